"""Confidence intervals that respect that images of one patient resemble one another.

The bootstrap resamples *patients*, not queries (the cluster bootstrap, Field and Welsh 2007): P patients are
drawn with replacement, each brings all of its queries, and the figure is the mean over the queries drawn.
Its spread is the uncertainty of the figure for other patients from the same archive.

Shapes: Q queries, M figures, P patients, C findings, R resamples, B of them in a block.
"""

import math
from dataclasses import dataclass, fields
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

# Bounds the memory of one block of resamples (8 bytes a cell, twice).
_MAX_CELLS = 1 << 21


@dataclass(frozen=True)
class Interval:
    """A mean, the percentile interval around it and its standard error: float64, all of one shape.

    With fewer than two patients nothing can be said about spread: `low`, `high` and `standard_error` are NaN.
    """

    mean: Tensor
    low: Tensor
    high: Tensor
    standard_error: Tensor

    def figures(self, **more: Tensor) -> list[dict[str, float | None]]:
        """{value, low, high, standard_error} of each figure, and what `more` says of it; NaN becomes None for JSON."""
        return _named(value=self.mean, low=self.low, high=self.high, standard_error=self.standard_error, **more)

    def differences(self) -> list[dict[str, float | None]]:
        """{difference, low, high, standard_error, detectable} of each figure of a `paired_difference`, where
        `detectable` is the true difference that would have been found with 80% power at 5%."""
        detectable = detectable_difference(self.standard_error)
        return _named(
            difference=self.mean,
            low=self.low,
            high=self.high,
            standard_error=self.standard_error,
            detectable=detectable,
        )


