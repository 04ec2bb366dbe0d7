"""CCLoss: contrast against one centre per finding instead of against other images; and the weak supervision beside it.

CCLoss is that of Medical Physics 2023;50(6):3560-3572 (doi 10.1002/mp.16144) as reconstructed in the design's section
"The method"; its formulas are not public. For an image i, P_i are the findings present, N_i those absent, and unknown
ones are in neither; d(i,j) = |z_i - c_j|:

    margin    L =  1/B sum_i [ mean_{j in P_i} w_j d(i,j)^2 + lambda mean_{j in N_i} max(0, m - d(i,j))^2 ]
    softmax   L = -1/B sum_i mean_{j in P_i} w_j log( e^{z.c_j/t} / (e^{z.c_j/t} + sum_{k in N_i} e^{z.c_k/t}) )

A mean over an empty set is 0. Cost B*C*D a batch, memory B*(C + D): no image is ever compared with another.

Shapes: B images, C classes of the centres (findings, and No Finding where it has a centre), D dimensions.
Every loss divides by B, so the losses of equal parts of a batch average to the loss of the whole: gradients do not
depend on the number of workers or of accumulation steps.
"""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cxr_retrieval.losses.targets import ABSENT, PRESENT, UNKNOWN

LossForm = Literal["margin", "softmax"]


def cc_loss(
    z_BD: Tensor,
    centres_CD: Tensor,
    targets_BC: Tensor,
    weights_C: Tensor | None = None,
    *,
    form: LossForm = "margin",
    margin: float = 1.0,
    negative_weight: float = 1.0,
    temperature: float = 0.1,
) -> Tensor:
    """CCLoss of a batch, a scalar >= 0 in float32 (float64 for float64 embeddings), by the equations above.

    Centres get no gradient: they move by `Centres.apply` only.

    - `z_BD`: embeddings, any floating type; unit length in training, right for any length.
    - `centres_CD`: the centres of one (step, pass), as `Centres.vectors_TCD[t]`.
    - `targets_BC`: integers in {-1, 0, 1}, from `centre_targets`.
    - `weights_C`: w_j >= 0, from `class_weights`; None is 1 for all. They weigh the terms of P_i in both forms.
    - `margin` m: between unit vectors d is in [0, 2], and sqrt(2) where they are orthogonal. `margin` form only.
    - `negative_weight` lambda >= 0: `margin` form only.
    - `temperature` > 0: `softmax` form only.

    Raises ValueError for an unknown form, a temperature not above 0, or shapes that do not fit each other.
    """
    if form not in get_args(LossForm):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(LossForm))}")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    # Broadcasting would turn a wrong shape into a wrong loss.
    _check_shape("targets", targets_BC, (len(z_BD), len(centres_CD)))
    if weights_C is not None:
        _check_shape("weights", weights_C, (len(centres_CD),))

    with torch.autocast(z_BD.device.type, enabled=False):
        present_BC, absent_BC = targets_BC == PRESENT, targets_BC == ABSENT
        if form == "margin":
            squared_BC = squared_distances(z_BD, centres_CD)
            # Without the small number the gradient of the root is infinite on a centre.
            hinge_BC = F.relu(margin - (squared_BC + 1e-12).sqrt()).square()
            attraction_B = _row_mean(squared_BC if weights_C is None else squared_BC * weights_C, present_BC)
            loss_B = attraction_B + negative_weight * _row_mean(hinge_BC, absent_BC)
        else:
            # In float64 for TF32, see squared_distances.
            products_BC = z_BD.double() @ centres_CD.detach().double().T
            scores_BC = products_BC.to(_result_type(z_BD)) / temperature
            # -inf where N_i is empty: the fraction is then 1, its logarithm and gradient 0.
            rest_B1 = scores_BC.masked_fill(~absent_BC, -torch.inf).logsumexp(dim=1, keepdim=True)
            # e^a / (e^a + e^b) = sigmoid(a - b): exact at both ends, where a plain logarithm of the sum is not.
            surprise_BC = -F.logsigmoid(scores_BC - rest_B1)
            loss_B = _row_mean(surprise_BC if weights_C is None else surprise_BC * weights_C, present_BC)
        return _mean(loss_B).to(_result_type(z_BD))


