"""Promises of an index over time: it grows by what is new, and nothing of a patient who is removed stays in it."""

import csv
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cxr_retrieval import artifacts, storage
from cxr_retrieval.artifacts import Artifact
from cxr_retrieval.config import (
    CorpusSettings,
    EmbeddingSettings,
    IndexSettings,
    NetworkSettings,
    PrivacySettings,
    Settings,
)
from cxr_retrieval.corpus.preparation import prepare
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.embedding.stream import embed
from cxr_retrieval.errors import UserError
from cxr_retrieval.index import cache, plan
from cxr_retrieval.index.build import build_index
from cxr_retrieval.index.files import files_of
from cxr_retrieval.index.groups import InProcess
from cxr_retrieval.index.lifecycle import rollback
from cxr_retrieval.index.quantizer import QUANTIZER_FILE
from cxr_retrieval.index.removal import published_holdings, purge, workspace_holdings
from cxr_retrieval.index.search import Retriever, UnknownImage
from cxr_retrieval.index.shards import Shards
from cxr_retrieval.index.source import Source
from cxr_retrieval.index.versions import Published, publish
from cxr_retrieval.privacy import Pseudonyms
from cxr_retrieval.tombstones import RemovedPatients, remove
from jobs.prepare import corpus_report
from tests.indexes import untrained_model, values_of

SIZE, PARTITION, SHARD = 64, 16, 32
PUBLIC = PrivacySettings(pseudonymise=False)
PLAIN = Pseudonyms(None)
INDEX = IndexSettings(shard_rows=SHARD, latency_ms=1e-9, recall_target=0.1)

pytestmark = pytest.mark.usefixtures("ray_session", "fresh_cache")


@pytest.fixture(scope="module")
def fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cache.VARIABLE, str(tmp_path_factory.mktemp("cache")))
        patch.setattr(plan, "TRAIN_PER_LIST", 8)  # in this process, where it is planned
        yield


@dataclass
class Hospital:
    """An archive with names that nothing else spells, its workspace, and where its index is published."""

    folder: Path
    rows: list[list[str]]
    header: list[str]
    model: Artifact | None = None

    @property
    def workspace(self) -> str:
        return str(self.folder / "workspace")

    @property
    def to(self) -> str:
        return str(self.folder / "published")

    @property
    def archive(self) -> Path:
        return self.folder / "archive"

    def patient_of(self, row: int) -> str:
        return self.rows[row][self.header.index("Patient ID")]

    def receive(self, phantoms: Path, count: int) -> None:
        """The first so many images of the phantoms are there now."""
        (self.archive / "images").mkdir(parents=True, exist_ok=True)
        for row in self.rows[:count]:
            shutil.copy2(phantoms / "images" / row[0], self.archive / "images" / row[0])  # with its time
        lines = [",".join(row) for row in [self.header, *self.rows[:count]]]
        (self.archive / "Data_Entry_2017.csv").write_text("\n".join(lines) + "\n")

    def index(self) -> tuple[Artifact, Published]:
        """Prepare, embed, build and publish what is there, by a model that stays."""
        settings = CorpusSettings(archive=str(self.archive), size=SIZE, partition_images=PARTITION, row_group_images=16)
        corpus = Corpus(prepare(settings, self.workspace, PUBLIC)[0])
        if self.model is None:
            self.model = untrained_model(self.workspace, corpus, NetworkSettings(dimensions=16))
        embedded, _ = embed(EmbeddingSettings(batch_size=16), self.workspace, self.model.uri, corpus)
        build, _ = build_index(INDEX, self.workspace, Source(corpus, embedded, self.model.uri, "combined"), PLAIN)
        return build, publish(build, self.to, "latest")

    def removed(self) -> RemovedPatients:
        return RemovedPatients.of(self.workspace, PUBLIC)


@pytest.fixture
def hospital(phantom_archive: Path, tmp_path: Path) -> Hospital:
    (table,) = phantom_archive.glob("Data_Entry*.csv")
    header, *rows = sorted_rows(table)
    patient = header.index("Patient ID")
    rows = [[*row[:patient], f"Patient-{int(row[patient]):05d}", *row[patient + 1 :]] for row in rows]
    return Hospital(tmp_path, rows, header)


def sorted_rows(table: Path) -> list[list[str]]:
    header, *rows = csv.reader(table.read_text().splitlines())
    return [header, *sorted(rows)]


def parts_of(build: Artifact) -> list[str]:
    return [part["input_id"] for part in build.manifest["parts"]]


def shards_of(retriever: Retriever) -> Shards:
    assert isinstance(retriever.holders, InProcess)
    return retriever.holders.group.shards


