"""Intervals over patients: what they must equal where the answer is known."""

import random
import statistics

import pytest
import torch

from cxr_retrieval.evaluation import intervals
from cxr_retrieval.evaluation.intervals import (
    detectable_difference,
    finding_bootstrap,
    paired_difference,
    patient_bootstrap,
    resampled_means,
)


def test_one_query_a_patient_is_the_ordinary_bootstrap() -> None:
    values = torch.rand(400, generator=torch.Generator().manual_seed(1))
    interval = patient_bootstrap(values, torch.arange(400), draws=4000)
    textbook = statistics.pstdev(values.tolist()) / 400**0.5
    assert interval.mean.item() == pytest.approx(statistics.fmean(values.tolist()))
    assert interval.standard_error.item() == pytest.approx(textbook, rel=0.05)
    assert interval.low.item() == pytest.approx(interval.mean.item() - 1.96 * textbook, abs=0.15 * textbook)
    assert interval.high.item() == pytest.approx(interval.mean.item() + 1.96 * textbook, abs=0.15 * textbook)


def test_spread_equals_that_of_a_plain_loop_over_patients() -> None:
    values, patients = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0], [7, 7, 7, 3, 9, 9, 1]
    chance = random.Random(0)
    means = []
    for _ in range(20_000):
        drawn = [chance.choice([1, 3, 7, 9]) for _ in range(4)]
        brought = [values[q] for patient in drawn for q in range(7) if patients[q] == patient]
        means.append(sum(brought) / len(brought))
    interval = patient_bootstrap(torch.tensor(values), torch.tensor(patients), draws=20_000)
    assert interval.standard_error.item() == pytest.approx(statistics.stdev(means), rel=0.03)
    low, *_, high = statistics.quantiles(means, n=40)
    assert interval.low.item() == pytest.approx(low, abs=0.03)
    assert interval.high.item() == pytest.approx(high, abs=0.03)


def test_copies_of_a_patients_queries_add_no_certainty() -> None:
    values = torch.rand(60, generator=torch.Generator().manual_seed(2))
    patients = torch.arange(60)
    once = patient_bootstrap(values, patients)
    copied = patient_bootstrap(values.repeat_interleave(5), patients.repeat_interleave(5))
    for name in ("mean", "low", "high", "standard_error"):
        assert getattr(copied, name).item() == pytest.approx(getattr(once, name).item(), rel=1e-12)


def test_seed_fixes_the_interval_and_columns_share_resamples() -> None:
    values = torch.rand(50, 3, generator=torch.Generator().manual_seed(3))
    patients = torch.arange(50) // 2
    whole = patient_bootstrap(values, patients, draws=300, seed=5)
    assert torch.equal(whole.low, patient_bootstrap(values, patients, draws=300, seed=5).low)
    assert not torch.equal(whole.low, patient_bootstrap(values, patients, draws=300, seed=6).low)
    alone = patient_bootstrap(values[:, 1], patients, draws=300, seed=5)
    assert alone.low.shape == ()
    assert alone.low.item() == pytest.approx(whole.low[1].item(), rel=1e-12)


def test_bounded_memory_changes_no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    values, patients = torch.rand(40, generator=torch.Generator().manual_seed(4)), torch.arange(40)
    whole = patient_bootstrap(values, patients, draws=200)
    monkeypatch.setattr(intervals, "_MAX_CELLS", 130)
    assert patient_bootstrap(values, patients, draws=200).low.item() == pytest.approx(whole.low.item(), rel=1e-12)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(200):
        patient_effect = torch.randn(60, generator=generator)
        values = patient_effect.repeat_interleave(3) + 0.2 * torch.randn(180, generator=generator)
        interval = patient_bootstrap(values, torch.arange(60).repeat_interleave(3), draws=300, seed=trial)
        covered += bool(interval.low <= 0 <= interval.high)
    assert 0.89 <= covered / 200 <= 0.99


def test_paired_difference_sees_what_two_intervals_hide() -> None:
    generator = torch.Generator().manual_seed(5)
    difficulty = torch.randn(200, generator=generator)
    better = difficulty + 0.1 + 0.05 * torch.randn(200, generator=generator)
    patients = torch.arange(200)
    paired = paired_difference(better, difficulty, patients)
    assert paired.low.item() > 0
    assert patient_bootstrap(better, patients).low.item() < patient_bootstrap(difficulty, patients).high.item()
    assert paired.mean.item() == pytest.approx((better - difficulty).mean().item(), rel=1e-5)


