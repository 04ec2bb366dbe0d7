"""What a run tells of itself while it trains: a small file in the workspace, written by the first worker."""

import json
import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from cxr_retrieval import storage
from cxr_retrieval.errors import UserError

PROGRESS_FILE = "progress.json"
EVERY_S = 2.0
logger = logging.getLogger(__name__)


class Teller:
    """Writes how far the run is, where the driver and another terminal can read it. No step waits for storage."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._told = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="progress")
        self._telling: Future[None] | None = None

    def is_due(self) -> bool:
        """Whether there is something to tell again."""
        idle = self._telling is None or self._telling.done()
        return idle and time.monotonic() - self._told >= EVERY_S

    def tell(self, facts: Mapping[str, Any]) -> None:
        self._told = time.monotonic()
        self._telling = self._thread.submit(_write, self._uri, json.dumps(facts).encode())

    def end(self) -> None:
        """Wait until what was told is written."""
        self._thread.shutdown()


def told_of(uri: str) -> dict[str, Any]:
    """What the workers of a run have told of it last: images done, requests to storage sent again; empty before."""
    found = storage.read_tagged(uri)
    facts: dict[str, Any] = json.loads(found[0]) if found else {}
    return facts


def _write(uri: str, facts: bytes) -> None:
    try:
        storage.write_bytes(uri, facts)
    except UserError as error:  # for a person to look at: no reason to end a run
        logger.warning("progress is not told: %s", error)
