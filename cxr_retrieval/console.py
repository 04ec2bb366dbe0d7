"""What a person sees while a job runs and when it ends: progress with a rate, and tables."""

import re
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

# Control characters, line ends, turns of the writing direction, halves of characters: they move or hide what is shown.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LINE_EVERY_S = 10.0  # a log file gets a line, not a bar

LOG_WIDTH = 140  # of a table in a log file, which does not know the reader's terminal

# What is printed is names and paths: `[PA]` is no markup in them and `:x:` no emoji.
out = Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else LOG_WIDTH)
err = Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """A name or a cell as it may be shown on a terminal or a page: in one line, UNPRINTABLE escaped as `\\x1b`."""
    if text.isprintable():
        return text
    return UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


class Meter:
    """Progress of one long step: a bar on a terminal, a line every ten seconds elsewhere, both with a rate."""

    def __init__(self, label: str, total: int, unit: str = "images") -> None:
        self._label, self.total, self._unit = label, total, unit
        self._done = 0
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> "Meter":
        self._start = self._last = time.monotonic()
        if err.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=err,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self.total, note="")
        return self

    def advance(self, count: int, note: str = "") -> None:
        """Report `count` more units done; `note` is shown behind the rate."""
        self._done += count
        now = time.monotonic()
        a_second = self._done / max(now - self._start, 1e-6)
        rate = f"{a_second:,.0f} {self._unit}/s" if a_second >= 1 else f"{60 * a_second:.1f} {self._unit}/min"
        if self._bar:
            self._bar.update(self._task, completed=self._done, note=f"{rate} {note}")
        elif now - self._last >= LINE_EVERY_S or self._done == self.total:
            self._last = now
            say(f"{self._label}: {self._done:,} of {self.total:,} {self._unit}, {rate} {note}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()


def say(text: str) -> None:
    """One line for the person who waits (to standard error, so that standard output stays the result)."""
    err.print(printable(text.rstrip()))
    sys.stderr.flush()


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table to standard output; numbers are aligned to the right."""
    out.print(
        printable(title), style="bold", soft_wrap=True
    )  # not the table's own title, which breaks at the table's width
    table = Table()
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(
            *[
                f"{cell:,}"
                if isinstance(cell, int)
                else f"{cell:.1f}"
                if isinstance(cell, float)
                else printable(str(cell))
                for cell in row
            ]
        )
    out.print(table)
