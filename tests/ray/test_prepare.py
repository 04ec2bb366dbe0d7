"""Promises of prepare: rows are accounted for, a rerun does what is missing, and readers get what was decoded."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
import tracemalloc
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from cxr_retrieval import artifacts
from cxr_retrieval.artifacts import AccountingError, Artifact, Draft
from cxr_retrieval.config import ColumnSettings, CorpusSettings, PrivacySettings, Settings
from cxr_retrieval.corpus import parts, preparation
from cxr_retrieval.corpus.archive import Archive
from cxr_retrieval.corpus.decoding import Limits, Recipe, decode
from cxr_retrieval.corpus.exclusions import Exclusions
from cxr_retrieval.corpus.manifest import MANIFEST_FILE
from cxr_retrieval.corpus.parts import (
    PART_KIND,
    QUARANTINE_FILE,
    ROWS_FILE,
    PartTask,
    prepare_part,
    recipe_of,
    task_memory,
)
from cxr_retrieval.corpus.preparation import find_prepared, plan_corpus, prepare, row_facts
from cxr_retrieval.corpus.reading import Corpus, labels_of, pixels_of
from cxr_retrieval.corpus.splits import SPLITS
from cxr_retrieval.errors import UserError, user_error_in
from cxr_retrieval.index.removal import listed_images
from cxr_retrieval.privacy import Pseudonyms
from cxr_retrieval.runtime import nodes_cpus, nodes_memory
from jobs import prepare as job
from tests import commands

pytestmark = pytest.mark.usefixtures("ray_session")

TABLE = "Data_Entry_2017_v2020.csv"
IMAGES = 96


def corpus_settings(archive: Path, **changes: Any) -> CorpusSettings:
    small = {"size": 64, "partition_images": 16, "row_group_images": 8, "max_quarantined": 1.0}
    return CorpusSettings(archive=str(archive), **(small | changes))


@pytest.fixture
def archive(phantom_archive: Path, tmp_path: Path) -> Path:
    """A copy of the phantom archive, to be changed."""
    return shutil.copytree(phantom_archive, tmp_path / "archive")


@pytest.fixture(scope="module")
def corpus(phantom_archive: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Corpus:  # noqa: ARG001
    """The phantom archive prepared once, for tests that only read."""
    made, worked = prepare(corpus_settings(phantom_archive), str(tmp_path_factory.mktemp("corpus")))
    assert worked
    return Corpus.open(made.uri)


def label(archive: Path, *lines: str) -> None:
    with (archive / TABLE).open("a") as table:
        table.writelines(line + "\n" for line in lines)


def names(archive: Path) -> list[str]:
    return sorted(path.name for path in (archive / "images").iterdir())


def quarantined(made: Artifact) -> dict[str, tuple[str, str]]:
    rows = [row for uri in made.part_uris for row in pq.read_table(f"{uri}/{QUARANTINE_FILE}").to_pylist()]
    return {row["image_id"]: (row["reason"], row["text"]) for row in rows}


def part_manifests(workspace: Path) -> dict[str, int]:
    """Time of writing of each finished part, by its id."""
    return {path.parent.name: path.stat().st_mtime_ns for path in workspace.glob("corpora/*/parts/*/manifest.json")}


def rows_of_part(workspace: Path, part: str) -> list[dict[str, Any]]:
    (file,) = workspace.glob(f"corpora/*/parts/{part}/{ROWS_FILE}")
    return pq.read_table(file, columns=["image_id", "patient_id"]).to_pylist()


def rows_of(reader: Corpus, columns: list[str]) -> list[dict[str, Any]]:
    tables = (table for part in range(len(reader.files)) for table in reader.batches(part, 10, columns))
    return [row for table in tables for row in table.to_pylist()]


def refused(settings: CorpusSettings, workspace: Path) -> str:
    with pytest.raises(Exception) as caught:  # whatever Ray wraps it in, as a job sees it
        prepare(settings, str(workspace))
    error = user_error_in(caught.value)
    assert error is not None
    assert "\n" not in str(error)
    return str(error)


def test_findings_that_are_none_of_ours_are_counted_and_told(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for table in archive.glob("*.csv"):
        table.unlink()
    found = names(archive)
    words = ["Gout|Mass", "Gout", *(f"word {n:02d}" for n in range(11)), *["No Finding"] * (len(found) - 13)]
    rows = [f"{name},{name},{word}" for name, word in zip(found, words, strict=True)]
    (archive / "list.csv").write_text("\n".join(["file,who,seen", *rows]) + "\n")
    shutil.copy(archive / "images" / found[1], archive / "images" / "twice.png")
    with (archive / "list.csv").open("a") as table:
        table.write("twice.png,x,Gout\n")
    columns = ColumnSettings(image="file", patient="who", findings="seen")
    corpus = corpus_settings(archive, format="csv", columns=columns)
    job.run(Settings(workspace=str(tmp_path / "work"), corpus=corpus), Namespace())
    told = "none of the 14: Gout 2, word 00 1, word 01 1"
    text = " ".join(capsys.readouterr().err.split())
    assert told in text
    assert "word 08 1, and 2 more in the corpus's manifest" in text
    made, worked = prepare(corpus, str(tmp_path / "work"))
    assert not worked
    assert made.manifest["other_findings"]["Gout"] == 2, "a duplicate is not counted"


def test_rows_are_accounted_for_with_every_kind_of_bad_input(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, found = archive / "images", names(archive)
    cut, text, empty, tiny, bits, twice = (images / name for name in found[:6])
    cut.write_bytes(cut.read_bytes()[:2000])
    text.write_text("not an image")
    empty.write_bytes(b"")
    assert cv2.imwrite(str(tiny), np.zeros((20, 20), np.uint8))
    assert cv2.imwrite(str(bits), cv2.imread(str(bits), cv2.IMREAD_GRAYSCALE).astype(np.uint16) * 256)
    (archive / "more").mkdir()
    shutil.copy(twice, archive / "more" / twice.name)
    shutil.copy(images / found[6], images / "unlabelled.png")
    assert cv2.imwrite(str(images / "flat.png"), np.full((99, 99), 9, np.uint8))
    assert cv2.imwrite(str(images / "side.png"), np.full((99, 99), 8, np.uint8))
    shutil.copy(images / "flat.png", images / "flat2.png")
    assert cv2.imwrite(str(images / "small.png"), np.full((98, 99), 7, np.uint8))
    tail = "0,9001,50,F,PA,1,1,1,1"
    label(archive, f"flat.png,Gout,{tail}", f"flat2.png,Mass,{tail}", "side.png,Mass,0,9002,50,F,LL,1,1,1,1")
    label(archive, f"small.png,Mass,{tail}", f"gone1.png,Mass,{tail}", f"gone2.png,Mass,{tail}")
    (archive / "scan.tif").write_bytes(b"of another kind")
    settings = corpus_settings(archive, views=["PA", "AP"], source_side=99)
    made, worked = prepare(settings, str(tmp_path / "work"))
    assert worked
    assert made.manifest["ignored_files"] == {".tif": 1}
    capsys.readouterr()
    job.run(Settings(workspace=str(tmp_path / "work"), corpus=settings), Namespace())
    told = capsys.readouterr()
    assert "left alone: 1 (.tif 1)" in told.err
    table = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in told.out.splitlines()]
    for row in (["quarantined", "name twice", "2"], ["excluded", "view", "1"], ["excluded", "source side", "1"]):
        assert row in table
    reasons = {
        "damaged": 1,
        "not_an_image": 2,
        "too_small": 1,
        "name_twice": 2,
        "no_label_row": 1,
        "unknown_finding": 1,
    }
    assert made.manifest["quarantine_reasons"] == reasons
    assert made.manifest["exclusion_rules"] == {"view": 1, "source_side": 1}
    assert made.manifest["labels_without_image"] == 2
    assert made.manifest["label_rows"] == IMAGES + 6
    assert made.counts == {
        "archive": IMAGES + 6,
        "prepared": IMAGES + 6 - 8 - 2,
        "quarantined": 8,
        "excluded": 2,
        "duplicates": 0,
    }
    assert made.manifest["equations"] == [
        f"archive {IMAGES + 6} = prepared {IMAGES - 4} + quarantined 8 + excluded 2 + duplicates 0"
    ]
    bad = quarantined(made)
    assert bad[cut.name][0] == "damaged"
    assert bad[empty.name] == ("not_an_image", "neither PNG, JPEG nor DICOM: an empty file")
    assert bad["flat.png"] == ("unknown_finding", "finding 'Gout' is none of the 14")
    rows = rows_of(Corpus.open(made.uri), ["image_id"])
    assert len(rows) == made.counts["prepared"]
    left_out = {*bad, "side.png", "small.png"}
    assert {row["image_id"] for row in rows} == {*names(archive)} - left_out
    for uri in made.part_uris:
        assert artifacts.load(uri, PART_KIND).manifest["equations"]


def test_a_patient_in_two_splits_is_never_shipped(archive: Path, tmp_path: Path) -> None:
    settings = corpus_settings(archive)
    rows = next(Archive(settings).partitions())
    torn = ["train", "test", *rows["split"].to_pylist()[2:]]
    patients = ["1", "1", *rows["patient_id"].to_pylist()[2:]]
    for name, values in (("split", torn), ("patient_id", patients)):
        rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), [values])
    part = prepare_part(Draft(str(tmp_path / "part"), PART_KIND, {}, ()).begin(), rows, settings)
    with pytest.raises(AccountingError, match="rows do not add up: patients"):
        row_facts([part], Exclusions(np.empty(0, np.int32), np.empty(0, np.int32)))


def test_an_image_that_vanishes_after_it_was_listed_is_quarantined(archive: Path, tmp_path: Path) -> None:
    settings = corpus_settings(archive)
    rows = next(Archive(settings).partitions()).slice(0, 16)
    (archive / "images" / names(archive)[3]).unlink()
    part = prepare_part(Draft(str(tmp_path / "part"), PART_KIND, {}, ()).begin(), rows, settings)
    assert part.manifest["quarantine_reasons"] == {"unreadable": 1}
    assert part.counts["prepared"] == 15


def test_an_image_for_which_memory_does_not_suffice_is_quarantined_alone(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = corpus_settings(archive)
    rows = next(Archive(settings).partitions()).slice(0, 16)
    decode, large = parts.decode, (archive / "images" / names(archive)[3]).read_bytes()

    def short_of_memory(data: bytes, *what: Any) -> Any:
        if data == large:
            raise MemoryError
        return decode(data, *what)

    monkeypatch.setattr(parts, "decode", short_of_memory)
    part = prepare_part(Draft(str(tmp_path / "part"), PART_KIND, {}, ()).begin(), rows, settings)
    assert part.manifest["quarantine_reasons"] == {"unreadable": 1}
    assert part.counts["prepared"] == 15


def test_a_file_that_grew_after_it_was_listed_is_not_read_to_its_end(archive: Path, tmp_path: Path) -> None:
    settings = corpus_settings(archive)
    rows = next(Archive(settings).partitions())
    os.truncate(archive / "images" / names(archive)[3], 40 << 30)
    tracemalloc.start()
    part = prepare_part(Draft(str(tmp_path / "part"), PART_KIND, {}, ()).begin(), rows, settings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert part.manifest["quarantine_reasons"] == {"unreadable": 1}
    assert peak < 10_000_000


@pytest.mark.parametrize(
    ("folder", "read_s", "begun_at", "last"),
    [
        ("s3://bucket", 0.1, [7, 8, 8, 8, 4], [0, 1, 3, 2, 1, 0]),
        ("/archive", 0.4, [0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]),
        ("/archive", 0.6, [0, 1, 2, 4, 4], [0, 1, 3, 2, 1, 0]),
    ],
    ids=["storage", "local", "slow"],
)
def test_files_are_read_ahead_from_storage_and_where_they_are_waited_for_as_far_as_their_bytes_go(
    folder: str, read_s: float, begun_at: list[int], last: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    begun: list[int] = []
    read: list[int] = []
    taken = 0

    def read_listed(_: str, size: int) -> bytes:
        nonlocal now
        now += read_s
        read.append(size)
        return b""

    def result(reading: Callable[[], bytes]) -> bytes:
        nonlocal taken
        taken += 1
        return reading()

    class InTurn(ThreadPoolExecutor):
        """Reads what was begun when it is waited for."""

        def submit(self, function: Any, /, *_: Any, **__: Any) -> Any:
            begun.append(function.args[-1])
            return SimpleNamespace(result=partial(result, function))

    monkeypatch.setattr(parts, "ThreadPoolExecutor", InTurn)
    monkeypatch.setattr(parts, "read_listed", read_listed)
    monkeypatch.setattr(parts, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(parts, "BYTES_AHEAD", 100)
    sizes = [10] * 20 + [101, 60, 60, 10, 10]
    rows = [{"reason": None, "excluded": None, "source_uri": f"{folder}/x", "size": size} for size in sizes]
    rows.insert(3, {"reason": "no_patient", "excluded": None, "source_uri": None, "size": 10**12})
    ahead = []
    for row, reading in parts._fetched(rows):
        if row["reason"] is None:
            reading()
            now += 1.0
        ahead.append(len(begun) - taken)
    assert read == sizes
    assert [ahead[number] for number in (0, 4, 8, 12, 16)] == begun_at
    assert ahead[20:] == last


def test_on_two_cores_three_partitions_are_at_work(
    phantom_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sum(nodes_cpus()) == 2

    class Meets(PartTask):
        """Goes on once three of its kind, the first of them in its head start, have begun."""

        def __call__(self, task: dict[str, Any], rows: pa.Table | None = None) -> dict[str, Any]:
            (tmp_path / f"began-{task['partition']}").touch()
            end = time.monotonic() + 60
            while len(list(tmp_path.glob("began-*"))) < 3 and time.monotonic() < end:
                time.sleep(0.05)
            assert time.monotonic() < end, "no three were at work at once"
            return super().__call__(task, rows)

    monkeypatch.setattr(preparation, "PartTask", Meets)
    made, _ = prepare(corpus_settings(phantom_archive), str(tmp_path / "work"))
    assert made.counts["prepared"] == IMAGES


def test_tasks_that_may_need_more_memory_than_a_node_has_run_one_at_a_time(
    phantom_archive: Path, tmp_path: Path
) -> None:
    settings = corpus_settings(phantom_archive, max_pixels=10**12)
    assert task_memory(settings) > max(nodes_memory())
    assert prepare(settings, str(tmp_path))[0].counts["prepared"] == IMAGES


@pytest.mark.parametrize("dies", [3, 0], ids=["later", "in its head start"])
def test_a_process_that_dies_at_every_try_ends_the_job_in_one_line(
    dies: int, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dies(PartTask):
        def __call__(self, task: dict[str, Any], *rows: Any) -> dict[str, Any]:
            if task["partition"] == dies:
                Draft(task["uri"], PART_KIND, {}, ()).begin()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(task, *rows)

    monkeypatch.setattr(preparation, "PartTask", Dies)
    monkeypatch.setattr(preparation, "TRIES", 2)
    told = refused(corpus_settings(archive), tmp_path / "work")
    assert re.search(rf"died at every try: (.*, )?{dies} \({tmp_path}/work/corpora/chest/parts/\w+\)", told), told
    assert "lower corpus.max_pixels, and run the same command again" in told
    assert not any(name in told for name in names(archive))


@pytest.fixture
def listed_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The archive's listing ends after its first partition is prepared."""

    def plan_late(*what: Any, **how: Any) -> Any:
        until = time.monotonic() + 60
        while not part_manifests(tmp_path / "work"):
            assert time.monotonic() < until
            time.sleep(0.05)
        return plan_corpus(*what, **how)

    monkeypatch.setattr(preparation, "plan_corpus", plan_late)


