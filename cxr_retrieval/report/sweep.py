"""A sweep as one HTML file: where in the space good trials lie, how they learnt, and what the data asks for next."""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cxr_retrieval.report.advice import next_steps
from cxr_retrieval.report.charts import (
    ColourBar,
    Dimension,
    Plane,
    choice_axis,
    colour_bar,
    epoch_axis,
    number_axis,
    percent_axis,
    plane,
    viridis,
)
from cxr_retrieval.report.pages import render
from cxr_retrieval.report.trials import (
    STATES,
    Axis,
    Trial,
    Trials,
    as_number,
    as_percent,
    as_points,
    as_text,
    as_time,
    counted,
    known_numbers,
    listed,
    read_trials,
)

_MAP_SIZE = (720, 460)
_SMALL_SIZE = (520, 340)
_BESIDE_BAR = 104
_MOST_CELLS = 12


def sweep_page(sweep: Mapping[str, Any]) -> str:
    """HTML text of one offline file about a sweep, given as the content of its `sweep.json`.

    Only `trials` and `axes` are needed, and may be empty. Values are in 0 to 1 and shown in percent. Trials without a
    value, and settings that an axis cannot hold, are listed and left out of the plots.
    """
    run = read_trials(sweep)
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


def _summary(run: Trials) -> list[str]:
    """Sentences in plain words: what ran, what came out, and how much that means."""
    states = Counter(trial.state for trial in run.trials)
    if not run.trials:
        return ["No trial was run."]
    parts = [f"{states[state]} {words}" for state, words in STATES.items() if states[state]]
    sentences = [f"{counted(len(run.trials), 'trial')}: {listed(parts)}."]
    if run.best is None:
        return [*sentences, "No trial is the best: none gave a value to choose by."]
    best, values = run.best, [trial.reached for trial in run.ranked]
    when = f" in epoch {best.value_epoch}" if best.value_epoch is not None else ""
    how = f", with {best.words(run.axes)}" if run.axes else ""
    sentences.append(f"The best, trial {best.id}, reached a {run.metric} of {as_percent(best.reached)}{when}{how}.")
    if run.chance is not None:
        sentences.append(f"Chance is {as_percent(run.chance)}.")
    if len(values) > 1:
        middle = statistics.median(values)
        early = sum(trial.state == "stopped" for trial in run.ranked)
        fewer = f" ({early} of them stopped early, after fewer epochs)" if early else ""
        sentences.append(
            f"The {len(values)} trials with a value{fewer} spread from {as_percent(min(values))} to"
            f" {as_percent(max(values))}, with a standard deviation of {as_points(statistics.stdev(values))}; the best"
            f" is {as_points(best.reached - middle)} ahead of their median, {as_percent(middle)}."
        )
    sentences += _against_default(run)
    judges = f" on {run.validation_images:,} validation images" if run.validation_images else ""
    basis = "about one standard error of one value" if run.validation_images else "assumed"
    sentences.append(
        f"Read differences with care: each trial is one run with one seed, judged{judges}, and a difference under"
        f" {as_points(run.noise)} ({basis}) is not told apart from noise; the best of several noisy figures is also"
        " flattered by having been picked."
    )
    near = run.near()
    if near:
        second = f"trial {near[0].id} with {as_percent(near[0].reached)}"
        sentences.append(f"The second, {second}, is that close: the two are not told apart.")
    return sentences


