"""Promises from a prepared corpus to an answer: rows are accounted for, kept in order, and found again."""

import csv
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cxr_retrieval import artifacts, storage
from cxr_retrieval.artifacts import AccountingError, Artifact
from cxr_retrieval.assessment import EVALUATION_FILE, REPORT_FILE, evaluate
from cxr_retrieval.config import CorpusSettings, EmbeddingSettings, EvaluationSettings, IndexSettings, NetworkSettings
from cxr_retrieval.corpus.decoding import Recipe
from cxr_retrieval.corpus.exclusions import EXCLUSIONS_FILE, Exclusions
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.corpus.parts import ROWS_FILE
from cxr_retrieval.corpus.preparation import prepare
from cxr_retrieval.corpus.reading import Corpus, pixels_of
from cxr_retrieval.embedding.stream import EMBEDDINGS_FILE, embed, embeddings_id, read_part
from cxr_retrieval.errors import UserError
from cxr_retrieval.images import read_images
from cxr_retrieval.index import build as building
from cxr_retrieval.index import cache, plan, proof, source
from cxr_retrieval.index.build import build_index
from cxr_retrieval.index.files import files_of, shard_files
from cxr_retrieval.index.lifecycle import embedded_by
from cxr_retrieval.index.plan import whole_parts
from cxr_retrieval.index.quantizer import QUANTIZER_FILE, list_sizes
from cxr_retrieval.index.search import Retriever
from cxr_retrieval.index.shards import EXACT_BELOW, INDEX_FILE, Shards
from cxr_retrieval.index.source import SIDECAR, Source
from cxr_retrieval.index.versions import publish, resolve
from cxr_retrieval.network.progressive import embeddings
from cxr_retrieval.privacy import Pseudonyms, row_id
from cxr_retrieval.training.model import Model
from tests.indexes import untrained_model, values_of

SIZE, PARTITION, BATCH = 64, 32, 16
DUPLICATE = "00009999_000.png"  # the last image of the archive: alone in its partition, which is empty for readers
NETWORK = NetworkSettings(dimensions=16)
PLAIN = Pseudonyms(None)
KEYED = Pseudonyms(b"a key of sixteen bytes or more")
# Half precision of entries below 1, and of logits below 8.
Z_TOLERANCE, LOGIT_TOLERANCE = 1e-3, 5e-3

pytestmark = pytest.mark.usefixtures("ray_session", "cache_folder")


@dataclass(frozen=True)
class World:
    workspace: str
    archive: Path
    corpus: Corpus
    model: Artifact
    embedded: Artifact
    table: list[dict[str, Any]]
    """The corpus' rows that readers see, in order."""

    @property
    def source(self) -> Source:
        return Source(self.corpus, self.embedded, self.model.uri, "combined")


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv(cache.VARIABLE, str(folder))
        yield folder


def named_archive(phantoms: Path, folder: Path) -> Path:
    """The phantoms with patient names that nothing else spells, and one more image that is another one's copy."""
    shutil.copytree(phantoms, folder)
    (label_table,) = folder.glob("Data_Entry*.csv")
    header, *rows = csv.reader(label_table.read_text().splitlines())
    patient = next(column for column, name in enumerate(header) if name == "Patient ID")
    rows.append([DUPLICATE, *rows[0][1:patient], "9999", *rows[0][patient + 1 :]])
    shutil.copy(folder / "images" / rows[0][0], folder / "images" / DUPLICATE)
    lines = [[*row[:patient], f"Patient-{int(row[patient]):05d}", *row[patient + 1 :]] for row in rows]
    label_table.write_text("\n".join(map(",".join, [header, *lines])) + "\n")
    return folder


