"""The trials of a sweep as its report reads them from `sweep.json`, and numbers as it writes them."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

STATES = {"finished": "finished", "stopped": "stopped early", "failed": "failed", "unfinished": "unfinished"}
# How far one image's average precision lies from the mean on the NIH sample (docs/experiments.md: 622 queries, an
# interval of 2.2 points); on n images the mean is then uncertain by this / sqrt(n), and by half a point for 700.
IMAGE_SPREAD = 0.14
UNKNOWN_NOISE = 0.005
CERTAIN = 1.96  # standard errors on either side of a 95% interval


@dataclass(frozen=True)
class Axis:
    """A setting that was searched."""

    key: str
    meaning: str
    scale: str
    low: float | None
    high: float | None
    choices: tuple[Any, ...]
    default: Any

    @property
    def numeric(self) -> bool:
        return self.scale in ("log", "linear")

    @property
    def title(self) -> str:
        return f"{self.key}, log scale" if self.scale == "log" else self.key


@dataclass(frozen=True, eq=False)
class Trial:
    """One trial: values in 0 to 1, times in seconds."""

    id: str
    state: str
    settings: Mapping[str, Any]
    value: float | None
    value_epoch: int | None
    epochs: int
    seconds: float | None
    images: int | None
    """Training images of the epochs that ended, each as often as it was seen."""
    error: str | None
    model: str | None
    curve: tuple[tuple[int, float], ...]
    """(epoch, value) of every epoch that has a value, in their order."""
    centre_cosine: float | None
    resampled: tuple[float, ...]
    """Its value in resamples of the validation patients, the same ones in every trial; empty where none were kept."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of its value over validation patients."""
        if not self.resampled:
            return None
        low, high = np.quantile(self.resampled, (0.025, 0.975))
        return float(low), float(high)

    @property
    def reached(self) -> float:
        """The value of a trial that has one, as every ranked trial does."""
        assert self.value is not None
        return self.value

    def number(self, axis: Axis) -> float | None:
        return as_number(self.settings.get(axis.key))

    def words(self, axes: Sequence[Axis]) -> str:
        """Its settings as a person would write them."""
        return ", ".join(f"{axis.key} = {as_text(self.settings.get(axis.key))}" for axis in axes)


@dataclass(frozen=True)
class Gap:
    """How far a trial is behind the best (less than 0: ahead), and the margin within which that says nothing."""

    size: float
    margin: float
    paired: bool
    """Whether the margin is that of a 95% interval of the difference on the same patients, and not assumed."""

    @property
    def told_apart(self) -> bool:
        return abs(self.size) > self.margin


@dataclass(frozen=True)
class Trials:
    """All trials of a sweep, and what is compared with what."""

    metric: str
    sign: int
    """1 where more is better, -1 where less is."""
    epochs: int | None
    chance: float | None
    validation_images: int
    axes: tuple[Axis, ...]
    trials: tuple[Trial, ...]
    ranked: tuple[Trial, ...]
    """Trials that finished or were stopped, and have a value: the best first."""
    best: Trial | None

    @property
    def assumed_noise(self) -> float:
        """What differences without intervals are held against: one standard error of a mean over validation images."""
        return IMAGE_SPREAD / math.sqrt(self.validation_images) if self.validation_images else UNKNOWN_NOISE

    @property
    def noise(self) -> float:
        """The margin of the best trial's own value: half its 95% interval, or what is assumed."""
        known = self.best.resampled if self.best else ()
        return CERTAIN * float(np.std(known, ddof=1)) if known else self.assumed_noise

    def gap(self, trial: Trial) -> Gap:
        """How far a trial is behind the best: paired where both were measured on the same patients."""
        assert self.best is not None
        size = self.sign * (self.best.reached - trial.reached)
        if not trial.resampled or len(trial.resampled) != len(self.best.resampled):
            return Gap(size, self.assumed_noise, paired=False)
        spread = float(np.std(np.subtract(self.best.resampled, trial.resampled), ddof=1))
        return Gap(size, CERTAIN * spread, paired=True)

    @property
    def paired(self) -> bool:
        """Whether every trial is compared with the best on the same patients."""
        return self.best is not None and all(self.gap(trial).paired for trial in self.ranked)

    def near(self) -> list[Trial]:
        """Trials that are not told apart from the best."""
        return [trial for trial in self.ranked if trial is not self.best and not self.gap(trial).told_apart]

    def default(self) -> Trial | None:
        """The best trial that ran with every searched setting at its default."""

        def is_default(trial: Trial) -> bool:
            return all(as_text(trial.settings.get(axis.key)) == as_text(axis.default) for axis in self.axes)

        return next((trial for trial in self.ranked if is_default(trial)), None)


