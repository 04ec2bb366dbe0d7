"""Promises of the phantom archive: NIH's layout, the number asked for, and nothing of others' overwritten."""

import csv
import hashlib
import shutil
from pathlib import Path
from typing import Any

import cv2
import pytest

from cxr_retrieval.config import CorpusSettings, PhantomSettings
from cxr_retrieval.corpus.archive import PHANTOM_PLAN, Archive
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.corpus.phantom.archive import (
    BOXES_FILE,
    TABLE_FILE,
    PhantomArchive,
    write_phantom_archive,
)
from cxr_retrieval.corpus.phantom.radiographs import draw_patient, patients_for
from cxr_retrieval.errors import UserError

pytestmark = pytest.mark.usefixtures("ray_session")

IMAGES = 45


def phantoms(out: Path, **changes: Any) -> PhantomSettings:
    return PhantomSettings(**({"images": IMAGES, "size": 128, "out": str(out)} | changes))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> PhantomArchive:  # noqa: ARG001
    archive, worked = write_phantom_archive(phantoms(tmp_path_factory.mktemp("drawn") / "archive"))
    assert worked
    return archive


def hashes(folder: str | Path) -> dict[str, str]:
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(settings: PhantomSettings) -> str:
    with pytest.raises(UserError) as caught:
        write_phantom_archive(settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_number_of_images_and_patients_is_right(drawn: PhantomArchive) -> None:
    rows = next(Archive(CorpusSettings(archive=drawn.uri)).partitions()).to_pylist()
    assert len(rows) == drawn.images == IMAGES
    assert {int(row["patient_id"]) for row in rows} == set(patients_for(IMAGES, 0))
    assert drawn.patients == len(patients_for(IMAGES, 0))


def test_the_tables_are_read_without_a_reject(drawn: PhantomArchive) -> None:
    archive = Archive(CorpusSettings(archive=drawn.uri))
    rows = next(archive.partitions()).to_pylist()
    assert (archive.label_rows, archive.labels_without_image) == (IMAGES, 0)
    assert not any(row["reason"] or row["excluded"] for row in rows)
    assert all(row["age_years"] and row["sex"] in ("F", "M") and row["view"] in ("PA", "AP") for row in rows)
    for row in rows:
        assert {box["finding"] for box in row["boxes"]} == set(row["findings"]) <= set(FINDINGS)
        for box in row["boxes"]:
            assert min(box["x"], box["y"]) >= 0
            assert max(box["x"] + box["w"], box["y"] + box["h"]) <= 1024 + 1e-3


def test_films_labels_and_boxes_are_those_that_were_drawn(drawn: PhantomArchive) -> None:
    folder = Path(drawn.uri)
    labels = {row["Image Index"]: row for row in csv.DictReader((folder / TABLE_FILE).open())}
    images = [image for patient in patients_for(IMAGES, 0) for image in draw_patient(patient, 0, 128)][:IMAGES]
    assert [image.image_id for image in images] == sorted(labels)
    for image in images:
        assert (cv2.imread(str(folder / "images" / image.image_id), cv2.IMREAD_UNCHANGED) == image.pixels).all()
        assert labels[image.image_id]["Finding Labels"] == ("|".join(image.findings) or "No Finding")
    assert len((folder / BOXES_FILE).read_text().splitlines()) == 1 + sum(len(image.boxes) for image in images)


def test_a_second_run_has_nothing_to_do(drawn: PhantomArchive) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(drawn.uri).rglob("*")}
    assert write_phantom_archive(phantoms(Path(drawn.uri))) == (drawn, False)
    assert {path: path.stat().st_mtime_ns for path in Path(drawn.uri).rglob("*")} == before


def test_an_archive_that_was_not_finished_is_finished_with_the_same_bytes(
    drawn: PhantomArchive, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(drawn.uri, tmp_path / "copy"))
    (copy / TABLE_FILE).unlink()
    for path in sorted((copy / "images").iterdir())[10:]:
        path.unlink()
    archive, worked = write_phantom_archive(phantoms(copy))
    assert worked
    assert hashes(archive.uri) == hashes(drawn.uri)


@pytest.mark.parametrize("change", [{"images": IMAGES + 1}, {"size": 129}, {"seed": 1}])
def test_phantoms_of_other_settings_are_not_mixed(change: dict[str, int], drawn: PhantomArchive) -> None:
    before = hashes(drawn.uri)
    message = refused(phantoms(Path(drawn.uri), **change))
    assert message == f"{drawn.uri} holds phantoms of other settings: choose another phantom.out"
    assert hashes(drawn.uri) == before


@pytest.mark.parametrize("table", [TABLE_FILE, "Data_Entry_2017.csv", None])
def test_an_archive_that_is_not_of_phantoms_is_left_as_it_is(table: str | None, tmp_path: Path) -> None:
    """NIH's first film has a phantom's name; its table has two names, by edition."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "00000001_000.png").write_bytes(b"a real X-ray")
    if table:
        (tmp_path / table).write_text("Image Index\n")
    before = hashes(tmp_path)
    assert refused(phantoms(tmp_path)) == (
        f"{tmp_path} holds files that are not of phantoms: choose another phantom.out"
    )
    assert hashes(tmp_path) == before
    assert not (tmp_path / PHANTOM_PLAN).exists()


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert "a file stands where a folder is needed" in refused(phantoms(tmp_path / "file" / "archive"))
    (tmp_path / "archive").mkdir()
    wanted = phantoms(tmp_path / "archive")
    write_phantom_archive(wanted)
    (tmp_path / "archive" / TABLE_FILE).unlink()
    shutil.rmtree(tmp_path / "archive" / "images")
    (tmp_path / "archive" / "images").write_text("a file stands here")  # met by the tasks
    assert "a file stands where a folder is needed" in refused(wanted)


def test_no_place_at_all_is_refused() -> None:
    assert refused(PhantomSettings()).startswith("phantom.out is not set")
