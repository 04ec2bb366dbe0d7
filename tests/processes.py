"""Processes of a job and of all the Ray that it started: found by a mark that every descendant inherits, and killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARK = "CXR_TEST_PROCESSES"  # in the environment, whatever session or group Ray gives a process
TIMEOUT_S = 300


def ray_workers(title: str) -> dict[int, int]:
    """Process ids of all of Ray's workers whose title begins so, and the raylet of each."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cmdline").read_bytes().startswith(f"ray::{title}".encode()):
                found[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
    return found


def marked(mark: str) -> Iterator[int]:
    """Processes that carry the mark, this one left out."""
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    yield int(entry.name)


def kill_all(mark: str) -> int:
    """SIGKILL every marked process until none is left; how many there were."""
    killed: set[int] = set()
    deadline = time.monotonic() + 60
    while (alive := set(marked(mark))) and time.monotonic() < deadline:
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed |= alive
        time.sleep(0.05)
    assert not alive, f"processes that SIGKILL does not end: {alive}"
    return len(killed)


@contextlib.contextmanager
def job(name: str, *words: str, log: Path, cwd: Path = ROOT, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m jobs.NAME WORDS` as a process of its own, on a Ray of its own; killed at the end with all of it."""
    mark = f"{log}-{time.monotonic_ns()}"
    with log.open("ab") as written:
        process = subprocess.Popen(
            [sys.executable, "-m", f"jobs.{name}", *words],
            cwd=cwd,
            env=os.environ | {"RAY_ADDRESS": ""} | environment | {MARK: mark},
            stdout=written,
            stderr=written,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            kill_all(mark)
            process.wait()


def wait_until(reached: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until something is there while the job runs."""
    end = time.monotonic() + TIMEOUT_S
    while not reached():
        assert process.poll() is None, f"the job ended too early: {log.read_text(errors='replace')}"
        assert time.monotonic() < end, f"not reached: {log.read_text(errors='replace')}"
        time.sleep(0.1)  # looking is work too: it takes a core from the job
