"""Where the marks of a plot go: values in, coordinates out; the templates draw them as inline SVG."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH = 1120
LABEL_WIDTH = 190
ROW_HEIGHT = 24
HEAD = 34
FOOT = 40
_VALUE_WIDTH = 52
_GAP = 26
_STEPS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
_INTERVALS = 4
_TEXT_LIMIT = 27


@dataclass(frozen=True)
class Figure:
    """A figure with its 95% interval and its chance level, each in 0 to 1 or None where it is not defined."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    chance: float | None = None

    def known(self) -> list[float]:
        """The numbers that are defined."""
        return [number for number in (self.value, self.low, self.high, self.chance) if number is not None]


@dataclass(frozen=True)
class Series:
    """One row of a forest plot: a figure for each panel."""

    name: str
    figures: tuple[Figure, ...]
    chosen: bool = False
    floor: bool = False


@dataclass(frozen=True)
class Tick:
    """A grid line and what stands under it."""

    x: float
    text: str


@dataclass(frozen=True)
class Mark:
    """One figure in its panel; a coordinate is None where the figure lacks the number."""

    y: float
    x: float | None
    low: float | None
    high: float | None
    chance: float | None
    text: str


@dataclass(frozen=True)
class Panel:
    """A panel of a forest plot, from `left` to `right`, values written at `value_x`."""

    title: str
    left: float
    right: float
    value_x: float
    ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class RowLabel:
    """The name at the left of a row, shortened where it would run into the first panel."""

    y: float
    text: str
    full: str
    chosen: bool
    floor: bool


@dataclass(frozen=True)
class Forest:
    """A forest plot: rows are embeddings and floors, panels are figures."""

    height: float
    bottom: float
    labels: tuple[RowLabel, ...]
    panels: tuple[Panel, ...]
    cut: bool
    """Whether some axis does not start at zero, which the reader must be told."""
    whiskers: bool
    chance: bool


def forest(series: Sequence[Series], titles: Sequence[str]) -> Forest:
    """Lay out one row a series and one panel a title.

    Each panel has its own axis: on a common one, from Recall@2 to Recall@8, no interval would be wide enough to see.
    """
    bottom = HEAD + ROW_HEIGHT * len(series)
    span = (WIDTH - LABEL_WIDTH) / len(titles)
    panels = []
    cut = False
    for column, title in enumerate(titles):
        low, high, step = axis(number for row in series for number in row.figures[column].known())
        left = LABEL_WIDTH + span * column
        right = left + span - _VALUE_WIDTH - _GAP
        scale = _Scale(left, right, low, high)
        marks = tuple(_mark(row.figures[column], _row_y(i), scale) for i, row in enumerate(series))
        ticks = tuple(
            Tick(scale.x(low + step * i), f"{100 * (low + step * i):.3g}")
            for i in range(round((high - low) / step) + 1)
        )
        panels.append(Panel(title, left, right, right + 8, ticks, marks))
        cut = cut or low > 0
    labels = tuple(
        RowLabel(_row_y(i), _shorten(row.name), row.name, row.chosen, row.floor) for i, row in enumerate(series)
    )
    drawn = [mark for panel in panels for mark in panel.marks]
    return Forest(
        height=bottom + FOOT,
        bottom=bottom,
        labels=labels,
        panels=tuple(panels),
        cut=cut,
        whiskers=any(mark.low is not None for mark in drawn),
        chance=any(mark.chance is not None for mark in drawn),
    )


def axis(values: Iterable[float]) -> tuple[float, float, float]:
    """Ends and step of an axis of round numbers that holds all values: (low, high, step)."""
    known = list(values) or [0.0, 1.0]
    for step in _STEPS:
        # A hair of tolerance: 0.3 / 0.1 is 2.999..., and must not cost an interval.
        low = max(0, math.floor(min(known) / step + 1e-9))
        high = max(math.ceil(max(known) / step - 1e-9), low + 1)
        if high - low <= _INTERVALS:
            break
    return low * step, high * step, step


@dataclass(frozen=True)
class _Scale:
    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.left + share * (self.right - self.left), 2)

    def maybe(self, value: float | None) -> float | None:
        return None if value is None else self.x(value)


def _mark(figure: Figure, y: float, scale: _Scale) -> Mark:
    whisker = figure.low is not None and figure.high is not None
    return Mark(
        y=y,
        x=scale.maybe(figure.value),
        low=scale.maybe(figure.low) if whisker else None,
        high=scale.maybe(figure.high) if whisker else None,
        chance=scale.maybe(figure.chance),
        text="n/a" if figure.value is None else f"{100 * figure.value:.1f}",
    )


def _row_y(row: int) -> float:
    return HEAD + ROW_HEIGHT * (row + 0.5)


def _shorten(name: str) -> str:
    return name if len(name) <= _TEXT_LIMIT else name[: _TEXT_LIMIT - 3] + "..."
