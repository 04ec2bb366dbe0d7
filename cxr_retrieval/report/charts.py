"""Where the marks of a plot go: values in, coordinates out; the templates draw them as inline SVG."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

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
_MOST_TICKS = 7
_INSET = 16
_GLYPH = 6.6
_BAR_STEPS = 32
_MATRIX_SIZE = (760.0, 620.0)
# Nine even samples of matplotlib's viridis: its lightness rises steadily, so it survives colour blindness and print.
_VIRIDIS = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")


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
class Dimension:
    """One direction of a plane: its name, its ends, and its grid lines, each a value and what is written there."""

    title: str
    note: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value stands between the ends: 0 at `low`, 1 at `high`."""
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def holds(self, value: float) -> bool:
        """Whether a value lies between the ends."""
        return self.low <= value <= self.high


def percent_axis(title: str, values: Iterable[float]) -> Dimension:
    """A direction for figures in 0 to 1, written in percent, with round ends that hold all of them."""
    low, high, step = axis(values)
    ticks = (low + step * i for i in range(round((high - low) / step) + 1))
    return Dimension(title, "percent", low, high, tuple((tick, f"{100 * tick:.3g}") for tick in ticks))


def number_axis(title: str, note: str, values: Iterable[float], log: bool = False) -> Dimension:
    """A direction that ends at the least and the greatest of the values (at least one; all positive where `log`)."""
    known = list(values)
    low, high = min(known), max(known)
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1))
    ticks = _log_ticks(low, high) if log else _even_ticks(low, high)
    return Dimension(title, note, low, high, tuple((tick, f"{tick:.4g}") for tick in ticks), log)


def epoch_axis(last: int) -> Dimension:
    """A direction of the epochs 1 to `last`."""
    ticks = tuple((float(epoch), str(epoch)) for epoch in range(1, last + 1, math.ceil(last / 12)))
    # A single epoch has no width of its own.
    start, end = (1.0, float(last)) if last > 1 else (0.5, 1.5)
    return Dimension("epoch", "passes over the training images", start, end, ticks)


def choice_axis(title: str, note: str, texts: Sequence[str]) -> Dimension:
    """A direction with one place for each text, at 0, 1, 2, ..."""
    return Dimension(
        title, note, -0.5, max(len(texts), 1) - 0.5, tuple((float(i), text) for i, text in enumerate(texts))
    )


@dataclass(frozen=True)
class Level:
    """A horizontal grid line and what stands beside it."""

    y: float
    text: str


@dataclass(frozen=True)
class Plane:
    """A plot of one direction against another, in pixels: its frame, its grid lines, and where values lie."""

    x: Dimension
    y: Dimension
    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    columns: tuple[Tick, ...]
    rows: tuple[Level, ...]

    def at_x(self, value: float) -> float:
        """The pixel column of a value."""
        return _between(self.left + _INSET, self.right - _INSET, self.x.share(value))

    def at_y(self, value: float) -> float:
        """The pixel row of a value."""
        return _between(self.bottom - _INSET, self.top + _INSET, self.y.share(value))


def plane(x: Dimension, y: Dimension, width: float, height: float, beside: float = 16) -> Plane:
    """Lay out a plane, leaving `beside` pixels at its right, for a colour bar for example."""
    names = [_shorten(text, 16) for _, text in y.ticks]
    left, right = 54 + _GLYPH * max(map(len, names), default=0), width - beside
    # Texts of neighbouring grid lines must not run into each other; numbers are few and short by their making.
    limit = max(3, int((right - left) / max(len(x.ticks), 1) / _GLYPH))
    empty = Plane(x, y, width, height, left, right, 12, height - 64, (), ())
    return replace(
        empty,
        columns=tuple(Tick(empty.at_x(value), _shorten(text, limit)) for value, text in x.ticks),
        rows=tuple(Level(empty.at_y(value), name) for (value, _), name in zip(y.ticks, names, strict=True)),
    )


@dataclass(frozen=True)
class ColourBar:
    """What colour means what figure: strips (y, height, colour) from the top down, and figures beside them."""

    x: float
    title: str
    strips: tuple[tuple[float, float, str], ...]
    levels: tuple[Level, ...]


