"""A sweep as one HTML file: where in the space good trials lie, how they learnt, and what the data asks for next."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cxr_retrieval.config import settings_fields
from cxr_retrieval.report.charts import (
    ColourBar,
    Dimension,
    Plane,
    choice_axis,
    colour_bar,
    number_axis,
    percent_axis,
    plane,
    viridis,
)
from cxr_retrieval.report.pages import render

STATES = {"finished": "finished", "stopped": "stopped early", "failed": "failed", "unfinished": "unfinished"}
TOO_FEW = 5
# A rank correlation of 20 trials without any effect lies within 0.44 of 0 in 95% of sweeps; with fewer it says nothing.
ENOUGH_FOR_EFFECT = 20
NO_EFFECT = 0.2
EDGE = 0.1
REPEATS = 5
# How far one image's average precision lies from the mean on the NIH sample (docs/experiments.md: 622 queries, an
# interval of 2.2 points); on n images the mean is then uncertain by this / sqrt(n), and by half a point for 700.
IMAGE_SPREAD = 0.14
UNKNOWN_NOISE = 0.005

_MAP_SIZE = (720, 460)
_SMALL_SIZE = (520, 340)
_BESIDE_BAR = 104
_MOST_CELLS = 12


@dataclass(frozen=True)
class _Axis:
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
class _Trial:
    id: str
    state: str
    settings: Mapping[str, Any]
    value: float | None
    value_epoch: int | None
    epochs: int
    seconds: float | None
    error: str | None
    model: str | None
    curve: tuple[tuple[int, float], ...]
    """(epoch, value) of every epoch that has a value, in their order."""
    centre_cosine: float | None

    @property
    def reached(self) -> float:
        """The value of a trial that has one, as every ranked trial does."""
        assert self.value is not None
        return self.value

    def number(self, axis: _Axis) -> float | None:
        return _number(self.settings.get(axis.key))

    def words(self, axes: Sequence[_Axis]) -> str:
        """Its settings as a person would write them."""
        return ", ".join(f"{axis.key} = {_text(self.settings.get(axis.key))}" for axis in axes)


@dataclass(frozen=True)
class _Sweep:
    metric: str
    sign: int
    """1 where more is better, -1 where less is."""
    epochs: int | None
    chance: float | None
    validation_images: int
    axes: tuple[_Axis, ...]
    trials: tuple[_Trial, ...]
    ranked: tuple[_Trial, ...]
    """Trials that finished or were stopped, and have a value: the best first."""
    best: _Trial | None

    @property
    def noise(self) -> float:
        """Differences of values below this are not told apart: one standard error of a mean over validation images."""
        return IMAGE_SPREAD / math.sqrt(self.validation_images) if self.validation_images else UNKNOWN_NOISE

    def lead(self, trial: _Trial) -> float:
        """How much better than a trial the best is; negative where it is worse."""
        assert self.best is not None
        return self.sign * (self.best.reached - trial.reached)

    def near(self) -> list[_Trial]:
        """Trials that are not told apart from the best."""
        return [trial for trial in self.ranked if trial is not self.best and self.lead(trial) <= self.noise]

    def default(self) -> _Trial | None:
        """The best trial that ran with every searched setting at its default."""

        def is_default(trial: _Trial) -> bool:
            return all(_text(trial.settings.get(axis.key)) == _text(axis.default) for axis in self.axes)

        return next((trial for trial in self.ranked if is_default(trial)), None)


def sweep_page(sweep: Mapping[str, Any]) -> str:
    """HTML text of one offline file about a sweep, given as the content of its `sweep.json`.

    Only `trials` and `axes` are needed, and may be empty. Values are in 0 to 1 and shown in percent. Trials without a
    value, and settings that an axis cannot hold, are listed and left out of the plots.
    """
    run = _read(sweep)
    values = percent_axis(run.metric, (trial.value for trial in run.trials if trial.value is not None))
    heat = _heat_map(run, values)
    scatter = None if heat else _map(run, values)
    each = [chart for axis in run.axes if (chart := _against(run, axis))]
    # Where there is no map, the plots of one setting each say what it would have said.
    leading, others = ([scatter] if scatter else [], each) if heat or scatter else (each, [])
    return render(
        "sweep.html.j2",
        title=f"Sweep: {sweep.get('name') or 'without a name'}",
        facts=_facts(sweep),
        run=run,
        states=STATES,
        summary=_summary(run),
        heat=heat,
        leading=leading,
        others=others,
        curves=_curves(run),
        rows=_rows(run),
        cosines=any(trial.centre_cosine is not None for trial in run.trials),
        errors=any(trial.error for trial in run.trials),
        next_steps=next_steps(sweep),
    )


def next_steps(sweep: Mapping[str, Any]) -> list[str]:
    """What the trials ask for next, the most urgent first: each an action with its reason, as plain text.

    `sweep` is the content of a `sweep.json`. Bounds that are named lie within what the setting itself allows. Fewer
    than `TOO_FEW` trials with a value say only that they are too few.
    """
    run = _read(sweep)
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
        f"Fix {axis.key} at its default, {_text(axis.default)}, in the next sweep: over {len(run.ranked)} trials it has"
        f" no visible effect (rank correlation with {run.metric} {without_effect[axis.key]:+.2f}, and none with a best"
        " value in the middle either); a weak effect would not show."
        for axis in run.axes
        if axis.key in without_effect
    ]
    return steps + _try_default(run)


def _mend_failures(run: _Sweep) -> list[str]:
    failed = [trial for trial in run.trials if trial.state == "failed"]
    if not failed:
        return []
    errors = Counter(trial.error for trial in failed if trial.error)
    often = f", {'most often ' if len(errors) > 1 else ''}with: {_cut(errors.most_common(1)[0][0])}" if errors else ""
    return [
        f"Mend what failed, or keep the space away from it: {len(failed)} of {len(run.trials)} trials failed{often}."
    ]


def _beat_chance(run: _Sweep) -> list[str]:
    if run.best is None or run.chance is None or run.sign * (run.best.reached - run.chance) > run.noise:
        return []
    return [
        "Find out why nothing is learnt before any setting is chosen: the best value,"
        f" {_percent(run.best.reached)}, is not ahead of chance, {_percent(run.chance)}, by more than"
        f" {_points(run.noise)}."
    ]


def _repeat(run: _Sweep) -> list[str]:
    near = run.near()
    if not near or run.best is None:
        return []
    again = [run.best, *near][:REPEATS]
    names = _list([trial.id for trial in again])
    which = f"trials {names}" if len(again) > len(near) else f"the {REPEATS} best trials, {names},"
    return [
        f"Repeat {which} with other seeds (seed=1, seed=2): {len(near) + 1} trials lie within {_points(run.noise)} of"
        " the best, and one run of each does not tell them apart."
    ]


def _widen(run: _Sweep, axis: _Axis) -> list[str]:
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
            f"Try choices of {axis.key} {'above' if up else 'below'} {_text(value)}: it is the best trial's and the"
            f" {'greatest' if up else 'least'} that was tried, and a better one may lie beyond."
        ]
    new = f"upwards, to between {_text(low)} and {bound}" if up else f"downwards, to between {bound} and {_text(high)}"
    return [
        f"Widen {axis.key} {new}: the best trial's {_text(value)} lies in the {'upper' if up else 'lower'} tenth of"
        f" what was searched, {_text(low)} to {_text(high)}, and a better one may lie beyond."
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

    texts = (_decimal(bound, digits) for digits in (2, 3, 4, 6, 9, 12, 17))
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


def _is_whole(run: _Sweep, axis: _Axis) -> bool:
    return all(isinstance(trial.settings.get(axis.key), int) for trial in run.ranked)


def _train_longer(run: _Sweep) -> list[str]:
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


def _rises(trial: _Trial, run: _Sweep) -> bool:
    last = run.sign * trial.curve[-1][1]
    return all(run.sign * value < last for _, value in trial.curve[:-1])


def _wait_longer(run: _Sweep) -> list[str]:
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
        f" stopped after {_count(rung, 'epoch')}, when values say least about where they end."
    ]


def _without_effect(run: _Sweep) -> dict[str, float]:
    """Numeric settings that do not move with the value, neither up or down nor away from the middle."""
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
    return flat


def _try_default(run: _Sweep) -> list[str]:
    if not run.axes or run.default():
        return []
    words = ", ".join(f"{axis.key} = {_text(axis.default)}" for axis in run.axes)
    return [f"Run the default settings as a trial ({words}): without it nobody knows what the best settings gain."]


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1, equal values sharing the mean of theirs."""
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


