"""`python -m jobs.train`, killed with all its processes inside an epoch, goes on from its checkpoint when run again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cxr_retrieval import artifacts
from cxr_retrieval.config import Settings, load_settings
from cxr_retrieval.corpus.preparation import prepare
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.training.loop import PROGRESS_FILE, STATE_FILE
from cxr_retrieval.training.run import model_draft, train

ROOT = Path(__file__).parents[2]
EPOCHS, BATCH, EVERY = 2, 8, 2
TIMEOUT_S = 300.0
pytestmark = pytest.mark.usefixtures("ray_session")
WORDS = (
    "corpus.size=64 corpus.partition_images=32 corpus.row_group_images=8 corpus.validation_share=0.25"
    f" network.dimensions=16 training.epochs={EPOCHS} training.batch_size={BATCH} training.lanes=2"
).split()


@pytest.fixture(scope="module")
def undisturbed(phantom_archive, tmp_path_factory) -> artifacts.Artifact:
    plain = settings(phantom_archive, tmp_path_factory.mktemp("undisturbed"))
    return train(plain, corpus(plain))[0]


def words(archive: Path, workspace: Path) -> list[str]:
    return [f"workspace={workspace}", f"corpus.archive={archive}", *WORDS]


def settings(archive: Path, workspace: Path) -> Settings:
    return load_settings((), words(archive, workspace))


def corpus(plain: Settings) -> Corpus:
    return Corpus(prepare(plain.corpus, plain.workspace)[0])


def test_the_same_command_goes_on_after_a_kill_and_gives_the_same_curve(undisturbed, phantom_archive, tmp_path):
    run = tmp_path / "runs" / undisturbed.input_id
    command = [sys.executable, "-m", "jobs.train", *words(phantom_archive, tmp_path)]
    command.append(f"training.checkpoint_steps={EVERY}")  # how a run is executed: the model is the same

    with (tmp_path / "first.log").open("wb") as log:
        job = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(lambda: inside_a_later_epoch(run), job)
        finally:
            kill_all(job)
    assert artifacts.find(str(tmp_path / "models" / undisturbed.input_id)) is None
    newest = newest_checkpoint(run)
    assert newest is not None
    before = torch.load(newest / STATE_FILE, weights_only=True)["run"]
    assert before["history"], "the kill came in the first epoch: this test showed nothing"
    (run / PROGRESS_FILE).unlink()  # it is for a person to read, and nothing goes on from it

    with (tmp_path / "second.log").open("wb") as log:
        job = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for((run / PROGRESS_FILE).exists, job)
            seen = json.loads((run / PROGRESS_FILE).read_text())["images"]
            assert job.wait(TIMEOUT_S) == 0, (tmp_path / "second.log").read_text()
        finally:
            kill_all(job)
    assert seen == (before["step"] + 1) * BATCH, "the first step of the second run is the next one"

    again = settings(phantom_archive, tmp_path)
    model = artifacts.load(model_draft(again, corpus(again)).uri, "model")
    assert model.input_id == undisturbed.input_id
    records = history(model)
    speeds = [record["images_per_second"] for record in before["history"]]
    assert [record["images_per_second"] for record in records[: len(speeds)]] == speeds  # none was trained again
    for record in (*records, *(expected := history(undisturbed))):
        del record["images_per_second"]
    assert records == expected
    assert weights_hash(model) == weights_hash(undisturbed)


def history(model: artifacts.Artifact) -> list[dict[str, Any]]:
    return json.loads(model.read("model.json"))["history"]


def weights_hash(model: artifacts.Artifact) -> str:
    return next(entry.sha256 for entry in model.files if entry.path == "weights.safetensors")


def newest_checkpoint(run: Path) -> Path | None:
    try:
        snapshot = json.loads((run / "checkpoint_manager_snapshot.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    latest = snapshot["latest_checkpoint_result"]
    return run / latest["checkpoint_dir_name"] if latest else None


def inside_a_later_epoch(run: Path) -> bool:
    newest = newest_checkpoint(run)
    if newest is None:
        return False
    try:
        state = torch.load(newest / STATE_FILE, weights_only=True)["run"]
    except FileNotFoundError:  # replaced by a newer one meanwhile
        return False
    return bool(state["history"] and state["sums"])


def wait_for(condition, job: subprocess.Popen) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert job.poll() is None, "the job ended before its time"
        assert time.monotonic() < end, "the job did not come so far"
        time.sleep(0.02)


def kill_all(job: subprocess.Popen) -> None:
    """SIGKILL the job, if it still runs, with all that descends from it (Ray's processes), and wait for their end."""
    if job.poll() is not None:
        return
    doomed = [job.pid, *descendants(job.pid)]
    for pid in doomed:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    job.wait()
    end = time.monotonic() + 30
    while any(is_alive(pid) for pid in doomed):
        assert time.monotonic() < end, "a killed process is still there"
        time.sleep(0.05)


def descendants(root: int) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    waiting = children.get(root, [])
    while waiting:
        pid = waiting.pop()
        yield pid
        waiting += children.get(pid, [])


def is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
