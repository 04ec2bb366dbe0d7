"""What a random ranking would score: the expectation of each figure over all orderings, in closed form.

A query has n candidates, m of them relevant; every one of the n! orderings is equally likely. All functions take
and return float64 tensors of any one shape; a query without candidates (n = 0) or without relevant ones scores 0.
"""

import torch
from torch import Tensor


def chance_recall(candidates: Tensor, relevant: Tensor, cutoff: int) -> Tensor:
    """Probability of some relevant image among the first k: 1 - C(n - m, k) / C(n, k) (hypergeometric).

    Computed as a product of k factors, which keeps full precision where binomials would overflow. With fewer than
    k candidates the first k are all of them.
    """
    _check(candidates, relevant)
    n, m = candidates.double(), relevant.double()
    none_found = torch.ones_like(n)
    for drawn in range(_check_cutoff(cutoff)):
        left = n - drawn
        factor = ((left - m) / left.clamp(min=1)).clamp(min=0)
        none_found = torch.where(left > 0, none_found * factor, none_found)
    return 1 - none_found


def chance_precision(candidates: Tensor, relevant: Tensor) -> Tensor:
    """Expected precision@k: m / n at every k."""
    _check(candidates, relevant)
    return relevant.double() / candidates.double().clamp(min=1)


def chance_average_precision(candidates: Tensor, relevant: Tensor) -> Tensor:
    """Expected average precision: (1 / n) [H_n + (m - 1) / (n - 1) (n - H_n)], H_n the n-th harmonic number.

    A place i holds a relevant image with probability m / n; given that, the i - 1 places before it hold
    (i - 1)(m - 1) / (n - 1) of them on average. Summing (m / n) (1 + (i - 1)(m - 1) / (n - 1)) / i over i and
    dividing by m gives the formula. A single candidate that is relevant scores 1.
    """
    _check(candidates, relevant)
    n, m = candidates.double().clamp(min=1), relevant.double()
    harmonic = torch.special.digamma(n + 1) + _EULER_GAMMA
    expected = (harmonic + (m - 1) / (n - 1).clamp(min=1) * (n - harmonic)) / n
    return torch.where(m > 0, expected, torch.zeros_like(expected))


def chance_ndcg(candidates: Tensor, mean_gain: Tensor, ideal_dcg: Tensor, cutoff: int) -> Tensor:
    """Expected nDCG@k: every place has the candidates' mean gain, so E[DCG@k] = mean gain * sum of discounts.

    `ideal_dcg` is the best DCG@k that the candidates allow; it does not depend on the ordering.
    """
    discounts = discount(_check_cutoff(cutoff), candidates.device)
    totals = torch.cat([discounts.new_zeros(1), discounts.cumsum(dim=0)])
    reached = totals[candidates.long().clamp(max=cutoff)]
    expected = mean_gain.double() * reached / torch.where(ideal_dcg > 0, ideal_dcg, 1.0)
    return torch.where(ideal_dcg > 0, expected, torch.zeros_like(expected))


def discount(places: int, device: torch.device | None = None) -> Tensor:
    """Weight of the first `places` ranks in DCG: 1 / log2(1 + rank), rank from 1 (Jarvelin and Kekalainen 2002)."""
    return 1 / torch.log2(torch.arange(2, places + 2, dtype=torch.float64, device=device))


_EULER_GAMMA = -float(torch.special.digamma(torch.tensor(1.0, dtype=torch.float64)))


def _check_cutoff(cutoff: int) -> int:
    if cutoff < 1:
        raise ValueError(f"a cut-off must be at least 1, got {cutoff}")
    return cutoff


def _check(candidates: Tensor, relevant: Tensor) -> None:
    if bool((relevant < 0).any()) or bool((relevant > candidates).any()):
        raise ValueError("relevant must lie between 0 and candidates")
