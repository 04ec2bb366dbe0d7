"""Promises of submitted jobs: token authentication, logs, exit codes; a driver that is killed is submitted again."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local import Head, head
from cxr_retrieval import storage
from tests.processes import ROOT, TIMEOUT_S

SMALL = ["corpus.size=64", "corpus.partition_images=8", "corpus.row_group_images=8"]
PARTS = 96 // 8


@pytest.fixture(scope="module")
def cluster() -> Iterator[Head]:
    with head() as running:
        yield running


def submission(cluster: Head, job: str, *words: str, **variables: str) -> subprocess.Popen[str]:
    """`ray job submit` from a terminal that has what leads to the cluster, and nothing else of Ray."""
    terminal = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ray = str(Path(sys.executable).parent / "ray")
    return subprocess.Popen(
        [ray, "job", "submit", "--working-dir", ".", "--", "python", "-m", f"jobs.{job}", *words],
        cwd=ROOT,
        env=terminal | cluster.variables | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def submitted(cluster: Head, job: str, *words: str, **variables: str) -> tuple[int, str]:
    with submission(cluster, job, *words, **variables) as process:
        printed, _ = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, printed


def test_a_relative_workspace_is_refused_by_its_name_and_the_submission_fails(
    cluster: Head, phantom_archive: Path
) -> None:
    code, printed = submitted(cluster, "prepare", f"corpus.archive={phantom_archive}")
    assert code != 0
    assert "error: workspace=./workspace is a relative path" in printed
    assert "Traceback" not in printed.partition("error: workspace")[2].splitlines()[0]


def test_who_has_no_token_is_refused(cluster: Head) -> None:
    for token in ("0" * 64, ""):
        code, printed = submitted(cluster, "status", "workspace=/tmp", RAY_AUTH_TOKEN=token)
        assert code != 0
        assert "submitted successfully" not in printed
        assert re.search(r"40[13]|authentication token|unauthenticated", printed, re.IGNORECASE), printed


def ended_with(uri: str, name: str) -> list[str]:
    try:
        return [file.uri for file in storage.list_files(uri) if file.uri.endswith(name)]
    except FileNotFoundError:
        return []


def test_a_driver_that_is_killed_is_submitted_again_and_goes_on(cluster: Head, large_archive: Path, s3: str) -> None:
    workspace = f"{s3}/workspace"
    words = [f"workspace={workspace}", f"corpus.archive={large_archive}", *SMALL]

    def parts() -> list[str]:
        return ended_with(f"{workspace}/corpora", "/manifest.json")

    with submission(cluster, "prepare", *words) as process:
        end = time.monotonic() + TIMEOUT_S
        while not parts():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.05)
        found = subprocess.run(["pgrep", "-f", f"jobs.prepare workspace={workspace}"], capture_output=True, text=True)
        drivers = [int(pid) for pid in found.stdout.split() if int(pid) != process.pid]
        assert drivers
        for pid in drivers:
            os.kill(pid, signal.SIGKILL)
        printed, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode != 0, printed
    kept = parts()
    assert 1 <= len(kept) < PARTS
    code, printed = submitted(cluster, "prepare", *words)
    assert code == 0, printed
    assert "Prepared corpus" in printed
    assert set(kept) < set(parts())
    (corpus,) = ended_with(f"{workspace}/corpora", "/exclusions.parquet")
    assert json.loads(storage.read_bytes(f"{storage.parent(corpus)}/manifest.json"))["counts"]["prepared"] == 96
