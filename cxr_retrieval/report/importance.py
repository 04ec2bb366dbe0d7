"""How much each searched setting decides whether a trial is among the best, and how sure that is.

The measure is PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255), as Optuna has it: how far the values of a setting
among the best third of the trials are from its values among all of them. It asks only which trials are in that third,
so that trials which were stopped early, being behind, need no value at full length.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import PedAnovaImportanceEvaluator

from cxr_retrieval.report.trials import Axis, Trial, Trials, as_text, counted

TOP = 1 / 3
# Optuna wants five trials above the line. In simulated sweeps of three settings, one of which matters, it came out
# first in 62% of those of 8 trials, 74% of 12, 82% of 16 and 95% of 30 (docs/experiments.md); by chance in 33%.
ENOUGH = 15
RESAMPLES = 100


@dataclass(frozen=True)
class Importance:
    """What a setting has of the importance of all, 0 to 1, with the 95% interval of resamples of the trials."""

    axis: Axis
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Importances:
    """Of every searched setting, the most important first; none, and why, where trials do not tell."""

    settings: tuple[Importance, ...]
    refused: str = ""

    @property
    def even(self) -> float:
        """What each would have if all mattered equally, or none did."""
        return 1 / len(self.settings)


def importances(run: Trials) -> Importances:
    """The importance of every setting for being among the best third of the trials.

    Refused, with the reason, for fewer than `ENOUGH` trials that have a value and a place on every axis, and where
    their values do not differ. Trials are resampled by a fixed seed: the same sweep gives the same figures.
    """
    spaces = {axis.key: _space(axis) for axis in run.axes}
    placed = [trial for trial in run.ranked if all(_holds(spaces[axis.key], axis, trial) for axis in run.axes)]
    if len(placed) < ENOUGH:
        return Importances(
            (),
            f"{counted(len(placed), 'trial')} with a value {'is' if len(placed) == 1 else 'are'} too few: the measure"
            f" looks at what the best third has in common, and needs {ENOUGH} trials for a third of {ENOUGH // 3}.",
        )
    if len({trial.value for trial in placed}) == 1:
        return Importances((), "all trials have the same value.")
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells of every study, and each resample is one
    outcome = run.sign * np.array([trial.reached for trial in placed])
    known = [_known(trial, value, run.axes, spaces) for trial, value in zip(placed, outcome, strict=True)]
    chance = np.random.default_rng(0)
    draws = [chance.integers(len(known), size=len(known)) for _ in range(RESAMPLES)]
    shares = _shares(known, outcome, np.arange(len(known)))
    lows, highs = np.quantile([_shares(known, outcome, drawn) for drawn in draws], (0.025, 0.975), axis=0)
    found = [
        Importance(axis, float(share), float(low), float(high))
        for axis, share, low, high in zip(run.axes, shares, lows, highs, strict=True)
    ]
    return Importances(tuple(sorted(found, key=lambda importance: -importance.share)))


def _shares(known: Sequence[optuna.trial.FrozenTrial], outcome: np.ndarray, drawn: np.ndarray) -> list[float]:
    """What each setting has of the importance of all among the trials that are drawn, in the order of the axes."""
    keys = list(known[0].params)
    # The line as the evaluator draws it: where no trial is below, there is nothing to compare.
    line = np.sort(outcome[drawn])[::-1][math.ceil(TOP * len(drawn)) - 1]
    if outcome[drawn].min() >= line:
        return [1 / len(keys)] * len(keys)
    study = optuna.create_study(direction="maximize")
    study.add_trials([known[place] for place in drawn])
    found = PedAnovaImportanceEvaluator(target_quantile=TOP).evaluate(study, keys)
    total = sum(found.values())
    return [found[key] / total if total > 0 else 1 / len(keys) for key in keys]


def _space(axis: Axis) -> BaseDistribution | None:
    """The values of an axis as Optuna knows them; None where its bounds say nothing."""
    if not axis.numeric:
        texts = dict.fromkeys(map(as_text, axis.choices))
        return CategoricalDistribution(list(texts)) if texts else None
    if axis.low is None or axis.high is None or not axis.low < axis.high or (axis.scale == "log" and axis.low <= 0):
        return None
    return FloatDistribution(axis.low, axis.high, log=axis.scale == "log")


def _value(axis: Axis, trial: Trial) -> Any:
    return trial.number(axis) if axis.numeric else as_text(trial.settings.get(axis.key))


def _holds(space: BaseDistribution | None, axis: Axis, trial: Trial) -> bool:
    if isinstance(space, FloatDistribution):
        number = trial.number(axis)
        return number is not None and space.low <= number <= space.high
    return isinstance(space, CategoricalDistribution) and _value(axis, trial) in space.choices


def _known(
    trial: Trial, value: float, axes: Sequence[Axis], spaces: dict[str, BaseDistribution | None]
) -> optuna.trial.FrozenTrial:
    """A trial as Optuna knows it, with a value of which more is better."""
    return optuna.trial.create_trial(
        params={axis.key: _value(axis, trial) for axis in axes},
        distributions={axis.key: space for axis in axes if (space := spaces[axis.key]) is not None},
        value=float(value),
    )
