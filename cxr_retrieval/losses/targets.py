"""From findings to what the losses aim at: targets of the centres, and weights that make up for rare findings.

Shapes: B images, C findings, K classes of the centres (C, or C + 1 where No Finding has its own centre).
Labels and targets are int8: 1 present, 0 absent, -1 unknown, which is in neither P_i nor N_i of the design's section
"The method".
"""

from typing import Literal, get_args

import torch
from torch import Tensor

NoFinding = Literal["center", "negatives_only", "ignore"]

PRESENT, ABSENT, UNKNOWN = 1, 0, -1


def centre_targets(labels_BC: Tensor, no_finding: NoFinding) -> Tensor:
    """Targets of the centres, int8 [B, K], by the rule for No Finding images: those whose findings are all absent.

    An image with an unknown finding and none present may or may not be one: it never counts as No Finding.

    - `center`: K = C + 1. The last column is 1 for No Finding, 0 where any finding is present, -1 where undecidable.
    - `negatives_only`: K = C, unchanged. No Finding images have an empty P and are pushed from every centre.
    - `ignore`: K = C. Rows of No Finding images become unknown throughout, so they take no part.

    `labels_BC`: integers in {-1, 0, 1}; it is not changed. Raises ValueError for another rule or number of dimensions.
    """
    if no_finding not in get_args(NoFinding):
        raise ValueError(f"no_finding is {no_finding!r}; it must be one of {', '.join(get_args(NoFinding))}")
    if labels_BC.dim() != 2:
        raise ValueError(f"labels must be [B, C], got {list(labels_BC.shape)}")
    labels_BC = labels_BC.to(torch.int8)
    no_finding_B = (labels_BC == ABSENT).all(dim=1)
    if no_finding == "negatives_only":
        return labels_BC
    if no_finding == "ignore":
        return labels_BC.masked_fill(no_finding_B[:, None], UNKNOWN)
    column_B = labels_BC.new_full((len(labels_BC),), UNKNOWN)
    column_B.masked_fill_(no_finding_B, PRESENT)
    column_B.masked_fill_((labels_BC == PRESENT).any(dim=1), ABSENT)
    return torch.cat([labels_BC, column_B[:, None]], dim=1)


def class_weights(counts_K: Tensor, power: float = 0.5, limit: float = 10.0) -> Tensor:
    """Weights w_j of CCLoss from the positives of each class in the training split, float32 [K].

    w_j is proportional to (mean count / count_j)^power, clipped to [1/limit, limit], then scaled so that the mean over
    positives, sum_j count_j w_j / sum_j count_j, is 1: the scale of the loss, and with it the learning rate, stays.
    `power` 0 gives equal weights, 1 the same total weight for every class. A class never seen gets the upper
    limit (before scaling); with no positives at all every weight is 1.

    `counts_K`: numbers >= 0, of the columns that `centre_targets` returns. Raises ValueError for a negative count, a
    negative power, or a limit below 1.
    """
    counts_K = _checked_counts(counts_K, power, limit)
    total = counts_K.sum()
    if total == 0:
        return torch.ones_like(counts_K, dtype=torch.float32)
    # 0 / 0 cannot occur here: the mean is above 0, and mean / 0 is inf, which the clip ends.
    ratio_K = counts_K.mean() / counts_K
    weights_K = ratio_K.pow(power).clamp(1.0 / limit, limit)
    return (weights_K * (total / (counts_K * weights_K).sum())).float()


def positive_weights(present_C: Tensor, absent_C: Tensor, power: float = 0.5, limit: float = 20.0) -> Tensor:
    """Weights of the positive terms of `multi_label_cross_entropy`, float32 [C]: (absent / present)^power,
    clipped to [1/limit, limit].

    `power` 1 balances the two terms of a finding, which at one positive in 500 makes training jump and probabilities
    meaningless; 0.5 is half the way. A finding never seen counts as seen once.

    `present_C`, `absent_C`: counts of the training split, >= 0, unknown labels in neither. Raises ValueError as
    `class_weights` does, and when the two shapes differ.
    """
    if present_C.shape != absent_C.shape:
        raise ValueError(f"counts of present {list(present_C.shape)} and absent {list(absent_C.shape)} differ in shape")
    present_C, absent_C = _checked_counts(present_C, power, limit), _checked_counts(absent_C, power, limit)
    return (absent_C / present_C.clamp(min=1)).pow(power).clamp(1.0 / limit, limit).float()


def _checked_counts(counts_K: Tensor, power: float, limit: float) -> Tensor:
    if counts_K.dim() != 1 or bool((counts_K < 0).any()):
        raise ValueError(f"counts must be one row of numbers >= 0, got {counts_K.tolist()}")
    if power < 0:
        raise ValueError(f"power is {power}; it must be at least 0")
    if limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    return counts_K.double()
