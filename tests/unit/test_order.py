"""The order of an epoch: every row at most once, the same for every number of workers, and nothing read twice."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.corpus.reading import PLACE
from cxr_retrieval.errors import UserError
from cxr_retrieval.training.input import WorkerInput
from cxr_retrieval.training.order import Order, group_rows

WORKERS = (1, 2, 3, 4)  # three do not divide LANES
LANES = 4


@st.composite
def orders(draw: st.DrawFn) -> Order:
    groups = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    batch = LANES * draw(st.integers(1, 6))
    if sum(groups) < batch:
        groups.append(batch)
    return Order(np.asarray(groups), draw(st.integers(0, 2**32)), batch, LANES, draw(st.integers(1, 200)))


def order(**changes) -> Order:
    plain = {"group_rows": np.asarray([16] * 20), "seed": 0, "batch_size": 16, "lanes": LANES, "window": 64}
    return Order(**plain | changes)


@given(orders(), st.integers(0, 5))
def test_every_row_comes_at_most_once_and_fewer_than_a_batch_wait(plan, epoch):
    rows = plan.epoch(epoch)
    total = int(plan.group_rows.sum())
    assert rows.shape == (plan.steps, LANES, plan.batch_size // LANES)
    assert len(np.unique(rows)) == rows.size
    assert rows.min() >= 0
    assert rows.max() < total
    assert 0 <= total - rows.size < plan.batch_size


@given(orders(), st.integers(0, 5))
def test_the_same_seed_and_epoch_give_the_same_order(plan, epoch):
    again = Order(plan.group_rows.copy(), plan.seed, plan.batch_size, plan.lanes, plan.window)
    assert np.array_equal(plan.epoch(epoch), again.epoch(epoch))


def test_epochs_and_seeds_differ_in_order():
    assert not np.array_equal(order().epoch(0), order().epoch(1))
    assert not np.array_equal(order().epoch(0), order(seed=1).epoch(0))


def test_no_row_waits_for_ever():
    plan = order(group_rows=np.asarray([7] * 9))  # 63 rows, 15 of them left out in each epoch
    seen = np.unique(np.concatenate([plan.epoch(epoch).reshape(-1) for epoch in range(12)]))
    assert len(seen) == 63


@given(orders(), st.integers(0, 5), st.data())
def test_the_images_of_a_step_do_not_depend_on_the_number_of_workers(plan, epoch, data):
    first = data.draw(st.integers(0, plan.steps - 1))
    last = data.draw(st.integers(first + 1, plan.steps))
    expected = np.sort(plan.epoch(epoch)[first:last].reshape(last - first, -1))
    for workers in WORKERS:
        shares = [plan.worker_rows(epoch, first, last, rank, workers) for rank in range(workers)]
        lanes = [share.size // (last - first) // (plan.batch_size // LANES) for share in shares]
        assert max(lanes) - min(lanes) <= 1
        assert np.array_equal(np.sort(np.concatenate(shares, axis=2)[:, 0]), expected)


@given(orders(), st.integers(0, 5), st.sampled_from((2, 3)))
def test_the_images_of_a_micro_batch_do_not_depend_on_the_number_of_workers(plan, epoch, parts):
    plan = replace(plan, group_rows=np.asarray([*plan.group_rows, plan.batch_size * parts]), batch_size=LANES * parts)

    def micro_batches(workers: int) -> np.ndarray:
        shares = [plan.worker_rows(epoch, 0, plan.steps, rank, workers, parts) for rank in range(workers)]
        for rank, share in enumerate(shares):
            assert share.shape[2] == plan.micro_batch_rows(rank, workers, parts)
        return np.sort(np.concatenate(shares, axis=2))

    alone = micro_batches(1)
    assert alone.shape == (plan.steps, parts, LANES)
    assert all(np.array_equal(micro_batches(workers), alone) for workers in WORKERS)


@given(orders(), st.integers(1, 4), st.data())
def test_windows_cover_every_step_that_is_left_once_and_in_order(plan, epochs, data):
    first_step = data.draw(st.integers(0, epochs * plan.steps))
    windows = plan.windows(first_step, epochs)
    steps = [epoch * plan.steps + step for epoch, first, last in windows for step in range(first, last)]
    assert steps == list(range(first_step, epochs * plan.steps))
    assert all(0 < last - first <= plan.window_steps for _, first, last in windows)


@given(orders(), st.integers(0, 3))
def test_a_window_reads_few_row_groups_however_it_is_shuffled(plan, epoch):
    """Each lane of a window is a permutation of rows that lie one after another in the order of the groups."""
    group_of = np.repeat(np.arange(len(plan.group_rows)), plan.group_rows)
    for window_epoch, first, last in plan.windows(epoch * plan.steps, epoch + 1):
        for lane in plan.epoch(window_epoch)[first:last].transpose(1, 0, 2).reshape(LANES, -1):
            partly = [g for g in np.unique(group_of[lane]) if np.sum(group_of[lane] == g) < plan.group_rows[g]]
            assert len(partly) <= 2  # only the first and the last group are shared with the neighbours


def test_images_are_mixed_inside_a_window():
    """Rows of several groups meet in one step, though groups are read whole."""
    plan = order(group_rows=np.asarray([64] * 8), window=512)
    groups = plan.epoch(0).reshape(plan.steps, -1) // 64
    assert np.mean([len(np.unique(step)) for step in groups]) > 4


def test_nothing_is_read_after_the_last_step():
    """A run killed between its last epoch and its choice goes on with no step left."""
    plan = order()
    source = WorkerInput(None, np.zeros(320, PLACE), plan, 0, 1, 1)
    assert list(source.batches(3 * plan.steps, 3)) == []


def test_more_workers_than_lanes_are_refused():
    with pytest.raises(ValueError, match="lanes 4 are fewer than workers 5"):
        order().worker_rows(0, 0, 1, 0, 5)


def test_a_batch_that_does_not_divide_among_lanes_is_refused():
    with pytest.raises(ValueError, match="batch_size 18 is not a multiple of lanes 4"):
        order(batch_size=18)


def test_too_few_images_are_refused_with_both_numbers():
    with pytest.raises(UserError, match=r"has 15 images, fewer than training\.batch_size=16"):
        order(group_rows=np.asarray([10, 5]))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 9)), min_size=1, unique=True))
def test_group_rows_counts_each_group_of_each_part(rows):
    places = np.asarray(sorted(rows), PLACE)
    expected = {}
    for part, group, _ in sorted(rows):
        expected[part, group] = expected.get((part, group), 0) + 1
    assert group_rows(places).tolist() == list(expected.values())
