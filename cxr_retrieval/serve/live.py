"""The published index that a server answers from: opened once, and exchanged when its alias moves."""

import threading
from collections.abc import Callable
from types import TracebackType

from cxr_retrieval import console
from cxr_retrieval.errors import UserError
from cxr_retrieval.index.search import Retriever
from cxr_retrieval.index.versions import resolve, split_reference
from cxr_retrieval.tombstones import Tombstones


class LiveIndex:
    """What `reference` (URI@alias or URI@version) points to, looked at every `poll_seconds` by a thread of its own.

    A request takes `retriever` once and keeps it: one that is under way when the alias moves ends on the version that
    it began with. While the store cannot be asked, or the new version is damaged, the old one goes on serving and
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
        self.trouble: str | None = None
        self._poll_seconds = poll_seconds
        self._stopped = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="alias", daemon=True)

    def __enter__(self) -> "LiveIndex":
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._watcher.join()

    @property
    def watching(self) -> bool:
        """Whether the alias is being looked at. It stops only where there is a bug, whose traceback is in the log."""
        return self._watcher.is_alive()

    def look(self) -> None:
        """Look once where the alias points, and open that version if it is another one; and who was removed."""
        try:
            version = resolve(self.to, self.name)
            if version.id != self.retriever.version.version.id:
                self.retriever = self._opened(f"{self.to}@{version.id}")
                self.moves += 1
                console.say(f"alias {self.name}: now version {version.id}")
            self.retriever.honour(Tombstones.at(self.to))
            self.trouble = None
        except (UserError, OSError) as error:  # what passes by itself or what a publisher can mend
            self.failures += 1
            if str(error) != self.trouble:
                console.say(f"alias {self.name}: {error}; version {self.retriever.version.version.id} goes on serving")
            self.trouble = str(error)

    def _watch(self) -> None:
        while not self._stopped.wait(self._poll_seconds):
            self.look()
