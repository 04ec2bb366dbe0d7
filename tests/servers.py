"""A server of the search page and its API, on a free port of this machine, in a thread of the test."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from fastapi import FastAPI

from cxr_retrieval.config import ServeSettings
from jobs.serve import listening, server


def until(reached: Callable[[], bool]) -> None:
    """Wait until a server's threads have reached something."""
    end = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The address at which the application answers."""
    with listening(ServeSettings(port=0)) as taken:
        answering = server(app, ServeSettings())
        thread = threading.Thread(target=answering.run, kwargs={"sockets": [taken]})
        thread.start()
        try:
            while not answering.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield f"http://127.0.0.1:{taken.getsockname()[1]}"
        finally:
            answering.should_exit = True
            thread.join()
