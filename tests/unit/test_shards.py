"""Promises of search over shards: the answer is that of one index, whatever the shards, filters and ties.

Q queries, N rows, D dimensions.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_retrieval.config import IndexSettings
from cxr_retrieval.errors import UserError
from cxr_retrieval.index import plan
from cxr_retrieval.index.files import shard_files
from cxr_retrieval.index.plan import Code, IndexPlan, plan_index
from cxr_retrieval.index.quantizer import QUANTIZER_FILE, Trained, index_of, train
from cxr_retrieval.index.shards import INDEX_FILE, SLACK, Candidates, Found, Passing, Shards, exact_distances

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


CODES = [
    Code("SQfp16", 2 * DIMENSIONS, 1, 1.0),
    Code("SQ8", DIMENSIONS, 4, 1.0),
    Code(f"PQ{DIMENSIONS // 4}", DIMENSIONS // 4, 16, 1.0),
]
EXACT, STORED, BYTES, PRODUCT = "exact", *(code.name for code in CODES)


def planned(rows: int, dimensions: int, shards: int, kind: str) -> IndexPlan:
    """A plan with few lists and so many shards; `kind` is the code of its lists, or exact."""
    found = plan_index(rows, dimensions, IndexSettings(shard_rows=-(-rows // shards)))
    assert found.shards == shards
    if kind == EXACT:
        return found
    code = next(code for code in CODES if code.name == kind)
    return replace(found, lists=LISTS, code=code)


@pytest.fixture(scope="module")
def trained(rows_ND: np.ndarray) -> dict[str, Trained | None]:
    """Lists and codebooks for every kind."""
    kinds = [code.name for code in CODES]
    return {EXACT: None} | {kind: train(planned(ROWS, DIMENSIONS, 1, kind), rows_ND) for kind in kinds}


def write_index(
    folder: Path,
    rows_ND: np.ndarray,
    ids_N: np.ndarray,
    shards: int,
    kind: str = EXACT,
    trained: Trained | None = None,
) -> Shards:
    """An index as the build writes it, without sidecar columns that a search does not need."""
    built = planned(*rows_ND.shape, shards, kind)
    (folder / "shards").mkdir(parents=True)
    edges = np.linspace(0, len(rows_ND), shards + 1).astype(int)
    for number in range(shards):
        part, paths = slice(edges[number], edges[number + 1]), shard_files(number)
        np.save(folder / paths["rows"], rows_ND[part])
        faiss.write_index(index_of(built, rows_ND[part], trained), str(folder / paths["faiss"]))
        pq.write_table(pa.table({"id": ids_N[part]}), folder / paths["sidecar"])
        pictures = pa.table({"jpeg": [b"%d" % row_id for row_id in ids_N[part]]})
        pq.write_table(pictures, folder / paths["thumbnails"], row_group_size=64)
    if trained:
        (folder / QUANTIZER_FILE).write_bytes(trained.quantizer)
    facts = {
        "shards": shards,
        "dimensions": built.dimensions,
        "lists": built.lists,
        "candidates": built.code.candidates,
        "probes": max(1, built.lists // 4),
        "filter_probes": [[0.1, max(1, built.lists // 2)]],
    }
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


def cut(mask_N: np.ndarray, shards: Shards) -> list[Passing]:
    edges = np.cumsum([len(shard.ids_N) for shard in shards.shards])[:-1]
    return [Passing.of(part) for part in np.split(mask_N, edges)]


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
    trained: dict[str, Trained | None],
) -> Shards:
    folder = tmp_path_factory.mktemp("ivf") / "index"
    return write_index(folder, rows_ND, ids_N, request.param, STORED, trained[STORED])


@pytest.fixture(scope="module", params=[EXACT, STORED, BYTES])
def either(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    rows_ND: np.ndarray,
    ids_N: np.ndarray,
    trained: dict[str, Trained | None],
) -> Shards:
    folder = tmp_path_factory.mktemp("either") / "index"
    return write_index(folder, rows_ND, ids_N, 3, request.param, trained[request.param])


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
    trained: dict[str, Trained | None],
) -> None:
    shared = trained[STORED]
    assert shared is not None
    quantizer = faiss.deserialize_index(np.frombuffer(shared.quantizer, np.uint8))
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


@pytest.mark.parametrize("shards", [2, 5])
@pytest.mark.parametrize("kind", [BYTES, PRODUCT])
def test_candidates_of_short_codes_are_those_of_one_index_over_all_rows(
    kind: str,
    shards: int,
    tmp_path: Path,
    queries_QD: np.ndarray,
    rows_ND: np.ndarray,
    ids_N: np.ndarray,
    trained: dict[str, Trained | None],
) -> None:
    one, many = (
        write_index(tmp_path / str(count), rows_ND, ids_N, count, kind, trained[kind]) for count in (1, shards)
    )
    for probes, candidates in ((1, 1), (2, 2), (LISTS, 1), (LISTS, 4)):
        expected = answers(one.search(queries_QD, K, probes=probes, candidates=candidates))
        assert answers(many.search(queries_QD, K, probes=probes, candidates=candidates)) == expected
        # Groups of shards that are asked apart hold the same ones together.
        nearest, wanted = many.lists.nearest(queries_QD, probes=probes), K * candidates
        groups = [Shards(many.facts, many._path, numbers) for numbers in (range(1), range(1, shards))]
        parts = zip(*(group.candidates(queries_QD, wanted, nearest) for group in groups), strict=True)
        assert answers([Candidates.joined(pair).first(wanted, K) for pair in parts]) == expected


def test_comparing_more_candidates_by_the_stored_rows_makes_up_for_short_codes(
    tmp_path: Path, queries_QD: np.ndarray, rows_ND: np.ndarray, ids_N: np.ndarray, trained: dict[str, Trained | None]
) -> None:
    shards = write_index(tmp_path / "index", rows_ND, ids_N, 2, PRODUCT, trained[PRODUCT])
    exact = answers(shards.exact(queries_QD, K))
    found = [answers(shards.search(queries_QD, K, probes=LISTS, candidates=many)) for many in (1, 4, ROWS)]
    right = [sum(len(set(a) & set(b)) for a, b in zip(ours, exact, strict=True)) for ours in found]
    assert right == sorted(right)
    assert right[0] < right[2]
    assert found[2] == exact


def test_a_graph_of_lists_gives_the_same_answer_over_any_number_of_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queries_QD: np.ndarray, rows_ND: np.ndarray, ids_N: np.ndarray
) -> None:
    monkeypatch.setattr(plan, "GRAPH_LISTS", 1)
    drawn = train(planned(ROWS, DIMENSIONS, 1, STORED), rows_ND)
    one, many = (write_index(tmp_path / str(count), rows_ND, ids_N, count, STORED, drawn) for count in (1, 4))
    assert isinstance(many.lists.quantizer, faiss.IndexHNSW)
    for probes in (1, 3):
        assert answers(many.search(queries_QD, K, probes=probes)) == answers(one.search(queries_QD, K, probes=probes))
    assert answers(many.search(queries_QD, K, probes=LISTS)) == answers(many.exact(queries_QD, K))


def test_a_graph_of_rows_is_no_choice_because_it_loses_the_hits_of_a_narrow_filter() -> None:
    rng = np.random.default_rng(5)
    rows_ND = unit(rng.normal(size=(8, 32))[rng.integers(8, size=4000)] + 0.5 * rng.normal(size=(4000, 32)))
    graph = faiss.IndexHNSWFlat(32, 32)
    graph.add(rows_ND.astype(np.float32))
    passes_N = rng.random(len(rows_ND)) < 0.01
    selector = faiss.IDSelectorBitmap(np.packbits(passes_N, bitorder="little"))
    parameters = faiss.SearchParametersHNSW(efSearch=64, sel=selector)
    _, found = graph.search(rows_ND[:50].astype(np.float32), K, params=parameters)
    assert (found >= 0).sum() < 0.7 * found.size


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
    expected = brute_force(queries_QD, rows_ND, ids_N, K, mask_N)
    assert answers(found) == expected
    assert answers(either.exact(queries_QD, K, cut(mask_N, either))) == expected


@pytest.mark.parametrize(("passing", "probes"), [(1.0, 2), (0.999, 2), (0.1, 4), (0.099, LISTS), (0.0, LISTS)])
def test_a_narrower_filter_searches_the_lists_that_the_proof_found_it_to_need(
    passing: float, probes: int, inverted: Shards, queries_QD: np.ndarray
) -> None:
    masks = cut(np.arange(ROWS) < round(passing * ROWS), inverted)
    found = answers(inverted.search(queries_QD, K, masks))
    assert found == answers(inverted.search(queries_QD, K, masks, probes=probes))


def test_a_shard_where_nothing_passes_hides_no_hit_of_another(
    either: Shards, queries_QD: np.ndarray, rows_ND: np.ndarray, ids_N: np.ndarray
) -> None:
    masks = [np.full(len(shard.ids_N), number == 0) for number, shard in enumerate(either.shards)]
    found = either.search(queries_QD, K, [Passing.of(mask) for mask in masks], probes=LISTS)
    assert {hit.shard for hits in found for hit in hits} == {0}
    assert answers(found) == brute_force(queries_QD, rows_ND, ids_N, K, np.concatenate(masks))


@settings(deadline=None)
@given(rows=st.integers(1, 70), passing=st.sets(st.integers(0, 69)), left_out=st.sets(st.integers(0, 69)))
def test_rows_that_pass_are_told_alike_by_their_bits_their_numbers_and_their_count(
    rows: int, passing: set[int], left_out: set[int]
) -> None:
    mask_N = np.array([row in passing for row in range(rows)])
    whole = Passing.of(mask_N)
    taken = np.array([row for row in left_out if row < rows], np.int64)
    some = whole.without(taken)
    mask_N[taken] = False
    assert some.rows.tolist() == np.flatnonzero(mask_N).tolist()
    assert some.bits.tolist() == np.packbits(mask_N, bitorder="little").tolist()
    assert some.count == mask_N.sum()
    assert [some.selector.is_member(row) for row in range(rows)] == mask_N.tolist()
    assert whole.rows.tolist() == sorted(row for row in passing if row < rows)  # what is kept stays as it is


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


def test_an_index_of_an_earlier_release_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps({"shards": 1, "dimensions": 8, "lists": 0, "probes": 1}))
    with pytest.raises(UserError, match="of an earlier release: build and publish it again"):
        Shards.open(tmp_path.joinpath)


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
