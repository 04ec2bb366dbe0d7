"""Promises of the proof: it searches as a search does, without the query's patient, and under filters that have to do
with the images."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr_retrieval.config import IndexSettings
from cxr_retrieval.errors import UserError
from cxr_retrieval.index import proof
from cxr_retrieval.index.files import shard_files
from cxr_retrieval.index.plan import plan_index
from cxr_retrieval.index.proof import K, Proof, prove
from cxr_retrieval.index.quantizer import QUANTIZER_FILE, index_of, train
from cxr_retrieval.index.shards import INDEX_FILE, Passing, Shards, exact_distances

ROWS, DIMENSIONS, LISTS, SHARDS = 1200, 16, 32, 3
TARGET = 0.9
HERE = SimpleNamespace(  # tasks run here, at once
    remote=lambda **_: lambda task: SimpleNamespace(remote=task),
    put=lambda value: value,
    wait=lambda waiting, num_returns: (waiting[:num_returns], waiting[num_returns:]),
    get=lambda value: value,
)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Writes an index of lists; what `index.json` says before the proof. A patient has four rows, near each other; two
    in five rows are lateral, and far from the others."""
    monkeypatch.setattr(proof, "ray", HERE)
    monkeypatch.setattr(proof, "_Files", lambda _: tmp_path.joinpath)

    def write(patients: int = ROWS // 4, ids_N: np.ndarray | None = None) -> dict[str, Any]:
        random = np.random.default_rng(0)
        lateral_N = np.arange(ROWS) % 5 < 2
        patient_N = np.arange(ROWS) * patients // ROWS
        rows_ND = (
            0.4 * random.normal(size=(ROWS, DIMENSIONS)) + 0.3 * random.normal(size=(patients, DIMENSIONS))[patient_N]
        )
        rows_ND[:, 0] += np.where(lateral_N, 2, -2)
        rows_ND = unit(rows_ND).astype(np.float16)
        ids_N = np.arange(ROWS) if ids_N is None else ids_N
        plan = plan_index(ROWS, DIMENSIONS, IndexSettings(latency_ms=1e-9))
        plan = SimpleNamespace(**(vars(plan) | {"lists": LISTS, "graph": False}))
        trained = train(plan, rows_ND)  # type: ignore[arg-type]
        (tmp_path / "shards").mkdir()
        for number, rows in enumerate(np.array_split(np.arange(ROWS), SHARDS)):
            names = shard_files(number)
            np.save(tmp_path / names["rows"], rows_ND[rows])
            faiss.write_index(index_of(plan, rows_ND[rows], trained), str(tmp_path / names["faiss"]))  # type: ignore[arg-type]
            columns = {
                "id": pa.array(ids_N[rows], pa.int64()),
                "patient": [f"p{patient}" for patient in patient_N[rows]],
                "view": np.where(lateral_N[rows], "LL", "PA").tolist(),
                "sex": pa.array([None] * len(rows), pa.string()),
                "held_out": rows % 3 == 0,
            }
            pq.write_table(pa.table(columns), tmp_path / names["sidecar"])
        (tmp_path / QUANTIZER_FILE).write_bytes(trained.quantizer)
        facts = {"shards": SHARDS, "dimensions": DIMENSIONS, "lists": LISTS, "candidates": 1, "factory": "IVF32,SQfp16"}
        (tmp_path / INDEX_FILE).write_text(json.dumps(facts))
        return facts

    return write


def proven(facts: dict[str, Any], **settings: Any) -> Proof:
    return prove({}, facts, IndexSettings(recall_target=TARGET, proof_queries=60, latency_ms=1000, **settings))


def recalls(shards: Shards, lateral: bool) -> list[float]:
    """Of held-out images of the one view among those of the other, without their patient, by the definition."""
    tables = [shards.sidecar(number) for number in shards.numbers]
    view_N, patient_N = (np.concatenate([table[name].to_numpy() for table in tables]) for name in ("view", "patient"))
    rows_ND = np.concatenate([shard.rows_ND for shard in shards.shards])
    ids_N = np.concatenate([shard.ids_N for shard in shards.shards])
    asked, other = ("LL", "PA") if lateral else ("PA", "LL")
    found = []
    for row in np.flatnonzero(view_N == other)[::15]:
        passes_N = (view_N == asked) & (patient_N != patient_N[row])
        query_D = rows_ND[row].astype(np.float32)
        far_N = np.where(passes_N, exact_distances(query_D, rows_ND), np.inf)
        truth = {*ids_N[np.argsort(far_N, kind="stable")[:K]].tolist()}
        allowed = [Passing.of(part) for part in np.array_split(passes_N, SHARDS)]
        (hits,) = shards.search(query_D[None], K, allowed)
        found.append(len(truth & {hit.id for hit in hits}) / K)
    return found


def test_filters_that_have_to_do_with_the_images_reach_the_target_too(written, tmp_path: Path) -> None:
    facts = written()
    done = proven(facts)
    assert {setting.filter: setting.passing for setting in done.filtered if setting.filter} == {
        "view PA": 0.6,
        "view LL": 0.4,
    }
    assert all(setting.recall >= TARGET for setting in done.filtered)
    of_images = done.filter_probes
    by_id = [[setting.passing, setting.probes] for setting in done.filtered if not setting.filter]
    found = {}
    for name, probes in (("of images", of_images), ("by id", by_id)):
        told = facts | {"probes": done.probes, "filter_probes": probes}
        shards = Shards(told, tmp_path.joinpath)
        found[name] = float(np.mean(recalls(shards, True) + recalls(shards, False)))
    assert found["of images"] >= TARGET - 0.03  # other images than those that were proven
    assert found["by id"] < TARGET - 0.2


def test_ever_narrower_filters_are_proven_as_long_as_lists_are_looked_up_for_so_few_rows(
    written, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = written()

    def narrowest() -> float:
        return min(share for share, _ in proven(facts).filter_probes)

    assert narrowest() == 1 / 100
    monkeypatch.setattr(proof, "EXACT_BELOW", ROWS // 1000 - 1)
    assert narrowest() == 1 / 1000


def test_fewer_rows_that_pass_are_never_looked_for_in_fewer_lists() -> None:
    settings = [
        proof.Setting(*figures)
        for figures in (
            (6, 1.0, 1.0, 1.0, 0.1),
            (16, 1.0, 1.0, 1.0, 0.01),
            (12, 1.0, 1.0, 1.0, 0.4, "view LL"),
            (4, 1.0, 1.0, 1.0, 0.4, "sex F"),
        )
    ]
    done = Proof(1, 0.9, 4, 1.0, [], settings, 2.0)
    assert done.filter_probes == [[0.4, 12], [0.1, 12], [0.01, 16]]


def test_images_of_the_query_s_own_patient_do_not_count(written, tmp_path: Path) -> None:
    facts = written()
    shards = Shards(facts, tmp_path.joinpath)
    query_QD, queries = proof._queries(shards, 40)
    found = proof._exact(tmp_path.joinpath, SHARDS, query_QD, queries, [proof._Filter(1.0)])  # type: ignore[arg-type]
    patient_N = np.concatenate([shards.sidecar(number)["patient"].to_numpy() for number in shards.numbers])
    rows_ND = np.concatenate([shard.rows_ND for shard in shards.shards])
    for query_D, query, hits in zip(query_QD, queries, found.nearest[0], strict=True):
        far_N = np.where(patient_N != query.patient, exact_distances(query_D, rows_ND), np.inf)
        assert [hit.id for hit in hits] == np.argsort(far_N, kind="stable")[:K].tolist()
        own = [number * ROWS // SHARDS + rows for number, rows in found.own[query.patient].items()]
        assert np.concatenate(own).tolist() == np.flatnonzero(patient_N == query.patient).tolist()
    trial = proof._Trial(shards, query_QD, queries, found.own, proof._Filter(1.0), found.nearest[0])
    assert trial.measured(LISTS).recall == 1.0  # the index finds none of them either
    assert trial.measured(1).recall < 1.0


def test_where_nothing_can_be_found_nothing_is_proven(written) -> None:
    random = np.random.default_rng(0)
    ids_N = 10 * random.choice(1 << 40, ROWS, replace=False) + 1  # no id is a multiple of 10
    ids_N[7] = 10  # but for one image, which one patient does not find
    done = proven(written(ids_N=ids_N))
    assert [setting.passing for setting in done.filtered if not setting.filter] == [0.1]
    assert done.filtered[0].recall == 1.0


def test_an_index_of_one_patient_has_nothing_to_find(written) -> None:
    with pytest.raises(UserError, match="all images are of one patient"):
        proven(written(patients=1))
