"""CCLoss and the cross-entropy against their equations, written again here with loops over Python floats.

Shapes: B images, C classes of the centres, D dimensions.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from cxr_retrieval.losses.ccloss import cc_loss, multi_label_cross_entropy, squared_distances

FORMS = ["margin", "softmax"]


def mean(values):
    return sum(values) / len(values) if values else 0.0


def reference_cc_loss(z, c, targets, w, form, margin, negative_weight, temperature):
    total = 0.0
    for z_i, t_i in zip(z, targets, strict=True):
        squared = [sum((a - b) ** 2 for a, b in zip(z_i, c_j, strict=True)) for c_j in c]
        dot = [sum(a * b for a, b in zip(z_i, c_j, strict=True)) for c_j in c]
        positives = [j for j, t in enumerate(t_i) if t == 1]
        negatives = [k for k, t in enumerate(t_i) if t == 0]
        if form == "margin":
            total += mean([w[j] * squared[j] for j in positives])
            total += negative_weight * mean([max(0.0, margin - math.sqrt(squared[k] + 1e-12)) ** 2 for k in negatives])
        else:
            terms = []
            for j in positives:
                own = math.exp(dot[j] / temperature)
                rest = sum(math.exp(dot[k] / temperature) for k in negatives)
                terms.append(w[j] * math.log(own / (own + rest)))
            total -= mean(terms)
    return total / len(z)


def reference_cross_entropy(x, labels, p, smoothing):
    total = 0.0
    for x_i, t_i in zip(x, labels, strict=True):
        terms = []
        for j, t in enumerate(t_i):
            if t == -1:
                continue
            y, s = t * (1 - smoothing) + smoothing / 2, 1 / (1 + math.exp(-x_i[j]))
            terms.append(-(p[j] * y * math.log(s) + (1 - y) * math.log(1 - s)))
        total += mean(terms)
    return total / len(x)


@st.composite
def batches(draw):
    """Embeddings (unit or raw), unit centres, targets with unknown ones and empty sets, and weights or none."""
    images, classes, dimensions = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    z_BD = torch.randn(images, dimensions, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        z_BD = F.normalize(z_BD, dim=1)
    centres_CD = F.normalize(torch.randn(classes, dimensions, generator=generator, dtype=torch.float64), dim=1)
    row = st.lists(st.sampled_from([-1, 0, 1]), min_size=classes, max_size=classes)
    targets_BC = torch.tensor(draw(st.lists(row, min_size=images, max_size=images)), dtype=torch.int8)
    weights_C = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.1 if draw(st.booleans()) else None
    return z_BD, centres_CD, targets_BC, weights_C


def batch(images=6, classes=5, dimensions=6, dtype=torch.float64):
    """One fixed batch whose first rows have: no negative, no positive, all unknown; then some of each."""
    generator = torch.Generator().manual_seed(3)
    z_BD = F.normalize(torch.randn(images, dimensions, generator=generator, dtype=dtype), dim=1)
    centres_CD = F.normalize(torch.randn(classes, dimensions, generator=generator, dtype=dtype), dim=1)
    # Each row begins at another point of present, absent, unknown.
    targets_BC = ((torch.arange(classes) + torch.arange(images)[:, None]) % 3 - 1).to(torch.int8)
    targets_BC[0] = targets_BC[0].abs().clamp(min=1)
    targets_BC[1] = targets_BC[1].clamp(max=0)
    targets_BC[2] = -1
    weights_C = torch.rand(classes, generator=generator, dtype=dtype) + 0.5
    return z_BD, centres_CD, targets_BC, weights_C


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40)
@given(
    sample=batches(), margin=st.floats(0.1, 2.0), negative_weight=st.floats(0.0, 3.0), temperature=st.floats(0.05, 2.0)
)
def test_cc_loss_is_its_equation(form, sample, margin, negative_weight, temperature):
    z_BD, centres_CD, targets_BC, weights_C = sample
    weights = [1.0] * len(centres_CD) if weights_C is None else weights_C.tolist()
    expected = reference_cc_loss(
        z_BD.tolist(), centres_CD.tolist(), targets_BC.tolist(), weights, form, margin, negative_weight, temperature
    )
    options = {"form": form, "margin": margin, "negative_weight": negative_weight, "temperature": temperature}
    loss = cc_loss(z_BD, centres_CD, targets_BC, weights_C, **options)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)

    single = cc_loss(z_BD.float(), centres_CD.float(), targets_BC, weights_C, **options)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1.0, 0.6])
def test_gradient_of_cc_loss_is_right_for_unit_and_other_embeddings(form, length):
    z_BD, centres_CD, targets_BC, weights_C = batch()
    z_BD = (z_BD * length).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: cc_loss(z, centres_CD, targets_BC, weights_C, form=form, margin=1.4), z_BD
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_step_from_raw_outputs_has_the_right_gradient(form):
    z_BD, centres_CD, targets_BC, _ = batch()
    raw_BD = (3.0 * z_BD).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cc_loss(F.normalize(x, dim=1), centres_CD, targets_BC, form=form), raw_BD)


@pytest.mark.parametrize("form", FORMS)
def test_centres_get_no_gradient(form):
    z_BD, centres_CD, targets_BC, _ = batch()
    z_BD.requires_grad_()
    centres_CD.requires_grad_()
    cc_loss(z_BD, centres_CD, targets_BC, form=form).backward()
    assert centres_CD.grad is None
    assert z_BD.grad.abs().sum() > 0


@pytest.mark.parametrize("form", FORMS)
def test_unknown_findings_have_no_part_in_loss_or_gradient(form):
    z_BD, centres_CD, targets_BC, weights_C = batch()
    results = []
    for seed in (0, 1):
        other_CD = centres_CD.clone()
        # The fourth finding is unknown everywhere, so its centre may be anywhere and its weight anything.
        targets_BC[:, 3] = -1
        other_CD[3] = F.normalize(torch.randn(6, generator=torch.Generator().manual_seed(seed)).double(), dim=0)
        weights_C[3] = seed
        z = z_BD.clone().requires_grad_()
        loss = cc_loss(z, other_CD, targets_BC, weights_C, form=form)
        loss.backward()
        results.append((loss.detach(), z.grad))
        assert z.grad[2].abs().sum() == 0
    assert results[0][0].equal(results[1][0])
    assert results[0][1].equal(results[1][1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", [-1, 0, 1])
def test_empty_sets_give_finite_losses_and_gradients(form, target):
    z_BD, centres_CD, _, _ = batch(dtype=torch.float32)
    z_BD.requires_grad_()
    loss = cc_loss(z_BD, centres_CD, torch.full((6, 5), target, dtype=torch.int8), form=form)
    loss.backward()
    assert z_BD.grad.isfinite().all()
    if target == -1 or (form == "softmax"):
        # Without negatives there is nothing to tell a finding from; without positives nothing to pull to.
        assert loss.item() == 0.0
    assert cc_loss(z_BD[:0], centres_CD, torch.empty(0, 5, dtype=torch.int8), form=form).item() == 0.0


@pytest.mark.parametrize("distance", [0.0, 1e-6, 1e-4, 1e-2])
def test_the_hinge_pushes_with_its_true_force_however_near_the_centre(distance):
    centre_1D = F.normalize(torch.randn(1, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    offset_1D = F.normalize(torch.randn(1, 64, generator=torch.Generator().manual_seed(1)), dim=1)
    z_1D = (centre_1D + distance * offset_1D).requires_grad_()
    cc_loss(z_1D, centre_1D, torch.zeros(1, 1, dtype=torch.int8), margin=1.0).backward()
    real = (z_1D.detach().double() - centre_1D.double()).norm().item()
    expected = 2 * (1 - real) * real / math.sqrt(real**2 + 1e-12)
    assert z_1D.grad.norm().item() == pytest.approx(expected, rel=0.02, abs=1e-6)


def test_softmax_stays_finite_at_a_temperature_that_overflows_plain_exponentials():
    z_BD, centres_CD, targets_BC, _ = batch(dtype=torch.float32)
    z_BD.requires_grad_()
    loss = cc_loss(z_BD, centres_CD, targets_BC, form="softmax", temperature=1e-3)
    loss.backward()
    assert loss.isfinite()
    assert z_BD.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_autocast_does_not_reach_the_distances(form):
    z_BD, centres_CD, targets_BC, weights_C = batch(images=8, dimensions=64, dtype=torch.float32)
    plain = cc_loss(z_BD, centres_CD, targets_BC, weights_C, form=form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = cc_loss(z_BD, centres_CD, targets_BC, weights_C, form=form)
        from_half_BC = squared_distances(z_BD.bfloat16(), centres_CD)
        entropy = multi_label_cross_entropy(z_BD[:, :5].bfloat16(), targets_BC)
    assert cast.dtype == from_half_BC.dtype == entropy.dtype == torch.float32
    assert cast.equal(plain)
    exact_BC = (z_BD.bfloat16().double()[:, None] - centres_CD.double()).square().sum(dim=2)
    assert (from_half_BC - exact_BC).abs().max() < 1e-6


def test_half_precision_embeddings_get_a_gradient_of_their_own_type():
    z_BD, centres_CD, targets_BC, _ = batch(dtype=torch.float32)
    half_BD = z_BD.bfloat16().requires_grad_()
    cc_loss(half_BD, centres_CD, targets_BC).backward()
    assert half_BD.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMS)
def test_no_tensor_grows_with_pairs_of_images_or_with_all_differences(form):
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(value, torch.Tensor):
                    self.numbers = max(self.numbers, value.numel())
            return out

    z_BD, centres_CD, targets_BC, _ = batch(images=300, classes=7, dimensions=16, dtype=torch.float32)
    z_BD.requires_grad_()
    with Largest() as largest:
        cc_loss(z_BD, centres_CD, targets_BC, form=form).backward()
    assert 0 < largest.numbers <= 300 * 16


@pytest.mark.parametrize("form", FORMS)
def test_equal_parts_of_a_batch_average_to_the_loss_of_the_whole(form):
    z_BD, centres_CD, targets_BC, weights_C = batch(images=6)
    whole = cc_loss(z_BD, centres_CD, targets_BC, weights_C, form=form)
    parts = [cc_loss(z_BD[i::2], centres_CD, targets_BC[i::2], weights_C, form=form) for i in range(2)]
    assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), abs=1e-12)


def test_wrong_settings_and_shapes_are_refused_by_name():
    z_BD, centres_CD, targets_BC, _ = batch()
    with pytest.raises(ValueError, match="form is 'hinge'"):
        cc_loss(z_BD, centres_CD, targets_BC, form="hinge")
    with pytest.raises(ValueError, match="temperature"):
        cc_loss(z_BD, centres_CD, targets_BC, form="softmax", temperature=0.0)
    with pytest.raises(ValueError, match=r"targets must have shape \[6, 5\]"):
        cc_loss(z_BD, centres_CD, targets_BC[:1])
    with pytest.raises(ValueError, match=r"weights must have shape \[5\]"):
        cc_loss(z_BD, centres_CD, targets_BC, torch.ones(1))
    with pytest.raises(ValueError, match="labels must have shape"):
        multi_label_cross_entropy(z_BD[:, :5], targets_BC[:1])
    with pytest.raises(ValueError, match="positive weights"):
        multi_label_cross_entropy(z_BD[:, :5], targets_BC, torch.ones(1))
    with pytest.raises(ValueError, match="smoothing"):
        multi_label_cross_entropy(z_BD[:, :5], targets_BC, smoothing=1.0)


@settings(max_examples=40)
@given(sample=batches(), smoothing=st.floats(0.0, 0.9))
def test_cross_entropy_is_its_equation(sample, smoothing):
    _, _, targets_BC, weights_C = sample
    logits_BC = torch.randn(targets_BC.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    weights = [1.0] * targets_BC.shape[1] if weights_C is None else weights_C.tolist()
    expected = reference_cross_entropy(logits_BC.tolist(), targets_BC.tolist(), weights, smoothing)
    loss = multi_label_cross_entropy(logits_BC, targets_BC, weights_C, smoothing)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_cross_entropy_ignores_unknown_labels_and_is_the_plain_mean_without_them():
    _, _, targets_BC, _ = batch()
    logits_BC = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    multi_label_cross_entropy(logits_BC, targets_BC).backward()
    assert logits_BC.grad[targets_BC == -1].abs().sum() == 0
    assert logits_BC.grad[targets_BC != -1].abs().min() > 0

    known_BC = targets_BC.clamp(min=0)
    plain = F.binary_cross_entropy_with_logits(logits_BC, known_BC.float())
    assert multi_label_cross_entropy(logits_BC, known_BC).item() == pytest.approx(plain.item(), rel=1e-6)
    assert multi_label_cross_entropy(logits_BC, torch.full_like(targets_BC, -1)).item() == 0.0


def test_gradient_of_cross_entropy_is_right():
    _, _, targets_BC, weights_C = batch()
    logits_BC = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: multi_label_cross_entropy(x, targets_BC, weights_C, 0.1), logits_BC)
