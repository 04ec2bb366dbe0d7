"""Training on phantom radiographs: what a run leaves behind, and that a killed worker changes nothing in it."""

import json
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import safetensors.numpy
import torch
from ray.train import ControllerError, UserCallback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cxr_retrieval import artifacts
from cxr_retrieval.artifacts import Artifact
from cxr_retrieval.config import Settings, load_settings
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.corpus.preparation import prepare
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.errors import UserError, user_error_in
from cxr_retrieval.progress import statuses
from cxr_retrieval.training.model import Model
from cxr_retrieval.training.run import cautions, model_draft, train, trainer_of, training_images
from cxr_retrieval.training.state import STATE_FILE, load_state
from cxr_retrieval.training.telling import PROGRESS_FILE
from jobs.train import training_report
from tests.commands import done
from tests.processes import TIMEOUT_S, job, wait_until

EPOCHS, BATCH = 4, 8
WHOLE_EPOCHS = 3  # of whole images only; then the crop, which is cut at whole pixels and jumps
SPEED = "images_per_second"  # the only figure of a history that a clock decides
pytestmark = pytest.mark.usefixtures("ray_session")


# Small steps: with larger ones the last bit of a float32 sum, which two workers round otherwise, decides a lot.
WORDS = (
    "corpus.size=64 corpus.partition_images=32 corpus.row_group_images=8 corpus.validation_share=0.25"
    " corpus.test_share=0.1 network.backbone=resnet18_half network.dimensions=16 training.lanes=2"
    f" training.epochs={EPOCHS} training.batch_size={BATCH} training.precision=float32 training.augment=false"
    f" training.learning_rate=2e-5 training.crop_from={WHOLE_EPOCHS / EPOCHS}"
).split()


def words(archive: Path, workspace: Path) -> list[str]:
    return [f"workspace={workspace}", f"corpus.archive={archive}", *WORDS]


def settings(archive: Path, workspace: Path, **training: Any) -> Settings:
    changes = [f"training.{name}={value}" for name, value in training.items()]
    return load_settings((), [*words(archive, workspace), *changes])


def history(model: Artifact) -> list[dict[str, Any]]:
    return json.loads(model.read("model.json"))["history"]


def without_speed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != SPEED} for record in records]


def same_curve(found: list[dict[str, Any]], straight: list[dict[str, Any]]) -> None:
    """The same within what other sums round off; a crop is cut at whole pixels, and jumps."""
    for name in ("loss", "ccloss", "cross_entropy", "centre_cosine"):
        these, those = (np.array([record[name] for record in records]) for records in (found, straight))
        assert these[:WHOLE_EPOCHS] == pytest.approx(those[:WHOLE_EPOCHS], rel=1e-4, abs=1e-5), name
        assert these == pytest.approx(those, rel=0.05, abs=0.01), name


def weights_hash(model: Artifact) -> str:
    return next(entry.sha256 for entry in model.files if entry.path == "weights.safetensors")


@pytest.fixture(scope="module")
def corpus(phantom_archive, tmp_path_factory) -> Corpus:
    workspace = tmp_path_factory.mktemp("corpus")
    return Corpus(prepare(settings(phantom_archive, workspace).corpus, str(workspace))[0])


@pytest.fixture(scope="module")
def undisturbed(phantom_archive, corpus, tmp_path_factory) -> tuple[Settings, Artifact]:
    plain = settings(phantom_archive, tmp_path_factory.mktemp("undisturbed"), tracking="tensorboard")
    model, worked = train(plain, corpus)
    assert worked
    return plain, model


@pytest.fixture(scope="module")
def two_workers(phantom_archive, corpus, tmp_path_factory) -> Artifact:
    return train(settings(phantom_archive, tmp_path_factory.mktemp("two"), workers=2), corpus)[0]


