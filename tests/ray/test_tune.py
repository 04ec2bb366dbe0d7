"""Promises of a sweep on a real Ray: early stopping, failing trials, kills, and a best config that train takes."""

import json
import time
from pathlib import Path

import pytest
import ray
import yaml

from cxr_retrieval import storage
from cxr_retrieval.config import load_settings
from tests import commands, processes
from tests.commands import done, job
from tests.processes import wait_until

TINY = [
    *commands.TINY,
    "training.epochs=7",
    "training.precision=float32",  # the order of trials must not depend on the machine
]
ONE_AT_A_TIME = ["training.cpus_per_worker=1.2"]


def space_file(folder: Path, **values: object) -> str:
    space = {
        "name": "tiny",
        "search": "grid",
        "epochs": 2,
        "reduction": 2,
        "settings": {"losses.contrastive_from": 0},
        "space": {"losses.centre_rate": {"choice": [0.02, 0.2]}},
    }
    file = folder / "space.yaml"
    file.write_text(yaml.safe_dump(space | values))
    return str(file)


def sweep_of(workspace: Path) -> Path:
    (folder,) = (workspace / "reports" / "sweeps").iterdir()
    return folder


@pytest.mark.usefixtures("ray_session")
def test_a_sweep_survives_a_trial_that_fails_and_stops_one_early(
    phantom_archive: Path, tmp_path: Path, s3: str
) -> None:
    workspace = f"{s3}/workspace"
    words = [f"workspace={workspace}", f"corpus.archive={phantom_archive}", *TINY, *ONE_AT_A_TIME]
    free = ray.cluster_resources()["CPU"]
    # A file that holds no weights: a trial that is given it fails when it builds its network.
    (tmp_path / "weights").write_bytes(b"not weights")
    axes = {
        "network.weights": {"choice": [None, str(tmp_path / "weights")]},
        "training.learning_rate": {"choice": [0.01, 0.001]},  # the second is behind after an epoch
    }
    out = done("tune", "--space", space_file(tmp_path, space=axes), *words)
    (manifest,) = [file for file in storage.list_files(f"{workspace}/reports/sweeps") if "manifest" in file.path]
    folder = storage.parent(manifest.uri)
    facts = json.loads(storage.read_bytes(f"{folder}/sweep.json"))
    states = [trial["state"] for trial in facts["trials"]]
    assert (states.count("failed"), states.count("finished") > 0, "stopped" in states) == (2, True, True), facts
    failed = [trial for trial in facts["trials"] if trial["state"] == "failed"]
    assert all("safetensors" in trial["error"] for trial in failed)
    assert all(trial["settings"]["network.weights"] for trial in failed)
    assert "failed" in out
    best = load_settings([f"{folder}/best.yaml"], read=storage.read_bytes)
    winner = next(trial for trial in facts["trials"] if trial["id"] == facts["best"])
    assert best.training.learning_rate == winner["settings"]["training.learning_rate"]
    assert best.training.epochs == 7  # the full budget
    assert best.corpus.archive == str(phantom_archive)
    assert b"<html" in storage.read_bytes(f"{folder}/sweep.html")[:200].lower()
    # Whoever was stopped has given back what it had.
    end = time.monotonic() + 20
    while ray.available_resources().get("CPU") != free and time.monotonic() < end:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == free
    again = done("tune", "--space", space_file(tmp_path, space=axes), *words)
    assert "finished before, nothing to do" in again
    planned = done("train", "--config", f"{folder}/best.yaml", "--plan")
    assert "to do" in planned


@pytest.mark.usefixtures("ray_session")
def test_a_point_that_the_schema_refuses_ends_the_sweep_before_it_starts(phantom_archive: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    words = [f"workspace={workspace}", f"corpus.archive={phantom_archive}", *TINY]
    for axes, told in (
        ({"losses.centre_rate": {"choice": [0.1, 3.0]}}, "losses.centre_rate=3.0"),
        ({"losses.centre_rat": {"choice": [0.1, 0.3]}}, "did you mean 'losses.centre_rate'"),
        ({"training.lanes": {"choice": [2, 4]}, "training.batch_size": {"choice": [16, 18]}}, "is not a multiple"),
        ({"training.workers": {"choice": [1, 2]}}, "training.workers cannot be searched"),
    ):
        outcome = job("tune", "--space", space_file(tmp_path, space=axes), *words)
        assert outcome.code == 1
        assert told in outcome.err
    assert not (workspace / "reports").exists()
    assert not any((workspace / "runs").glob("*-*"))


def test_a_sweep_that_is_killed_goes_on_and_keeps_the_trials_that_ended(phantom_archive: Path, tmp_path: Path) -> None:
    workspace, log = tmp_path / "workspace", tmp_path / "log"
    words = ["--space", space_file(tmp_path, epochs=1, scheduler="none"), *TINY]
    words += [f"workspace={workspace}", f"corpus.archive={phantom_archive}", *ONE_AT_A_TIME]

    def ended() -> list[Path]:
        """Trials that have reported their last epoch."""
        found = [path for path in workspace.glob("runs/*/*/result.json") if path.read_text().endswith("\n")]
        return [path.parent for path in found]

    with processes.job("tune", *words, log=log) as process:
        wait_until(lambda: bool(ended()), process, log)
    before = {path.name.rpartition("_")[2] for path in ended()}
    assert before
    with processes.job("tune", *words, log=log) as process:
        assert process.wait(processes.TIMEOUT_S) == 0, log.read_text()
    assert "going on with a sweep that was begun before" in log.read_text()
    trials = json.loads((sweep_of(workspace) / "sweep.json").read_text())["trials"]
    assert before <= {trial["id"] for trial in trials}
    assert [trial["state"] for trial in trials] == ["finished"] * 2
    assert sorted(trial["settings"]["losses.centre_rate"] for trial in trials) == [0.02, 0.2]
    assert all([point["epoch"] for point in trial["curve"]] == [1] for trial in trials)
