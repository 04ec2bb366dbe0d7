"""Where a run stands: what it keeps of an epoch, which epoch is the best, and for how long none was better."""

import pytest
import torch

from cxr_retrieval.training.state import RunState


def epoch(state: RunState, value: float) -> None:
    """An epoch whose best embedding has that validation mAP; its weights and centres are all that number."""
    figures = {"global": {"map": value, "chance_map": 0.1}, "profile": {"map": value / 2, "chance_map": 0.1}}
    record = {"epoch": len(state.history), "joined": True, "loss": 1.0, "centre_cosine": [0.0, 0.5]}
    state.history.append(record | {"validation": figures})
    state.keep_best({"weight": torch.full((2,), value)}, torch.full((1, 2, 3), value), [])


def test_the_best_epoch_is_kept_and_patience_counts_from_it() -> None:
    state, waited = RunState(), []
    assert state.epochs_since_best() == 0
    for value in (0.2, 0.4, 0.3, 0.4, 0.5, 0.1):
        epoch(state, value)
        waited.append(state.epochs_since_best())
    assert waited == [0, 0, 1, 2, 0, 1]
    assert (state.best_epoch, state.best_map) == (4, 0.5)
    assert torch.equal(state.best_network["weight"], torch.full((2,), 0.5))
    assert state.best_centres is not None
    assert torch.equal(state.best_centres, torch.full((1, 2, 3), 0.5))
    assert [point["value"] for point in state.curve()] == [0.2, 0.4, 0.3, 0.4, 0.5, 0.1]


def test_patience_goes_on_where_the_checkpoint_was_taken() -> None:
    state = RunState()
    for value in (0.4, 0.3, 0.2):
        epoch(state, value)
    assert RunState(**vars(state)).epochs_since_best() == 2


def test_the_losses_of_an_epoch_are_means_over_the_steps_that_were_taken() -> None:
    state = RunState()
    for loss in (1.0, 2.0):
        by_table = torch.tensor([[2 * loss, 0.0], [3 * loss, 0.0], [1.0, 0.0]])
        state.add({"loss": torch.tensor(loss), "ccloss": torch.tensor(2 * loss), "by_table": by_table})
    means = state.mean_losses()
    assert (means["loss"], means["ccloss"]) == pytest.approx((1.5, 3.0))
    assert means["ccloss_by_table"] == [pytest.approx(3.0), None]
    assert means["cross_entropy_by_table"] == [pytest.approx(4.5), None]
    assert set(means) == {"loss", "ccloss", "ccloss_by_table", "cross_entropy_by_table"}


def steps(state: RunState, *losses: float) -> None:
    """Steps with labels, of which cross-entropy is what counts: CCLoss has joined, and made the sum larger."""
    for loss in losses:
        parts = {"loss": torch.tensor(50.0), "ccloss": torch.tensor(50.0), "cross_entropy": torch.tensor(loss)}
        state.add(parts | {"by_table": torch.ones(3, 2)})


@pytest.mark.parametrize(("loss", "exploded"), [(0.2, False), (1.9, False), (2.1, True)])
def test_a_loss_over_ten_times_that_of_the_best_stretch_is_an_explosion(loss: float, exploded: bool) -> None:
    state = RunState()
    state.add({"loss": torch.tensor(1e-3)})  # another phase, another loss
    assert not state.look_for_explosion()
    state.end_epoch()
    assert not state.look_for_explosion(), "no step was taken yet"
    for good in (0.9, 0.2, 0.4):
        steps(state, 0.5 * good, 1.5 * good)
        assert not state.look_for_explosion(), "a first stretch has none to compare with, and the others are fine"
        state.end_epoch()
    steps(state, 0.5 * loss, 1.5 * loss)  # it is their mean that counts
    assert state.look_for_explosion() is exploded


def test_an_explosion_late_in_an_epoch_is_not_hidden_by_its_good_beginning_nor_by_a_restart() -> None:
    state = RunState()
    for _ in range(8):
        steps(state, *[0.2] * 100)
        assert not state.look_for_explosion()
    state = RunState(**vars(state))
    steps(state, *[5.0] * 100)
    assert state.look_for_explosion()
    assert state.mean_losses()["cross_entropy"] < 10 * 0.2


def test_a_loss_that_had_nearly_vanished_and_is_small_again_is_no_explosion() -> None:
    state = RunState()
    for good in (0.7, 0.001):
        steps(state, good)
        assert not state.look_for_explosion()
    steps(state, 0.5)
    assert not state.look_for_explosion()


def test_pretraining_is_compared_with_itself() -> None:
    state = RunState()
    for loss, exploded in ((1.0, False), (9.0, False), (12.0, True)):
        state.add({"loss": torch.tensor(loss)})
        assert state.look_for_explosion() is exploded


def test_an_epoch_without_labels_has_a_loss_and_no_place_in_the_curve() -> None:
    state = RunState()
    for loss in (1.0, 2.0):
        state.add({"loss": torch.tensor(loss)})
    state.pretraining.append(state.mean_losses())
    assert state.pretraining == [{"loss": 1.5}]
    assert (state.curve(), state.epochs_since_best()) == ([], 0)
