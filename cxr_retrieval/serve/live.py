"""The published index that a server answers from: opened once, and exchanged when its alias moves."""

import threading
import traceback
from collections.abc import Callable
from types import TracebackType

from cxr_retrieval import console
from cxr_retrieval.errors import UserError
from cxr_retrieval.index.search import Retriever
from cxr_retrieval.index.versions import named_version, split_reference
from cxr_retrieval.tombstones import Tombstones


class LiveIndex:
    """What `reference` (URI@alias or URI@version) points to, looked at every `poll_seconds` by a thread of its own; and
    who was removed, by another, since to open a new version may take long.

    A request takes `retriever` once and keeps it: one that is under way when the alias moves ends on the version that
    it began with. While the store cannot be asked, or the new version cannot be opened, the old one goes on serving and
    `trouble` says why, in one line.

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
        self._looks = {"removed patients": self._honour, f"alias {self.name}": self._follow}
        self._troubles: dict[str, str | None] = dict.fromkeys(self._looks)
        self._poll_seconds = poll_seconds
        self._stopped = threading.Event()
        self._turn = threading.Lock()
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
        """Whether it is being looked at where the alias points and who was removed."""
        return all(watcher.is_alive() for watcher in self._watchers)

    @property
    def trouble(self) -> str | None:
        """What went wrong at the last looks."""
        return "; ".join(trouble for trouble in self._troubles.values() if trouble) or None

    def look(self) -> None:
        """Look once who was removed; and where the alias points, and open that version if it is another one."""
        for what in self._looks:
            self._try(what)

    def _honour(self) -> None:
        with self._turn:
            self.retriever.honour(Tombstones.at(self.to))

    def _follow(self) -> None:
        version = named_version(self.to, self.name)
        if version == self.retriever.version.version.id:
            return
        retriever = self._opened(f"{self.to}@{version}")
        with self._turn:  # nobody who was removed while it was opened, or before, comes back
            retriever.honour(Tombstones.at(self.to) | self.retriever.removed)
            self.retriever = retriever
        self.moves += 1
        console.say(f"alias {self.name}: now version {version}")

    def _try(self, what: str) -> None:
        try:
            self._looks[what]()
        except Exception as error:  # noqa: BLE001  # a bug too, told with its traceback: to look no more would be worse
            with self._turn:
                self.failures += 1
            mendable = isinstance(error, UserError | OSError)  # what passes by itself or what a publisher can mend
            trouble = f"{what}: {error if mendable else repr(error)}"
            if trouble != self._troubles[what]:
                console.say(f"{trouble}; version {self.retriever.version.version.id} goes on serving")
                if not mendable:
                    traceback.print_exception(error)
            self._troubles[what] = trouble
        else:
            self._troubles[what] = None

    def _watch(self, what: str) -> None:
        while not self._stopped.wait(self._poll_seconds):
            self._try(what)
