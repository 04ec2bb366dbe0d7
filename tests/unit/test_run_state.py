"""Where a run stands: what it keeps of an epoch, which epoch is the best, and for how long none was better."""

import pytest
import torch

from cxr_retrieval.training.state import RunState


def epoch(state: RunState, value: float) -> None:
    """An epoch whose best embedding has that validation mAP; its weights and centres are all that number."""
    figures = {"global": {"map": value, "chance_map": 0.1}, "profile": {"map": value / 2, "chance_map": 0.1}}
    state.history.append({"epoch": len(state.history), "loss": 1.0, "centre_cosine": [0.0, 0.5], "validation": figures})
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


@pytest.mark.parametrize(("loss", "exploded"), [(0.2, False), (1.9, False), (2.1, True)])
def test_a_loss_over_ten_times_that_of_the_best_epoch_is_an_explosion(loss: float, exploded: bool) -> None:
    state = RunState()
    by_table = torch.ones(3, 2)

    def steps(of: float) -> None:
        for share in (0.5, 1.5):  # it is their mean that counts
            # CCLoss has joined, and made the sum larger.
            parts = {
                "loss": torch.tensor(50.0),
                "ccloss": torch.tensor(50.0),
                "cross_entropy": torch.tensor(share * of),
            }
            state.add(parts | {"by_table": by_table})

    state.pretraining.append({"loss": 1e-3})  # another phase, another loss
    steps(9.0)
    assert not state.has_exploded(), "a first epoch has none to compare with"
    for past in (9.0, 0.2, 0.4):
        state.history.append({"epoch": len(state.history), "cross_entropy": past})
    state.sums = {}
    assert not state.has_exploded(), "no step was taken yet"
    steps(loss)
    assert state.has_exploded() is exploded


def test_pretraining_is_compared_with_itself() -> None:
    state = RunState(pretraining=[{"loss": 1.0}])
    state.add({"loss": torch.tensor(9.0)})
    assert not state.has_exploded()
    state.add({"loss": torch.tensor(12.0)})
    assert state.has_exploded()


def test_an_epoch_without_labels_has_a_loss_and_no_place_in_the_curve() -> None:
    state = RunState()
    for loss in (1.0, 2.0):
        state.add({"loss": torch.tensor(loss)})
    state.pretraining.append(state.mean_losses())
    assert state.pretraining == [{"loss": 1.5}]
    assert (state.curve(), state.epochs_since_best()) == ([], 0)
