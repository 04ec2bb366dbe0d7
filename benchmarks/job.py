"""A job as a person runs it: a command with a Ray of its own, its seconds, and the memory of its processes."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cxr_retrieval.errors import UserError

EVERY_S = 0.2
PUBLIC = "privacy.pseudonymise=false"  # phantoms are nobody


def run_job(name: str, *words: str) -> tuple[float, float]:
    """Seconds of `python -m jobs.NAME WORDS`, start of Python and Ray included, and the highest MiB that its driver and
    workers held together. Raises UserError with what it said where it fails."""
    peak, began = 0.0, time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", f"jobs.{name}", *words],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"RAY_ADDRESS": ""},
            stdout=said,
            stderr=said,
        )
        while process.poll() is None:
            peak = max(peak, sum(map(_held, _tree(process.pid))))
            time.sleep(EVERY_S)
        seconds = time.perf_counter() - began
        if process.returncode:
            said.seek(0)
            raise UserError(f"jobs.{name} failed: {said.read()}")
    return seconds, peak


def _tree(pid: int) -> Iterator[int]:
    """The driver and its workers; what Ray runs beside them, its servers and their helpers, is no part of a job."""
    yield pid
    for child in _below(pid):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if re.match(rb"ray::[^_]", Path(f"/proc/{child}/cmdline").read_bytes()):  # Ray's own actors: _StatsActor
                yield child


def _below(pid: int) -> Iterator[int]:
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                yield child
                yield from _below(child)


def _held(pid: int) -> float:
    """MiB of a process: what it shares with others counts by its share (proportional set size)."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0