def read_trials(sweep: Mapping[str, Any]) -> Trials:
    """The trials of a parsed `sweep.json`, checked field by field: what is missing or strange is left out."""
    objective = sweep.get("objective") or {}
    sign = -1 if objective.get("mode") == "min" else 1
    trials = tuple(map(_trial, sweep.get("trials") or ()))
    known = [(trial.value, trial) for trial in trials if trial.value is not None]
    ranked = sorted(
        (pair for pair in known if pair[1].state in ("finished", "stopped")), key=lambda pair: -sign * pair[0]
    )
    return Trials(
        metric=str(objective.get("metric") or "objective"),
        sign=sign,
        epochs=as_whole(sweep.get("epochs")),
        chance=as_number(sweep.get("chance")),
        validation_images=as_whole(sweep.get("validation_images")) or 0,
        axes=tuple(map(_axis, sweep.get("axes") or ())),
        trials=trials,
        ranked=tuple(trial for _, trial in ranked),
        best=next((trial for _, trial in ranked if trial.id == str(sweep.get("best"))), None),
    )


def _axis(axis: Mapping[str, Any]) -> Axis:
    choices = tuple(axis.get("choices") or ())
    low, high = as_number(axis.get("low")), as_number(axis.get("high"))
    listed = known_numbers(*map(as_number, choices))
    if low is None and high is None and listed and len(listed) == len(choices):
        low, high = min(listed), max(listed)
    return Axis(
        key=str(axis["key"]),
        meaning=str(axis.get("meaning") or ""),
        scale=str(axis.get("scale") or "choice"),
        low=low,
        high=high,
        choices=choices,
        default=axis.get("default"),
    )


def _trial(trial: Mapping[str, Any]) -> Trial:
    curve = ((as_whole(point.get("epoch")), as_number(point.get("value"))) for point in trial.get("curve") or ())
    points = sorted((epoch, value) for epoch, value in curve if epoch is not None and value is not None)
    state = str(trial.get("state"))
    return Trial(
        id=str(trial["id"]),
        state=state if state in STATES else "unfinished",
        settings=trial.get("settings") or {},
        value=as_number(trial.get("value")),
        value_epoch=as_whole(trial.get("value_epoch")),
        epochs=as_whole(trial.get("epochs")) or 0,
        seconds=as_number(trial.get("seconds")),
        images=as_whole(trial.get("images")),
        error=None if trial.get("error") is None else str(trial["error"]),
        model=None if trial.get("model") is None else str(trial["model"]),
        curve=tuple(points),
        centre_cosine=as_number(trial.get("centre_cosine")),
        resampled=tuple(known_numbers(*map(as_number, trial.get("resampled") or ()))),
    )


def as_number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def as_whole(value: Any) -> int | None:
    """A finite number without its fraction, or None for anything else."""
    number = as_number(value)
    return None if number is None else int(number)


def known_numbers(*values: float | None) -> list[float]:
    """The numbers that are known."""
    return [value for value in values if value is not None]


def as_text(value: Any) -> str:
    """A setting as it stands in a YAML file, a number with four digits that count."""
    if isinstance(value, float) and math.isfinite(value):
        return as_decimal(value, 4)
    return value if isinstance(value, str) else json.dumps(value)


def as_decimal(value: float, digits: int) -> str:
    """A number with so many digits that matter."""
    # Without an exponent: YAML reads 5e-05 as a text.
    return np.format_float_positional(float(f"{value:.{digits}g}"), trim="-")


def as_percent(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.1f}%"


def as_points(difference: float) -> str:
    """A difference of shares in percentage points."""
    size = abs(100 * difference)
    return "less than 0.1 points" if 0 < size < 0.05 else f"{size:.1f} points"


def as_time(seconds: float | None) -> str:
    """Seconds in the units that a person reads."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def counted(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(parts: Iterable[str]) -> str:
    """Parts as a sentence lists them."""
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def shortened(text: str, limit: int = 160) -> str:
    """The text, cut where it is longer than `limit`."""
    return text if len(text) <= limit else text[: limit - 3] + "..."