def _against_default(run: Trials) -> list[str]:
    if not run.axes:
        return []
    trial = run.default()
    if trial is None:
        words = ", ".join(f"{axis.key} = {as_text(axis.default)}" for axis in run.axes)
        return [f"The default settings ({words}) were not among the trials."]
    if trial is run.best:
        return ["The best settings are the default ones."]
    lead = run.lead(trial)
    apart = ", not told apart from it" if abs(lead) <= run.noise else ""
    return [
        f"The default settings, trial {trial.id}, gave {as_percent(trial.reached)}:"
        f" {as_points(lead)} {'behind' if lead >= 0 else 'ahead of'} the best{apart}."
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
    trial: Trial
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


def _map(run: Trials, values: Dimension) -> _Chart | None:
    """The objective as colour over the first two numeric settings."""
    known = [(axis, found) for axis in run.axes if axis.numeric and (found := _dimension(run, axis))]
    if len(known) < 2:
        return None
    (across, x), (upward, y) = known[:2]
    area = plane(x, y, *_MAP_SIZE, beside=_BESIDE_BAR)

    def spot(trial: Trial) -> _Spot | None:
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


def _heat_map(run: Trials, values: Dimension) -> _Chart | None:
    """Two settings that were tried in every combination, each once; None for any other sweep."""
    if len(run.axes) != 2:
        return None
    across, upward = run.axes
    pairs = [(as_text(trial.settings.get(across.key)), as_text(trial.settings.get(upward.key))) for trial in run.trials]
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

    def spot(trial: Trial) -> _Spot:
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


def _against(run: Trials, axis: Axis) -> _Chart | None:
    """The objective over one setting; a choice is a strip of trials for each of its texts."""
    x = _dimension(run, axis)
    if x is None:
        return None
    y = percent_axis(run.metric, known_numbers(run.chance, *(trial.value for trial in run.trials)))
    area = plane(x, y, *_SMALL_SIZE)
    seen: Counter[float] = Counter()

    def spot(trial: Trial) -> _Spot | None:
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


def _curves(run: Trials) -> _Chart | None:
    """The objective by epoch, a line a trial, which ends where the trial did."""
    curves = [trial.curve for trial in run.trials if trial.curve]
    if not curves:
        return None
    last = max(run.epochs or 1, *(curve[-1][0] for curve in curves))
    y = percent_axis(run.metric, known_numbers(run.chance, *(value for curve in curves for _, value in curve)))
    area = plane(epoch_axis(last), y, *_MAP_SIZE, beside=64)

    def line(trial: Trial) -> _Spot | None:
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


def _drawn(run: Trials, spot: Callable[[Trial], _Spot | None]) -> tuple[_Spot, ...]:
    """The spots of all trials that have a place; the best come last, so that none is hidden under a worse one."""
    order = [trial for trial in run.trials if trial not in run.ranked] + list(reversed(run.ranked))
    spots = map(spot, sorted(order, key=lambda trial: trial is run.best))
    return tuple(found for found in spots if found is not None)


def _spot(run: Trials, trial: Trial, x: float, y: float, colour: str | None = None) -> _Spot:
    return _Spot(x, y, trial, trial is run.best, _describe(run, trial), colour)


def _colour(values: Dimension, trial: Trial) -> str | None:
    return None if trial.value is None else viridis(values.share(trial.value))


def _light(colour: str) -> bool:
    """Whether black reads better than white on a colour `#rrggbb` (relative luminance, as WCAG defines it)."""
    parts = [channel / 255 for channel in bytes.fromhex(colour[1:])]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    luminance = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return luminance > 0.179


def _describe(run: Trials, trial: Trial) -> str:
    value = "no value" if trial.value is None else as_percent(trial.value)
    return f"trial {trial.id}, {STATES[trial.state]}: {value}; {trial.words(run.axes)}"


def _dimension(run: Trials, axis: Axis) -> Dimension | None:
    """The direction of an axis, wide enough for its range and for every trial; None where nothing is known of it."""
    if not axis.numeric:
        texts = _texts(run, axis)
        return choice_axis(axis.title, axis.meaning, texts) if texts else None
    known = [*known_numbers(axis.low, axis.high), *known_numbers(*(trial.number(axis) for trial in run.trials))]
    log = axis.scale == "log"
    known = [number for number in known if number > 0 or not log]
    return number_axis(axis.title, axis.meaning, known, log) if known else None


def _texts(run: Trials, axis: Axis) -> list[str]:
    """The values of an axis as texts: its choices in their order, then what trials have beside them."""
    tried = [trial.settings[axis.key] for trial in run.trials if axis.key in trial.settings]
    values = [*axis.choices, *tried]
    if axis.numeric:
        values.sort(key=lambda value: as_number(value) or 0.0)
    return list(dict.fromkeys(map(as_text, values)))


def _place(axis: Axis, dimension: Dimension, trial: Trial) -> float | None:
    """Where a trial stands on an axis, in the axis' own numbers."""
    if not axis.numeric:
        text = as_text(trial.settings.get(axis.key))
        return next((at for at, choice in dimension.ticks if choice == text), None)
    number = trial.number(axis)
    return number if number is not None and dimension.holds(number) else None


def _default(axis: Axis, dimension: Dimension, at: Callable[[float], float]) -> float | None:
    number = as_number(axis.default)
    return at(number) if axis.numeric and number is not None and dimension.holds(number) else None


def _rows(run: Trials) -> list[dict[str, Any]]:
    """The leaderboard: by value, then what is not done, then what failed."""
    rest = [trial for trial in run.trials if trial not in run.ranked]
    rest.sort(key=lambda trial: trial.state == "failed")
    return [
        {
            "rank": rank if rank <= len(run.ranked) else None,
            "trial": trial,
            "best": trial is run.best,
            "settings": [as_text(trial.settings[axis.key]) if axis.key in trial.settings else "" for axis in run.axes],
            "time": as_time(trial.seconds),
        }
        for rank, trial in enumerate([*run.ranked, *rest], start=1)
    ]