def patient_bootstrap(
    values: Tensor, patients_Q: Tensor, *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Interval `[M]` of the mean over queries of each column of `values` `[Q, M]`, or `[]` of those of `[Q]`.

    `patients_Q` holds an integer code a query. The same seed, draws and patients give the same resamples, so
    figures computed from the same queries are resampled together. Time and memory: draws x P, in blocks.

    Raises `ValueError` for no queries, NaN in `values`, lengths that disagree, `draws` below 2, or a `level` that
    is not between 0 and 1.
    """
    values_QM = _checked(values, patients_Q, draws, level)
    everyone_Q1 = torch.ones(len(values), 1, dtype=torch.float64)
    resampled_RM = _resampled_means(values_QM, everyone_Q1, patients_Q, draws, seed)[:, 0]
    interval = _interval(values_QM.mean(dim=0), resampled_RM, patients_Q, level)
    shape = values.shape[1:]
    return Interval(*(getattr(interval, part.name).reshape(shape) for part in fields(interval)))


def finding_bootstrap(
    values_QM: Tensor, present_QC: Tensor, patients_Q: Tensor, *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[list[Interval], Interval]:
    """Intervals `[M]` of the means over the queries that have each of C findings, and of the mean over findings.

    `present_QC` is bool; a query may have several findings, and one resample serves them all. A finding that nobody in
    a resample has is left out of that resample; one that no query has is NaN and has no part in the mean.
    Errors as in `patient_bootstrap`.
    """
    values_QM = _checked(values_QM, patients_Q, draws, level)
    present_QC, patients_Q = present_QC.cpu(), patients_Q.cpu()
    # 0 / 0 is the NaN that a finding without queries should have.
    mean_CM = (present_QC.double().T @ values_QM) / present_QC.sum(dim=0)[:, None]
    resampled_RCM = _resampled_means(values_QM, present_QC.double(), patients_Q, draws, seed)
    each = [
        _interval(mean_CM[c], resampled_RCM[:, c], patients_Q[present_QC[:, c]], level) for c in range(len(mean_CM))
    ]
    return each, _interval(mean_CM.nanmean(dim=0), resampled_RCM.nanmean(dim=1), patients_Q, level)


def resampled_means(values: Tensor, patients_Q: Tensor, *, draws: int, seed: int = 0) -> Tensor:
    """The means that `patient_bootstrap` takes its interval from: float64 `[draws, M]`, or `[draws]` for one figure.

    Kept, they are compared later with those of another run over the same queries: the spread of the differences is
    that of `paired_difference`. Nothing where there are fewer than two patients: `[0, M]`, or `[0]`. Errors as in
    `patient_bootstrap`.
    """
    values_QM = _checked(values, patients_Q, draws)
    if len(patients_Q.unique()) < 2:
        return torch.empty(0, *values.shape[1:], dtype=torch.float64)
    everyone_Q1 = torch.ones(len(values), 1, dtype=torch.float64)
    return _resampled_means(values_QM, everyone_Q1, patients_Q, draws, seed)[:, 0].reshape(draws, *values.shape[1:])


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


def number(value: Tensor) -> float | None:
    """A float that JSON can hold: NaN becomes None."""
    found = float(value)
    return None if math.isnan(found) else found


def _named(**columns: Tensor) -> list[dict[str, float | None]]:
    return [dict(zip(columns, map(number, row), strict=True)) for row in zip(*columns.values(), strict=True)]


def _checked(values: Tensor, patients_Q: Tensor, draws: int, level: float = 0.95) -> Tensor:
    """The values as float64 `[Q, M]`."""
    if values.dim() not in (1, 2) or len(values) != len(patients_Q):
        raise ValueError(f"values must be [Q] or [Q, M] with Q = {len(patients_Q)}, got {tuple(values.shape)}")
    if len(values) == 0:
        raise ValueError("no queries to resample")
    if draws < 2 or not 0 < level < 1:
        raise ValueError(f"draws must be at least 2 and level between 0 and 1, got {draws} and {level}")
    values_QM = values.detach().cpu().double().reshape(len(values), -1)
    if bool(values_QM.isnan().any()):
        raise ValueError("values hold NaN: leave out the queries for which a figure is not defined")
    return values_QM


def _interval(mean_M: Tensor, resampled_RM: Tensor, patients_Q: Tensor, level: float) -> Interval:
    """The interval `[M]`; a resample that holds none of the queries is NaN and says nothing."""
    if len(patients_Q.unique()) < 2:
        nothing_M = torch.full_like(mean_M, torch.nan)
        return Interval(mean_M, nothing_M, nothing_M, nothing_M)
    known_RM = resampled_RM[~resampled_RM.isnan().any(dim=1)]
    outside = (1 - level) / 2
    low_M, high_M = torch.from_numpy(np.quantile(known_RM.numpy(), (outside, 1 - outside), axis=0))
    return Interval(mean_M, low_M, high_M, known_RM.std(dim=0))


def _resampled_means(values_QM: Tensor, weights_QC: Tensor, patients_Q: Tensor, draws: int, seed: int) -> Tensor:
    """Means over queries under each column of weights, in each of `draws` resamples of the patients: `[R, C, M]`."""
    _, patient_Q = torch.unique(patients_Q.cpu(), return_inverse=True)
    patients = int(patient_Q.max()) + 1
    weighted_QCM = weights_QC[:, :, None] * values_QM[:, None]
    shape = weighted_QCM.shape[1:]
    sums_PE = torch.zeros(patients, shape.numel(), dtype=torch.float64).index_add_(
        0, patient_Q, weighted_QCM.flatten(1)
    )
    sizes_PC = torch.zeros(patients, shape[0], dtype=torch.float64).index_add_(0, patient_Q, weights_QC)
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _MAX_CELLS // patients)
    means = []
    for start in range(0, draws, rows):
        drawn_BP = torch.randint(patients, (min(rows, draws - start), patients), generator=generator)
        # How often each patient was drawn: a multinomial count, which turns resampling into one product.
        times_BP = torch.zeros(drawn_BP.shape, dtype=torch.float64)
        times_BP.scatter_add_(1, drawn_BP, torch.ones_like(times_BP))
        means.append((times_BP @ sums_PE).reshape(-1, *shape) / (times_BP @ sizes_PC)[:, :, None])
    return torch.cat(means)
