"""Confidence intervals that respect that images of one patient resemble one another.

The bootstrap resamples *patients*, not queries (the cluster bootstrap, Field and Welsh 2007): P patients are
drawn with replacement, each brings all of its queries, and the figure is the mean over the queries drawn.
Its spread is the uncertainty of the figure for other patients from the same archive.

Shapes: Q queries, M figures, P patients, R resamples in a block.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

# Bounds the memory of one block of resamples (8 bytes a cell, twice).
_MAX_CELLS = 1 << 21


@dataclass(frozen=True)
class Interval:
    """A mean, the percentile interval around it and its standard error: float64 `[M]`, or `[]` for one figure.

    With fewer than two patients nothing can be said about spread: `low`, `high` and `standard_error` are NaN.
    """

    mean: Tensor
    low: Tensor
    high: Tensor
    standard_error: Tensor


def patient_bootstrap(
    values: Tensor, patients_Q: Tensor, *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Interval of the mean over queries of each column of `values` (`[Q, M]`, or `[Q]` for a single figure).

    `patients_Q` holds an integer code a query. The same seed, draws and patients give the same resamples, so
    figures computed from the same queries are resampled together. Time and memory: draws x P, in blocks.

    Raises `ValueError` for no queries, NaN in `values`, lengths that disagree, `draws` below 2, or a `level` that
    is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    values_QM, patient_Q = _checked(values, patients_Q, draws)
    mean_M = values_QM.mean(dim=0)
    if int(patient_Q.max()) == 0:
        low_M = high_M = error_M = torch.full_like(mean_M, torch.nan)
    else:
        resampled_RM = _resampled_means(values_QM, patient_Q, draws, seed)
        outside = (1 - level) / 2
        low_M, high_M = torch.from_numpy(np.quantile(resampled_RM.numpy(), (outside, 1 - outside), axis=0))
        error_M = resampled_RM.std(dim=0)
    return Interval(*(column.reshape(values.shape[1:]) for column in (mean_M, low_M, high_M, error_M)))


def resampled_means(values: Tensor, patients_Q: Tensor, *, draws: int, seed: int = 0) -> Tensor:
    """The means that `patient_bootstrap` takes its interval from: float64 `[draws, M]`, or `[draws]` for one figure.

    Kept, they are compared later with those of another run over the same queries: the spread of the differences is
    that of `paired_difference`. Nothing where there are fewer than two patients: `[0, M]`, or `[0]`. Errors as in
    `patient_bootstrap`.
    """
    values_QM, patient_Q = _checked(values, patients_Q, draws)
    if int(patient_Q.max()) == 0:
        return torch.empty(0, *values.shape[1:], dtype=torch.float64)
    return _resampled_means(values_QM, patient_Q, draws, seed).reshape(draws, *values.shape[1:])


def paired_difference(
    values_a_Q: Tensor, values_b_Q: Tensor, patients_Q: Tensor, *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Interval of the mean of a - b over the same queries (`[Q]`, or `[Q, M]` for several figures).

    Pairing removes what the two have in common, hard and easy queries above all, and so sees far smaller
    differences than two separate intervals would. Errors as in `patient_bootstrap`.
    """
    if values_a_Q.shape != values_b_Q.shape:
        raise ValueError(
            f"a and b must hold the same queries, got {tuple(values_a_Q.shape)}, {tuple(values_b_Q.shape)}"
        )
    difference_Q = values_a_Q.double() - values_b_Q.double()
    return patient_bootstrap(difference_Q, patients_Q, draws=draws, seed=seed, level=level)


def detectable_difference(standard_error: Tensor, *, power: float = 0.8, significance: float = 0.05) -> Tensor:
    """The true difference that a two-sided test would have found with the given power.

    (z_{1 - significance / 2} + z_{power}) standard errors: 2.80 of them for 80% power at 5%.
    """
    if not 0 < power < 1 or not 0 < significance < 1:
        raise ValueError(f"power and significance must lie between 0 and 1, got {power} and {significance}")
    normal = NormalDist()
    return standard_error * (normal.inv_cdf(1 - significance / 2) + normal.inv_cdf(power))


def _checked(values: Tensor, patients_Q: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """The values as float64 `[Q, M]`, and the patients counted from 0."""
    if values.dim() not in (1, 2) or len(values) != len(patients_Q):
        raise ValueError(f"values must be [Q] or [Q, M] with Q = {len(patients_Q)}, got {tuple(values.shape)}")
    if len(values) == 0:
        raise ValueError("no queries to resample")
    if draws < 2:
        raise ValueError(f"draws must be at least 2, got {draws}")
    values_QM = values.detach().cpu().double().reshape(len(values), -1)
    if bool(values_QM.isnan().any()):
        raise ValueError("values hold NaN: leave out the queries for which a figure is not defined")
    return values_QM, torch.unique(patients_Q.cpu(), return_inverse=True)[1]


def _resampled_means(values_QM: Tensor, patient_Q: Tensor, draws: int, seed: int) -> Tensor:
    """Mean over queries in each of `draws` resamples of the patients, `[draws, M]`."""
    patients = int(patient_Q.max()) + 1
    sums_PM = torch.zeros(patients, values_QM.shape[1], dtype=torch.float64).index_add_(0, patient_Q, values_QM)
    sizes_P = torch.bincount(patient_Q, minlength=patients).double()
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _MAX_CELLS // patients)
    means = []
    for start in range(0, draws, rows):
        drawn_RP = torch.randint(patients, (min(rows, draws - start), patients), generator=generator)
        # How often each patient was drawn: a multinomial count, which turns resampling into one product.
        times_RP = torch.zeros(drawn_RP.shape, dtype=torch.float64)
        times_RP.scatter_add_(1, drawn_RP, torch.ones_like(times_RP))
        means.append((times_RP @ sums_PM) / (times_RP @ sizes_P)[:, None])
    return torch.cat(means)
