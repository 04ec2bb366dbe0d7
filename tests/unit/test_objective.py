"""The sum that training minimises, against the same sum written plainly; and that every output keeps a gradient.

S steps, P passes, B images, C findings, D dimensions.
"""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.config import LossSettings
from cxr_retrieval.losses.ccloss import cc_loss, multi_label_cross_entropy
from cxr_retrieval.losses.centres import Centres
from cxr_retrieval.losses.targets import centre_targets
from cxr_retrieval.network.progressive import Output
from cxr_retrieval.training.objective import LEAST_WEIGHT, Objective, begin_crop, gather_centres, step_weights

S, B, C, D = 3, 6, 5, 4
CPU = torch.device("cpu")


def labels() -> torch.Tensor:
    drawn_BC = torch.randint(-1, 2, (B, C), generator=torch.Generator().manual_seed(2), dtype=torch.int8)
    drawn_BC[0] = 0  # No Finding
    drawn_BC[torch.arange(1, B), torch.arange(C)] = 1  # every finding is learnt
    return drawn_BC


def output(passes: int, steps: int = S) -> Output:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    z_PSBD = torch.nn.functional.normalize(draw(passes, steps, B, D), dim=-1).requires_grad_()
    logits_PSBC, joint_PBC = draw(passes, steps, B, C).requires_grad_(), draw(passes, B, C).requires_grad_()
    return Output(z_PSBD, logits_PSBC, joint_PBC, torch.zeros(B, 2, 2), torch.zeros(B, 4, dtype=torch.int64))


def objective(steps: int = S, share: float = 0.4, **changes) -> Objective:
    return Objective.build(LossSettings(**changes), labels(), steps, share, CPU)


def centres(objective: Objective, steps: int = S) -> Centres:
    return Centres(2 * steps, len(objective.centre_weights_K), D, 0.5, seed=3)


# The schedule


def test_shallow_steps_come_first():
    assert step_weights(0.0, 3, 0.3) == [1.0, LEAST_WEIGHT, LEAST_WEIGHT]
    assert step_weights(0.05, 3, 0.3) == pytest.approx([1.0, 0.5, LEAST_WEIGHT])
    assert step_weights(0.15, 3, 0.3) == pytest.approx([1.0, 1.0, 0.5])


@given(st.floats(0, 1), st.integers(1, 4), st.floats(0.01, 1))
def test_weights_fall_with_depth_and_all_are_full_after_their_share(progress, steps, share):
    weights = step_weights(progress, steps, share)
    assert weights == sorted(weights, reverse=True)
    assert all(LEAST_WEIGHT <= weight <= 1.0 for weight in weights)
    assert weights[0] == 1.0
    if progress >= share * (1 + 1e-9):
        assert weights == pytest.approx([1.0] * steps)


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 4), st.floats(0.01, 1))
def test_no_weight_falls_as_training_goes_on(one, other, steps, share):
    before, after = (step_weights(progress, steps, share) for progress in sorted((one, other)))
    assert all(a <= b for a, b in zip(before, after, strict=True))


def test_a_share_of_0_is_no_schedule():
    assert step_weights(0.0, 4, 0.0) == [1.0] * 4


# What is learnt


def without(finding: int) -> torch.Tensor:
    """Labels of a training that never sees a finding: of all its images the archive says that they have not got it."""
    labels_BC = labels()
    labels_BC[:, finding] = 0
    return labels_BC


@pytest.mark.parametrize("form", ["margin", "softmax"])
@pytest.mark.parametrize("no_finding", ["center", "ignore"])
def test_a_finding_that_training_must_not_see_is_unknown_to_every_loss(form, no_finding):
    sums = Objective.build(LossSettings(form=form, no_finding=no_finding), without(1), S, 0.4, CPU, [1])
    out = output(2)
    table = centres(sums)
    loss, _ = sums(out, without(1), sums.ccloss(table), 1.0)
    loss.backward()
    for gradient in (out.logits_PSBC.grad, out.joint_PBC.grad):
        assert (gradient[..., 1] == 0).all(), "its classifier is taught nothing"
        assert (gradient[..., [0, 2, 3, 4]] != 0).any()
    table.vectors_TCD[:, 1] *= -1
    moved, _ = sums(out, without(1), sums.ccloss(table), 1.0)
    assert torch.equal(moved, loss), "no image is pushed from its centre"


