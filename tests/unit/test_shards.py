"""Promises of search over shards: the answer is that of one index, whatever the shards, filters and ties.

Q queries, N rows, D dimensions.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cxr_retrieval.errors import UserError
from cxr_retrieval.index.build import _faiss_index
from cxr_retrieval.index.plan import plan_index
from cxr_retrieval.index.shards import INDEX_FILE, SLACK, Found, Shards, exact_distances, shard_files

ROWS, DIMENSIONS, LISTS = 600, 24, 8
TIES = 40  # more equal vectors than a search asks FAISS for beyond k
K = 10


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def rows_ND() -> np.ndarray:
    """Unit vectors in float16, some of them many times, at places that fall into different shards."""
    rng = np.random.default_rng(0)
    centres = unit(rng.normal(size=(12, DIMENSIONS)))
    rows = unit(centres[rng.integers(12, size=ROWS)] + 0.15 * rng.normal(size=(ROWS, DIMENSIONS)))
    rows[rng.choice(np.arange(1, ROWS), TIES - 1, replace=False)] = rows[0]
    return rows.astype(np.float16)


@pytest.fixture(scope="module")
def ids_N() -> np.ndarray:
    return np.random.default_rng(1).choice(1 << 62, ROWS, replace=False).astype(np.int64)


@pytest.fixture(scope="module")
def queries_QD(rows_ND: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(2)
    near = rows_ND[rng.choice(ROWS, 25)].astype(np.float32) + 0.05 * rng.normal(size=(25, DIMENSIONS))
    return np.concatenate([rows_ND[:1], unit(near)]).astype(np.float32)


@pytest.fixture(scope="module")
def centroids(rows_ND: np.ndarray) -> np.ndarray:
    clustering = faiss.Kmeans(DIMENSIONS, LISTS, seed=0)
    clustering.train(rows_ND.astype(np.float32))
    return np.asarray(clustering.centroids)


def write_index(
    folder: Path, rows_ND: np.ndarray, ids_N: np.ndarray, shards: int, centroids: np.ndarray | None = None
) -> Shards:
    """An index as the build writes it, without sidecar columns that a search does not need."""
    count, dimensions = rows_ND.shape
    lists = 0 if centroids is None else len(centroids)
    plan = plan_index(count, dimensions, -(-count // shards), count)
    plan = plan.__class__(count, dimensions, lists, 0, plan.shards)
    assert len(plan.shards) == shards
    (folder / "shards").mkdir(parents=True)
    for shard in plan.shards:
        part, paths = slice(shard.start, shard.stop), shard_files(shard.number)
        np.save(folder / paths["rows"], rows_ND[part])
        faiss.write_index(_faiss_index(plan, rows_ND[part].astype(np.float32), centroids), str(folder / paths["faiss"]))
        pq.write_table(pa.table({"id": ids_N[part]}), folder / paths["sidecar"])
        pictures = pa.table({"jpeg": [b"%d" % row_id for row_id in ids_N[part]]})
        pq.write_table(pictures, folder / paths["thumbnails"], row_group_size=64)
    facts = {"shards": shards, "dimensions": dimensions, "lists": lists, "probes": max(1, lists // 4)}
    (folder / INDEX_FILE).write_text(json.dumps(facts))
    return Shards.open(folder.joinpath)


def answers(found: list[list[Found]]) -> list[list[tuple[int, float]]]:
    return [[(hit.id, hit.distance) for hit in hits] for hits in found]


def brute_force(
    queries_QD: np.ndarray, rows_ND: np.ndarray, ids_N: np.ndarray, k: int, allowed: np.ndarray | None = None
) -> list[list[tuple[int, float]]]:
    """The definition, row by row."""
    found = []
    for query in queries_QD:
        hits = [
            (float(exact_distances(query, row[None])[0]), int(row_id))
            for n, (row, row_id) in enumerate(zip(rows_ND, ids_N, strict=True))
            if allowed is None or allowed[n]
        ]
        found.append([(row_id, distance) for distance, row_id in sorted(hits)[:k]])
    return found


def cut(mask_N: np.ndarray, shards: Shards) -> list[np.ndarray]:
    edges = np.cumsum([len(shard.ids_N) for shard in shards.shards])[:-1]
    return np.split(mask_N, edges)


@pytest.fixture(scope="module", params=[1, 2, 5])
def flat(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, rows_ND: np.ndarray, ids_N: np.ndarray
) -> Shards:
    return write_index(tmp_path_factory.mktemp("flat") / "index", rows_ND, ids_N, request.param)


@pytest.fixture(scope="module", params=[1, 2, 5])
def inverted(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    rows_ND: np.ndarray,
    ids_N: np.ndarray,
    centroids: np.ndarray,
) -> Shards:
    return write_index(tmp_path_factory.mktemp("ivf") / "index", rows_ND, ids_N, request.param, centroids)


@pytest.fixture(scope="module", params=["flat", "ivf"])
def either(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    rows_ND: np.ndarray,
    ids_N: np.ndarray,
    centroids: np.ndarray,
) -> Shards:
    shared = None if request.param == "flat" else centroids
    return write_index(tmp_path_factory.mktemp("either") / "index", rows_ND, ids_N, 3, shared)


# ---- the same answer


@pytest.mark.parametrize("k", [1, K, TIES - SLACK - 1, ROWS])
def test_flat_search_is_brute_force_with_ties_by_id_over_any_number_of_shards(
    k: int, flat: Shards, queries_QD: np.ndarray, rows_ND: np.ndarray, ids_N: np.ndarray
) -> None:
    assert flat.rows == ROWS
    expected = brute_force(queries_QD, rows_ND, ids_N, k)
    assert answers(flat.search(queries_QD, k)) == expected
    assert answers(flat.exact(queries_QD, k)) == expected
    if k > 1:  # the first query is the vector that occurs many times
        tied = [row_id for row_id, distance in expected[0] if distance == expected[0][0][1]]
        assert tied == sorted(tied)
        assert len(tied) == min(k, TIES)


def test_a_query_alone_is_answered_as_among_others(flat: Shards, queries_QD: np.ndarray) -> None:
    together = answers(flat.search(queries_QD, K))
    assert [answers(flat.search(query[None], K))[0] for query in queries_QD] == together


def test_neighbours_closer_than_float32_can_tell_are_ordered_by_the_stored_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    base = unit(rng.normal(size=(1, 8)))
    rows_ND = unit(base + 2e-4 * rng.normal(size=(500, 8))).astype(np.float16)
    shards = write_index(tmp_path / "index", rows_ND, np.arange(500), 3)
    query_QD = base.astype(np.float32)
    expected = brute_force(query_QD, rows_ND, np.arange(500), 20)
    assert answers(shards.search(query_QD, 20)) == answers(shards.exact(query_QD, 20)) == expected


@pytest.mark.parametrize("probes", [1, 2, LISTS])
def test_ivf_over_shards_is_one_ivf_index_with_the_same_quantizer(
    probes: int,
    inverted: Shards,
    queries_QD: np.ndarray,
    rows_ND: np.ndarray,
    ids_N: np.ndarray,
    centroids: np.ndarray,
) -> None:
    quantizer = faiss.IndexFlatL2(DIMENSIONS)
    quantizer.add(centroids)
    _, cells_N = quantizer.search(rows_ND.astype(np.float32), 1)
    _, probed_QP = quantizer.search(queries_QD, probes)
    found = answers(inverted.search(queries_QD, K, probes=probes))
    for query, probed, hits in zip(queries_QD, probed_QP, found, strict=True):
        (expected,) = brute_force(query[None], rows_ND, ids_N, K, np.isin(cells_N[:, 0], probed))
        assert hits == expected


def test_ivf_uses_the_recorded_probes_unless_told_otherwise(inverted: Shards, queries_QD: np.ndarray) -> None:
    recorded = inverted.facts["probes"]
    plain = answers(inverted.search(queries_QD, K))
    assert plain == answers(inverted.search(queries_QD, K, probes=recorded))
    assert answers(inverted.search(queries_QD, K, probes=LISTS)) == answers(inverted.exact(queries_QD, K))


# ---- filters


@pytest.mark.parametrize("passing", [0, 1, 12, ROWS // 2])
def test_filters_hold_inside_the_search(
    passing: int, either: Shards, queries_QD: np.ndarray, rows_ND: np.ndarray, ids_N: np.ndarray
) -> None:
    mask_N = np.zeros(ROWS, bool)
    # The rows farthest from the first query: a search that filters afterwards would find none of them.
    mask_N[np.argsort(-exact_distances(queries_QD[0], rows_ND))[:passing]] = True
    found = either.search(queries_QD, K, cut(mask_N, either), probes=LISTS)
    allowed_ids = set(ids_N[mask_N].tolist())
    assert all(hit.id in allowed_ids for hits in found for hit in hits)
    assert all(len(hits) == min(K, passing) for hits in found)
    assert answers(found) == brute_force(queries_QD, rows_ND, ids_N, K, mask_N)


def test_a_shard_where_nothing_passes_hides_no_hit_of_another(
    either: Shards, queries_QD: np.ndarray, rows_ND: np.ndarray, ids_N: np.ndarray
) -> None:
    masks = [np.full(len(shard.ids_N), number == 0) for number, shard in enumerate(either.shards)]
    found = either.search(queries_QD, K, masks)
    assert {hit.shard for hits in found for hit in hits} == {0}
    assert answers(found) == brute_force(queries_QD, rows_ND, ids_N, K, np.concatenate(masks))


# ---- what is refused


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_query_that_is_not_finite_is_refused(value: float, either: Shards, queries_QD: np.ndarray) -> None:
    broken = queries_QD.copy()
    broken[3, 5] = value
    with pytest.raises(ValueError, match="not finite"):
        either.search(broken, K)


@pytest.mark.parametrize("shape", [(1, DIMENSIONS - 1), (1, DIMENSIONS + 1), (DIMENSIONS,), (1, 1, DIMENSIONS)])
def test_a_query_of_another_shape_is_refused(shape: Sequence[int], either: Shards) -> None:
    with pytest.raises(ValueError, match=rf"queries must be \[Q, {DIMENSIONS}\]"):
        either.search(np.zeros(shape, np.float32), K)


@pytest.mark.parametrize("k", [0, -1])
def test_fewer_than_one_hit_is_refused(k: int, either: Shards, queries_QD: np.ndarray) -> None:
    with pytest.raises(ValueError, match="k must be at least 1"):
        either.search(queries_QD, k)


@pytest.mark.parametrize("kind", ["faiss", "rows", "sidecar"])
def test_files_of_a_shard_that_differ_in_length_are_refused(
    kind: str, tmp_path: Path, rows_ND: np.ndarray, ids_N: np.ndarray
) -> None:
    whole, short = tmp_path / "whole", tmp_path / "short"
    write_index(whole, rows_ND[:50], ids_N[:50], 2)
    write_index(short, rows_ND[:48], ids_N[:48], 2)
    name = shard_files(1)[kind]
    (whole / name).write_bytes((short / name).read_bytes())
    with pytest.raises(UserError, match="shard 1: index, rows and sidecar differ in length"):
        Shards.open(whole.joinpath)


def test_pickled_rows_are_never_loaded(tmp_path: Path, rows_ND: np.ndarray, ids_N: np.ndarray) -> None:
    write_index(tmp_path / "index", rows_ND[:50], ids_N[:50], 1)
    np.save(tmp_path / "index" / shard_files(0)["rows"], np.array([{"run": "me"}] * 50, dtype=object))
    with pytest.raises(ValueError, match="Python objects"):
        Shards.open((tmp_path / "index").joinpath)


# ---- what a hit leads to


def test_a_hit_leads_to_its_own_sidecar_row_and_thumbnail(either: Shards, queries_QD: np.ndarray) -> None:
    for hit in either.search(queries_QD[:3], K)[2]:
        assert either.sidecar(hit.shard, ["id"])["id"][hit.row].as_py() == hit.id
        assert either.thumbnail(hit.shard, hit.row) == str(hit.id).encode()
    with pytest.raises(IndexError, match="shard 0 has no row"):
        either.thumbnail(0, len(either.shards[0].ids_N))


def test_torch_and_faiss_work_side_by_side_in_one_process(either: Shards, queries_QD: np.ndarray) -> None:
    threads = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(2)
    faiss.omp_set_num_threads(2)
    try:
        network = torch.nn.Conv2d(1, 32, 3)
        images = torch.randn(8, 1, 96, 96)
        with torch.inference_mode(), ThreadPoolExecutor(2) as pool:
            image, hits = network(images), answers(either.search(queries_QD, K))
            forwards = [pool.submit(lambda: network(images)) for _ in range(6)]
            searches = [pool.submit(lambda: answers(either.search(queries_QD, K))) for _ in range(6)]
            assert all(torch.allclose(forward.result(), image, atol=1e-5) for forward in forwards)
            assert all(search.result() == hits for search in searches)
    finally:
        torch.set_num_threads(threads[0])
        faiss.omp_set_num_threads(threads[1])
