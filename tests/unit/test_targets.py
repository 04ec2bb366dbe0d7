"""Targets of the centres and weights of rare findings. Shapes: B images, C findings."""

import pytest
import torch

from cxr_retrieval.losses.targets import centre_targets, class_weights, positive_weights

LABELS_BC = torch.tensor(
    [
        [0, 0, 0],  # No Finding
        [0, -1, 0],  # undecidable
        [1, -1, 0],  # a finding and an unknown one
        [1, 0, 1],
        [-1, -1, -1],
    ],
    dtype=torch.int8,
)


def test_no_finding_gets_a_column_of_its_own():
    targets_BK = centre_targets(LABELS_BC, "center")
    assert targets_BK.dtype == torch.int8
    assert targets_BK[:, :3].equal(LABELS_BC)
    assert targets_BK[:, 3].tolist() == [1, -1, 0, 0, -1]


def test_negatives_only_leaves_no_finding_with_negatives_and_no_positive():
    targets_BC = centre_targets(LABELS_BC, "negatives_only")
    assert targets_BC.dtype == torch.int8
    assert targets_BC.equal(LABELS_BC)


def test_ignore_takes_no_finding_out_of_both_sets_and_touches_nothing_else():
    before_BC = LABELS_BC.clone()
    targets_BC = centre_targets(LABELS_BC, "ignore")
    assert targets_BC[0].tolist() == [-1, -1, -1]
    assert targets_BC[1:].equal(LABELS_BC[1:])
    assert LABELS_BC.equal(before_BC)


@pytest.mark.parametrize("rule", ["center", "negatives_only", "ignore"])
def test_wider_integers_and_empty_batches_are_fine(rule):
    assert centre_targets(LABELS_BC.long(), rule).equal(centre_targets(LABELS_BC, rule))
    assert centre_targets(LABELS_BC[:0], rule).shape == (0, 4 if rule == "center" else 3)


def test_another_rule_or_shape_is_refused_by_name():
    with pytest.raises(ValueError, match="no_finding is 'centre'"):
        centre_targets(LABELS_BC, "centre")
    with pytest.raises(ValueError, match=r"\[B, C\]"):
        centre_targets(LABELS_BC[0], "center")


def test_class_weights_favour_the_rare_and_keep_the_scale():
    counts_C = torch.tensor([1000, 100, 10])
    weights_C = class_weights(counts_C)
    assert weights_C.dtype == torch.float32
    assert (counts_C * weights_C).sum() / counts_C.sum() == pytest.approx(1.0, abs=1e-6)
    # The square root: ten times rarer weighs sqrt(10) times more.
    assert (weights_C[1:] / weights_C[:-1]).tolist() == pytest.approx([10**0.5, 10**0.5])


def test_class_weights_are_limited_also_for_a_finding_never_seen():
    weights_C = class_weights(torch.tensor([10**6, 10, 0]), power=1.0, limit=5.0)
    assert weights_C[1] == weights_C[2]
    assert (weights_C[1] / weights_C[0]).item() <= 25.0
    assert class_weights(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]
    assert class_weights(torch.tensor([7, 70]), power=0.0).tolist() == [1.0, 1.0]


def test_positive_weights_are_the_limited_root_of_the_odds():
    weights_C = positive_weights(torch.tensor([100, 1, 0, 900]), torch.tensor([900, 10**6, 10**6, 100]))
    assert weights_C.tolist() == pytest.approx([3.0, 20.0, 20.0, 1 / 3])


def test_counts_that_are_none_are_refused():
    with pytest.raises(ValueError, match="counts"):
        class_weights(torch.tensor([3, -1]))
    with pytest.raises(ValueError, match="power"):
        class_weights(torch.tensor([3, 1]), power=-1.0)
    with pytest.raises(ValueError, match="limit"):
        class_weights(torch.tensor([3, 1]), limit=0.5)
    with pytest.raises(ValueError, match="differ in shape"):
        positive_weights(torch.tensor([3, 1]), torch.tensor([3]))