def test_of_a_finding_that_no_training_image_has_the_classifier_learns_that_and_no_image_is_pushed():
    sums = Objective.build(LossSettings(no_finding="ignore"), without(1), S, 0.4, CPU)
    out = output(2)
    table = centres(sums)
    loss, _ = sums(out, without(1), sums.ccloss(table), 1.0)
    loss.backward()
    assert (out.joint_PBC.grad[..., 1] > 0).all(), "absent in every image"
    table.vectors_TCD[:, 1] *= -1
    moved, _ = sums(out, without(1), sums.ccloss(table), 1.0)
    assert torch.equal(moved, loss)
    unlabelled = without(1)
    unlabelled[:, 1] = -1
    assert Objective.build(LossSettings(), unlabelled, S, 0.4, CPU).taught_C.tolist() == [True, False, True, True, True]


def test_an_image_without_any_finding_that_is_learnt_is_no_finding():
    for no_finding, expected in (("center", [0, -1, 0, 0, 0, 1]), ("ignore", [-1] * 5)):
        sums = Objective.build(LossSettings(form="margin", no_finding=no_finding), without(1), S, 0.4, CPU, [1])
        assert sums.targets(without(1))[0].tolist() == expected


# The sum


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("form", ["margin", "softmax"])
@pytest.mark.parametrize("no_finding", ["center", "negatives_only", "ignore"])
@pytest.mark.parametrize("progress", [0.0, 0.06, 1.0])
def test_the_loss_is_the_weighted_sum_over_passes_and_steps(passes, form, no_finding, progress):
    """Means over steps and passes by weight; the joint classifier of a pass weighs what its deepest step does."""
    changes = {"form": form, "no_finding": no_finding, "margin": 1.2, "negative_weight": 0.7, "temperature": 0.3}
    changes |= {"contrastive_weight": 0.6, "contrastive_from": 0.06, "classification_weight": 1.7, "smoothing": 0.1}
    joined = 0.6 if progress >= 0.06 else 0.0  # CCLoss joins late
    sums, out = objective(**changes), output(passes)
    table = centres(sums)
    targets_BK = centre_targets(labels(), no_finding)

    def contrast(p, s):
        return cc_loss(
            out.z_PSBD[p, s],
            table.vectors_TCD[p * S + s],
            targets_BK,
            sums.centre_weights_K,
            form=form,
            margin=1.2,
            negative_weight=0.7,
            temperature=0.3,
        )

    def entropy(logits_BC):
        return multi_label_cross_entropy(logits_BC, labels(), sums.positive_weights_C, 0.1)

    weights = {0.0: [1.0, 0.1, 0.1], 0.06: [1.0, 0.45, 0.1], 1.0: [1.0, 1.0, 1.0]}[progress]
    total, cc_total, entropy_total = 0.0, 0.0, 0.0
    for p in range(passes):
        for s, weight in enumerate(weights):
            total += weight * (joined * contrast(p, s) + 1.7 * entropy(out.logits_PSBC[p, s]))
            cc_total += weight * contrast(p, s)
            entropy_total += weight * entropy(out.logits_PSBC[p, s])
        total += weights[-1] * 1.7 * entropy(out.joint_PBC[p])
    scale = passes * sum(weights)

    loss, parts = sums(out, labels(), sums.ccloss(table), progress)
    torch.testing.assert_close(loss, total / scale)
    torch.testing.assert_close(parts["loss"], loss.detach())
    torch.testing.assert_close(parts["ccloss"], (cc_total / scale).detach())
    torch.testing.assert_close(parts["cross_entropy"], (entropy_total / scale).detach())
    by_table = torch.zeros(3, 2 * S)
    for p, s in itertools.product(range(passes), range(S)):
        by_table[:, p * S + s] = torch.stack([contrast(p, s), entropy(out.logits_PSBC[p, s]), torch.tensor(1.0)])
    torch.testing.assert_close(parts["by_table"], by_table.detach())
    assert not any(part.requires_grad for part in parts.values())


