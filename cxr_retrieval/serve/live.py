"""The published index that a server answers from: opened once, and exchanged when its alias moves."""

import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType

from cxr_retrieval import console
from cxr_retrieval.errors import UserError
from cxr_retrieval.index.search import Retriever
from cxr_retrieval.index.versions import named_version, split_reference
from cxr_retrieval.tombstones import Tombstones

# A look that waits longer for its answer is none. It may outwait two lost answers of storage, 60 seconds each, and not
# all eight that storage is asked for.
LATE_SECONDS = 150.0


class LiveIndex:
    """What `reference` (URI@alias or URI@version) points to, looked at every `poll_seconds` by a thread of its own; and
    who was removed, by another, since to open a new version may take long.

    A request takes `retriever` once and keeps it: one that is under way when the alias moves ends on the version that
    it began with. While the store cannot be asked, or the new version cannot be opened, the old one goes on serving and
    `trouble` says why, in one line. A look that is not answered is told as well, while it waits; to open a version
    may take as long as it takes.

    >>> with LiveIndex("s3://bucket/indexes/chest@latest", 5.0) as live:
    ...     retriever = live.retriever
    """

    def __init__(
        self, reference: str, poll_seconds: float, opened: Callable[[str], Retriever] = Retriever.open
    ) -> None:
        """Open the version. Raises UserError, as `Retriever.open` does; `opened` may hold the shards elsewhere."""
        self.to, self.name = split_reference(reference)
        self.retriever = opened(reference)
        self._opened = opened
        self.moves = 0
        self.failures = 0
        self._alias = f"alias {self.name}"
        self._looks = {"removed patients": self._honour, self._alias: self._follow}
        self._troubles: dict[str, str | None] = dict.fromkeys(self._looks)
        self._waits_since: dict[str, float | None] = dict.fromkeys(self._looks)
        self._poll_seconds = poll_seconds
        self._stopped = threading.Event()
        self._turn = threading.Lock()  # of exchanging what is served, or who is hidden; the store is asked before
        self._counting = threading.Lock()  # not the turn: shards on a cluster may keep that for a while
        self._watchers = [
            threading.Thread(target=self._watch, args=(what,), name=what, daemon=True) for what in self._looks
        ]

    def __enter__(self) -> "LiveIndex":
        for watcher in self._watchers:
            watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        for watcher in self._watchers:
            watcher.join(timeout=1.0)  # one that fetches a version, or waits for its store, ends with the process

    @property
    def watching(self) -> bool:
        """Whether it is being looked at where the alias points and who was removed. A look that fails is one;
        one that waits for its answer without end is none."""
        return all(watcher.is_alive() for watcher in self._watchers) and not self._unanswered

    @property
    def trouble(self) -> str | None:
        """What went wrong at the last looks, or which of them wait for their answer."""
        return "; ".join(trouble for trouble in (self._troubles | self._unanswered).values() if trouble) or None

    @property
    def _unanswered(self) -> dict[str, str]:
        waited = {what: time.monotonic() - since for what, since in self._waits_since.items() if since is not None}
        return {
            what: f"{what}: no answer for {seconds:.0f} seconds"
            for what, seconds in waited.items()
            if seconds > LATE_SECONDS
        }

    def look(self) -> None:
        """Look once who was removed; and where the alias points, and open that version if it is another one."""
        for what in self._looks:
            self._try(what)

    def _honour(self) -> None:
        removed = Tombstones.at(self.to)
        with self._turn:
            self.retriever.honour(removed)

    def _follow(self) -> None:
        version = named_version(self.to, self.name)
        moved = version != self.retriever.version.version.id
        if not moved and not self.retriever.holders.lost:
            return
        self._waits_since[self._alias] = None  # the look is answered: a large version takes its time
        retriever = self._opened(f"{self.to}@{version}")
        removed = Tombstones.at(self.to)
        with self._turn:  # nobody who was removed while it was opened, or before, comes back
            retriever.honour(removed | self.retriever.removed)
            self.retriever = retriever
        self.moves += moved
        console.say(f"alias {self.name}: now version {version}" if moved else f"version {version}: opened again")

    def _try(self, what: str) -> None:
        began = time.monotonic()
        self._waits_since[what] = self._waits_since[what] or began
        try:
            self._looks[what]()
        except Exception as error:  # noqa: BLE001  # a bug too, told with its traceback: to look no more would be worse
            with self._counting:
                self.failures += 1
            mendable = isinstance(error, UserError | OSError)  # what passes by itself or what a publisher can mend
            trouble = f"{what}: {error if mendable else repr(error)}"
            if trouble != self._troubles[what]:
                console.say(f"{trouble}; version {self.retriever.version.version.id} goes on serving")
                if not mendable:
                    traceback.print_exception(error)
            self._troubles[what] = trouble
            if time.monotonic() - began <= LATE_SECONDS:  # else the next look still waits for what this one did
                self._waits_since[what] = None
        else:
            self._troubles[what] = self._waits_since[what] = None

    def _watch(self, what: str) -> None:
        while not self._stopped.wait(self._poll_seconds):
            self._try(what)
