"""How far a piece of work is: shown where it runs, and kept in the workspace for `jobs.status` on another terminal.

Every piece of work, known by its name, keeps one small file in `runs/progress`; a driver that is alive writes it anew
every few seconds, so a file that grows old tells of a driver that was killed.
"""

import contextlib
import datetime
import json
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from types import TracebackType
from typing import Literal

from cxr_retrieval import artifacts, storage
from cxr_retrieval.artifacts import Draft
from cxr_retrieval.console import Meter, say
from cxr_retrieval.errors import UserError

FOLDER = "progress"
EVERY_S = 5.0
SILENT_S = 60.0  # a driver that has not been heard of for so long is taken for dead
State = Literal["finished", "running", "failed", "silent"]


@dataclass(frozen=True)
class Status:
    """What is known of one piece of work. Times are ISO 8601 in UTC; `rate` is in units a second."""

    step: str
    uri: str
    unit: str
    total: int
    done: int
    rate: float
    started: str
    updated: str
    note: str = ""
    error: str | None = None
    finished: bool = False
    moved: str = ""
    """When a unit was last done."""

    @property
    def seconds(self) -> float:
        """From the start of its last run to the last that was heard of it."""
        return (_time(self.updated) - _time(self.started)).total_seconds()

    @property
    def seconds_left(self) -> float | None:
        return (self.total - self.done) / self.rate if self.rate else None

    def silent_for(self) -> float:
        return _since(self.updated)

    def stuck_for(self) -> float:
        """Seconds since a unit was last done."""
        return _since(self.moved or self.started)

    def state(self) -> State:
        if self.finished or artifacts.find(self.uri) is not None:  # killed after the last of it
            return "finished"
        if self.error is not None:
            return "failed"
        return "silent" if self.silent_for() > SILENT_S else "running"


class Progress:
    """The progress of one piece of work: a meter here, and a file in the workspace. `before` of `total` was done
    earlier. The work is finished when the block that it runs in ends without an error."""

    def __init__(
        self, workspace: str, work: str, uri: str, step: str, total: int, unit: str = "images", before: int = 0
    ) -> None:
        self._file = storage.join(_folder(workspace), f"{work}.json")
        self._meter = Meter(step, total - before, unit)
        self._step, self._uri, self._unit, self._total = step, uri, unit, total
        self._before, self._done, self._note = before, before, ""
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="progress", daemon=True)

    @classmethod
    def of(
        cls, workspace: str, draft: Draft, step: str, total: int, unit: str = "images", before: int = 0
    ) -> "Progress":
        """The progress of an artifact that is being made."""
        return cls(workspace, f"{draft.kind}-{draft.input_id}", draft.uri, step, total, unit, before)

    def __enter__(self) -> "Progress":
        self._started = self._moved = _now()
        self._meter.__enter__()
        self._keep(None)
        self._heart.start()
        return self

    def advance(self, count: int, note: str = "") -> None:
        """Report `count` more units done."""
        self._done, self._note, self._moved = self._done + count, note, _now()
        self._meter.advance(count, note)

    def found(self, count: int) -> None:
        """Report `count` units that were done before: they are no part of the rate."""
        self._done, self._before = self._done + count, self._before + count
        self._meter.total -= count

    def end_early(self, note: str) -> None:
        """There is no more to do than what was done."""
        self._total, self._note = self._done, note
        self._meter.total = self._done - self._before
        self._meter.advance(0, note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._heart.join()
        self._meter.__exit__(kind, error, trace)
        told = None if error is None else " ".join(str(error).split())[:500] or type(error).__name__
        with contextlib.suppress(UserError):  # the work has ended one way or the other, and this is only to look at
            self._keep(told, finished=error is None)

    def _beat(self) -> None:
        told = False
        while not self._ended.wait(EVERY_S):
            try:
                self._keep(None)
            except (UserError, OSError) as error:  # an outage that the work itself may survive
                if not told:
                    say(f"progress is not kept for jobs.status: {error}")
                told = True

    def _keep(self, error: str | None, finished: bool = False) -> None:
        now = _now()
        seconds = max((now - self._started).total_seconds(), 1e-6)
        status = Status(
            step=self._step,
            uri=self._uri,
            unit=self._unit,
            total=self._total,
            done=self._done,
            rate=round((self._done - self._before) / seconds, 3),
            started=self._started.isoformat(timespec="milliseconds"),
            updated=now.isoformat(timespec="milliseconds"),
            note=self._note,
            error=error,
            finished=finished,
            moved=self._moved.isoformat(timespec="milliseconds"),
        )
        storage.write_bytes(self._file, json.dumps(asdict(status), indent=1).encode())


def statuses(workspace: str) -> Iterator[Status]:
    """Every piece of work that was begun in a workspace, in the order in which their last runs began."""
    try:
        files = list(storage.list_files(_folder(workspace)))
    except FileNotFoundError:
        return
    names = {field.name for field in fields(Status)}
    read = [json.loads(storage.read_bytes(file.uri)) for file in files]
    found = [Status(**{name: value for name, value in facts.items() if name in names}) for facts in read]
    yield from sorted(found, key=lambda status: status.started)


def _folder(workspace: str) -> str:
    return storage.join(workspace, "runs", FOLDER)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _since(text: str) -> float:
    return (_now() - _time(text)).total_seconds()


def _time(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text)