def test_a_corpus_that_grew_builds_and_uploads_only_its_new_shards(hospital: Hospital, phantom_archive: Path) -> None:
    hospital.receive(phantom_archive, 64)
    first, _ = hospital.index()
    assert first.manifest["factory"] == "IVF8,SQfp16"
    hospital.receive(phantom_archive, 96)
    before = {path: path.stat().st_mtime_ns for path in Path(first.uri).parent.rglob("*") if path.is_file()}
    second, published = hospital.index()
    assert (first.counts["indexed"], second.counts["indexed"]) == (64, 96)
    assert parts_of(second)[:2] == parts_of(first)
    assert len(parts_of(second)) == 3
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert files_of(first)[QUANTIZER_FILE].entry == files_of(second)[QUANTIZER_FILE].entry
    assert published.uploaded == 4 + 1  # a shard, and what the index is; model and quantizer are there
    # What was built in two steps is what one step would have built.
    at_once = replace(hospital, folder=hospital.folder / "at-once")
    shutil.copytree(hospital.archive, at_once.archive)
    whole, _ = at_once.index()
    one, other = (Retriever.open(f"{each.to}@latest") for each in (hospital, at_once))
    assert one.images == other.images == 96
    assert parts_of(whole) != parts_of(second)  # lists trained on other rows
    query = one.query_of(shards_of(one).sidecar(0)["image_id"][3].as_py())
    exact = [
        [(hit.id, hit.distance) for hit in shards_of(each).exact(query.vector[None], 5)[0]] for each in (one, other)
    ]
    assert exact[0] == exact[1]


def test_lists_are_trained_anew_when_they_are_asked_to_be(hospital: Hospital, phantom_archive: Path) -> None:
    hospital.receive(phantom_archive, 64)
    hospital.index()
    hospital.receive(phantom_archive, 96)
    kept, _ = hospital.index()
    corpus = Corpus.open(storage.join(hospital.workspace, "corpora", "chest", corpus_of(kept)))
    (embedded,) = kept.manifest["inputs"]
    embeddings = artifacts.load(storage.join(hospital.workspace, "embeddings", embedded), "embeddings")
    assert hospital.model is not None
    source = Source(corpus, embeddings, hospital.model.uri, "combined")
    again, worked = build_index(INDEX.model_copy(update={"training": 2}), hospital.workspace, source, PLAIN)
    assert worked
    assert again.counts == kept.counts
    assert set(parts_of(again)).isdisjoint(parts_of(kept))


def newest(hospital: Hospital, folder: str) -> str:
    """The one finished artifact in a folder of the workspace."""
    (found,) = (path.parent for path in Path(hospital.workspace, folder).glob("*/manifest.json"))
    return str(found)


def test_a_build_that_was_killed_keeps_the_shards_that_it_finished(hospital: Hospital, phantom_archive: Path) -> None:
    hospital.receive(phantom_archive, 96)
    build, _ = hospital.index()
    shards = [Path(uri) for uri in build.part_uris]
    before = [(shard / "rows.npy").stat().st_ino for shard in shards]
    for folder in (shards[1], Path(build.uri)):
        (folder / artifacts.MANIFEST).unlink()
    again, _ = hospital.index()
    assert again.counts == build.counts
    assert [(shard / "rows.npy").stat().st_ino != inode for shard, inode in zip(shards, before, strict=True)] == [
        False,
        True,
        False,
    ]