def _correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    return statistics.correlation(one, other) if len(set(one)) > 1 and len(set(other)) > 1 else None


def _summary(run: _Sweep) -> list[str]:
    """Sentences in plain words: what ran, what came out, and how much that means."""
    states = Counter(trial.state for trial in run.trials)
    if not run.trials:
        return ["No trial was run."]
    parts = [f"{states[state]} {words}" for state, words in STATES.items() if states[state]]
    sentences = [f"{_count(len(run.trials), 'trial')}: {_list(parts)}."]
    if run.best is None:
        return [*sentences, "No trial is the best: none gave a value to choose by."]
    best, values = run.best, [trial.reached for trial in run.ranked]
    when = f" in epoch {best.value_epoch}" if best.value_epoch is not None else ""
    how = f", with {best.words(run.axes)}" if run.axes else ""
    sentences.append(f"The best, trial {best.id}, reached a {run.metric} of {_percent(best.reached)}{when}{how}.")
    if run.chance is not None:
        sentences.append(f"Chance is {_percent(run.chance)}.")
    if len(values) > 1:
        middle = statistics.median(values)
        early = sum(trial.state == "stopped" for trial in run.ranked)
        fewer = f" ({early} of them stopped early, after fewer epochs)" if early else ""
        sentences.append(
            f"The {len(values)} trials with a value{fewer} spread from {_percent(min(values))} to"
            f" {_percent(max(values))}, with a standard deviation of {_points(statistics.stdev(values))}; the best is"
            f" {_points(best.reached - middle)} ahead of their median, {_percent(middle)}."
        )
    sentences += _against_default(run)
    judges = f" on {run.validation_images:,} validation images" if run.validation_images else ""
    basis = "about one standard error of one value" if run.validation_images else "assumed"
    sentences.append(
        f"Read differences with care: each trial is one run with one seed, judged{judges}, and a difference under"
        f" {_points(run.noise)} ({basis}) is not told apart from noise; the best of several noisy figures is also"
        " flattered by having been picked."
    )
    near = run.near()
    if near:
        second = f"trial {near[0].id} with {_percent(near[0].reached)}"
        sentences.append(f"The second, {second}, is that close: the two are not told apart.")
    return sentences


