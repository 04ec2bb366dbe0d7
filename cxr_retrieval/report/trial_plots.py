"""The plots of a sweep's trials: over their settings, across all of them, with their intervals, and by epoch."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from cxr_retrieval.report.charts import (
    ColourBar,
    Dimension,
    Plane,
    Upright,
    choice_axis,
    colour_bar,
    epoch_axis,
    number_axis,
    percent_axis,
    plane,
    viridis,
)
from cxr_retrieval.report.trials import (
    STATES,
    Axis,
    Trial,
    Trials,
    as_number,
    as_percent,
    as_text,
    known_numbers,
)

_MAP_SIZE = (720, 460)
_SMALL_SIZE = (520, 340)
_BESIDE_BAR = 104
_MOST_CELLS = 12
_BETWEEN = 190
_TALL = 380
_ROW = 22


@dataclass(frozen=True)
class Spot:
    """A trial in a plot, its place in pixels; `corners` is its line, `colour` None that of its state."""

    x: float
    y: float
    trial: Trial
    best: bool
    text: str
    colour: str | None = None
    corners: str = ""
    whisker: tuple[float, float] | None = None
    """From where to where its interval reaches, sideways."""
    near: bool = False
    """Not told apart from the best."""

    @property
    def ink(self) -> str:
        """The class of a text that is read on its colour."""
        return "" if self.colour is None else "dark" if _light(self.colour) else "light"


@dataclass(frozen=True)
class Chart:
    """A plot of trials, in pixels, with lines at defaults and chance; a heat map where cells are `wide` x `tall`."""

    label: str
    plane: Plane
    spots: tuple[Spot, ...]
    bar: ColourBar | None = None
    default_x: float | None = None
    default_y: float | None = None
    chance_x: float | None = None
    chance_y: float | None = None
    wide: float = 0.0
    tall: float = 0.0
    foot: bool = False
    """Whether trials without a value stand at the foot."""


def setting_map(run: Trials, values: Dimension) -> Chart | None:
    """The objective as colour over the first two numeric settings."""
    known = [(axis, found) for axis in run.axes if axis.numeric and (found := _dimension(run, axis))]
    if len(known) < 2:
        return None
    (across, x), (upward, y) = known[:2]
    area = plane(x, y, *_MAP_SIZE, beside=_BESIDE_BAR)

    def spot(trial: Trial) -> Spot | None:
        at_x, at_y = _place(across, x, trial), _place(upward, y, trial)
        if at_x is None or at_y is None:
            return None
        return _spot(run, trial, area.at_x(at_x), area.at_y(at_y), _colour(values, trial))

    return Chart(
        f"{run.metric} over {across.key} and {upward.key}",
        area,
        _drawn(run, spot),
        bar=colour_bar(values, area) if any(trial.value is not None for trial in run.trials) else None,
        default_x=_default(across, x, area.at_x),
        default_y=_default(upward, y, area.at_y),
    )


def heat_map(run: Trials, values: Dimension) -> Chart | None:
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

    def spot(trial: Trial) -> Spot:
        column, row = places[trial]
        return _spot(run, trial, area.at_x(columns.index(column)), area.at_y(rows.index(row)), _colour(values, trial))

    return Chart(
        f"{run.metric} over {across.key} and {upward.key}",
        area,
        _drawn(run, spot),
        bar=colour_bar(values, area),
        wide=round(area.at_x(1) - area.at_x(0), 2),
        tall=round(area.at_y(0) - area.at_y(1), 2),
    )


def against(run: Trials, axis: Axis) -> Chart | None:
    """The objective over one setting; a choice is a strip of trials for each of its texts."""
    x = _dimension(run, axis)
    if x is None:
        return None
    y = percent_axis(run.metric, known_numbers(run.chance, *(trial.value for trial in run.trials)))
    area = plane(x, y, *_SMALL_SIZE)
    seen: Counter[float] = Counter()

    def spot(trial: Trial) -> Spot | None:
        at = _place(axis, x, trial)
        if at is None:
            return None
        # Trials of one choice beside each other: equal values would hide one another.
        beside = 0.0 if axis.numeric else (2 * seen[at] % 5 - 2) * 0.1
        seen[at] += 1
        return _spot(run, trial, area.at_x(at + beside), area.bottom if trial.value is None else area.at_y(trial.value))

    return Chart(
        f"{run.metric} against {axis.key}",
        area,
        _drawn(run, spot),
        default_x=_default(axis, x, area.at_x),
        chance_y=None if run.chance is None else area.at_y(run.chance),
        foot=any(trial.value is None for trial in run.trials),
    )


def learning_curves(run: Trials) -> Chart | None:
    """The objective by epoch, a line a trial, which ends where the trial did."""
    curves = [trial.curve for trial in run.trials if trial.curve]
    if not curves:
        return None
    last = max(run.epochs or 1, *(curve[-1][0] for curve in curves))
    y = percent_axis(run.metric, known_numbers(run.chance, *(value for curve in curves for _, value in curve)))
    area = plane(epoch_axis(last), y, *_MAP_SIZE, beside=64)

    def line(trial: Trial) -> Spot | None:
        if not trial.curve:
            return None
        corners = [(area.at_x(epoch), area.at_y(value)) for epoch, value in trial.curve]
        return replace(
            _spot(run, trial, *corners[-1]), corners=" ".join(f"{across},{down}" for across, down in corners)
        )

    return Chart(
        f"Learning curves: {run.metric} by epoch",
        area,
        _drawn(run, line),
        chance_y=None if run.chance is None else area.at_y(run.chance),
    )


@dataclass(frozen=True)
class Parallel:
    """All trials across all settings, in pixels: an upright axis a setting, and at the right the objective's."""

    label: str
    width: float
    height: float
    uprights: tuple[Upright, ...]
    defaults: tuple[tuple[float, float], ...]
    """Where the default of a setting stands."""
    spots: tuple[Spot, ...]
    default_x: None = None
    default_y: None = None
    chance_x: None = None
    chance_y: None = None
    foot: bool = False


