"""Promises of the index plan: pure arithmetic that covers every row once and can be trained and searched."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.index.plan import TRAIN_PER_LIST, plan_index, plan_probes

ROWS = st.one_of(st.integers(1, 3000), st.integers(1, 10**9))
DIMENSIONS = st.integers(1, 4096)
MANY = 10_000  # shards of one plan: more would only make the test slow


def shard_rows_for(rows: int) -> st.SearchStrategy[int]:
    return st.integers(max(1, rows // MANY), 2 * rows)


SIZES = ROWS.flatmap(lambda rows: st.tuples(st.just(rows), shard_rows_for(rows)))


@given(SIZES, DIMENSIONS, st.integers(1, 10**9))
def test_shards_cover_all_rows_once_in_order_and_none_is_too_large(
    sizes: tuple[int, int], dimensions: int, exact_rows: int
) -> None:
    rows, shard_rows = sizes
    shards = plan_index(rows, dimensions, shard_rows, exact_rows).shards
    assert [shard.number for shard in shards] == list(range(len(shards)))
    assert shards[0].start == 0
    assert shards[-1].stop == rows
    assert all(a.stop == b.start for a, b in itertools.pairwise(shards))
    lengths = [shard.stop - shard.start for shard in shards]
    assert 1 <= min(lengths) <= max(lengths) <= shard_rows
    assert max(lengths) - min(lengths) <= 1  # evenly filled
    assert len(shards) == -(-rows // shard_rows)  # and no more than are needed


@given(ROWS, st.integers(1, 10**9))
def test_an_index_is_exact_up_to_exact_rows_and_only_up_to_them(rows: int, exact_rows: int) -> None:
    plan = plan_index(rows, 96, rows, exact_rows)
    assert (plan.lists == 0) == (plan.factory == "Flat") == (rows <= exact_rows)
    assert (plan.training_rows == 0) == (plan.lists == 0)


@given(st.integers(2, 10**9))
def test_lists_are_a_power_of_two_near_four_roots_and_can_be_trained(rows: int) -> None:
    plan = plan_index(rows, 96, rows, exact_rows=1)
    assert plan.factory == f"IVF{plan.lists},Flat"
    assert plan.lists.bit_count() == 1
    assert plan.lists <= 4 * rows**0.5 * 2**0.5
    assert plan.training_rows <= rows
    assert plan.training_rows >= min(rows, plan.lists * TRAIN_PER_LIST)
    assert plan.lists == 1 or plan.lists * TRAIN_PER_LIST <= rows
    if rows >= 1 << 16:  # enough to train all that are wanted
        assert plan.lists >= 4 * rows**0.5 / 2**0.5


@given(SIZES, DIMENSIONS)
def test_shards_do_not_change_what_kind_of_index_is_built(sizes: tuple[int, int], dimensions: int) -> None:
    rows, shard_rows = sizes
    one, many = (plan_index(rows, dimensions, size, exact_rows=1000) for size in (rows, shard_rows))
    assert (one.lists, one.training_rows, one.factory, one.bytes) == (
        many.lists,
        many.training_rows,
        many.factory,
        many.bytes,
    )


@given(st.integers(0, 1 << 20))
def test_probes_are_ascending_powers_of_two_and_at_most_all_lists(lists: int) -> None:
    probes = plan_probes(lists)
    assert probes == [2**power for power in range(len(probes))]
    assert probes[-1] <= max(lists, 1) < 2 * probes[-1]


@given(st.integers(2, 10**9))
def test_the_last_probe_searches_every_list_so_that_any_target_can_be_reached(rows: int) -> None:
    plan = plan_index(rows, 96, rows, exact_rows=1)
    assert plan_probes(plan.lists)[-1] == plan.lists


def test_a_flat_index_has_one_setting() -> None:
    assert plan_probes(0) == [1]


def test_bytes_are_those_of_vectors_ids_and_centroids() -> None:
    assert plan_index(1000, 96, 400, exact_rows=1000).bytes == 1000 * 96 * 4
    plan = plan_index(1_000_000, 96, 400_000, exact_rows=1000)
    assert plan.lists == 4096
    assert plan.bytes == 1_000_000 * (96 * 4 + 8) + 4096 * 96 * 4


@pytest.mark.parametrize("numbers", [(0, 96, 10), (10, 0, 10), (10, 96, 0), (-1, 96, 10), (10, -96, 10), (10, 96, -1)])
def test_numbers_below_one_are_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        plan_index(*numbers, exact_rows=10)