def _against_default(run: _Sweep) -> list[str]:
    if not run.axes:
        return []
    trial = run.default()
    if trial is None:
        words = ", ".join(f"{axis.key} = {_text(axis.default)}" for axis in run.axes)
        return [f"The default settings ({words}) were not among the trials."]
    if trial is run.best:
        return ["The best settings are the default ones."]
    lead = run.lead(trial)
    apart = ", not told apart from it" if abs(lead) <= run.noise else ""
    return [
        f"The default settings, trial {trial.id}, gave {_percent(trial.reached)}:"
        f" {_points(lead)} {'behind' if lead >= 0 else 'ahead of'} the best{apart}."
    ]


def _facts(sweep: Mapping[str, Any]) -> list[tuple[str, object]]:
    objective = sweep.get("objective") or {}
    aim = {"max": "more is better", "min": "less is better"}.get(str(objective.get("mode")))
    search = [part for part in (sweep.get("search"), sweep.get("scheduler")) if part and part != "none"]
    software = sweep.get("software")
    if isinstance(software, Mapping):
        software = ", ".join(f"{name} {version}" for name, version in software.items())
    return [
        ("Objective", ", ".join(part for part in (objective.get("metric"), aim) if part)),
        ("Search space", sweep.get("space_file")),
        ("Search", ", ".join(search)),
        ("Epochs of a trial", sweep.get("epochs")),
        ("Seed", sweep.get("seed")),
        ("Workers of a trial", sweep.get("workers")),
        ("Training images", sweep.get("train_images")),
        ("Validation images", sweep.get("validation_images")),
        ("Corpus", sweep.get("corpus")),
        ("Created", sweep.get("created")),
        ("Software", software),
    ]