def across_settings(run: Trials, values: Dimension) -> Parallel | None:
    """A line a trial over every searched setting to its value, in its colour; None for fewer than two settings.

    A trial without a value ends at the last setting; one that an axis cannot hold is left out.
    """
    known = [(axis, found) for axis in run.axes if (found := _dimension(run, axis))]
    if len(known) < 2:
        return None
    # Axes stand close: what a setting means is in the table, and whether its axis is of powers under its name.
    names = [replace(found, title=axis.key, note="log scale" if found.log else "") for axis, found in known]
    directions = [*names, values]
    uprights = tuple(Upright(found, _BETWEEN * (i + 0.5), 52, _TALL - 16) for i, found in enumerate(directions))

    def line(trial: Trial) -> Spot | None:
        places = [_place(axis, found, trial) for axis, found in known] + [trial.value]
        if any(place is None for place in places[:-1]):
            return None
        corners = [
            (upright.x, upright.at(place)) for upright, place in zip(uprights, places, strict=True) if place is not None
        ]
        return replace(
            _spot(run, trial, *corners[-1], _colour(values, trial)), corners=" ".join(f"{x},{y}" for x, y in corners)
        )

    return Parallel(
        f"Every trial across its settings: {run.metric} as colour",
        _BETWEEN * len(uprights) + 16,
        _TALL,
        uprights,
        tuple(
            (upright.x, place)
            for (axis, found), upright in zip(known, uprights, strict=False)
            if (place := _default(axis, found, upright.at)) is not None
        ),
        _drawn(run, line),
    )


def with_intervals(run: Trials) -> Chart | None:
    """Every trial's value with its 95% interval, the best on top; None where no interval was measured."""
    known = [(trial, trial.interval) for trial in reversed(run.ranked)]
    ends = [end for _, interval in known if interval for end in interval]
    if not ends:
        return None
    order = [trial for trial, interval in known if interval]
    near = run.near()
    x = percent_axis(run.metric, [*ends, *(trial.reached for trial in order), *known_numbers(run.chance)])
    y = choice_axis("trial", "the best on top", [trial.id for trial in order])
    area = plane(x, y, _MAP_SIZE[0], 108 + _ROW * len(order))

    def spot(trial: Trial) -> Spot | None:
        if trial not in order:
            return None
        low, high = trial.interval or (trial.reached, trial.reached)
        found = _spot(run, trial, area.at_x(trial.reached), area.at_y(order.index(trial)))
        return replace(found, whisker=(area.at_x(low), area.at_x(high)), near=trial in near)

    return Chart(
        f"95% intervals: {run.metric} of every trial",
        area,
        _drawn(run, spot),
        chance_x=None if run.chance is None else area.at_x(run.chance),
    )


def _drawn(run: Trials, spot: Callable[[Trial], Spot | None]) -> tuple[Spot, ...]:
    """The spots of all trials that have a place; the best come last, so that none is hidden under a worse one."""
    order = [trial for trial in run.trials if trial not in run.ranked] + list(reversed(run.ranked))
    spots = map(spot, sorted(order, key=lambda trial: trial is run.best))
    return tuple(found for found in spots if found is not None)


def _spot(run: Trials, trial: Trial, x: float, y: float, colour: str | None = None) -> Spot:
    return Spot(x, y, trial, trial is run.best, _describe(run, trial), colour)


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