def colour_bar(values: Dimension, beside: Plane) -> ColourBar:
    """The colours of a direction as a bar at the right of a plane."""
    levels = (Level(_between(beside.bottom, beside.top, values.share(value)), text) for value, text in values.ticks)
    strips = _strips(beside.top, beside.bottom)
    return ColourBar(beside.right + 18, f"{values.title}, {values.note}", strips, tuple(levels))


def _strips(top: float, bottom: float) -> tuple[tuple[float, float, str], ...]:
    tall = (bottom - top) / _BAR_STEPS
    return tuple(
        # A hair of overlap, or the ground shines through between two strips.
        (round(top + tall * i, 2), round(tall + 0.5, 2), viridis(1 - (i + 0.5) / _BAR_STEPS))
        for i in range(_BAR_STEPS)
    )


@dataclass(frozen=True)
class Cell:
    """A coloured cell of a matrix, by its middle in pixels, and what it says."""

    x: float
    y: float
    colour: str
    text: str


@dataclass(frozen=True)
class Matrix:
    """A square of cells, `wide` x `tall` pixels each, whose rows and columns have the same names."""

    label: str
    plane: Plane
    bar: ColourBar
    cells: tuple[Cell, ...]
    wide: float
    tall: float


def matrix(
    label: str,
    names: Sequence[str],
    colours: Dimension,
    values: Sequence[Sequence[float]],
    say: Callable[[float], str],
) -> Matrix:
    """Lay out a value for every row and column of `names` (at least two), the first row at the top; `say` tells a value
    in words."""
    x, y = choice_axis("", "", names), choice_axis("", "", list(reversed(names)))
    area = plane(x, y, *_MATRIX_SIZE, beside=88)
    # Written aslant, or there is no room for a word.
    area = replace(
        area, columns=tuple(Tick(tick.x, _shorten(name, 16)) for tick, name in zip(area.columns, names, strict=True))
    )
    last = len(names) - 1
    cells = tuple(
        Cell(area.at_x(column), area.at_y(last - row), viridis(colours.share(value)), f"{name}, {other}: {say(value)}")
        for row, (name, across) in enumerate(zip(names, values, strict=True))
        for column, (other, value) in enumerate(zip(names, across, strict=True))
    )
    wide, tall = area.at_x(1) - area.at_x(0), area.at_y(0) - area.at_y(1)
    return Matrix(label, area, colour_bar(colours, area), cells, round(wide, 2), round(tall, 2))


@dataclass(frozen=True)
class Upright:
    """One of several axes that stand beside each other, in pixels."""

    direction: Dimension
    x: float
    top: float
    bottom: float

    def at(self, value: float) -> float:
        """The pixel row of a value."""
        return _between(self.bottom, self.top, self.direction.share(value))

    @property
    def levels(self) -> tuple[Level, ...]:
        """Where its values are written."""
        return tuple(Level(self.at(value), _shorten(text, 16)) for value, text in self.direction.ticks)

    @property
    def strips(self) -> tuple[tuple[float, float, str], ...]:
        """The colours of its values, as in a `ColourBar`."""
        return _strips(self.top, self.bottom)


def viridis(share: float) -> str:
    """The colour `#rrggbb` of a share from 0 (dark) to 1 (light)."""
    place = min(max(share, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    first = min(int(place), len(_VIRIDIS) - 2)
    pairs = zip(bytes.fromhex(_VIRIDIS[first]), bytes.fromhex(_VIRIDIS[first + 1]), strict=True)
    return "#" + bytes(round(low + (high - low) * (place - first)) for low, high in pairs).hex()


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**power for power in powers for digit in digits]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= _MOST_TICKS:
            break
    # Within a fraction of a decade there is hardly a power to write; over very many, every one is too much.
    return ticks[:: math.ceil(len(ticks) / _MOST_TICKS)] if len(ticks) > 2 else _even_ticks(low, high)


def _even_ticks(low: float, high: float) -> list[float]:
    least = (high - low) / (_MOST_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= least * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _between(start: float, end: float, share: float) -> float:
    return round(start + share * (end - start), 2)


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


def _shorten(name: str, limit: int = _TEXT_LIMIT) -> str:
    return name if len(name) <= limit else name[: max(limit - 3, 1)] + "..."