@dataclass(frozen=True)
class _Spot:
    """A trial in a plot, its place in pixels; `corners` is its line, `colour` None that of its state."""

    x: float
    y: float
    trial: _Trial
    best: bool
    text: str
    colour: str | None = None
    corners: str = ""

    @property
    def ink(self) -> str:
        """The class of a text that is read on its colour."""
        return "" if self.colour is None else "dark" if _light(self.colour) else "light"


@dataclass(frozen=True)
class _Chart:
    """A plot of trials, in pixels, with lines at defaults and chance; a heat map where cells are `wide` x `tall`."""

    label: str
    plane: Plane
    spots: tuple[_Spot, ...]
    bar: ColourBar | None = None
    default_x: float | None = None
    default_y: float | None = None
    chance_y: float | None = None
    wide: float = 0.0
    tall: float = 0.0
    foot: bool = False
    """Whether trials without a value stand at the foot."""


def _map(run: _Sweep, values: Dimension) -> _Chart | None:
    """The objective as colour over the first two numeric settings."""
    known = [(axis, found) for axis in run.axes if axis.numeric and (found := _dimension(run, axis))]
    if len(known) < 2:
        return None
    (across, x), (upward, y) = known[:2]
    area = plane(x, y, *_MAP_SIZE, beside=_BESIDE_BAR)

    def spot(trial: _Trial) -> _Spot | None:
        at_x, at_y = _place(across, x, trial), _place(upward, y, trial)
        if at_x is None or at_y is None:
            return None
        return _spot(run, trial, area.at_x(at_x), area.at_y(at_y), _colour(values, trial))

    return _Chart(
        f"{run.metric} over {across.key} and {upward.key}",
        area,
        _drawn(run, spot),
        bar=colour_bar(values, area) if any(trial.value is not None for trial in run.trials) else None,
        default_x=_default(across, x, area.at_x),
        default_y=_default(upward, y, area.at_y),
    )


def _heat_map(run: _Sweep, values: Dimension) -> _Chart | None:
    """Two settings that were tried in every combination, each once; None for any other sweep."""
    if len(run.axes) != 2:
        return None
    across, upward = run.axes
    pairs = [(_text(trial.settings.get(across.key)), _text(trial.settings.get(upward.key))) for trial in run.trials]
    columns = [text for text in _texts(run, across) if text in {column for column, _ in pairs}]
    rows = [text for text in _texts(run, upward) if text in {row for _, row in pairs}]
    if not len(set(pairs)) == len(pairs) == len(columns) * len(rows):
        return None
    if not (2 <= len(columns) <= _MOST_CELLS and 2 <= len(rows) <= _MOST_CELLS):
        return None
    # Keys without their scale: cells are equally wide whatever their numbers.
    x, y = choice_axis(across.key, across.meaning, columns), choice_axis(upward.key, upward.meaning, rows)
    area = plane(x, y, *_MAP_SIZE, beside=_BESIDE_BAR)
    places = dict(zip(run.trials, pairs, strict=True))

    def spot(trial: _Trial) -> _Spot:
        column, row = places[trial]
        return _spot(run, trial, area.at_x(columns.index(column)), area.at_y(rows.index(row)), _colour(values, trial))

    return _Chart(
        f"{run.metric} over {across.key} and {upward.key}",
        area,
        _drawn(run, spot),
        bar=colour_bar(values, area),
        wide=round(area.at_x(1) - area.at_x(0), 2),
        tall=round(area.at_y(0) - area.at_y(1), 2),
    )


def _against(run: _Sweep, axis: _Axis) -> _Chart | None:
    """The objective over one setting; a choice is a strip of trials for each of its texts."""
    x = _dimension(run, axis)
    if x is None:
        return None
    y = percent_axis(run.metric, _known(run.chance, *(trial.value for trial in run.trials)))
    area = plane(x, y, *_SMALL_SIZE)
    seen: Counter[float] = Counter()

    def spot(trial: _Trial) -> _Spot | None:
        at = _place(axis, x, trial)
        if at is None:
            return None
        # Trials of one choice beside each other: equal values would hide one another.
        beside = 0.0 if axis.numeric else (2 * seen[at] % 5 - 2) * 0.1
        seen[at] += 1
        return _spot(run, trial, area.at_x(at + beside), area.bottom if trial.value is None else area.at_y(trial.value))

    return _Chart(
        f"{run.metric} against {axis.key}",
        area,
        _drawn(run, spot),
        default_x=_default(axis, x, area.at_x),
        chance_y=None if run.chance is None else area.at_y(run.chance),
        foot=any(trial.value is None for trial in run.trials),
    )