def squared_distances(z_BD: Tensor, centres_CD: Tensor) -> Tensor:
    """d(i,j)^2 >= 0 between embeddings and centres, [B, C], under autocast too in float32 (float64 for float64
    embeddings). Only embeddings get a gradient, and that once: there is no second derivative.

    |z|^2 + |c|^2 - 2 z.c costs one matrix product and B*C numbers, where differences would hold B*C*D for the backward
    pass. It cancels near a centre, so the product is in float64 and rounded at the end; that also keeps it from TF32,
    which rounds float32 products to 10 bits on GPUs where it is allowed.
    """
    with torch.autocast(z_BD.device.type, enabled=False):
        return _SquaredDistances.apply(z_BD, centres_CD.detach())


class _SquaredDistances(torch.autograd.Function):
    """Its gradient written out, 2 (z - c), makes large batches two to three times faster than recording each step."""

    @staticmethod
    def forward(ctx: Any, z_BD: Tensor, centres_CD: Tensor) -> Tensor:
        ctx.save_for_backward(z_BD, centres_CD)
        wide_BD, wide_CD = z_BD.double(), centres_CD.double()
        lengths_BC = torch.linalg.vecdot(wide_BD, wide_BD)[:, None] + torch.linalg.vecdot(wide_CD, wide_CD)
        squared_BC = torch.addmm(lengths_BC, wide_BD, wide_CD.T, alpha=-2.0)
        return squared_BC.clamp_(min=0).to(_result_type(z_BD))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BC: Tensor) -> tuple[Tensor, None]:
        z_BD, centres_CD = ctx.saved_tensors
        gradient_BC = gradient_BC.double()
        scaled_BD = z_BD * gradient_BC.sum(dim=1, keepdim=True)
        return torch.addmm(scaled_BD, gradient_BC, centres_CD.double(), beta=2.0, alpha=-2.0).to(z_BD.dtype), None


def multi_label_cross_entropy(
    logits_BC: Tensor, labels_BC: Tensor, positive_weights_C: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Binary cross-entropy of each finding, averaged over an image's known findings, then over images: a scalar >= 0
    in float32 (float64 for float64 logits).

        L = -1/B sum_i mean_{j known} [ p_j y log s(x_ij) + (1 - y) log(1 - s(x_ij)) ],  y = label (1 - e) + e / 2

    Averaging by image, as CCLoss does, keeps the loss independent of how images are dealt to workers when some
    labels are unknown. Where none is, it is the plain mean.

    - `labels_BC`: integers in {-1, 0, 1}; unknown ones have no part in value or gradient.
    - `positive_weights_C`: p_j > 0, from `positive_weights`; None is 1 for all.
    - `smoothing` e in [0, 1).

    Raises ValueError for smoothing out of range or shapes that do not fit each other.
    """
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"smoothing is {smoothing}; it must be in [0, 1)")
    _check_shape("labels", labels_BC, tuple(logits_BC.shape))
    if positive_weights_C is not None:
        _check_shape("positive weights", positive_weights_C, (logits_BC.shape[1],))
    logits_BC = logits_BC.to(_result_type(logits_BC))
    wanted_BC = (labels_BC == PRESENT).to(logits_BC) * (1.0 - smoothing) + 0.5 * smoothing
    entropy_BC = F.binary_cross_entropy_with_logits(
        logits_BC,
        wanted_BC,
        pos_weight=None if positive_weights_C is None else positive_weights_C.to(logits_BC),
        reduction="none",
    )
    return _mean(_row_mean(entropy_BC, labels_BC != UNKNOWN))


def _result_type(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _row_mean(values_BC: Tensor, members_BC: Tensor) -> Tensor:
    """Mean over each row's members, 0 where there is none. Others may be infinite without harm."""
    return values_BC.where(members_BC, 0.0).sum(dim=1) / members_BC.sum(dim=1).clamp(min=1)


def _mean(loss_B: Tensor) -> Tensor:
    return loss_B.sum() / max(1, len(loss_B))


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must have shape {list(expected)}, got {list(tensor.shape)}")