@pytest.fixture(scope="module")
def world(phantom_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    workspace, archive = str(folder / "workspace"), named_archive(phantom_archive, folder / "archive")
    settings = CorpusSettings(archive=str(archive), size=SIZE, partition_images=PARTITION, row_group_images=16)
    corpus = Corpus(prepare(settings, workspace)[0])
    model = untrained_model(workspace, corpus, NETWORK)
    embedded, worked = embed(EmbeddingSettings(batch_size=BATCH), workspace, model.uri, corpus)
    assert worked
    table = pa.concat_tables(pq.read_table(uri) for uri in corpus.files).to_pylist()
    return World(workspace, archive, corpus, model, embedded, table[:-1])


@pytest.fixture(scope="module")
def built(world: World) -> Artifact:
    build, worked = build_index(IndexSettings(shard_rows=40), world.workspace, world.source, PLAIN)
    assert worked
    return build


def opened(build: Artifact) -> Shards:
    files = files_of(build)
    return Shards.open(lambda name: Path(files[name].uri))


def sidecar(build: Artifact) -> list[dict[str, Any]]:
    shards = opened(build)
    return [row for number in range(len(shards.shards)) for row in shards.sidecar(number).to_pylist()]


# ---- embedding


def test_rows_prepared_are_rows_embedded(world: World) -> None:
    assert world.corpus.artifact.counts["duplicates"] == 1
    assert world.embedded.counts == {"prepared": 96, "embedded": 96, "duplicates_left_out": 1}
    assert world.embedded.manifest["equations"] == ["prepared 96 = embedded 96"]
    assert [part["counts"]["embedded"] for part in world.embedded.manifest["parts"]] == [32, 32, 32, 1]


def test_rows_stand_in_the_order_of_the_corpus(world: World) -> None:
    for uri, rows in zip(world.embedded.part_uris, world.corpus.files, strict=True):
        embedded = pq.read_table(storage.join(uri, EMBEDDINGS_FILE), columns=["pixel_id"])
        hashes = pq.read_table(rows, columns=["pixel_sha256"])["pixel_sha256"].to_pylist()
        assert embedded["pixel_id"].to_pylist() == [int.from_bytes(value[:8], "big", signed=True) for value in hashes]


def test_vectors_are_those_of_the_model_on_the_same_pixels(world: World) -> None:
    model = Model.open(world.model.uri)
    for part in (0, 2):
        table = pq.read_table(world.corpus.files[part])
        stored = read_part(world.embedded, world.corpus, part, model, ["image_id"])
        pixels = pixels_of(table, SIZE)
        for start in range(0, len(pixels), BATCH):
            chosen = slice(start, start + BATCH)
            output = model.forward(pixels[chosen].copy())
            assert torch.allclose(stored.z_PSND[:, :, chosen], output.z_PSBD, atol=Z_TOLERANCE)
            assert torch.allclose(stored.joint_PNC[:, chosen], output.joint_PBC, atol=LOGIT_TOLERANCE)
            assert (stored.crop_N4[chosen] == output.boxes_B4.numpy()).all()


def test_a_second_run_does_nothing(world: World) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(world.workspace, "embeddings").rglob("*")}
    again, worked = embed(EmbeddingSettings(batch_size=BATCH), world.workspace, world.model.uri, world.corpus)
    assert not worked
    assert again.manifest == world.embedded.manifest
    assert {path: path.stat().st_mtime_ns for path in Path(world.workspace, "embeddings").rglob("*")} == before


def test_only_the_part_without_a_manifest_is_done_again(world: World) -> None:
    lost = 1
    files = [Path(uri, EMBEDDINGS_FILE) for uri in world.embedded.part_uris]
    before = [path.stat().st_ino for path in files]
    Path(world.embedded.part_uris[lost], artifacts.MANIFEST).unlink()
    Path(world.embedded.uri, artifacts.MANIFEST).unlink()
    again, worked = embed(EmbeddingSettings(batch_size=BATCH), world.workspace, world.model.uri, world.corpus)
    assert worked
    assert again.input_id == world.embedded.input_id
    assert again.counts == world.embedded.counts
    written = [number for number, path in enumerate(files) if path.stat().st_ino != before[number]]
    assert written == [lost]


def test_a_model_of_another_recipe_is_refused_in_one_line(world: World) -> None:
    other = untrained_model(world.workspace, world.corpus, NETWORK, Recipe(32, "letterbox"))
    with pytest.raises(UserError, match=r"decode recipe .*corpus\.size and corpus\.fit") as refused:
        embed(EmbeddingSettings(), world.workspace, other.uri, world.corpus)
    assert "\n" not in str(refused.value)