def _curves(run: _Sweep) -> _Chart | None:
    """The objective by epoch, a line a trial, which ends where the trial did."""
    curves = [trial.curve for trial in run.trials if trial.curve]
    if not curves:
        return None
    last = max(run.epochs or 1, *(curve[-1][0] for curve in curves))
    ticks = tuple((float(epoch), str(epoch)) for epoch in range(1, last + 1, math.ceil(last / 12)))
    # A single epoch has no width of its own.
    start, end = (1.0, float(last)) if last > 1 else (0.5, 1.5)
    x = Dimension("epoch", "passes over the training images", start, end, ticks)
    y = percent_axis(run.metric, _known(run.chance, *(value for curve in curves for _, value in curve)))
    area = plane(x, y, *_MAP_SIZE, beside=64)

    def line(trial: _Trial) -> _Spot | None:
        if not trial.curve:
            return None
        corners = [(area.at_x(epoch), area.at_y(value)) for epoch, value in trial.curve]
        return replace(
            _spot(run, trial, *corners[-1]), corners=" ".join(f"{across},{down}" for across, down in corners)
        )

    return _Chart(
        f"Learning curves: {run.metric} by epoch",
        area,
        _drawn(run, line),
        chance_y=None if run.chance is None else area.at_y(run.chance),
    )


def _drawn(run: _Sweep, spot: Callable[[_Trial], _Spot | None]) -> tuple[_Spot, ...]:
    """The spots of all trials that have a place; the best come last, so that none is hidden under a worse one."""
    order = [trial for trial in run.trials if trial not in run.ranked] + list(reversed(run.ranked))
    spots = map(spot, sorted(order, key=lambda trial: trial is run.best))
    return tuple(found for found in spots if found is not None)


def _spot(run: _Sweep, trial: _Trial, x: float, y: float, colour: str | None = None) -> _Spot:
    return _Spot(x, y, trial, trial is run.best, _describe(run, trial), colour)


def _colour(values: Dimension, trial: _Trial) -> str | None:
    return None if trial.value is None else viridis(values.share(trial.value))


def _light(colour: str) -> bool:
    """Whether black reads better than white on a colour `#rrggbb` (relative luminance, as WCAG defines it)."""
    parts = [channel / 255 for channel in bytes.fromhex(colour[1:])]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    luminance = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return luminance > 0.179


def _describe(run: _Sweep, trial: _Trial) -> str:
    value = "no value" if trial.value is None else _percent(trial.value)
    return f"trial {trial.id}, {STATES[trial.state]}: {value}; {trial.words(run.axes)}"


def _dimension(run: _Sweep, axis: _Axis) -> Dimension | None:
    """The direction of an axis, wide enough for its range and for every trial; None where nothing is known of it."""
    if not axis.numeric:
        texts = _texts(run, axis)
        return choice_axis(axis.title, axis.meaning, texts) if texts else None
    known = [*_known(axis.low, axis.high), *_known(*(trial.number(axis) for trial in run.trials))]
    log = axis.scale == "log"
    known = [number for number in known if number > 0 or not log]
    return number_axis(axis.title, axis.meaning, known, log) if known else None


def _texts(run: _Sweep, axis: _Axis) -> list[str]:
    """The values of an axis as texts: its choices in their order, then what trials have beside them."""
    tried = [trial.settings[axis.key] for trial in run.trials if axis.key in trial.settings]
    values = [*axis.choices, *tried]
    if axis.numeric:
        values.sort(key=lambda value: _number(value) or 0.0)
    return list(dict.fromkeys(map(_text, values)))


def _place(axis: _Axis, dimension: Dimension, trial: _Trial) -> float | None:
    """Where a trial stands on an axis, in the axis' own numbers."""
    if not axis.numeric:
        text = _text(trial.settings.get(axis.key))
        return next((at for at, choice in dimension.ticks if choice == text), None)
    number = trial.number(axis)
    return number if number is not None and dimension.holds(number) else None