def test_findings_and_their_mean_spread_as_in_a_plain_loop_over_patients() -> None:
    values, patients = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.5], [7, 7, 7, 3, 9, 9, 1, 4]
    present = [[1, 0], [1, 1], [0, 1], [1, 0], [1, 0], [0, 1], [1, 1], [0, 1]]
    chance = random.Random(0)
    names = sorted(set(patients))
    means: list[list[float]] = [[], [], []]
    for _ in range(20_000):
        drawn = [chance.choice(names) for _ in names]
        rows = [q for patient in drawn for q in range(8) if patients[q] == patient]
        each = []
        for finding in (0, 1):
            brought = [values[q] for q in rows if present[q][finding]]
            if brought:
                each.append(statistics.fmean(brought))
                means[finding].append(each[-1])
        means[2].append(statistics.fmean(each))
    (a, b), macro = finding_bootstrap(
        torch.tensor(values)[:, None], torch.tensor(present).bool(), torch.tensor(patients), draws=20_000
    )
    for interval, plain in zip((a, b, macro), means, strict=True):
        assert interval.standard_error.item() == pytest.approx(statistics.stdev(plain), rel=0.03)
        low, *_, high = statistics.quantiles(plain, n=40)
        assert interval.low.item() == pytest.approx(low, abs=0.03)
        assert interval.high.item() == pytest.approx(high, abs=0.03)
    assert (a.mean.item(), b.mean.item()) == (pytest.approx(3 / 5), pytest.approx(1.5 / 5))
    assert macro.mean.item() == pytest.approx((3 / 5 + 1.5 / 5) / 2)


def test_a_finding_of_nobody_or_of_one_patient_has_no_interval_and_spoils_none() -> None:
    values = torch.rand(30, 2, generator=torch.Generator().manual_seed(6))
    present = torch.zeros(30, 3, dtype=torch.bool)
    present[:, 0] = True
    present[4, 1] = True
    (whole, single, nobody), macro = finding_bootstrap(values, present, torch.arange(30), draws=300)
    plain = patient_bootstrap(values, torch.arange(30), draws=300)
    assert torch.allclose(whole.low, plain.low, rtol=1e-12)
    assert torch.equal(single.mean, values[4].double())
    assert single.low.isnan().all()
    assert nobody.mean.isnan().all()
    assert torch.allclose(macro.mean, (whole.mean + single.mean) / 2)
    assert (macro.low < macro.high).all()


def test_figures_and_differences_are_leaves_that_json_can_hold() -> None:
    lonely = patient_bootstrap(torch.tensor([[0.25]]), torch.tensor([1]))
    told = lonely.figures(chance=torch.tensor([0.5]))
    assert told == [{"value": 0.25, "low": None, "high": None, "standard_error": None, "chance": 0.5}]
    assert lonely.differences()[0]["detectable"] is None


def test_detectable_difference_is_2_8_standard_errors() -> None:
    assert detectable_difference(torch.tensor(1.0)).item() == pytest.approx(2.802, abs=1e-3)


def test_single_patient_has_a_mean_but_no_interval() -> None:
    interval = patient_bootstrap(torch.tensor([0.0, 1.0]), torch.tensor([4, 4]))
    assert interval.mean.item() == 0.5
    assert all(part.isnan() for part in (interval.low, interval.high, interval.standard_error))


def test_wrong_use_is_refused() -> None:
    patients = torch.arange(3)
    with pytest.raises(ValueError, match="values must be"):
        patient_bootstrap(torch.rand(2), patients)
    with pytest.raises(ValueError, match="no queries"):
        patient_bootstrap(torch.rand(0), patients[:0])
    with pytest.raises(ValueError, match="NaN"):
        patient_bootstrap(torch.tensor([0.0, torch.nan, 1.0]), patients)
    with pytest.raises(ValueError, match="level"):
        patient_bootstrap(torch.rand(3), patients, level=95)
    with pytest.raises(ValueError, match="same queries"):
        paired_difference(torch.rand(3), torch.rand(2), patients)
    with pytest.raises(ValueError, match="power"):
        detectable_difference(torch.tensor(1.0), power=1.0)


def test_resamples_that_were_kept_give_the_interval_of_a_difference_later() -> None:
    random_numbers = torch.Generator().manual_seed(6)
    a, b = torch.rand(60, generator=random_numbers), torch.rand(60, generator=random_numbers)
    patients = torch.arange(60) // 3
    kept = resampled_means(a, patients, draws=200) - resampled_means(b, patients, draws=200)
    paired = paired_difference(a, b, patients, draws=200)
    assert kept.shape == (200,)
    assert kept.std().item() == pytest.approx(paired.standard_error.item(), rel=1e-9)
    assert torch.quantile(kept, 0.025).item() == pytest.approx(paired.low.item(), rel=1e-9)
    assert resampled_means(torch.rand(60, 2), patients, draws=5).shape == (5, 2)


def test_one_patient_gives_no_resamples() -> None:
    assert resampled_means(torch.rand(3), torch.zeros(3, dtype=torch.int64), draws=10).shape == (0,)
    assert resampled_means(torch.rand(3, 2), torch.zeros(3, dtype=torch.int64), draws=10).shape == (0, 2)