def everything_below(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file as it is stored, and tables also as what they hold: decompressed."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            yield path, data
            if data[:4] == b"PAR1":
                yield path, b"\n".join(values_of(pq.read_table(path)))


def killed_writes(files: set[Path]) -> None:
    """What local writes of these files leave that were killed at their end, two days ago."""
    for path in files:
        scratch = path.with_name(f".{path.name}.0123abcd")
        shutil.copyfile(path, scratch)
        os.utime(scratch, (time.time() - 2 * 86_400,) * 2)


def test_nothing_of_a_removed_patient_stays(hospital: Hospital, phantom_archive: Path) -> None:
    hospital.receive(phantom_archive, 96)
    first, _ = hospital.index()
    patient = hospital.patient_of(40)
    retriever = Retriever.open(f"{hospital.to}@latest")
    rows = [
        (shard, row)
        for shard in range(3)
        for row, name in enumerate(shards_of(retriever).sidecar(shard)["patient"].to_pylist())
        if name == patient
    ]
    assert 1 <= len(rows) <= 8
    tables = [shards_of(retriever).sidecar(shard) for shard in range(3)]
    images = [tables[shard]["image_id"][row].as_py() for shard, row in rows]
    secrets = {name.encode() for name in (patient, *images)}
    secrets |= {np.asarray(shards_of(retriever).shards[shard].rows_ND[row]).tobytes() for shard, row in rows}
    secrets |= {shards_of(retriever).thumbnail(shard, row) for shard, row in rows}
    hashes = [tables[shard]["pixel_sha256"][row].as_py() for shard, row in rows]
    secrets |= {*hashes}
    of_embeddings = [str(int.from_bytes(each[:8], "big", signed=True)).encode() for each in hashes]  # their pixel_id
    secrets |= {*of_embeddings}
    prepared = Corpus.open(newest(hospital, "corpora/chest"))
    for uri in prepared.files:
        table = pq.read_table(uri)
        secrets |= {row["pixels"] for row in table.to_pylist() if row["patient_id"] == patient}
    settings = Settings(workspace=hospital.workspace, privacy=PUBLIC)
    page = corpus_report(settings, prepared.artifact)
    holders = {path for path, data in everything_below(hospital.folder) if any(secret in data for secret in secrets)}
    assert any(hospital.to in str(path) for path in holders)
    killed_writes({path for path in holders if hospital.archive not in path.parents})
    for folder in ("corpora", "embeddings", "indexes"):
        assert any(Path(hospital.workspace, folder) in path.parents for path in holders), folder

    # From the tombstone on nobody finds them, whatever version an alias serves.
    query = retriever.query_of(images[0])
    assert remove(hospital.to, patient, PLAIN)
    assert remove(hospital.workspace, patient, PLAIN)
    assert not remove(hospital.to, patient, PLAIN)
    opened = Retriever.open(f"{hospital.to}@latest")
    assert opened.images == 96 - len(rows)
    answer = opened.search(query, k=96)
    assert answer.known is None
    assert len(answer.cases) == 96 - len(rows)
    assert patient not in {case.patient for case in answer.cases}
    with pytest.raises(UnknownImage):
        opened.query_of(images[0])
    with pytest.raises(UserError, match="is not in this index"):
        opened.search(query, exclude_patient=patient)

    # While an alias serves a version that holds them, what is stored cannot go, and nothing else goes either.
    with pytest.raises(UserError, match=r"alias 'latest' serves a version that holds removed patients"):
        purge(published_holdings(hospital.to))
    assert storage.exists(files_of(first)["index.json"].uri)

    # A new version is made without them; shards without them are those that were there.
    second, published = hospital.index()
    touched = {shard for shard, _ in rows}
    kept = [old == new for old, new in zip(parts_of(first), parts_of(second), strict=True)]
    assert kept == [shard not in touched for shard in range(3)]
    assert published.uploaded == 4 * len(touched) + 1
    assert second.counts["indexed"] == 96 - len(rows)
    corpus = Corpus.open(storage.join(hospital.workspace, "corpora", "chest", corpus_of(second)))
    assert corpus.artifact.manifest["exclusion_rules"] == {"removed": len(rows)}
    assert corpus.artifact.counts["archive"] == 96

    # Going back shows nothing of them.
    rollback(hospital.to, "latest")
    assert Retriever.open(f"{hospital.to}@latest").images == 96 - len(rows)
    rollback(hospital.to, "latest")

    # And then the bytes go.
    assert hospital.model is not None
    for holdings in (published_holdings(hospital.to), workspace_holdings(hospital.workspace, hospital.removed())):
        assert holdings.files
        purge(holdings)
    assert holdings.learnt
    found = {
        path
        for folder in (Path(hospital.to), Path(hospital.workspace))
        for path, data in everything_below(folder)
        if any(secret in data for secret in secrets)
    }
    assert not found
    assert not storage.exists(page)
    assert storage.exists(corpus_report(settings, corpus.artifact))
    after = Retriever.open(f"{hospital.to}@latest")
    assert after.version.version.id == published.version
    assert after.images == 96 - len(rows)
    assert after.search(query, k=8).cases
    again, moved = hospital.index()
    assert again.manifest == second.manifest
    assert not moved.moved
    assert not published_holdings(hospital.to).files
    assert not workspace_holdings(hospital.workspace, hospital.removed()).files


def corpus_of(build: Artifact) -> str:
    return str(json.loads(build.read("index.json"))["corpus"])


def test_without_the_key_nobody_can_prepare_as_if_no_one_was_removed(
    hospital: Hospital, phantom_archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital.receive(phantom_archive, 16)
    keyed = Pseudonyms(b"a key of sixteen bytes or more")
    remove(hospital.workspace, hospital.patient_of(3), keyed)
    settings = CorpusSettings(archive=str(hospital.archive), size=SIZE)
    monkeypatch.delenv("CXR_PRIVACY_KEY", raising=False)
    with pytest.raises(UserError, match="there is no key"):
        prepare(settings, hospital.workspace)
    with pytest.raises(UserError, match="would come back under their own names"):
        prepare(settings, hospital.workspace, PUBLIC)
    monkeypatch.setenv("CXR_PRIVACY_KEY", "a key of sixteen bytes or more")
    corpus, _ = prepare(settings, hospital.workspace)
    theirs = sum(hospital.patient_of(row) == hospital.patient_of(3) for row in range(16))
    assert corpus.counts["excluded"] == theirs
    assert corpus.counts["prepared"] == 16 - theirs


def test_a_purge_that_is_killed_after_any_file_leaves_nothing_when_it_is_run_again(
    hospital: Hospital, phantom_archive: Path
) -> None:
    hospital.receive(phantom_archive, 32)
    hospital.index()
    for place in (hospital.to, hospital.workspace):
        remove(place, hospital.patient_of(20), PLAIN)
    hospital.index()

    def still_there() -> list[storage.StoredFile]:
        found = published_holdings(hospital.to), workspace_holdings(hospital.workspace, hospital.removed())
        return [file for holdings in found for file in holdings.files]

    everything = still_there()
    assert len(everything) > 20
    while left := still_there():  # a purge that dies after one file, run again and again
        storage.delete(left[0].uri)
    assert [file.uri for file in everything if storage.exists(file.uri)] == []
    assert Retriever.open(f"{hospital.to}@latest").images < 32
