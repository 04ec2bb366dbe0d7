"""What a sweep's trials ask for next: rules, each an action with its reason."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cxr_retrieval.config import settings_fields
from cxr_retrieval.report.charts import Dimension
from cxr_retrieval.report.importance import importances
from cxr_retrieval.report.trials import (
    Axis,
    Trial,
    Trials,
    as_decimal,
    as_percent,
    as_points,
    as_text,
    counted,
    listed,
    read_trials,
    shortened,
)

TOO_FEW = 5
# A rank correlation of 20 trials without any effect lies within 0.44 of 0 in 95% of sweeps; with fewer it says nothing.
ENOUGH_FOR_EFFECT = 20
NO_EFFECT = 0.2
EDGE = 0.1
REPEATS = 5


def next_steps(sweep: Mapping[str, Any]) -> list[str]:
    """What the trials ask for next, the most urgent first: each an action with its reason, as plain text.

    `sweep` is the content of a `sweep.json`. Bounds that are named lie within what the setting itself allows. Fewer
    than `TOO_FEW` trials with a value say only that they are too few.
    """
    run = read_trials(sweep)
    steps = _mend_failures(run)
    given = len(run.ranked)
    if given < TOO_FEW:
        return [*steps, f"Run more trials: {given} with a value {'is' if given == 1 else 'are'} too few to say more."]
    if run.best is None:
        return steps
    if hopeless := _beat_chance(run):
        return [*steps, *hopeless, *_train_longer(run)]
    without_effect = _without_effect(run)
    steps += _repeat(run)
    for axis in run.axes:
        if axis.key not in without_effect:
            steps += _widen(run, axis)
    steps += _train_longer(run)
    steps += _wait_longer(run)
    steps += [
        f"Fix {axis.key} at its default, {as_text(axis.default)}, in the next sweep: over {len(run.ranked)} trials it"
        f" has no visible effect (rank correlation with {run.metric} {without_effect[axis.key]:+.2f}, and none with a"
        " best value in the middle either); a weak effect would not show."
        for axis in run.axes
        if axis.key in without_effect
    ]
    return steps + _try_default(run)


def _mend_failures(run: Trials) -> list[str]:
    failed = [trial for trial in run.trials if trial.state == "failed"]
    if not failed:
        return []
    errors = Counter(trial.error for trial in failed if trial.error)
    often = (
        f", {'most often ' if len(errors) > 1 else ''}with: {shortened(errors.most_common(1)[0][0])}" if errors else ""
    )
    return [
        f"Mend what failed, or keep the space away from it: {len(failed)} of {len(run.trials)} trials failed{often}."
    ]


def _beat_chance(run: Trials) -> list[str]:
    if run.best is None or run.chance is None or run.sign * (run.best.reached - run.chance) > run.noise:
        return []
    return [
        "Find out why nothing is learnt before any setting is chosen: the best value,"
        f" {as_percent(run.best.reached)}, is not ahead of chance, {as_percent(run.chance)}, by more than"
        f" {as_points(run.noise)}."
    ]


def _repeat(run: Trials) -> list[str]:
    near = run.near()
    if not near or run.best is None:
        return []
    again = [run.best, *near][:REPEATS]
    names = listed([trial.id for trial in again])
    which = f"trials {names}" if len(again) > len(near) else f"the {REPEATS} best trials, {names},"
    close = (
        "are not told apart by the patients they are judged on"
        if run.paired
        else f"lie within {as_points(run.assumed_noise)} of the best"
    )
    return [
        f"Repeat {which} with other seeds (seed=1, seed=2): {len(near) + 1} trials {close}, and one run of each says"
        " nothing of what another seed would give."
    ]


def _widen(run: Trials, axis: Axis) -> list[str]:
    """The best at an end of an axis: what is better may lie beyond."""
    assert run.best is not None
    value, low, high, log = run.best.number(axis), axis.low, axis.high, axis.scale == "log"
    if value is None or low is None or high is None or not low < high or (log and min(low, value) <= 0):
        return []
    share = Dimension("", "", low, high, (), log).share(value)
    if (EDGE < share < 1 - EDGE) or (not axis.numeric and low < value < high):
        return []
    up = share > 0.5
    bound = _beyond(axis.key, low, high, up, log, whole=_is_whole(run, axis))
    if bound is None:
        return []
    if not axis.numeric:
        return [
            f"Try choices of {axis.key} {'above' if up else 'below'} {as_text(value)}: it is the best trial's and the"
            f" {'greatest' if up else 'least'} that was tried, and a better one may lie beyond."
        ]
    new = (
        f"upwards, to between {as_text(low)} and {bound}"
        if up
        else f"downwards, to between {bound} and {as_text(high)}"
    )
    return [
        f"Widen {axis.key} {new}: the best trial's {as_text(value)} lies in the {'upper' if up else 'lower'} tenth of"
        f" what was searched, {as_text(low)} to {as_text(high)}, and a better one may lie beyond."
    ]


def _beyond(key: str, low: float, high: float, up: bool, log: bool, whole: bool) -> str | None:
    """A bound half a range further out, within what the setting allows, as text; None where it is there already."""
    least, greatest, least_open, greatest_open = _limits(key)
    edge, limit, is_open = (high, greatest, greatest_open) if up else (low, least, least_open)
    if whole:
        step = max(1, round((high - low) / 2))
        inside = limit - (1 if up else -1) * is_open
        bound = min(edge + step, inside) if up else max(edge - step, inside)
        return f"{bound:.0f}" if bound != edge else None
    half = math.sqrt(high / low) if log else (high - low) / 2
    bound = (edge * half if log else edge + half) if up else (edge / half if log else edge - half)
    if bound >= limit if up else bound <= limit:
        bound = (edge + limit) / 2 if is_open else limit

    def allowed(number: float) -> bool:
        outside = number > edge if up else number < edge
        inside = number < limit if up else number > limit
        return outside and (inside or (number == limit and not is_open))

    texts = (as_decimal(bound, digits) for digits in (2, 3, 4, 6, 9, 12, 17))
    return next((text for text in texts if allowed(float(text))), None)


def _limits(key: str) -> tuple[float, float, bool, bool]:
    """What a setting allows: (least, greatest, and whether each of the two is itself left out)."""
    least, greatest, least_open, greatest_open = -math.inf, math.inf, False, False
    field = dict(settings_fields()).get(key)
    for rule in field.metadata if field else ():
        for name in ("ge", "gt"):
            if getattr(rule, name, None) is not None:
                least, least_open = float(getattr(rule, name)), name == "gt"
        for name in ("le", "lt"):
            if getattr(rule, name, None) is not None:
                greatest, greatest_open = float(getattr(rule, name)), name == "lt"
    return least, greatest, least_open, greatest_open


def _is_whole(run: Trials, axis: Axis) -> bool:
    return all(isinstance(trial.settings.get(axis.key), int) for trial in run.ranked)


def _train_longer(run: Trials) -> list[str]:
    """Values that peak in the last epoch of most trials, and of the best: one late peak alone is chance."""
    whole = [trial for trial in run.ranked if trial.state == "finished" and len(trial.curve) > 1]
    late = [trial for trial in whole if _rises(trial, run)]
    if run.best is None or run.best not in late or 2 * len(late) <= len(whole):
        return []
    epochs = run.best.curve[-1][0]
    return [
        f"Train longer, for {2 * epochs} epochs instead of {epochs}: {len(late)} of {len(whole)} finished trials, the"
        f" best among them, have their best {run.metric} in the last epoch."
    ]


def _rises(trial: Trial, run: Trials) -> bool:
    last = run.sign * trial.curve[-1][1]
    return all(run.sign * value < last for _, value in trial.curve[:-1])


def _wait_longer(run: Trials) -> list[str]:
    stopped = [trial.epochs for trial in run.trials if trial.state == "stopped"]
    judged = sum(trial.state in ("finished", "stopped") for trial in run.trials)
    if not stopped:
        return []
    rung = min(stopped)
    early = stopped.count(rung)
    grace = min(2 * max(rung, 1), (run.epochs or math.inf) - 1)
    if 2 * early <= judged or grace <= rung:
        return []
    return [
        f"Give trials more time before they are judged, a grace of {grace} epochs: {early} of {judged} trials were"
        f" stopped after {counted(rung, 'epoch')}, when values say least about where they end."
    ]


def _without_effect(run: Trials) -> dict[str, float]:
    """Numeric settings that do not move with the value, neither up or down nor away from the middle, and are less
    important than an even share.
    """
    flat: dict[str, float] = {}
    for axis in run.axes:
        pairs = [(number, trial.reached) for trial in run.ranked if (number := trial.number(axis)) is not None]
        if not axis.numeric or len(pairs) < ENOUGH_FOR_EFFECT:
            continue
        places, outcome = (_ranks(side) for side in zip(*pairs, strict=True))
        # A best value in the middle of the range has no trend either, and is a strong effect all the same.
        middle = statistics.median(places)
        folded = _ranks([abs(place - middle) for place in places])
        found = [_correlation(side, outcome) for side in (places, folded)]
        if found[0] is not None and all(abs(value or 0) < NO_EFFECT for value in found):
            flat[axis.key] = found[0]
    if flat and len(run.axes) > 1:
        measured = importances(run)
        for importance in measured.settings:
            if importance.share >= measured.even:
                flat.pop(importance.axis.key, None)
    return flat


def _try_default(run: Trials) -> list[str]:
    if not run.axes or run.default():
        return []
    words = ", ".join(f"{axis.key} = {as_text(axis.default)}" for axis in run.axes)
    return [f"Run the default settings as a trial ({words}): without it nobody knows what the best settings gain."]


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1, equal values sharing the mean of theirs."""
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


def _correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    return statistics.correlation(one, other) if len(set(one)) > 1 and len(set(other)) > 1 else None
