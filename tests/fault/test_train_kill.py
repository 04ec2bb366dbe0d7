"""`python -m jobs.train`, killed with all its processes inside an epoch, goes on from its checkpoint when run again."""

import json
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
from tests.processes import TIMEOUT_S, job, wait_until

EPOCHS, BATCH, EVERY = 2, 8, 2
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
    log = tmp_path / "log"
    command = ["train", *words(phantom_archive, tmp_path)]
    command.append(f"training.checkpoint_steps={EVERY}")  # how a run is executed: the model is the same

    with job(*command, log=log) as process:
        wait_until(lambda: inside_a_later_epoch(run), process, log)
    assert artifacts.find(str(tmp_path / "models" / undisturbed.input_id)) is None
    newest = newest_checkpoint(run)
    assert newest is not None
    before = torch.load(newest / STATE_FILE, weights_only=True)["run"]
    assert before["history"], "the kill came in the first epoch: this test showed nothing"
    (run / PROGRESS_FILE).unlink()  # it is for a person to read, and nothing goes on from it

    with job(*command, log=log) as process:
        wait_until((run / PROGRESS_FILE).exists, process, log)
        seen = json.loads((run / PROGRESS_FILE).read_text())["images"]
        assert process.wait(TIMEOUT_S) == 0, log.read_text()
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
