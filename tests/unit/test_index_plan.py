"""Promises of the index plan: pure arithmetic that covers every row once, can be trained and searched, and says why."""

import itertools
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.config import IndexSettings
from cxr_retrieval.index import build as index_build
from cxr_retrieval.index.plan import (
    CODEBOOK_ROWS,
    GIB,
    KNOWN_BYTES,
    TRAIN_PER_LIST,
    Code,
    IndexPlan,
    _codes,
    plan_index,
    plan_probes,
    shard_bytes,
    whole_parts,
)
from cxr_retrieval.index.quantizer import index_of, list_sizes, train
from tests.commands import done, job

ROWS = st.one_of(st.integers(1, 3000), st.integers(1, 10**9))
DIMENSIONS = st.integers(1, 4096)
MANY = 1000  # shards of one plan: more would only make the test slow
DOCUMENT = Path(__file__).parents[2] / "docs" / "index.md"
TABLE_DIMENSIONS = 768


def inverted(rows: int, dimensions: int = 96, **changes: float) -> IndexPlan:
    """A plan that no exact index is fast enough for."""
    return plan_index(rows, dimensions, IndexSettings(latency_ms=1e-9, **changes))


def shard_rows_for(rows: int) -> st.SearchStrategy[int]:
    return st.integers(max(1, rows // MANY), 2 * rows)


SIZES = ROWS.flatmap(lambda rows: st.tuples(st.just(rows), shard_rows_for(rows)))


@given(SIZES, DIMENSIONS, st.floats(0.01, 1000))
def test_there_are_as_many_shards_as_their_rows_need(
    sizes: tuple[int, int], dimensions: int, latency_ms: float
) -> None:
    rows, shard_rows = sizes
    plan = plan_index(rows, dimensions, IndexSettings(shard_rows=shard_rows, latency_ms=latency_ms, memory_gib=1e6))
    assert (plan.shards, plan.shard_rows) == (-(-rows // shard_rows), shard_rows)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(1, 100))
def test_shards_are_whole_neighbouring_parts_filled_as_far_as_they_go(sizes: list[int], most: int) -> None:
    shards = whole_parts(sizes, most)
    assert [part for shard in shards for part in shard] == list(range(len(sizes)))
    filled = [sum(sizes[part] for part in shard) for shard in shards]
    assert all(rows <= most or len(shard) == 1 for rows, shard in zip(filled, shards, strict=True))
    # The next part would not have gone in.
    assert all(rows + sizes[shard.stop] > most for rows, shard in zip(filled[:-1], shards[:-1], strict=True))


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=30),
    st.lists(st.integers(0, 50), max_size=10),
    st.integers(1, 100),
)
def test_a_corpus_that_grows_keeps_its_shards_but_the_last(sizes: list[int], more: list[int], most: int) -> None:
    before = whole_parts(sizes, most)
    assert whole_parts([*sizes, *more], most)[: len(before) - 1] == before[:-1]


@given(st.integers(1, 10**7), DIMENSIONS, st.floats(0.05, 64))
def test_no_shard_takes_more_memory_to_build_than_a_machine_has(rows: int, dimensions: int, memory_gib: float) -> None:
    plan = plan_index(rows, dimensions, IndexSettings(memory_gib=memory_gib))
    assert shard_bytes(plan.shard_rows, dimensions) <= memory_gib * GIB


@given(ROWS, DIMENSIONS, st.floats(0.1, 1000), st.floats(0.5, 64))
def test_an_index_is_exact_where_comparing_all_rows_is_fast_enough_and_they_fit(
    rows: int, dimensions: int, latency_ms: float, memory_gib: float
) -> None:
    plan = plan_index(rows, dimensions, IndexSettings(latency_ms=latency_ms, memory_gib=memory_gib))
    assert (plan.lists == 0) == (plan.factory == "SQfp16") == (plan.training_rows == 0)
    if plan.lists == 0:
        assert plan.latency_ms <= latency_ms
        assert plan.memory <= memory_gib * GIB
    else:
        assert "index.latency_ms" in plan.why["kind"] or "index.memory_gib" in plan.why["kind"]


@given(ROWS, DIMENSIONS)
def test_only_an_exact_index_is_planned_for_a_recall_of_one(rows: int, dimensions: int) -> None:
    assert plan_index(rows, dimensions, IndexSettings(recall_target=1, latency_ms=1e-9)).lists == 0


@given(st.integers(2, 10**9))
def test_lists_are_a_power_of_two_near_four_roots_and_can_be_trained(rows: int) -> None:
    plan = inverted(rows)
    assert plan.lists.bit_count() == 1
    assert plan.lists <= 4 * rows**0.5 * 2**0.5
    assert plan.training_rows == min(rows, max(plan.lists * TRAIN_PER_LIST, CODEBOOK_ROWS))
    assert plan.lists == 1 or plan.lists * TRAIN_PER_LIST <= rows
    assert plan.graph == ("_HNSW" in plan.factory) == (plan.lists >= 65536)
    if rows >= 1 << 16:  # enough to train all that are wanted
        assert plan.lists >= 4 * rows**0.5 / 2**0.5


@given(st.integers(10**4, 10**9), st.sampled_from([96, 199, 384, 398, 768, 770, 1536]), st.floats(4, 512))
def test_a_code_is_the_longest_that_fits_and_keeps_the_recall_target(
    rows: int, dimensions: int, memory_gib: float
) -> None:
    plan = inverted(rows, dimensions, memory_gib=memory_gib)
    roomy = inverted(rows, dimensions, memory_gib=4 * memory_gib)
    assert plan.code.recall >= 0.95
    numbers_a_byte = dimensions / plan.code.bytes
    assert numbers_a_byte <= {1.0: 2, 0.99: 4, 0.95: 8}[plan.code.recall], "no shorter than was measured"
    assert plan.code.bytes <= roomy.code.bytes
    assert (plan.machines > 1) == (plan.memory > memory_gib * GIB) == ("machines" in plan.why)
    strict = inverted(rows, dimensions, memory_gib=memory_gib, recall_target=0.995)
    assert strict.code.recall == 1.0


@pytest.mark.parametrize(("rows", "wanted"), [(10, 10), (11, 10), (19, 10), (25, 10), (1000, 999), (997, 64)])
def test_as_many_rows_are_sampled_as_are_planned_evenly_and_whatever_the_shards(
    monkeypatch: pytest.MonkeyPatch, rows: int, wanted: int
) -> None:
    plan = replace(plan_index(rows, 1, IndexSettings()), training_rows=wanted)
    parts = np.array_split(np.arange(rows)[:, None], 3)
    monkeypatch.setattr(index_build.Model, "open", lambda _: None)
    monkeypatch.setattr(index_build, "vectors_of", lambda _, __, part, ___: (parts[part], None, None))
    source = SimpleNamespace(model_uri="")
    firsts = np.cumsum([0, *map(len, parts)]).tolist()
    taken = np.concatenate([index_build._sample(range(n, n + 1), firsts[n], plan, source)[:, 0] for n in range(3)])
    assert len(taken) == wanted
    assert set(np.diff(taken)) <= {rows // wanted, -(-rows // wanted)}


@given(st.integers(10**4, 10**9), st.integers(10**3, 10**6))
def test_shards_do_not_change_what_kind_of_index_is_built(rows: int, shard_rows: int) -> None:
    one, many = (inverted(rows, shard_rows=size, memory_gib=1e6) for size in (rows, max(shard_rows, rows // MANY)))
    assert (one.factory, one.training_rows, one.bytes) == (many.factory, many.training_rows, many.bytes)


@given(ROWS, DIMENSIONS, st.floats(1, 1000))
def test_every_choice_has_its_reason_in_a_sentence(rows: int, dimensions: int, latency_ms: float) -> None:
    plan = plan_index(rows, dimensions, IndexSettings(latency_ms=latency_ms))
    chosen = {"kind", "code", "shards"} | ({"lists", "probes"} if plan.lists else set())
    assert chosen <= set(plan.why) <= chosen | {"latency", "machines"}
    assert ("latency" in plan.why) == (plan.latency_ms > latency_ms)
    assert all(reason and "\n" not in reason for reason in plan.why.values())


@given(st.integers(0, 1 << 20))
def test_probes_ascend_by_at_most_twofold_to_all_lists_so_that_codes_alone_limit_recall(lists: int) -> None:
    probes = plan_probes(lists)
    assert probes[0] == 1
    assert probes[-1] == max(lists, 1)
    assert all(a < b <= 2 * a for a, b in itertools.pairwise(probes))


def test_an_exact_index_has_one_setting() -> None:
    assert plan_probes(0) == [1]


def test_bytes_are_those_of_codes_ids_and_centroids() -> None:
    assert plan_index(1000, 96, IndexSettings()).bytes == 1000 * 96 * 2
    plan = inverted(1_000_000)
    assert (plan.lists, plan.code.name) == (4096, "SQfp16")
    assert plan.bytes == 1_000_000 * (96 * 2 + 8) + 4096 * 96 * 4


@pytest.mark.parametrize("code", _codes(64), ids=lambda code: code.name)
def test_the_planned_bytes_are_those_that_faiss_writes(code: Code) -> None:
    rows, dimensions = 5000, 64
    plan = replace(inverted(rows, dimensions, shard_rows=rows), code=code)
    rows_ND = np.random.default_rng(0).normal(size=(rows, dimensions)).astype(np.float32)
    trained = train(plan, rows_ND)
    index = index_of(plan, rows_ND, trained)
    written = len(faiss.serialize_index(index)) + len(trained.quantizer)
    assert plan.bytes <= written <= plan.bytes + 8 * plan.lists + 1000
    assert list_sizes(index).sum() == rows
    assert index.code_size == plan.code.bytes
    assert replace(plan, shards=300).bytes == plan.bytes + 299 * code.codebook


def test_memory_has_room_for_what_is_known_of_the_rows_beside_their_codes() -> None:
    plan = inverted(100_000_000, 768, memory_gib=64)
    assert plan.memory == plan.bytes + 100_000_000 * KNOWN_BYTES <= 64 * GIB
    longer = next(code for code in reversed(_codes(768)) if code.bytes > plan.code.bytes)
    assert replace(plan, code=longer).bytes <= 64 * GIB < replace(plan, code=longer).memory


@pytest.mark.parametrize("numbers", [(0, 96), (10, 0), (-1, 96), (10, -96)])
def test_numbers_below_one_are_refused(numbers: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        plan_index(*numbers, IndexSettings())


def test_a_plan_for_any_size_is_printed_with_its_reasons_and_needs_neither_corpus_nor_model() -> None:
    shown = done("index", "--plan", "--rows", "10000000", "--dimensions", "768")
    plan = plan_index(10**7, 768, IndexSettings())
    assert f"{plan.factory} " in shown
    assert all(f"{choice}: {reason}" in shown for choice, reason in plan.why.items())


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--plan", "--rows", "10"], "--rows and --dimensions go together"),
        (["--plan", "--rows", "0", "--dimensions", "8"], "must be at least 1"),
        (["--rows", "10", "--dimensions", "8"], "are for --plan"),
    ],
)
def test_a_size_that_cannot_be_planned_is_refused_in_one_line(words: list[str], error: str) -> None:
    assert error in job("index", *words).error


def test_the_documented_table_is_what_is_planned() -> None:
    found = re.findall(r"^\| (10\^\d|[\d,]+) \| `([^`]+)` \| (.+) \|$", DOCUMENT.read_text(), flags=re.MULTILINE)
    assert [rows for rows, *_ in found] == [f"{10**power:,}" for power in range(4, 10)]
    for rows, factory, rest in found:
        plan = plan_index(int(rows.replace(",", "")), TABLE_DIMENSIONS, IndexSettings(memory_gib=64))
        assert factory == plan.factory
        columns = [column.strip() for column in rest.split("|")]
        assert columns == [
            str(plan.code.bytes),
            f"{plan.bytes / GIB:.3g}",
            f"{plan.memory / GIB:.3g}",
            str(plan.machines),
            f"{plan.shards:,}",
            f"{plan.shard_rows:,}",
            f"{plan.latency_ms:.3g}",
            f"{plan.build_hours:,.2f}",
        ]