def test_a_run_ends_in_a_model_that_embeds(undisturbed, corpus):
    plain, artifact = undisturbed
    assert artifact.input_id == model_draft(plain, corpus).input_id
    model = Model.open(artifact.uri)
    assert model.chosen in model.embedding_names
    assert model.findings == list(FINDINGS)
    assert model.recipe == corpus.recipe
    assert model.facts["corpus"] == corpus.artifact.input_id
    assert set(model.centring) == set(model.embedding_names) - {"global_profile"}  # made of two that are centred
    assert set(model.facts["validation"]) == set(model.embedding_names)
    assert model.facts["validation"][model.chosen]["map"] == max(f["map"] for f in model.facts["validation"].values())
    splits = corpus.artifact.manifest["splits"]
    assert artifact.counts["train_images"] == splits["train"]["images"]
    assert artifact.counts["steps"] == EPOCHS * (splits["train"]["images"] // BATCH)


def test_the_history_holds_every_epoch_with_centres_and_validation(undisturbed):
    plain, artifact = undisturbed
    records = history(artifact)
    assert [record["epoch"] for record in records] == list(range(EPOCHS))
    names = Model.open(artifact.uri).embedding_names
    for record in records:
        assert set(record["validation"]) == set(names)
        assert all(0 <= value <= 1 for figures in record["validation"].values() for value in figures.values())
        assert len(record["centre_cosine"]) == 2 * plain.network.steps
        assert all(-1 <= cosine <= 1 for cosine in record["centre_cosine"])
        assert record["centres_collapsed"] == any(cosine > 0.9 for cosine in record["centre_cosine"])
        assert record[SPEED] > 0
    assert all(0 < record["cross_entropy"] < 2 and 0 < record["ccloss"] < 20 for record in records)
    best_maps = [max(figures["map"] for figures in record["validation"].values()) for record in records]
    assert max(best_maps) > 0
    # The crop joins with the last of the epochs: the models of the others would have a half that was never trained.
    assert json.loads(artifact.read("model.json"))["best_epoch"] == WHOLE_EPOCHS


@pytest.mark.parametrize(
    ("corpus_settings", "told"),
    [
        ({"validation_share": 0.0}, "0 validation patients"),
        ({"test_share": 0.85, "validation_share": 0.04}, "training"),
    ],
)
def test_a_corpus_that_nothing_can_be_learnt_from_is_refused_before_workers_start(
    corpus_settings: dict[str, float], told: str, phantom_archive, tmp_path
):
    plain = settings(phantom_archive, tmp_path, batch_size=64, lanes=2)
    prepared = plain.corpus.model_copy(update=corpus_settings)
    with pytest.raises(UserError, match=told):
        train(plain, Corpus(prepare(prepared, str(tmp_path))[0]))
    assert not (tmp_path / "models").exists()


def test_a_finding_that_training_must_not_see_is_left_out_and_one_that_does_not_exist_is_refused(
    phantom_archive, corpus, tmp_path
):
    every = training_images(settings(phantom_archive, tmp_path), corpus)
    seen = training_images(settings(phantom_archive, tmp_path, unseen=["Effusion"]), corpus)
    assert seen == every - corpus.artifact.manifest["splits"]["train"]["findings"]["Effusion"] < every
    model, _ = train(settings(phantom_archive, tmp_path / "unseen", unseen=["Effusion"], epochs=1), corpus)
    assert (model.counts["train_images"], model.counts["steps"]) == (seen, seen // BATCH)
    facts = json.loads(model.read("model.json"))
    assert facts["unseen"] == ["Effusion"]
    assert "Effusion" not in facts["learnt"] != []
    weights = safetensors.numpy.load(model.read("weights.safetensors"))
    heads = [value for name, value in weights.items() if name.endswith(("joint.weight", "classifier.weight"))]
    assert len(heads) == 1 + facts["network"]["steps"]
    effusion, *others = (facts["findings"].index(name) for name in ("Effusion", *facts["learnt"][:3]))
    assert all((head[effusion] == 0).all() and (head[others] != 0).any() for head in heads), "nothing speaks of it"
    with pytest.raises(UserError, match=r"training\.unseen: there is no finding 'effusio'; did you mean 'Effusion'"):
        train(settings(phantom_archive, tmp_path, unseen=["effusio"]), corpus)
    assert not (tmp_path / "models").exists()


def test_curves_stand_in_tensorboard_and_the_page_follows_the_same_images_through_all_epochs(undisturbed, corpus):
    plain, artifact = undisturbed
    events = EventAccumulator(f"{plain.workspace}/runs/{artifact.input_id}/tensorboard")
    events.Reload()
    told = [(point.step, point.value) for point in events.Scalars("validation/map/global")]
    steps = artifact.counts["steps"] // EPOCHS
    records = history(artifact)
    assert [step for step, _ in told] == [steps * (epoch + 1) for epoch in range(EPOCHS)]
    assert [value for _, value in told] == pytest.approx([r["validation"]["global"]["map"] for r in records])
    for record in records:
        assert len(record["crops"]) == len(records[0]["crops"]) > 0
        sides = [side for box in record["crops"] for side in box]
        assert all(0 <= side <= corpus.recipe.size for side in sides)
        assert len(record["ccloss_by_table"]) == len(record["cross_entropy_by_table"]) == 2 * plain.network.steps
    page = Path(training_report(plain, artifact, corpus)).read_text()
    assert page.count("<image ") == len(records[0]["crops"]) * min(4, EPOCHS)


def test_a_finished_model_is_not_trained_again(undisturbed, corpus):
    plain, artifact = undisturbed
    files = {path: path.stat().st_mtime_ns for path in Path(plain.workspace).rglob("*") if path.is_file()}
    again, worked = train(plain, corpus)
    assert not worked
    assert again == artifact
    assert {path: path.stat().st_mtime_ns for path in Path(plain.workspace).rglob("*") if path.is_file()} == files


def test_a_run_killed_before_its_model_was_written_only_writes_it(undisturbed, corpus, tmp_path):
    plain, artifact = undisturbed
    shutil.copytree(Path(plain.workspace) / "runs", tmp_path / "runs")
    again, worked = train(plain.model_copy(update={"workspace": str(tmp_path)}), corpus)
    assert worked
    assert again.manifest["content_id"] == artifact.manifest["content_id"]  # speeds too: no epoch was trained again


def test_a_run_whose_worker_and_then_all_of_its_ray_is_killed_gives_the_same_curve(
    undisturbed, phantom_archive, tmp_path
):
    _, artifact = undisturbed
    run, log = tmp_path / "runs" / artifact.input_id, tmp_path / "log"
    command = ["train", *words(phantom_archive, tmp_path), "training.checkpoint_steps=2"]  # the model stays the same
    with job(*command, log=log) as process:
        wait_until(lambda: newest_checkpoint(run) is not None, process, log)
        (first,) = train_workers(process.pid)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: bool(set(train_workers(process.pid)) - {first}), process, log)
        wait_until(lambda: inside_a_later_epoch(run), process, log)
    assert not (tmp_path / "models" / artifact.input_id / "manifest.json").exists()
    newest = newest_checkpoint(run)
    assert newest is not None
    before = torch.load(newest / STATE_FILE, weights_only=True)["run"]
    assert before["history"], "the kill came in the first epoch: this test showed nothing"
    (run / PROGRESS_FILE).unlink()  # it is for a person to read, and nothing goes on from it

    ended = threading.Event()

    def first_step() -> int:
        while not (run / PROGRESS_FILE).exists() and not ended.wait(0.005):
            pass
        return json.loads((run / PROGRESS_FILE).read_text())["images"] // BATCH

    with ThreadPoolExecutor(1) as watcher:
        seen = watcher.submit(first_step)
        try:
            done(*command)
        finally:
            ended.set()
    assert seen.result() == before["step"] + 1, "the first step of the second run is the next one"
    model = artifacts.load(str(tmp_path / "models" / artifact.input_id), "model")
    speeds = [record[SPEED] for record in before["history"]]
    assert [record[SPEED] for record in history(model)[: len(speeds)]] == speeds  # none was trained again
    assert without_speed(history(model)) == without_speed(history(artifact))
    assert weights_hash(model) == weights_hash(artifact)


def test_two_workers_see_the_same_rows_and_give_the_same_loss(undisturbed, two_workers):
    _, artifact = undisturbed
    assert two_workers.counts == artifact.counts
    assert two_workers.input_id != artifact.input_id
    model = Model.open(two_workers.uri)
    assert model.chosen in model.embedding_names
    assert artifact.counts["steps"] * WHOLE_EPOCHS / EPOCHS >= 20
    curve = [record["cross_entropy"] for record in history(artifact)]
    assert abs(curve[WHOLE_EPOCHS - 1] / curve[0] - 1) > 50 * 1e-4, "nothing was learnt: nothing could differ"
    same_curve(history(two_workers), history(artifact))


def test_one_of_two_workers_killed_amid_an_epoch_costs_nothing_of_the_curve(two_workers, phantom_archive, tmp_path):
    run, log = tmp_path / "runs" / two_workers.input_id, tmp_path / "log"
    command = ["train", *words(phantom_archive, tmp_path), "training.workers=2", "training.checkpoint_steps=2"]
    with job(*command, log=log) as process:
        wait_until(lambda: inside_a_later_epoch(run), process, log)
        workers = train_workers(process.pid)
        assert len(workers) == 2
        os.kill(workers[-1], signal.SIGKILL)
        wait_until(lambda: bool(set(train_workers(process.pid)) - set(workers)), process, log)
        assert process.wait(TIMEOUT_S) == 0, log.read_text()
    model = artifacts.load(str(tmp_path / "models" / two_workers.input_id), "model")
    assert model.counts == two_workers.counts
    same_curve(history(model), history(two_workers))


def test_batch_statistics_of_several_workers_on_cpus_are_warned_of(phantom_archive, tmp_path):
    plain = settings(phantom_archive, tmp_path)
    assert cautions(plain, 2) == []
    batch = load_settings((), [*words(phantom_archive, tmp_path), "network.normalisation=batch"])
    assert cautions(batch, 1) == []
    (told,) = cautions(batch, 2)
    assert told.startswith("network.normalisation=batch on CPUs: each of 2 workers")


def test_gpus_that_training_does_not_take_are_warned_of(phantom_archive, tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": 4.0})
    (told,) = cautions(settings(phantom_archive, tmp_path), 1)
    assert told == "training.gpu=false: training takes none of the cluster's GPUs (4)"
    assert cautions(load_settings((), [*words(phantom_archive, tmp_path), "training.gpu=true"]), 1) == []


def test_a_run_of_two_workers_goes_on_with_one_and_gives_the_curve_of_one(
    undisturbed, phantom_archive, corpus, tmp_path
):
    class EndsIt(UserCallback):  # here, so that it is pickled with the run: Ray's controller has no tests
        def after_report(self, run_context: Any, metrics: list[Any], checkpoint: Any) -> None:  # noqa: ARG002
            if metrics[0]["epoch"] == 1 and "validation" not in metrics[0]:
                raise RuntimeError("no room for two workers any more")

    _, artifact = undisturbed
    two, one = (settings(phantom_archive, tmp_path, workers=workers, checkpoint_steps=3) for workers in (2, 1))
    with pytest.raises(Exception, match="no room"):
        trainer_of(two, corpus, "elastic", None, callbacks=[EndsIt()]).fit()
    checkpoint = newest_checkpoint(tmp_path / "runs" / "elastic")
    assert checkpoint is not None
    before = torch.load(checkpoint / STATE_FILE, weights_only=True)["run"]
    assert len(before["history"]) == 1
    assert before["sums"], "it goes on from within an epoch"
    after = load_state(trainer_of(one, corpus, "elastic", None).fit().checkpoint)["run"]
    assert after["history"][0] == before["history"][0], "nothing was trained again"
    assert after["step"] == artifact.counts["steps"]
    same_curve(after["history"], history(artifact))


def test_a_run_that_ends_amid_pretraining_goes_on_to_the_same_curve_and_workers_change_nothing(
    phantom_archive, corpus, tmp_path
):
    class EndsIt(UserCallback):
        def after_report(self, run_context: Any, metrics: list[Any], checkpoint: Any) -> None:  # noqa: ARG002
            if metrics[0]["epoch"] == 1 and "loss" not in metrics[0]:
                raise RuntimeError("killed")

    short = {"pretraining": 2, "epochs": 1, "augment": "true", "checkpoint_steps": 3, "learning_rate": 1e-5}
    one, two = (settings(phantom_archive, tmp_path, workers=workers, **short) for workers in (1, 2))
    straight, _ = train(one, corpus)
    facts = json.loads(straight.read("model.json"))
    assert [record["epoch"] for record in facts["pretraining"]] == [0, 1]
    assert [record["epoch"] for record in facts["history"]] == [0]
    steps = straight.counts["train_images"] // BATCH
    assert straight.counts["steps"] == 3 * steps
    (seen,) = statuses(str(tmp_path))
    assert (seen.done, seen.total) == (3 * steps * BATCH, 3 * steps * BATCH)
    assert model_draft(one, corpus) != model_draft(
        settings(phantom_archive, tmp_path, **short | {"pretraining": 0}), corpus
    )

    with pytest.raises(Exception, match="killed"):
        trainer_of(one, corpus, "killed", None, callbacks=[EndsIt()]).fit()
    before = torch.load(newest_checkpoint(tmp_path / "runs" / "killed") / STATE_FILE, weights_only=True)["run"]
    assert len(before["pretraining"]) == 1
    assert before["sums"], "it goes on from within an epoch"
    after = load_state(trainer_of(one, corpus, "killed", None).fit().checkpoint)["run"]
    assert after["pretraining"][0] == before["pretraining"][0], "nothing was trained again"
    for phase in ("pretraining", "history"):
        assert without_speed(after[phase]) == without_speed(facts[phase])

    parted = load_state(trainer_of(two, corpus, "parted", None).fit().checkpoint)["run"]
    for phase in ("pretraining", "history"):
        assert [record["loss"] for record in parted[phase]] == pytest.approx(
            [r["loss"] for r in facts[phase]], rel=1e-3
        )


def test_a_run_begins_with_as_many_workers_as_there_is_room_for(phantom_archive, corpus, tmp_path):
    wide = {"workers": 2, "cpus_per_worker": 1.2, "epochs": 1}
    with pytest.raises(UserError, match=r"training\.workers=2 with training\.cpus_per_worker=1\.2 leave Ray Data"):
        train(settings(phantom_archive, tmp_path, **wide), corpus)
    elastic = settings(phantom_archive, tmp_path, min_workers=1, **wide)
    assert model_draft(elastic, corpus) == model_draft(settings(phantom_archive, tmp_path, **wide), corpus)
    (record,) = history(train(elastic, corpus)[0])
    first = history(train(settings(phantom_archive, tmp_path, epochs=1), corpus)[0])[0]
    assert without_speed([record]) == without_speed([first]), "one worker trained it"


def test_a_run_that_no_longer_gets_better_ends_with_its_best_epoch_and_shows_done(
    phantom_archive, corpus, tmp_path, capsys
):
    # A rate that changes nothing: the first epoch that counts stays the best one.
    still = settings(phantom_archive, tmp_path, patience=1, learning_rate=1e-30, averaging=0.0, epochs=9, crop_from=0)
    model, _ = train(still, corpus)
    facts = json.loads(model.read("model.json"))
    assert facts["stopped_early"]
    assert 3 <= len(facts["history"]) < 9, "patience begins where CCLoss has joined"
    assert facts["best_epoch"] == len(facts["history"]) - 2
    assert model.counts["steps"] == len(facts["history"]) * (model.counts["train_images"] // BATCH)
    (seen,) = statuses(str(tmp_path))
    assert (seen.state(), seen.done) == ("finished", seen.total)
    assert "training stopped after epoch" in capsys.readouterr().err


def test_what_a_user_has_to_mend_ends_a_run_at_once(phantom_archive, corpus, tmp_path):
    class Counts(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: Any) -> None:  # noqa: ARG002
            with (tmp_path / "failures").open("a") as failures:
                failures.write("one\n")

    # Weights that are gone when a worker begins, as those in a folder that not every node has.
    gone = load_settings((), [*words(phantom_archive, tmp_path), f"network.weights={tmp_path}/gone.safetensors"])
    with pytest.raises(ControllerError) as caught:
        trainer_of(gone, corpus, "gone", None, callbacks=[Counts()]).fit()
    assert "gone.safetensors" in str(user_error_in(caught.value))
    assert (tmp_path / "failures").read_text() == "one\n"


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


def train_workers(driver: int) -> list[int]:
    """Process ids of Ray Train workers that descend from a driver, and of no other one's."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(entry.name)] = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue

    def descends(pid: int) -> bool:
        while pid > 1:
            if pid == driver:
                return True
            pid = parents.get(pid, 0)
        return False

    return [pid for pid, name in names.items() if name.startswith(b"ray::RayTrainWorker") and descends(pid)]
