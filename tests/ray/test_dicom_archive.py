"""Promises of preparing a folder of DICOM files whole: headers are read once, and none of their text comes out."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pydicom import uid

from cxr_retrieval.artifacts import Artifact
from cxr_retrieval.config import (
    CorpusSettings,
    EmbeddingSettings,
    IndexSettings,
    NetworkSettings,
    PrivacySettings,
    Settings,
)
from cxr_retrieval.corpus import archive, headers
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.corpus.headers import Headers
from cxr_retrieval.corpus.parts import QUARANTINE_FILE
from cxr_retrieval.corpus.preparation import prepare
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.embedding.stream import embed
from cxr_retrieval.index.build import build_index
from cxr_retrieval.index.source import Source
from cxr_retrieval.privacy import Pseudonyms
from jobs import prepare as job
from tests import commands
from tests.commands import TINY
from tests.dicoms import SECRET, dataset, ramp, written
from tests.exports import without_image
from tests.indexes import untrained_model
from tests.processes import job as process_of
from tests.processes import wait_until

pytestmark = pytest.mark.usefixtures("ray_session")

PUBLIC = PrivacySettings(pseudonymise=False)


def film(n: int, **elements: Any) -> bytes:
    """The n-th image of a hospital whose every text is a secret."""
    made = dataset(ramp() // (n + 1) + n, **{"ViewPosition": "PA", "Modality": "DX"} | elements)
    made.PatientID, made.StudyInstanceUID, made.SOPInstanceUID = f"patient-{n // 2}", f"1.{n // 2}", f"1.{n // 2}.{n}"
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    made.ReferringPhysicianName = made.StudyDescription = made.ImageComments = SECRET
    return written(made)


def put(folder: Path, count: int, first: int = 0, **elements: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for n in range(first, count):
        (folder / f"IM{n:05d}").write_bytes(film(n, **elements))
    return folder


def settings_of(folder: Path, **changes: Any) -> CorpusSettings:
    small = {"size": 64, "partition_images": 8, "row_group_images": 8, "max_quarantined": 1.0}
    return CorpusSettings(archive=str(folder), format="dicom", **(small | changes))


def scanned(workspace: Path) -> dict[str, int]:
    """Files that were read for their headers, by what was kept of them."""
    found = workspace.glob("corpora/*/headers/*/manifest.json")
    return {path.parent.name: json.loads(path.read_bytes())["counts"]["files"] for path in found}


def test_headers_are_read_in_stretches_a_rerun_reads_none_and_a_grown_folder_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "STRETCH", 4)
    folder, workspace = put(tmp_path / "export", 10), tmp_path / "work"
    (folder / "report").write_bytes(without_image())
    first, worked = prepare(settings_of(folder), str(workspace))
    assert worked
    assert sorted(scanned(workspace).values()) == [3, 4, 4]
    assert first.manifest["ignored_files"] == {"DICOM without an image": 1}
    assert first.counts["prepared"] == first.counts["archive"] == 10
    before = {path: path.stat().st_mtime_ns for path in workspace.rglob("*")}
    assert not prepare(settings_of(folder), str(workspace))[1]
    assert {path: path.stat().st_mtime_ns for path in workspace.rglob("*")} == before
    kept = scanned(workspace)
    put(folder, 13, first=10)
    grown, worked = prepare(settings_of(folder), str(workspace))
    assert worked
    assert sum(scanned(workspace).values()) == sum(kept.values()) + 3
    assert grown.part_uris[: len(first.part_uris)] == first.part_uris
    assert grown.counts["prepared"] == 13
    rows = [row for part in range(3) for table in Corpus(grown).batches(part, 99, ["patient_id", "study_id", "unknown"])
            for row in table.to_pylist()]  # fmt: skip
    assert rows[5] == {"patient_id": "patient-2", "study_id": "1.2", "unknown": list(FINDINGS)}


def test_a_scan_that_dies_goes_on_with_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "STRETCH", 2)
    folder, workspace = put(tmp_path / "export", 12), tmp_path / "work"
    real, told = Headers._next, []

    def dies(self: Headers, waiting: list[Any], progress: Any) -> Any:
        if len(told) == 2:
            raise KeyboardInterrupt
        told.append(real(self, waiting, progress))
        return told[-1]

    monkeypatch.setattr(Headers, "_next", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare(settings_of(folder), str(workspace))
    monkeypatch.setattr(Headers, "_next", real)
    kept = scanned(workspace)
    assert len(kept) >= 2
    made, _ = prepare(settings_of(folder), str(workspace))
    assert made.counts["prepared"] == 12
    assert kept.items() <= scanned(workspace).items()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds its processes by Linux's /proc")
def test_a_scan_whose_every_process_is_killed_reads_no_file_of_a_finished_stretch_again(tmp_path: Path) -> None:
    folder, workspace, log = put(tmp_path / "export", 4), tmp_path / "work", tmp_path / "log"
    report, files = without_image(), 4 * headers.STRETCH
    for n in range(files - 4):
        (folder / f"SR{n:05d}").write_bytes(report)
    words = [f"corpus.archive={folder}", f"workspace={workspace}", "corpus.format=dicom", "corpus.size=64"]
    with process_of("prepare", *words, log=log) as process:
        wait_until(lambda: bool(scanned(workspace)), process, log)
    kept = scanned(workspace)
    times = {name: (workspace / "corpora/chest/headers" / name / "manifest.json").stat().st_mtime_ns for name in kept}
    moment = f"killed when {sum(kept.values())} of {files} headers were kept"
    assert kept, moment
    commands.done("prepare", *words)
    assert kept.items() <= scanned(workspace).items(), moment
    assert sum(scanned(workspace).values()) == files, moment
    for name, written_at in times.items():
        assert (workspace / "corpora/chest/headers" / name / "manifest.json").stat().st_mtime_ns == written_at


def test_burned_in_text_is_warned_of_with_a_count_and_no_header_text_comes_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = put(tmp_path / "export", 8)
    put(folder, 11, first=8, BurnedInAnnotation="YES")
    data = film(0)
    (folder / "cut").write_bytes(data[: len(data) // 2])
    (folder / "palette").write_bytes(film(20, PhotometricInterpretation=SECRET))
    (folder / "nobody").write_bytes(film(21).replace(b"patient-10", b"          "))
    (folder / "mangled").write_bytes(data.replace(b"DX", b"\xff\xff").replace(b"1.0", SECRET[:3].encode()))
    (folder / "other.dcm").write_bytes(b"\x00" * 128 + b"DICM" + SECRET.encode() * 9)
    syntax = film(22).replace(uid.ExplicitVRLittleEndian.encode(), b"1.2.JANE^DOE.4.5.61")
    (folder / "syntax").write_bytes(syntax)
    workspace = tmp_path / "work"
    job.run(Settings(workspace=str(workspace), corpus=settings_of(folder), privacy=PUBLIC), Namespace())
    said = capfd.readouterr()
    assert "what their headers say (BurnedInAnnotation): 3;" in said.err
    assert "corpus.burned_in=exclude leaves them out" in said.err
    assert "JANE" not in said.out + said.err
    (corpus,) = (
        json.loads((path.parent / "manifest.json").read_bytes())
        for path in workspace.glob("corpora/chest/*/exclusions.parquet")
    )
    assert corpus["burned_in"] == 3
    assert corpus["counts"]["quarantined"] >= 4
    kept = [path for path in workspace.rglob("*") if path.is_file() and path.name != QUARANTINE_FILE]
    assert not any(b"JANE" in path.read_bytes() for path in kept)


def shown(page: str) -> int:
    """How many films a page shows."""
    return Path(page).read_text(encoding="utf-8").count("<image ")


def test_the_page_under_pseudonyms_never_shows_a_film_that_says_that_text_is_burned_in(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = put(tmp_path / "export", 16)
    put(folder, 32, first=16, BurnedInAnnotation="YES")
    table = tmp_path / "labels.csv"
    lines = [f"IM{n:05d},{int(n < 4 or n >= 16)},{int(n >= 24)}" for n in range(32)]
    table.write_text("\n".join(["path,Mass,Hernia", *lines]), encoding="utf-8")
    corpus = settings_of(folder, labels=str(table))
    keyed = Settings(workspace=str(tmp_path / "work"), corpus=corpus)
    prepared, _ = prepare(corpus, keyed.workspace)
    assert prepared.manifest["burned_in"] == 16
    assert shown(job.corpus_report(keyed, prepared)) == 2  # of Mass, two patients whose films say nothing
    assert shown(job.corpus_report(keyed.model_copy(update={"privacy": PUBLIC}), prepared)) == 3 + 3

    # A part of an earlier release tells how many of its films say so, and not which.
    for uri in prepared.part_uris:
        rows = Path(uri, "rows.parquet")
        pq.write_table(pq.read_table(rows).drop_columns("burned_in"), rows)
    page = job.corpus_report(keyed, prepared)
    assert shown(page) == 0
    Path(page).write_text("<image /> of an earlier release")
    assert shown(job.corpus_report(keyed, prepared)) == 0
    unflagged = Artifact(prepared.uri, {**prepared.manifest, "burned_in": 0})
    Path(page).unlink()
    assert shown(job.corpus_report(keyed, unflagged)) == 3 + 3

    without = keyed.model_copy(update={"corpus": settings_of(folder, labels=str(table), burned_in="exclude")})
    capfd.readouterr()
    job.run(without, Namespace())
    said = capfd.readouterr()
    assert "BurnedInAnnotation" not in said.err
    table_rows = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in said.out.splitlines()]
    assert ["excluded", "burned in", "16"] in table_rows
    job.plan(without, Namespace())
    assert "corpus.burned_in=exclude is told by each image's header" in capfd.readouterr().err


def test_a_corpus_of_which_no_finding_is_known_is_embedded_and_indexed_and_not_trained_on(tmp_path: Path) -> None:
    folder, workspace = put(tmp_path / "export", 24), tmp_path / "work"
    settings = settings_of(folder)
    corpus = Corpus(prepare(settings, str(workspace), PUBLIC)[0])
    model = untrained_model(str(workspace), corpus, NetworkSettings(dimensions=16))
    embedded, _ = embed(EmbeddingSettings(batch_size=16), str(workspace), model.uri, corpus)
    source = Source(corpus, embedded, model.uri, "combined")
    build, _ = build_index(IndexSettings(recall_target=0.1), str(workspace), source, Pseudonyms(None))
    assert build.counts["indexed"] == corpus.rows
    words = [*TINY, f"corpus.archive={folder}", f"workspace={workspace}", "corpus.format=dicom"]
    commands.done("prepare", *words)
    error = commands.job("train", *words).error
    assert "has a finding, so there is nothing to train on: give the archive labels" in error


def test_a_planned_folder_says_how_many_headers_are_to_be_read(tmp_path: Path) -> None:
    folder, workspace = put(tmp_path / "export", 3), tmp_path / "work"
    words = [f"corpus.archive={folder}", f"workspace={workspace}", "corpus.format=dicom", "--plan"]
    assert "files whose headers tell whether they are images: 3" in commands.job("prepare", *words).err
    planned = commands.job("pipeline", *words)
    assert "headers to read first" in planned.out, planned.err
    assert not workspace.exists()
    assert "is not prepared yet" in commands.job("train", *words).error
