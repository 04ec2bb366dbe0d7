"""What a comparison of losses says: paired over queries and seeds, with what both leave open."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import losses
from benchmarks.losses import ALONE, NAMES, OURS, claims, columns, compared, time_to_equal

QUERIES = 60


def run(seed: int, better: float, curve: tuple[float, ...] = (0.1, 0.2, 0.3)) -> dict[str, Any]:
    """A run whose average precision lies `better` above what the query itself decides."""
    base = np.random.default_rng(0).random(QUERIES) * 0.5
    figures = {
        "patients": [number // 2 for number in range(QUERIES)],
        "recall": ["0111" if number % 2 else "0000" for number in range(QUERIES)],
        "hits_of_8": [number % 9 for number in range(QUERIES)],
        "ap": (base + better).tolist(),
        "ndcg_at_8": base.tolist(),
        "macro_recall_at_8": 0.5,
        "macro_map": 0.2,
    }
    looks = [{"share": (n + 1) / len(curve), "seconds": 10.0 * n, "global": value} for n, value in enumerate(curve)]
    return {"seed": seed, "seconds": 100.0, "curve": looks, "figures": {"test": {"global": figures}}}


def test_columns_are_the_figures_of_a_query_in_their_order() -> None:
    found = columns(run(0, 0.1)["figures"]["test"]["global"])
    assert found.shape == (QUERIES, len(NAMES))
    assert found[3].tolist()[:5] == [0, 1, 1, 1, 3 / 8]


def test_a_difference_is_paired_and_says_nothing_of_its_error_with_one_seed() -> None:
    found = compared({OURS: [run(0, 0.03)], ALONE: [run(0, 0.01)]}, "test", "global")
    cell = found[ALONE]["ccloss_minus_this"]["mAP"]
    assert cell["difference"] == pytest.approx(0.02)
    assert "low" not in cell
    assert "ccloss_minus_this" not in found[OURS]


def test_the_spread_over_seeds_is_in_the_interval_of_a_difference() -> None:
    ours = [run(seed, better) for seed, better in enumerate((0.03, 0.05, 0.01))]
    theirs = [run(seed, 0.01) for seed in range(4)]  # the fourth seed has nothing to be paired with
    cell = compared({OURS: ours, ALONE: theirs}, "test", "global")[ALONE]["ccloss_minus_this"]["mAP"]
    assert cell["by_seed"] == pytest.approx([0.02, 0.04, 0.0])
    assert cell["difference"] == pytest.approx(0.02)
    # No query differs from another in its difference, so patients leave nothing open and seeds all of it.
    error = np.std([0.02, 0.04, 0.0], ddof=1) / math.sqrt(3)
    student = 4.3027  # 97.5% of Student's t with the two degrees of freedom that three seeds leave
    assert cell["high"] - cell["difference"] == pytest.approx(student * error, rel=1e-3)
    assert cell["detectable"] == pytest.approx((student + 1.0607) * error, rel=1e-3), "and its 80%"


def test_a_claim_is_against_the_best_other_over_common_seeds() -> None:
    entries = {OURS: [run(0, 0.03), run(1, 0.03)], ALONE: [run(0, 0.01)], "all pairs": [run(0, 0.05), run(1, 0.04)]}
    made = {
        claim.claim.split(" of ")[0]: claim
        for claim in claims(compared(entries, "test", "global"), "test", "global", 3)
    }
    assert made["mAP"].against.startswith("all pairs")
    assert len(made["mAP"].samples) == 2
    assert not made["mAP"].holds
    assert made["precision@8"].ratio == pytest.approx(1.0)


def test_time_to_equal_is_where_a_curve_stays_above_the_end_of_cross_entropy() -> None:
    entries = {
        ALONE: [run(0, 0, (0.1, 0.2, 0.3))],
        OURS: [run(0, 0, (0.35, 0.2, 0.4))],
        "all pairs": [run(0, 0, (0.1, 0.2, 0.25))],
        "proxy-anchor": [run(0, 0, (0.3, 0.5, 0.6))],
    }
    found = time_to_equal(entries, "global")
    assert found == {ALONE: 1.0, OURS: 1.0, "all pairs": None, "proxy-anchor": pytest.approx(1 / 3)}
    kept = compared(entries, "test", "global")  # what the summary holds
    assert {name: facts["share_to_equal_map"] for name, facts in kept.items()} == found


def test_every_rival_has_a_loss_of_its_own() -> None:
    made = {name: make(torch.device("cpu")) for name, make in losses.rivals(losses.LossSettings(), 0).items()}
    assert [name for name, rival in made.items() if rival.weight == 0] == [ALONE]
    assert {name for name, rival in made.items() if list(rival.parameters())} == {"proxy-anchor", "multi-label proxies"}