def test_a_model_that_is_not_finished_is_refused_in_one_line(world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no finished model at .*: it is not there"):
        embed(EmbeddingSettings(), world.workspace, str(tmp_path / "none"), world.corpus)


def test_duplicates_are_left_out_by_readers(world: World) -> None:
    model = Model.open(world.model.uri)
    rows = pq.read_table(storage.join(world.corpus.artifact.uri, EXCLUSIONS_FILE)).to_pylist()
    assert [(row["image_id"], row["part"], row["row"]) for row in rows] == [(DUPLICATE, 3, 0)]
    parts = [read_part(world.embedded, world.corpus, part, model, ["image_id", "view"]) for part in range(4)]
    names = [name for part in parts for name in part.facts["image_id"].to_pylist()]
    assert names == [row["image_id"] for row in world.table]
    empty = parts[3]
    assert empty.z_PSND.shape == (2, 3, 0, 16)
    assert empty.joint_PNC.shape == (2, 0, len(FINDINGS))
    assert empty.crop_N4.shape == (0, 4)


def test_rows_left_out_are_those_of_their_place(world: World) -> None:
    model = Model.open(world.model.uri)
    corpus = Corpus(world.corpus.artifact)
    corpus.__dict__["_exclusions"] = Exclusions(np.zeros(3, np.int32), np.array([0, 5, 31], np.int32))
    whole = read_part(world.embedded, world.corpus, 0, model, ["image_id"])
    left = read_part(world.embedded, corpus, 0, model, ["image_id"])
    kept = np.setdiff1d(np.arange(32), [0, 5, 31])
    assert torch.equal(left.z_PSND, whole.z_PSND[:, :, kept])
    assert torch.equal(left.joint_PNC, whole.joint_PNC[:, kept])
    assert (left.crop_N4 == whole.crop_N4[kept]).all()
    assert left.facts["image_id"].to_pylist() == [whole.facts["image_id"][row].as_py() for row in kept]


def test_embeddings_beside_rows_of_other_images_are_a_bug(world: World) -> None:
    corpus = Corpus(Artifact(world.corpus.artifact.uri, dict(world.corpus.artifact.manifest)))
    parts = corpus.artifact.manifest["parts"]
    corpus.artifact.manifest["parts"] = [parts[1], parts[0], *parts[2:]]  # type: ignore[index]
    with pytest.raises(AccountingError, match="holds other images than the corpus"):
        read_part(world.embedded, corpus, 0, Model.open(world.model.uri), [])


# ---- building


def test_rows_embedded_are_rows_indexed_over_several_shards(built: Artifact) -> None:
    assert built.counts == {"embedded": 96, "indexed": 96, "id_collisions": 0}
    assert built.manifest["equations"] == ["embedded 96 = indexed 96 + id_collisions 0"]
    assert built.manifest["shards"] == 3
    shards = opened(built)
    assert [len(shard.ids_N) for shard in shards.shards] == [32, 32, 32]  # of parts of 32, 32, 32 and a duplicate
    assert shards.rows == len(sidecar(built)) == 96
    assert set(files_of(built)) == {
        INDEX_FILE,
        "model/model.json",
        "model/weights.safetensors",
        *(name for number in range(3) for name in shard_files(number).values()),
    }


def test_a_second_build_does_nothing(world: World, built: Artifact) -> None:
    again, worked = build_index(IndexSettings(shard_rows=40), world.workspace, world.source, PLAIN)
    assert not worked
    assert again.manifest == built.manifest


def test_a_sidecar_has_what_a_hit_shows(world: World, built: Artifact) -> None:
    assert opened(built).sidecar(0).schema.equals(SIDECAR)
    model = Model.open(world.model.uri)
    crops = np.concatenate([read_part(world.embedded, world.corpus, n, model, []).crop_N4 for n in range(4)])
    for found, row, crop in zip(sidecar(built), world.table, crops, strict=True):
        for name in ("image_id", "study_date", "view", "sex", "age_years", "findings", "unknown", "pixel_sha256"):
            assert found[name] == row[name]
        assert found["id"] == row_id(row["image_id"])
        assert (found["patient"], found["source"]) == (row["patient_id"], row["source_uri"])
        assert found["held_out"] == (row["split"] != "train")
        assert found["crop"] == crop.tolist()


def test_stored_rows_are_the_named_embedding_and_thumbnails_the_images(world: World, built: Artifact) -> None:
    model, shards = Model.open(world.model.uri), opened(built)
    rows = np.concatenate([shard.rows_ND for shard in shards.shards]).astype(np.float32)
    pixels = np.stack([np.frombuffer(row["pixels"], np.uint8).reshape(SIZE, SIZE) for row in world.table])
    vectors = [
        embeddings(model.forward(pixels[n : n + BATCH]), model.centring)["combined"] for n in range(0, 96, BATCH)
    ]
    assert np.abs(rows - torch.cat(vectors).numpy()).max() < 5e-3
    for row in (0, 33, 95):
        shard, place = divmod(row, 32)
        picture = cv2.imdecode(np.frombuffer(shards.thumbnail(shard, place), np.uint8), cv2.IMREAD_UNCHANGED)
        assert picture.shape == (SIZE, SIZE)
        assert np.abs(picture.astype(int) - pixels[row]).mean() < 4


def test_ids_and_answers_do_not_change_with_builds_or_shard_sizes(world: World, built: Artifact) -> None:
    builds = [
        build_index(settings, world.workspace, world.source, PLAIN)[0]
        for settings in (
            IndexSettings(shard_rows=40, name="again"),
            IndexSettings(shard_rows=1000),
            IndexSettings(shard_rows=64),
        )
    ]
    assert [build.manifest["shards"] for build in builds] == [3, 1, 2]
    assert builds[0].input_id == built.input_id
    expected = sidecar(built)
    assert len({row["id"] for row in expected}) == 96
    query_QD = opened(built).shards[1].rows_ND[:8].astype(np.float32)

    def answers(build: Artifact) -> list[list[tuple[int, float]]]:
        return [[(hit.id, hit.distance) for hit in hits] for hits in opened(build).search(query_QD, 10)]

    for build in builds:
        assert sidecar(build) == expected
        assert answers(build) == answers(built)


def test_a_small_index_is_exact_and_proven_so(built: Artifact) -> None:
    assert (built.manifest["factory"], built.manifest["recall"], built.manifest["probes"]) == ("SQfp16", 1.0, 1)
    facts = json.loads(built.read(INDEX_FILE))
    told = [setting for setting in facts["proof"]["filtered"] if setting["filter"]]
    assert {setting["filter"] for setting in told} <= {"view PA", "view AP", "sex F", "sex M"}
    settings = [*facts["proof"]["curve"], *facts["proof"]["filtered"]]
    shares = [(setting["probes"], setting["passing"]) for setting in settings if setting not in told]
    assert shares == [(1, 1.0), (1, 0.1)], "one row in a hundred of 96 is none to find"
    assert all(setting["recall"] == 1.0 for setting in settings)
    assert all(0 < setting["p50_ms"] <= setting["p95_ms"] for setting in settings)
    assert set(facts["plan"]["why"]) == {"kind", "code", "shards"}
    held_out = sum(row["held_out"] for row in sidecar(built))
    assert facts["proof"]["queries"] == held_out > 0
    assert 0 < facts["proof"]["far_distance"] <= proof.FARTHEST
    assert (facts["rows"], facts["dimensions"], facts["shards"]) == (96, 96, 3)


def test_an_ivf_index_records_the_fewest_probes_that_reach_the_target(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "TRAIN_PER_LIST", 12)
    settings = IndexSettings(name="ivf", latency_ms=1e-9, shard_rows=40, recall_target=0.999)
    build, _ = build_index(settings, world.workspace, world.source, PLAIN)
    facts = json.loads(build.read(INDEX_FILE))
    assert (build.manifest["factory"], facts["lists"]) == ("IVF8,SQfp16", 8)
    curve = facts["proof"]["curve"]
    assert [entry["probes"] for entry in curve] == [1, 2, 3, 4, 6, 8][: len(curve)]
    assert [entry["recall"] for entry in curve] == sorted(entry["recall"] for entry in curve)
    assert all((entry["recall"] >= 0.999) == (entry["probes"] >= facts["probes"]) for entry in curve)
    # What more would give is shown, as far as there is more.
    assert curve[-1]["probes"] == 8 or [entry["probes"] for entry in curve].index(facts["probes"]) == len(curve) - 3
    assert build.manifest["probes"] == facts["probes"]
    assert build.manifest["recall"] == 1.0
    filtered = facts["proof"]["filtered"]
    assert facts["filter_probes"] == [[entry["passing"], entry["probes"]] for entry in filtered]
    assert all(entry["probes"] >= facts["probes"] and entry["recall"] >= 0.999 for entry in filtered)
    # All shards share one quantizer, which lies beside them: their distances compare.
    assert QUANTIZER_FILE in files_of(build)
    shards = opened(build)
    assert shards.lists.quantizer.ntotal == 8
    assert all(shard.index.quantizer.ntotal == 0 for shard in shards.shards)
    held = [list_sizes(shard.index) for shard in shards.shards]
    assert sum(sizes.sum() for sizes in held) == 96
    assert sum(facts["list_sizes"]) == 8
    query_QD = shards.shards[1].rows_ND[:5].astype(np.float32)
    found, exact = shards.search(query_QD, 10, probes=8), shards.exact(query_QD, 10)
    assert found == exact


def test_a_build_of_short_codes_is_proven_by_the_stored_rows(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "TRAIN_PER_LIST", 12)
    settings = IndexSettings(name="codes", latency_ms=1e-9, memory_gib=1e-3, recall_target=0.9)
    build, _ = build_index(settings, world.workspace, world.source, PLAIN)
    facts = json.loads(build.read(INDEX_FILE))
    assert facts["candidates"] == 1  # they fit
    assert build.manifest["shards"] > 1  # and no more rows are built at once than fit
    monkeypatch.setattr(plan, "_codes", lambda dimensions: [plan.Code("SQ8", dimensions, 4, 1.0)])
    build, _ = build_index(settings.model_copy(update={"name": "short"}), world.workspace, world.source, PLAIN)
    facts = json.loads(build.read(INDEX_FILE))
    assert (build.manifest["factory"], facts["candidates"], facts["plan"]["vector_bytes"]) == ("IVF8,SQ8", 4, 96)
    assert build.manifest["recall"] >= 0.9
    shards = opened(build)
    (hits,) = shards.search(shards.shards[0].rows_ND[3:4].astype(np.float32), 1)
    assert (hits[0].shard, hits[0].row, hits[0].distance) == (0, 3, 0.0)


def test_a_target_that_is_not_reached_fails_in_one_line_and_leaves_nothing_finished(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "TRAIN_PER_LIST", 3)
    monkeypatch.setattr(proof, "plan_probes", lambda _lists: [1])
    settings = IndexSettings(name="poor", latency_ms=1e-9, shard_rows=50, recall_target=0.999)
    with pytest.raises(
        UserError, match=r"recall@10 0\.\d+ .*index\.recall_target=0\.999; .*raise index\.memory_gib"
    ) as failed:
        build_index(settings, world.workspace, world.source, PLAIN)
    assert "\n" not in str(failed.value)
    draft = building.index_draft(settings, world.workspace, world.source, PLAIN)
    assert artifacts.find(draft.uri) is None


def test_an_embedding_that_the_model_lacks_is_refused_in_one_line(world: World) -> None:
    source = Source(world.corpus, world.embedded, world.model.uri, "nonsense")
    with pytest.raises(UserError, match=r"index\.embedding='nonsense' is none of the model's: step1, step2"):
        build_index(IndexSettings(), world.workspace, source, PLAIN)


def test_a_later_row_with_an_id_that_is_taken_is_left_out_and_counted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 63 bits do not collide in a test: rows 7 and 70 are said to.
    monkeypatch.setattr(building, "find_collisions", lambda *_: {0: [7], 2: [6]})
    build, _ = build_index(IndexSettings(shard_rows=40, name="collisions"), world.workspace, world.source, PLAIN)
    assert build.counts == {"embedded": 96, "indexed": 94, "id_collisions": 2}
    names = [row["image_id"] for number, row in enumerate(world.table) if number not in (7, 70)]
    assert [row["image_id"] for row in sidecar(build)] == names
    shards = opened(build)
    assert [len(shard.ids_N) for shard in shards.shards] == [31, 32, 31]
    query = shards.shards[2].rows_ND[20].astype(np.float32)
    (hits,) = shards.search(query[None], 1)
    assert (hits[0].shard, hits[0].row) == (2, 20)


def test_a_shard_that_is_lost_fails_the_build(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "whole_parts", lambda sizes, most: whole_parts(sizes, most)[:-1])
    with pytest.raises(AccountingError, match="embedded 96 = indexed 64 \\+ id_collisions 0"):
        build_index(IndexSettings(shard_rows=40, name="losing"), world.workspace, world.source, PLAIN)


def test_collisions_are_the_later_rows_of_equal_ids(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert source.find_collisions(world.source, PLAIN) == {}
    twin, copy = world.table[3]["image_id"], world.table[40]["image_id"]
    monkeypatch.setattr(source, "row_id", lambda name: row_id(twin if name == copy else name))
    assert source.find_collisions(world.source, PLAIN) == {1: [8]}


# ---- privacy


@pytest.fixture(scope="module")
def pseudonymous(world: World) -> Artifact:
    return build_index(IndexSettings(shard_rows=40, name="private"), world.workspace, world.source, KEYED)[0]


def test_no_name_of_the_archive_is_in_a_pseudonymised_index(world: World, pseudonymous: Artifact) -> None:
    names = {name.encode() for row in world.table for name in (row["image_id"], row["patient_id"], row["source_uri"])}
    names |= {Path(row["image_id"]).stem.encode() for row in world.table} | {str(world.archive).encode(), b"Patient-"}
    assert len(names) > 2 * 96
    found: dict[str, bytes] = {}
    for name, file in files_of(pseudonymous).items():
        path = Path(file.uri)
        if path.suffix == ".parquet":
            found[name] = b"\n".join(values_of(pq.read_table(path)))
        found[f"{name}, as stored"] = path.read_bytes()
    found["manifest"] = json.dumps(pseudonymous.manifest).encode()
    for uri in pseudonymous.part_uris:
        found |= {f"{uri}/{name}": Path(uri, name).read_bytes() for name in (artifacts.PLAN, artifacts.MANIFEST)}
    assert len(found) == 3 * (6 + 2) + 4
    for path, data in found.items():
        assert not [name for name in names if name in data], path
        assert KEYED.key is not None
        assert KEYED.key not in data, path


def test_pseudonyms_keep_patients_together_and_need_the_key(
    world: World, built: Artifact, pseudonymous: Artifact
) -> None:
    plain, keyed = sidecar(built), sidecar(pseudonymous)
    pairs = {(a["patient"], b["patient"]) for a, b in zip(plain, keyed, strict=True)}
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    for row, known in zip(world.table, keyed, strict=True):
        assert known["image_id"] == KEYED.name("image", row["image_id"])
        assert known["patient"] == KEYED.name("patient", row["patient_id"])
        assert known["source"] == KEYED.name("source", row["source_uri"])
        assert known["id"] == row_id(known["image_id"])
    assert all(re.fullmatch("[0-9a-f]{20}", row["patient"]) for row in keyed)
    assert json.loads(pseudonymous.read(INDEX_FILE))["pseudonymised"] is True
    assert pseudonymous.input_id != built.input_id


# ---- evaluating and searching


def test_an_evaluation_stands_beside_its_page_and_is_done_once(world: World) -> None:
    settings = EvaluationSettings(draws=100)
    done, worked = evaluate(settings, world.workspace, world.model.uri, world.corpus, world.embedded, names=False)
    again, worked_again = evaluate(
        settings, world.workspace, world.model.uri, world.corpus, world.embedded, names=False
    )
    assert (worked, worked_again) == (True, False)
    assert again.manifest == done.manifest
    figures = json.loads(done.read(EVALUATION_FILE))
    splits = world.corpus.artifact.manifest["splits"]
    assert done.counts == {"images": splits["test"]["images"], "queries": figures["queries"]}
    assert 0 < figures["patients"] <= splits["test"]["patients"]
    assert (figures["corpus"], figures["model"]) == (world.corpus.artifact.input_id, world.model.input_id)
    assert set(figures["embeddings"]["combined"]) == {"all", "findings", "same_view", "archive"}
    assert figures["localisation"]["boxes"] > 0  # phantoms have a box for each sign
    held_out = [row for row in world.table if row["split"] == "test"]
    assert figures["queries"] == sum(bool(row["findings"]) for row in held_out)
    page = done.read(REPORT_FILE).decode()
    assert not any(row["patient_id"] in page or row["image_id"] in page for row in world.table)
    shown = [query for queries in figures["examples"].values() for query in queries]
    assert len(shown) == page.count('data-role="query"') > 0
    told, _ = evaluate(settings, world.workspace, world.model.uri, world.corpus, world.embedded, names=True)
    public = told.read(REPORT_FILE).decode()
    for image in (image for query in shown for image in (query, *query["hits"])):
        assert held_out[image["row"]]["image_id"] in public
        assert held_out[image["row"]]["patient_id"] in public


def test_a_version_and_an_evaluation_tell_the_bytes_of_their_model(world: World, built: Artifact) -> None:
    settings = EvaluationSettings(draws=100)
    done, _ = evaluate(settings, world.workspace, world.model.uri, world.corpus, world.embedded, names=False)
    to = str(Path(world.workspace, "published"))
    model, embedding = embedded_by(resolve(to, publish(built, to, "latest").version))
    assert (model, embedding) == (world.model.manifest["content_id"], world.source.embedding)
    assert done.manifest["inputs"] == [embeddings_id(model, world.corpus.artifact.input_id)]


def test_an_indexed_image_finds_itself_and_by_default_nobody_of_its_own_patient(world: World, built: Artifact) -> None:
    to = str(Path(world.workspace, "published"))
    published = publish(built, to, "latest")
    retriever = Retriever.open(f"{to}@{published.version}")
    several = [row for row in world.table if sum(row["patient_id"] == other["patient_id"] for other in world.table) > 1]
    row = several[0]
    query = retriever.query(Path(row["source_uri"]).read_bytes())
    assert query.pixel_sha256 == hashlib.sha256(row["pixels"]).digest()
    with_own = retriever.search(query, 96, exclude_own=False)
    assert with_own.known is not None
    assert with_own.known.image_id == with_own.cases[0].image_id == row["image_id"]
    assert with_own.cases[0].distance < 0.01
    assert len(with_own.cases) == 96
    without = retriever.search(query, 96)
    assert [case.image_id for case in without.cases] == [
        case.image_id for case in with_own.cases if case.patient != row["patient_id"]
    ]
    assert [case.rank for case in without.cases] == list(range(1, len(without.cases) + 1))
    also = without.cases[0].patient
    left = retriever.search(query, 96, exclude_patient=also)
    assert {case.patient for case in left.cases} == {case.patient for case in without.cases} - {also}


def test_a_copy_of_an_indexed_image_is_known_as_the_one_that_was_kept(world: World, built: Artifact) -> None:
    to = str(Path(world.workspace, "published"))
    publish(built, to, "latest")
    retriever = Retriever.open(to)
    answer = retriever.search(retriever.query((world.archive / "images" / DUPLICATE).read_bytes()), 5)
    assert answer.known is not None
    assert answer.known.image_id == world.table[0]["image_id"]


def test_prepared_rows_are_not_touched_by_all_this(world: World) -> None:
    for uri in world.corpus.artifact.part_uris:
        part = artifacts.load(uri, "corpus-part")
        assert {entry.path for entry in part.files} >= {ROWS_FILE}
        for entry in part.files:
            part.read(entry.path)


def test_of_a_split_that_is_too_large_whole_patients_are_drawn(world: World) -> None:
    class Parts:
        done = 0

        def advance(self, count: int) -> None:
            self.done += count

    parts, model = Parts(), Model.open(world.model.uri)
    everyone = read_images(world.embedded, world.corpus, model, "train", 10_000, parts)  # type: ignore[arg-type]
    drawn = read_images(world.embedded, world.corpus, model, "train", 30, parts)  # type: ignore[arg-type]
    assert parts.done == 2 * len(world.corpus.files)
    assert len(everyone.patients) == world.corpus.artifact.manifest["splits"]["train"]["images"]
    assert 10 <= len(drawn.patients) <= 50
    for patient in set(drawn.patients):
        assert drawn.patients.count(patient) == everyone.patients.count(patient)
    places = [n for n, patient in enumerate(everyone.patients) if patient in set(drawn.patients)]
    assert torch.equal(drawn.z_PSND, everyone.z_PSND[:, :, places])


def test_a_target_that_is_not_reached_under_a_filter_fails_unless_all_that_pass_are_compared(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "TRAIN_PER_LIST", 12)
    monkeypatch.setattr(proof, "plan_probes", lambda _lists: [1])
    settings = IndexSettings(name="narrow", latency_ms=1e-9, shard_rows=50, recall_target=0.3)
    monkeypatch.setattr(proof, "EXACT_BELOW", 0)
    with pytest.raises(
        UserError, match=r"recall@10 0\.\d+ .* where one image of 10+ passes .*=0\.3; .*raise index\.memory_gib"
    ) as failed:
        build_index(settings, world.workspace, world.source, PLAIN)
    assert "\n" not in str(failed.value)
    monkeypatch.setattr(proof, "EXACT_BELOW", EXACT_BELOW)
    build, _ = build_index(settings, world.workspace, world.source, PLAIN)
    assert min(entry["recall"] for entry in json.loads(build.read(INDEX_FILE))["proof"]["filtered"]) < 0.3
