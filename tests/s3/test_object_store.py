"""Promises of the server that `make s3` starts: it runs a command against itself, and keeps what was stored."""

import os
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from cxr_retrieval.config import load_settings

ROOT = Path(__file__).parents[2]
WRITE = "from cxr_retrieval import storage; storage.write_bytes('s3://cxr/x', b'kept')"
READ = "import sys; from cxr_retrieval import storage; print(storage.read_bytes('s3://cxr/x')); sys.exit(7)"


def against_a_server(data: Path, code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.object_store", "--data", str(data), sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_command_runs_against_the_server_and_its_exit_status_is_passed_on(tmp_path: Path) -> None:
    assert against_a_server(tmp_path / "data", WRITE).returncode == 0
    again = against_a_server(tmp_path / "data", READ)
    assert (again.stdout.strip(), again.returncode) == ("b'kept'", 7), again.stderr
    left = subprocess.run(["pgrep", "-f", f"dir={tmp_path}"], capture_output=True, text=True)
    assert left.stdout == ""


def test_make_s3_names_jobs_and_settings_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    shown = subprocess.run(
        ["make", "-n", "-o", ".venv/.ready", "s3"], env=outside, check=True, capture_output=True, text=True
    )
    commands = [shlex.split(line) for line in shown.stdout.replace("\\\n", " ").splitlines()]
    assert [words[7] for words in commands] == ["jobs.phantom", "jobs.pipeline", "jobs.search"]
    for words in commands:
        assert words[:5] == [".venv/bin/python", "-m", "cluster.object_store", "--data", "demo-s3"]
        assert find_spec(words[7]) is not None
        settings = load_settings(
            [words[n + 1] for n, word in enumerate(words) if word == "--config"],
            [word for word in words[8:] if "=" in word and not word.startswith("-")],
        )
        if words[7] == "jobs.pipeline":
            assert settings.workspace == "s3://cxr/workspace"
            assert settings.corpus.archive == "s3://cxr/archive"