def _default(axis: _Axis, dimension: Dimension, at: Callable[[float], float]) -> float | None:
    number = _number(axis.default)
    return at(number) if axis.numeric and number is not None and dimension.holds(number) else None


def _rows(run: _Sweep) -> list[dict[str, Any]]:
    """The leaderboard: by value, then what is not done, then what failed."""
    rest = [trial for trial in run.trials if trial not in run.ranked]
    rest.sort(key=lambda trial: trial.state == "failed")
    return [
        {
            "rank": rank if rank <= len(run.ranked) else None,
            "trial": trial,
            "best": trial is run.best,
            "settings": [_text(trial.settings[axis.key]) if axis.key in trial.settings else "" for axis in run.axes],
            "time": _time(trial.seconds),
        }
        for rank, trial in enumerate([*run.ranked, *rest], start=1)
    ]


def _read(sweep: Mapping[str, Any]) -> _Sweep:
    objective = sweep.get("objective") or {}
    sign = -1 if objective.get("mode") == "min" else 1
    trials = tuple(map(_trial, sweep.get("trials") or ()))
    known = [(trial.value, trial) for trial in trials if trial.value is not None]
    ranked = sorted(
        (pair for pair in known if pair[1].state in ("finished", "stopped")), key=lambda pair: -sign * pair[0]
    )
    return _Sweep(
        metric=str(objective.get("metric") or "objective"),
        sign=sign,
        epochs=_whole(sweep.get("epochs")),
        chance=_number(sweep.get("chance")),
        validation_images=_whole(sweep.get("validation_images")) or 0,
        axes=tuple(map(_axis, sweep.get("axes") or ())),
        trials=trials,
        ranked=tuple(trial for _, trial in ranked),
        best=next((trial for _, trial in ranked if trial.id == str(sweep.get("best"))), None),
    )


def _axis(axis: Mapping[str, Any]) -> _Axis:
    choices = tuple(axis.get("choices") or ())
    low, high = _number(axis.get("low")), _number(axis.get("high"))
    listed = _known(*map(_number, choices))
    if low is None and high is None and listed and len(listed) == len(choices):
        low, high = min(listed), max(listed)
    return _Axis(
        key=str(axis["key"]),
        meaning=str(axis.get("meaning") or ""),
        scale=str(axis.get("scale") or "choice"),
        low=low,
        high=high,
        choices=choices,
        default=axis.get("default"),
    )


def _trial(trial: Mapping[str, Any]) -> _Trial:
    curve = ((_whole(point.get("epoch")), _number(point.get("value"))) for point in trial.get("curve") or ())
    points = sorted((epoch, value) for epoch, value in curve if epoch is not None and value is not None)
    state = str(trial.get("state"))
    return _Trial(
        id=str(trial["id"]),
        state=state if state in STATES else "unfinished",
        settings=trial.get("settings") or {},
        value=_number(trial.get("value")),
        value_epoch=_whole(trial.get("value_epoch")),
        epochs=_whole(trial.get("epochs")) or 0,
        seconds=_number(trial.get("seconds")),
        error=None if trial.get("error") is None else str(trial["error"]),
        model=None if trial.get("model") is None else str(trial["model"]),
        curve=tuple(points),
        centre_cosine=_number(trial.get("centre_cosine")),
    )


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


def _known(*values: float | None) -> list[float]:
    return [value for value in values if value is not None]


def _text(value: Any) -> str:
    """A setting as it stands in a YAML file, a number with four digits that count."""
    if isinstance(value, float) and math.isfinite(value):
        return _decimal(value, 4)
    return value if isinstance(value, str) else json.dumps(value)


def _decimal(value: float, digits: int) -> str:
    # Without an exponent: YAML reads 5e-05 as a text.
    return np.format_float_positional(float(f"{value:.{digits}g}"), trim="-")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _points(difference: float) -> str:
    size = abs(100 * difference)
    return "less than 0.1 points" if 0 < size < 0.05 else f"{size:.1f} points"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _list(parts: Iterable[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def _cut(text: str, limit: int = 160) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