def test_rare_findings_weigh_more_and_equal_balance_is_plain():
    labels_NC = torch.zeros(100, 2, dtype=torch.int8)
    labels_NC[:40, 0], labels_NC[:4, 1] = 1, 1
    built = Objective.build(LossSettings(class_balance=0.5, no_finding="ignore"), labels_NC, S, 0.3, CPU)
    assert built.centre_weights_K[1] > built.centre_weights_K[0]
    assert built.positive_weights_C[1] > built.positive_weights_C[0]
    plain = Objective.build(LossSettings(class_balance=0.0, no_finding="ignore"), labels_NC, S, 0.3, CPU)
    assert plain.centre_weights_K.tolist() == plain.positive_weights_C.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("passes", "shallow_only"), [(1, False), (2, False), (1, True), (2, True)])
def test_every_output_has_a_gradient_and_only_what_is_shuffled_away_has_none_but_0(passes, shallow_only):
    """DDP waits for a gradient of every parameter; what means nothing in a shuffled image must not learn from it."""
    out, sums = output(passes), objective()
    loss, parts = sums(out, labels(), sums.ccloss(centres(sums)), 0.5, shallow_only=shallow_only)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(part).all() for part in parts.values())
    for gradient in (out.z_PSBD.grad, out.logits_PSBC.grad, out.joint_PBC.grad):
        assert gradient is not None
        assert torch.isfinite(gradient).all()
    learns_PS = out.logits_PSBC.grad.abs().sum((2, 3)) > 0
    expected_PS = torch.ones(passes, S, dtype=torch.bool)
    if shallow_only:
        expected_PS[1:], expected_PS[:, -1] = False, False
    assert torch.equal(learns_PS, expected_PS)
    assert torch.equal(out.z_PSBD.grad.abs().sum((2, 3)) > 0, expected_PS)
    assert bool((out.joint_PBC.grad != 0).any()) != shallow_only


def test_a_shuffled_batch_is_a_finite_loss_with_one_step_too():
    out, sums = output(1, steps=1), objective(steps=1)
    loss, _ = sums(out, labels(), sums.ccloss(centres(sums, steps=1)), 0.1, shallow_only=True)
    loss.backward()
    assert torch.isfinite(loss)
    assert (out.logits_PSBC.grad != 0).any()


@pytest.mark.parametrize("passes", [1, 2])
def test_centres_gather_every_table_of_the_passes_there_are(passes):
    out, sums = output(passes), objective(no_finding="center")
    table = centres(sums)
    targets_BK = centre_targets(labels(), "center")
    gather_centres(out, targets_BK, table)
    present_BK = (targets_BK == 1).double()
    for which in range(2):
        for step in range(S):
            expected = torch.zeros(C + 1, D, dtype=torch.float64)
            if which < passes:
                expected = present_BK.T @ out.z_PSBD[which, step].detach().double()
            torch.testing.assert_close(table.pending()[which * S + step, :, :-1], expected)


def test_centres_of_crops_begin_where_those_of_whole_images_are():
    centres = Centres(4, 3, D, 0.5, seed=3)
    whole = centres.vectors_TCD[:2].clone()
    begin_crop(centres)
    assert centres.vectors_TCD[:2].equal(whole)
    assert centres.vectors_TCD[2:].equal(whole)
    centres.accumulate(2, whole[1], torch.eye(3, dtype=torch.int8))
    centres.reduce()
    centres.apply()
    assert centres.vectors_TCD[0].equal(whole[0]), "and then each pass has its own"
    assert not centres.vectors_TCD[2].equal(whole[0])
