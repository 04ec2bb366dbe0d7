"""Images through the network, those of several clients at once.

The network takes several images in little more time than one. Whoever comes while it is busy waits, and who is next
looks at all that wait, not at their own alone. It uses every core, so one such batch runs at a time.
"""

import os
import threading
from collections import deque
from concurrent.futures import Future

from cxr_retrieval.index.search import Query, Retriever, Seen, SimilarCase, Why

MOST = 16  # images of one batch: more take as much longer


class Looking:
    """Queries for images of many threads."""

    def __init__(self) -> None:
        # Films as they come are large: so many are decoded at once as there are cores, whatever number of clients.
        self._decoding = threading.BoundedSemaphore(os.cpu_count() or 1)
        self._network = threading.Lock()
        self._waiting: deque[tuple[Retriever, Seen, Future[Query]]] = deque()

    def query(self, retriever: Retriever, data: bytes, region: tuple[float, float, float, float] | None) -> Query:
        """What `Retriever.query` gives, to rounding: sums are added up in another order in a batch."""
        with self._decoding:
            seen = retriever.decode(data, region)
        mine: Future[Query] = Future()
        self._waiting.append((retriever, seen, mine))
        with self._network:
            while not mine.done():
                self._look()
        return mine.result()

    def why(self, retriever: Retriever, query: Query, case: SimilarCase) -> Why:
        """What `Retriever.why` gives."""
        with self._network:
            return retriever.why(query, case)

    def _look(self) -> None:
        """Look at the first that wait, as far as they ask the same index."""
        retriever = self._waiting[0][0]
        batch: list[tuple[Retriever, Seen, Future[Query]]] = []
        while self._waiting and self._waiting[0][0] is retriever and len(batch) < MOST:
            batch.append(self._waiting.popleft())
        try:
            queries = retriever.look([seen for _, seen, _ in batch])
        except BaseException as error:  # noqa: BLE001  # told to all that wait for it, one's own caller among them
            for _, _, theirs in batch:
                theirs.set_exception(error)
            return
        for (_, _, theirs), query in zip(batch, queries, strict=True):
            theirs.set_result(query)