@pytest.mark.usefixtures("listed_late")
def test_the_first_partition_is_prepared_while_the_archive_is_being_listed(
    archive: Path, tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counted: list[int] = []
    monkeypatch.setattr(preparation.storage, "add_retries", counted.append)
    made, worked = prepare(corpus_settings(archive), str(tmp_path / "work"))
    assert worked
    assert "prepare: the first 16 images, while the archive is being listed" in capsys.readouterr().err
    assert set(part_manifests(tmp_path / "work")) == {uri.rpartition("/")[2] for uri in made.part_uris}
    assert len(counted) == len(made.part_uris), "what was asked again is told of every part"
    assert made.counts == corpus.artifact.counts
    corpora = {plan.parent for plan in (tmp_path / "work" / "corpora").glob("*/*/plan.json")}
    assert len(corpora) == 2, "the guess stays, unfinished: who may not delete needs not"
    assert [corpus.name for corpus in corpora if (corpus / "manifest.json").exists()] == [made.input_id]
    prepare(corpus_settings(archive), str(tmp_path / "work"))
    assert "while the archive is being listed" not in capsys.readouterr().err


@pytest.mark.usefixtures("listed_late")
def test_a_wrong_guess_of_the_first_partition_is_of_no_corpus_and_its_patients_are_still_known(
    archive: Path, tmp_path: Path
) -> None:
    (archive / "later").mkdir()
    shutil.copy(archive / "images" / (film := names(archive)[0]), archive / "later")
    made, _ = prepare(corpus_settings(archive), str(tmp_path / "work"))
    assert made.manifest["quarantine_reasons"] == {"name_twice": 2}
    assert made.counts["prepared"] == IMAGES - 1
    (guess,) = set(part_manifests(tmp_path / "work")) - {uri.rpartition("/")[2] for uri in made.part_uris}
    assert {row["image_id"] for row in rows_of_part(tmp_path / "work", guess)} > {film}
    patient = film.partition("_")[0].lstrip("0")
    assert film in listed_images([patient], str(tmp_path / "work"))[patient]


@pytest.mark.usefixtures("listed_late")
def test_an_archive_that_is_refused_after_its_head_start_has_told_whose_images_were_prepared(
    archive: Path, tmp_path: Path
) -> None:
    with (archive / TABLE).open("a") as table:
        table.write('"a quote that is never closed')
    assert "cannot be read" in refused(corpus_settings(archive), tmp_path / "work")
    (guess,) = part_manifests(tmp_path / "work")
    (row, *_) = rows_of_part(tmp_path / "work", guess)
    assert row["image_id"] in listed_images([row["patient_id"]], str(tmp_path / "work"))[row["patient_id"]]


def test_a_file_that_is_replaced_is_prepared_again_though_its_size_is_the_same(archive: Path, tmp_path: Path) -> None:
    first, _ = prepare(corpus_settings(archive), str(tmp_path / "work"))
    before = part_manifests(tmp_path / "work")
    film = archive / "images" / names(archive)[20]
    data = bytearray(film.read_bytes())
    data[-1] ^= 1  # of the check sum of what ends a PNG: the pixels stay
    film.write_bytes(data)
    second, worked = prepare(corpus_settings(archive), str(tmp_path / "work"))
    assert worked
    assert second.input_id != first.input_id
    assert [one == two for one, two in zip(first.part_uris, second.part_uris, strict=True)].count(False) == 1
    assert before.items() <= part_manifests(tmp_path / "work").items()
    hashes = {row["image_id"]: row["source_sha256"] for row in rows_of(Corpus(second), ["image_id", "source_sha256"])}
    assert hashes[film.name] == hashlib.sha256(data).digest()


def test_a_file_that_could_not_be_read_is_tried_again_and_nothing_else_is(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film, away, settings = archive / "images" / names(archive)[20], tmp_path / "away.png", corpus_settings(archive)
    begin = preparation._begin

    def begin_and_lose(*what: Any) -> Any:
        if film.exists() and len(what[0].inputs) > 1:  # all is listed
            film.rename(away)
        return begin(*what)

    with monkeypatch.context() as patched:
        patched.setattr(preparation, "_begin", begin_and_lose)
        first, _ = prepare(settings, str(tmp_path / "work"))
    assert first.manifest["quarantine_reasons"] == {"unreadable": 1}
    told = pa.ipc.open_file(f"{first.uri}/{MANIFEST_FILE}").read_all().to_pylist()
    assert [row["image_id"] for row in told if row["reason"] == "unreadable" and row["patient_id"]] == [film.name]
    before = part_manifests(tmp_path / "work")
    away.rename(film)
    second, worked = prepare(settings, str(tmp_path / "work"))
    assert worked
    assert second.counts["prepared"] == IMAGES
    after = part_manifests(tmp_path / "work")
    assert before.items() <= after.items()
    assert len(after) == len(before) + 1
    assert artifacts.load(first.uri, "corpus").manifest == first.manifest
    # An id says what was read: the same archive has the same one where nothing ever failed.
    assert prepare(settings, str(tmp_path / "other"))[0].input_id == second.input_id != first.input_id


def test_a_file_that_still_cannot_be_read_makes_no_work(archive: Path, tmp_path: Path) -> None:
    (archive / "images" / "zz.png").symlink_to("nothing")
    label(archive, "zz.png,Mass,0,9001,50,F,PA,1,1,1,1")
    first, _ = prepare(corpus_settings(archive), str(tmp_path))
    assert quarantined(first)["zz.png"][0] == "unreadable"
    second, worked = prepare(corpus_settings(archive), str(tmp_path))
    assert (second.manifest, worked) == (first.manifest, False)
    assert find_prepared(corpus_settings(archive), str(tmp_path)).input_id == first.input_id


def test_the_page_of_a_corpus_shows_films_and_tells_names_only_where_they_are_no_patients(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = names(archive)
    (archive / "images" / found[0]).write_bytes(b"nothing")
    shutil.copy(archive / "images" / found[5], archive / "images" / "zz.png")
    label(archive, "zz.png,Mass,0,9001,50,F,PA,1,1,1,1")
    pages = {}
    for hidden in (True, False):
        privacy = PrivacySettings(pseudonymise=hidden)
        settings = Settings(workspace=str(tmp_path / "work"), corpus=corpus_settings(archive), privacy=privacy)
        job.run(settings, Namespace())
        told = capsys.readouterr().err
        assert "warning: images whose pixels another patient's image has too: 1;" in told
        pages[hidden] = Path(told.splitlines()[-1].removeprefix("report: ")).read_text()
    assert not re.search(r"\d{8}_\d{3}|zz\.png|neither PNG", pages[True])
    assert all(name in pages[False] for name in (found[0], found[5], "zz.png", "neither PNG"))
    keyed = Pseudonyms.of(PrivacySettings())
    assert all(keyed.name("image", name) in pages[True] for name in (found[0], found[5], "zz.png"))
    assert "not an image" in pages[True]
    for page in pages.values():
        assert page.count("<image ") == page.count('class="look"') > 20
        assert "A leak:" in page
    corpus = Corpus.open(str(next((tmp_path / "work").glob("corpora/chest/*/manifest.json")).parent))
    (mass, *_) = corpus.census().examples["Mass"]
    (row,) = corpus.take(corpus.places_of(mass.part, [mass.place]), ["patient_id", "findings"]).to_pylist()
    assert (row["patient_id"], "Mass" in row["findings"]) == (mass.patient, True)


def test_an_example_is_found_behind_rows_that_no_reader_sees(archive: Path, tmp_path: Path) -> None:
    shutil.copy(archive / "images" / names(archive)[40], archive / "images" / "00.png")
    label(archive, "00.png,Mass,0,9002,50,F,PA,1,1,1,1")
    corpus = Corpus(prepare(corpus_settings(archive), str(tmp_path / "work"))[0])
    (part,) = (part for part in range(len(corpus.files)) if len(corpus.left_out(part)))
    seen = [row["image_id"] for table in corpus.batches(part, 5, ["image_id"]) for row in table.to_pylist()]
    places = corpus.places_of(part, range(len(seen)))
    assert corpus.take(places, ["image_id"])["image_id"].to_pylist() == seen
    assert set(corpus.left_out(part)).isdisjoint(places["row"])


def test_a_second_run_does_nothing_and_says_so(
    phantom_archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(workspace=str(tmp_path), corpus=corpus_settings(phantom_archive))
    job.run(settings, Namespace())
    first = capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    (corpus_id,) = (path.parent.name for path in tmp_path.glob("corpora/chest/*/manifest.json"))
    job.run(settings, Namespace())
    second = capsys.readouterr()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    titles = [run.out.splitlines()[0].strip() for run in (first, second)]
    assert titles == ["Prepared corpus", "Prepared corpus (finished before, nothing to do)"]
    assert first.out.splitlines()[1:] == second.out.splitlines()[1:]
    assert f"prepare: {IMAGES} of {IMAGES} images" in first.err
    key_id = Pseudonyms.of(settings.privacy).key_id
    assert second.err == f"report: {tmp_path}/reports/corpus/{corpus_id}.{key_id}.html\n"


def test_the_plan_says_how_many_shards_and_writes_nothing(
    phantom_archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job.plan(Settings(workspace=str(tmp_path), corpus=corpus_settings(phantom_archive)), Namespace())
    assert f"{IMAGES} \u2502      6 \u2502" in capsys.readouterr().out
    settings = corpus_settings(phantom_archive, views=["LL"], source_side=9999)
    job.plan(Settings(workspace=str(tmp_path), corpus=settings), Namespace())
    told = capsys.readouterr()
    assert f"excluded \u2502 view \u2502     {IMAGES} \u2502" in told.out
    assert "corpus.source_side=9999 is told by each image's header" in told.err
    assert not list(tmp_path.iterdir())


def test_two_workspaces_hold_equal_bytes(corpus: Corpus, phantom_archive: Path, tmp_path: Path) -> None:
    other, _ = prepare(corpus_settings(phantom_archive), str(tmp_path))
    assert other.input_id == corpus.artifact.input_id
    assert other.manifest["content_id"] == corpus.artifact.manifest["content_id"]
    for ours, theirs in zip(corpus.files, Corpus(other).files, strict=True):
        assert Path(ours).read_bytes() == Path(theirs).read_bytes()


def test_every_file_is_what_its_manifest_says(corpus: Corpus) -> None:
    made = [corpus.artifact, *(artifacts.load(uri, PART_KIND) for uri in corpus.artifact.part_uris)]
    for artifact in made:
        assert {entry.path for entry in artifact.files}
        for entry in artifact.files:
            assert len(artifact.read(entry.path)) == entry.size


def test_pixels_and_hashes_are_those_of_the_decoded_files(corpus: Corpus, phantom_archive: Path) -> None:
    settings = corpus_settings(phantom_archive)
    limits = Limits(settings.min_side, settings.max_pixels)
    columns = ["image_id", "pixels", "pixel_sha256", "source_sha256", "source_uri", "original_width"]
    rows = rows_of(corpus, columns)
    assert [row["image_id"] for row in rows] == names(phantom_archive)
    for row in rows:
        data = (phantom_archive / "images" / row["image_id"]).read_bytes()
        image = decode(data, recipe_of(settings), limits)
        assert row["pixels"] == image.pixels.tobytes()
        assert row["pixel_sha256"] == hashlib.sha256(row["pixels"]).digest()
        assert row["source_sha256"] == hashlib.sha256(data).digest()
        assert row["source_uri"] == str(phantom_archive / "images" / row["image_id"])
        assert row["original_width"] == image.width == 128


def test_shards_are_laid_out_as_asked_and_carry_their_recipe(corpus: Corpus, phantom_archive: Path) -> None:
    recipe = recipe_of(corpus_settings(phantom_archive))
    assert len(corpus.files) == IMAGES // 16
    for file in corpus.files:
        parquet = pq.ParquetFile(file)
        assert [parquet.metadata.row_group(n).num_rows for n in range(parquet.num_row_groups)] == [8, 8]
        assert Recipe.from_json(json.loads(parquet.schema_arrow.metadata[b"decode_recipe"])) == recipe
    assert corpus.recipe == recipe
    assert corpus.artifact.manifest["decode_recipe_id"] == recipe.id


def test_boxes_are_in_prepared_pixels(corpus: Corpus, phantom_archive: Path) -> None:
    drawn = [line.split(",") for line in (phantom_archive / "BBox_List_2017.csv").read_text().splitlines()[1:]]
    spelled = {"Infiltrate": "Infiltration"}
    scale = 64 / 1024  # NIH's frame to prepared pixels
    expected: dict[str, list[tuple[Any, ...]]] = {}
    for image, finding, *box in drawn:
        expected.setdefault(image, []).append((spelled.get(finding, finding), *(float(v) * scale for v in box)))
    rows = rows_of(corpus, ["image_id", "boxes"])
    assert sum(len(row["boxes"]) for row in rows) == len(drawn) > 0
    for row in rows:
        found = [tuple(box.values()) for box in row["boxes"]]
        for ours, theirs in zip(found, expected.get(row["image_id"], []), strict=True):
            assert ours[0] == theirs[0]
            assert ours[1:] == pytest.approx(theirs[1:], rel=1e-5)


def test_no_patient_is_in_two_splits_and_the_manifest_counts_them(corpus: Corpus) -> None:
    rows = rows_of(corpus, ["patient_id", "split", "findings"])
    patients = {split: {row["patient_id"] for row in rows if row["split"] == split} for split in SPLITS}
    assert sum(map(len, patients.values())) == len({row["patient_id"] for row in rows})
    numbers = " + ".join(f"{split} {len(patients[split])}" for split in SPLITS)
    assert corpus.artifact.manifest["split_equation"] == f"patients {sum(map(len, patients.values()))} = {numbers}"
    for split, facts in corpus.artifact.manifest["splits"].items():
        own = [row for row in rows if row["split"] == split]
        assert (facts["images"], facts["patients"]) == (len(own), len(patients[split]))
        for finding, count in facts["findings"].items():
            assert count == sum(finding in row["findings"] for row in own)
    assert all(facts["images"] for facts in corpus.artifact.manifest["splits"].values())


def test_places_are_all_rows_of_a_split_in_the_order_of_the_corpus(corpus: Corpus) -> None:
    seen = []
    for split in SPLITS:
        table = corpus.take(corpus.places(split), ["image_id", "split"])
        assert set(table["split"].to_pylist()) == {split}
        assert table["image_id"].to_pylist() == sorted(table["image_id"].to_pylist())
        seen += table["image_id"].to_pylist()
    assert sorted(seen) == [row["image_id"] for row in rows_of(corpus, ["image_id"])]


def test_places_without_a_finding_are_all_other_rows_of_the_split(corpus: Corpus) -> None:
    facts = ["image_id", "findings", "unknown"]
    every = corpus.take(corpus.places("train"), facts).to_pylist()
    left = corpus.take(corpus.places("train", ["Effusion", "Mass"]), facts).to_pylist()
    assert left == [row for row in every if not {"Effusion", "Mass"} & set(row["findings"])]
    assert 0 < len(left) < len(every)


@pytest.mark.parametrize("seed", range(8))
def test_take_returns_rows_in_the_order_asked_for(seed: int, corpus: Corpus, phantom_archive: Path) -> None:
    rng = np.random.default_rng(seed)
    places = np.concatenate([corpus.places(split) for split in SPLITS])
    in_order = np.sort(places, order=["part", "row"])
    wanted = rng.integers(0, IMAGES, 1 + seed * 20)  # some of them twice
    table = corpus.take(in_order[wanted], ["image_id", "pixels", "findings", "unknown"])
    assert table["image_id"].to_pylist() == [names(phantom_archive)[n] for n in wanted]
    pixels, labels = pixels_of(table, 64), labels_of(table)
    assert pixels.shape == (len(wanted), 64, 64)
    for n, row in enumerate(table.to_pylist()):
        assert pixels[n].tobytes() == row["pixels"]
        assert labels[n].sum() == len(row["findings"])


def test_duplicates_leave_the_lowest_image_id_and_readers_do_not_see_them(archive: Path, tmp_path: Path) -> None:
    images, found = archive / "images", names(archive)
    patient = {line.split(",")[0]: line.split(",")[3] for line in (archive / TABLE).read_text().splitlines()}
    copies = {"zz1.png": (found[0], patient[found[0]]), "zz2.png": (found[0], "9001"), "00.png": (found[40], "9002")}
    for name, (of, whose) in copies.items():
        shutil.copy(images / of, images / name)
        label(archive, f"{name},Mass,0,{whose},50,F,PA,1,1,1,1")
    # The same pixels in another encoding are the same image.
    assert cv2.imwrite(str(images / "zz3.png"), cv2.imread(str(images / found[7])), [cv2.IMWRITE_PNG_COMPRESSION, 0])
    label(archive, f"zz3.png,Mass,0,{patient[found[7]]},50,F,PA,1,1,1,1")
    made, _ = prepare(corpus_settings(archive), str(tmp_path / "work"))
    gone = {"zz1.png", "zz2.png", "zz3.png", found[40]}
    assert made.counts["duplicates"] == 4
    assert made.counts["prepared"] == IMAGES
    assert made.manifest["duplicates_across_patients"] == 2
    exclusions = pq.read_table(f"{made.uri}/exclusions.parquet").to_pylist()
    assert {row["image_id"]: row["kept_image_id"] for row in exclusions} == {
        "zz1.png": found[0],
        "zz2.png": found[0],
        "zz3.png": found[7],
        found[40]: "00.png",
    }
    reader = Corpus.open(made.uri)
    assert reader.rows == IMAGES
    seen = [row["image_id"] for row in rows_of(reader, ["image_id"])]
    places = np.concatenate([reader.places(split) for split in SPLITS])
    taken = reader.take(places, ["image_id"])["image_id"].to_pylist()
    assert sorted(seen) == sorted(taken) == sorted({*names(archive)} - gone)
    assert sum(facts["images"] for facts in made.manifest["splits"].values()) == IMAGES


def test_a_part_without_a_row_is_a_part(archive: Path, tmp_path: Path) -> None:
    for name in names(archive)[16:32]:
        (archive / "images" / name).write_bytes(b"nothing")
    made, _ = prepare(corpus_settings(archive), str(tmp_path / "work"))
    assert made.counts["prepared"] == IMAGES - 16
    reader = Corpus.open(made.uri)
    assert sum(len(reader.places(split)) for split in SPLITS) == IMAGES - 16
    assert not list(reader.batches(1, 10, ["image_id"]))


def test_a_split_without_an_image_is_refused_in_one_line(phantom_archive: Path, tmp_path: Path) -> None:
    made, _ = prepare(corpus_settings(phantom_archive, split="all_test"), str(tmp_path))
    with pytest.raises(UserError, match="has no image in its train split"):
        Corpus.open(made.uri).places("train")


def test_too_many_bad_images_fail_the_job_and_finished_parts_are_kept(archive: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "work"
    for name in names(archive)[-10:]:
        (archive / "images" / name).write_bytes(b"nothing")
    message = refused(corpus_settings(archive, max_quarantined=0.1), workspace)
    assert "of 96 images are quarantined, more than corpus.max_quarantined=0.1" in message
    assert QUARANTINE_FILE in message
    assert str(workspace / "corpora" / "chest" / "parts") in message
    assert not list(workspace.glob("corpora/chest/*/manifest.json"))
    kept = part_manifests(workspace)
    assert kept
    assert "10 of 96 images are quarantined" in refused(corpus_settings(archive, max_quarantined=0.1), workspace)
    made, worked = prepare(corpus_settings(archive, max_quarantined=0.11), str(workspace))
    assert worked
    assert made.counts["quarantined"] == 10
    finished = part_manifests(workspace)
    assert kept.items() <= finished.items()


def test_a_lost_part_is_redone_and_no_other(phantom_archive: Path, tmp_path: Path, corpus: Corpus) -> None:
    settings = corpus_settings(phantom_archive)
    made, _ = prepare(settings, str(tmp_path))
    before = part_manifests(tmp_path)
    lost = Path(made.part_uris[2])
    (lost / "manifest.json").unlink()
    (lost / ROWS_FILE).write_bytes(b"half a file")
    Path(made.uri, "manifest.json").unlink()
    again, worked = prepare(settings, str(tmp_path))
    after = part_manifests(tmp_path)
    assert worked
    assert {name for name in before if before[name] != after[name]} == {lost.name}
    assert again.manifest == made.manifest
    assert again.manifest["content_id"] == corpus.artifact.manifest["content_id"]


def test_a_grown_archive_keeps_its_parts_wherever_the_new_names_sort(archive: Path, tmp_path: Path) -> None:
    first, _ = prepare(corpus_settings(archive), str(tmp_path / "work"))
    before = part_manifests(tmp_path / "work")
    (latest,) = (tmp_path / "work").glob("corpora/chest/latest/*.json")
    of_first = latest.read_bytes()
    rng = np.random.default_rng(0)
    for n in range(20):
        name = f"{'00000000' if n % 2 else '99999999'}_{n:03d}.png"
        assert cv2.imwrite(str(archive / "images" / name), rng.integers(0, 256, (64, 64), np.uint8))
        label(archive, f"{name},No Finding,{n},{99999000 + n},50,F,PA,1,1,1,1")
    second, worked = prepare(corpus_settings(archive), str(tmp_path / "work"))
    assert worked
    assert second.input_id != first.input_id
    assert second.part_uris[: len(first.part_uris)] == first.part_uris
    assert len(second.part_uris) == len(first.part_uris) + 2
    assert before.items() <= part_manifests(tmp_path / "work").items()
    assert (first.counts["prepared"], second.counts["prepared"]) == (IMAGES, IMAGES + 20)
    assert artifacts.load(first.uri, "corpus").manifest == first.manifest  # the first corpus is still whole
    latest.write_bytes(of_first)  # as if the job had been killed before it wrote this, the last of all
    again, worked = prepare(corpus_settings(archive), str(tmp_path / "work"))
    assert not worked
    assert again.manifest == second.manifest
    assert json.loads(latest.read_bytes()) == {"input_id": second.input_id}


@pytest.mark.parametrize("change", [{"fit": "stretch"}, {"split_seed": 1}, {"row_group_images": 16}, {"ages": [0, 50]}])
def test_settings_that_shape_rows_make_another_corpus(
    change: dict[str, Any], corpus: Corpus, phantom_archive: Path, tmp_path: Path
) -> None:
    made, _ = prepare(corpus_settings(phantom_archive, **change), str(tmp_path))
    assert made.input_id != corpus.artifact.input_id


def test_what_a_user_can_mend_in_a_part_is_one_line(phantom_archive: Path, tmp_path: Path) -> None:
    settings = corpus_settings(phantom_archive)
    made, _ = prepare(settings, str(tmp_path))
    part = Path(made.part_uris[0])
    for file in (part / "manifest.json", Path(made.uri, "manifest.json")):
        file.unlink()
    (part / "plan.json").write_text("{}")
    assert refused(settings, tmp_path) == (
        f"{part}/plan.json is the plan of other settings: choose another workspace or move the folder away"
    )


def test_a_user_error_in_a_ray_task_is_found_and_a_bug_in_ray_data_stays_a_bug() -> None:
    @ray.remote
    def task() -> None:
        raise UserError("mend it")

    def bug(_: dict[str, Any]) -> dict[str, Any]:
        raise ValueError("a bug")

    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.get(task.remote())
    assert str(user_error_in(caught.value)) == "mend it"
    with pytest.raises(Exception, match="a bug") as failed:
        ray.data.from_items([{"x": 1}]).map(bug).take_all()
    assert user_error_in(failed.value) is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB, where this machine lets us make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this machine mounts nothing: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is full is Linux's")
def test_a_manifest_that_does_not_fit_into_the_temporary_folder_is_said(
    phantom_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation.tempfile, "TemporaryFile", partial(open, "/dev/full", "wb", buffering=0))
    with pytest.raises(UserError, match=r"fit into the temporary folder: .*No space left.*; set TMPDIR"):
        plan_corpus(CorpusSettings(archive=str(phantom_archive)), str(tmp_path))


def test_a_full_disk_is_one_line_and_the_job_goes_on_when_there_is_room(
    small_disk: Path, phantom_archive: Path, corpus: Corpus
) -> None:
    words = [f"workspace={small_disk}", f"corpus.archive={phantom_archive}"]
    words += ["corpus.size=64", "corpus.partition_images=16", "corpus.row_group_images=8"]
    error = commands.job("prepare", *words).error
    assert error.startswith(str(small_disk))
    assert "no space left: free some and run the same command again" in error
    kept = part_manifests(small_disk)
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    commands.done("prepare", *words)
    assert kept.items() <= part_manifests(small_disk).items()
    [manifest] = (small_disk / "corpora" / "chest").glob("*/manifest.json")
    assert json.loads(manifest.read_bytes())["content_id"] == corpus.artifact.manifest["content_id"]


def test_the_sample_of_real_x_rays_is_prepared_whole(nih_sample: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    made, _ = prepare(CorpusSettings(archive=str(nih_sample / "dev"), size=64), str(tmp_path))
    assert made.manifest["equations"] == ["archive 7087 = prepared 7087 + quarantined 0 + excluded 0 + duplicates 0"], (
        f"{time.monotonic() - started:.0f} s"
    )
