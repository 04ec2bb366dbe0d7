"""A Ray cluster of one node on this machine, with token authentication on, as jobs are submitted to a real one.

  python -m cluster.local COMMAND...

starts a head with ports of its own and the dashboard on loopback, runs the command with the variables that lead
`ray job submit` to it, stops it, and ends with the command's exit status. Other Rays of the machine are left alone.
"""

import argparse
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.object_store import HOST, end_on_sigterm, free_ports, run_beside

PORTS = 6
STARTS_WITHIN_S = 60.0
STOPS_WITHIN_S = 3.0


@dataclass(frozen=True)
class Head:
    """A running head: the variables that lead to it."""

    variables: dict[str, str]


@contextlib.contextmanager
def head() -> Iterator[Head]:
    """A head whose drivers and workers inherit this environment. Raises RuntimeError where it does not start."""
    gcs, dashboard, client, agent, agent_grpc, metrics = range(first := free_ports(PORTS), first + PORTS)
    bin_folder = Path(sys.executable).parent
    variables = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_API_SERVER_ADDRESS": f"http://{HOST}:{dashboard}",
    }
    surroundings = os.environ | variables
    surroundings["PATH"] = f"{bin_folder}{os.pathsep}{surroundings.get('PATH', '')}"
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        surroundings.pop(name, None)  # they lead to another cluster
    flags = {
        "port": gcs,
        "dashboard-host": HOST,
        "dashboard-port": dashboard,
        "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent,
        "dashboard-agent-grpc-port": agent_grpc,
        "metrics-export-port": metrics,
        "node-ip-address": HOST,
    }
    with tempfile.TemporaryDirectory(prefix="ray-") as folder, (Path(folder) / "log").open("wb") as log:
        command = [str(bin_folder / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
        command += [f"--{name}={value}" for name, value in flags.items()]
        process = subprocess.Popen(command, env=surroundings, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait(process, variables, Path(folder) / "log")
            yield Head(variables)
        finally:
            _stop(process)


def _wait(process: subprocess.Popen[bytes], variables: dict[str, str], log: Path) -> None:
    """Wait until the job server answers one who has the token."""
    asked = urllib.request.Request(
        f"{variables['RAY_API_SERVER_ADDRESS']}/api/jobs/",
        headers={"Authorization": f"Bearer {variables['RAY_AUTH_TOKEN']}"},
    )
    end = time.monotonic() + STARTS_WITHIN_S
    while True:
        try:
            with urllib.request.urlopen(asked, timeout=5):
                return
        except (urllib.error.URLError, TimeoutError) as error:
            if process.poll() is not None or time.monotonic() > end:
                words = log.read_text(errors="replace").splitlines()[-3:]
                raise RuntimeError(f"the Ray head does not start: {error}; {' | '.join(words)}") from error
        time.sleep(0.3)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the head with all that it started: its own session's processes, and their descendants."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOPS_WITHIN_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> int:
    end_on_sigterm()
    parser = argparse.ArgumentParser(
        prog="python -m cluster.local", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="command to run beside the cluster")
    options = parser.parse_args()
    if not options.command:
        parser.error("no command to run")
    with head() as running:
        return run_beside(options.command, running.variables)


if __name__ == "__main__":
    sys.exit(main())
