"""Promises of a sweep on a real Ray: early stopping, failing trials, kills, and a best config that train takes."""

import gc
import json
import re
import time
from pathlib import Path

import pytest
import ray
import safetensors.torch
import torch
import yaml
from ray.util import placement_group_table

from cxr_retrieval import storage
from cxr_retrieval.config import load_settings
from cxr_retrieval.network.backbones import build_backbone
from cxr_retrieval.training.validation import RESAMPLES
from tests import commands, processes, proxy
from tests.commands import done, job
from tests.processes import wait_until
from tests.proxy import FaultProxy

TINY = [
    *commands.TINY,
    "training.epochs=7",
    "training.precision=float32",  # the order of trials must not depend on the machine
    "training.workers=2",
    "training.cpus_per_worker=0.6",  # one trial at a time
    "training.max_failures=0",
]


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


def weights_that_are_no_numbers() -> bytes:
    """Weights of the right shapes, none of which is a number."""
    body = build_backbone(load_settings(words=TINY).network.backbone, 3).body
    return safetensors.torch.save(
        {
            name: torch.full_like(value, torch.nan)
            for name, value in body.state_dict().items()
            if value.is_floating_point()
        }
    )


def stored(uri: str, ending: str) -> list[str]:
    try:
        return [file.uri for file in storage.list_files(uri) if file.uri.endswith(ending)]
    except FileNotFoundError:
        return []


def ended(workspace: str) -> dict[str, list[str]]:
    """Trials that are written down as ended, each with the checkpoints that its run keeps."""
    files = [uri.split("/")[-2:] for uri in stored(f"{workspace}/runs", ".json") if "/trial-" in uri]
    names = [(sweep, file.removeprefix("trial-").removesuffix(".json")) for sweep, file in files]
    checkpoints = stored(f"{workspace}/runs", "/state.pt")
    return {trial: [uri for uri in checkpoints if f"/{sweep}-{trial}-" in uri] for sweep, trial in names}


def held(cpus: float) -> str:
    """What of the cluster's CPUs is not free again after a while, and by whom; empty where all are."""
    end = time.monotonic() + 120
    while ray.available_resources().get("CPU") != cpus and time.monotonic() < end:
        gc.collect()  # the sweep ran in this process, which lives on: what it forgot is let go as at a driver's end
        time.sleep(0.2)
    free = ray.available_resources().get("CPU")
    groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    return "" if free == cpus else f"{free} of {cpus} CPUs are free; {groups}"


@pytest.mark.usefixtures("ray_session")
def test_a_sweep_that_is_killed_goes_on_survives_trials_that_fail_and_stops_one_early(
    phantom_archive: Path, tmp_path: Path, s3: str, faults: FaultProxy
) -> None:
    workspace, log = f"{s3}/workspace", tmp_path / "log"
    words = [f"workspace={workspace}", f"corpus.archive={phantom_archive}", *TINY]
    free = ray.cluster_resources()["CPU"]
    # Weights that are no numbers: the workers of a trial that is given them fail.
    (tmp_path / "weights").write_bytes(weights_that_are_no_numbers())
    axes = {
        "network.weights": {"choice": [None, str(tmp_path / "weights")]},
        "training.learning_rate": {"choice": [1e-7, 0.01]},  # the second is behind after an epoch
    }
    command = ["tune", "--space", space_file(tmp_path, space=axes), *words]

    # The driver is killed when a trial has ended; the cluster of this session lives on.
    with processes.job(*command, log=log, RAY_ADDRESS=ray.get_runtime_context().gcs_address) as process:
        wait_until(lambda: bool(ended(workspace)), process, log)
    before = ended(workspace)
    assert not stored(f"{workspace}/reports", "/manifest.json")
    assert not held(free), "a killed sweep keeps nothing of the cluster"

    # What training workers read is asked for again, and counted where the sweep was started.
    faults.inject(
        proxy.SLOW, 4, lambda method, path: method == "GET" and path.partition("?")[0].endswith("rows.parquet")
    )
    printed = job(*command)
    assert printed.code == 0, printed.err
    sent_again = re.search(r"storage: (\d+) requests were sent again", printed.err)
    assert sent_again, printed.err
    # Those of a second worker are told with its validation, which a trial that fails does not come to.
    assert int(sent_again[1]) >= 1
    (manifest,) = stored(f"{workspace}/reports/sweeps", "/manifest.json")
    folder = storage.parent(manifest)
    facts = json.loads(storage.read_bytes(f"{folder}/sweep.json"))
    states = {trial["id"]: trial["state"] for trial in facts["trials"]}
    assert sorted(states.values()) == ["failed", "failed", "finished", "stopped"], facts
    assert f"going on with a sweep of which {len(before)} of 4 trials have ended" in printed.err
    for trial, checkpoints in before.items():
        assert (states[trial], ended(workspace)[trial]) == ("finished", checkpoints), "what had ended was trained again"
    for trial in facts["trials"]:
        weights = trial["settings"]["network.weights"]
        assert (trial["state"] == "failed") == bool(weights), trial
        assert not weights or trial["error"].startswith("no finite gradient in a whole epoch, at step"), trial
        assert len(trial["resampled"]) == (RESAMPLES if trial["curve"] else 0), trial["id"]
        assert trial["images"] > 0 or not trial["curve"], trial["id"]
    chance = facts["chance"]
    assert 0 < chance < 1
    assert all(epoch["chance"] == chance for trial in facts["trials"] for epoch in trial["curve"])
    assert "failed" in printed.out
    best = load_settings([f"{folder}/best.yaml"], read=storage.read_bytes)
    winner = next(trial for trial in facts["trials"] if trial["id"] == facts["best"])
    assert best.training.learning_rate == winner["settings"]["training.learning_rate"]
    assert best.training.epochs == 7  # the full budget
    assert best.corpus.archive == str(phantom_archive)
    assert b"<html" in storage.read_bytes(f"{folder}/sweep.html")[:200].lower()
    assert not held(free), "whoever was stopped has given back what it had"
    assert "finished before, nothing to do" in done(*command)
    assert "to do" in done("train", "--config", f"{folder}/best.yaml", "--plan")


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
    assert not workspace.exists(), "it was said before anything was prepared"
