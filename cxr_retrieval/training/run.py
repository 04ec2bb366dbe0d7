"""A training run from its settings to a model artifact, by Ray Train."""

import contextlib
import difflib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.train import (
    CheckpointConfig,
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from ray.train.torch import TorchTrainer

from cxr_retrieval import artifacts, console, storage
from cxr_retrieval.artifacts import Artifact, Draft
from cxr_retrieval.config import CorpusSettings, Settings, TrainingSettings
from cxr_retrieval.corpus.decoding import Recipe
from cxr_retrieval.corpus.findings import FINDINGS, NO_FINDING
from cxr_retrieval.corpus.preparation import find_prepared
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.corpus.splits import SPLITS, TRAIN, VALIDATION
from cxr_retrieval.errors import UserError, user_error_in
from cxr_retrieval.network.progressive import ARCHITECTURE
from cxr_retrieval.progress import Progress
from cxr_retrieval.runtime import nodes_cpus, require_cpus
from cxr_retrieval.training.input import READ_CPUS
from cxr_retrieval.training.loop import TrainJob, train_worker
from cxr_retrieval.training.model import KIND, MODEL_FILE, build_network, write_model
from cxr_retrieval.training.state import load_state
from cxr_retrieval.training.telling import PROGRESS_FILE, told_of
from cxr_retrieval.training.tracking import require_tracking, tracking_server
from cxr_retrieval.training.weights import read_weights

POLL_S = 1.0
# The settings that decide who is trained on, by `corpus.split`; see corpus/splits.py.
SPLIT_BY = {
    "hash": ("split_seed", "validation_share", "test_share"),
    "official": ("split_seed", "validation_share"),
    "all_test": (),
}
# How a run is executed, not what it computes.
EXECUTION = ("checkpoint_steps", "max_failures", "cpus_per_worker", "tracking", "compile", "min_workers")


def model_draft(settings: Settings, corpus: Corpus) -> Draft:
    """The model that these settings train on that corpus: its identity and its place."""
    shaping: dict[str, Any] = {
        "seed": settings.seed,
        "architecture": ARCHITECTURE,
        "network": settings.network.model_dump(),
        "losses": settings.losses.model_dump(),
        "training": settings.training.model_dump(exclude=set(EXECUTION)),
    }
    if settings.network.weights is not None:  # by their bytes: another file under the same name is another model
        shaping["weights"] = hashlib.sha256(read_weights(settings.network.weights)).hexdigest()
    if settings.training.unseen:  # a model that took what it must not see for absent is another
        shaping["unseen"] = "silent"
    return Draft.under(storage.join(settings.workspace, "models"), KIND, shaping, (corpus.artifact.input_id,))


def model_of(settings: Settings) -> tuple[Settings, Artifact]:
    """The finished model that these settings mean, and the settings under which its images are prepared.

    With `model=URI` the archive is decoded by the model's own recipe, and all of it is test data unless `corpus.split`
    was set. Raises UserError where the model is not there or not finished.
    """
    if settings.model is None:
        corpus = Corpus(find_prepared(settings.corpus, settings.workspace, settings.privacy))
        return settings, artifacts.load(model_draft(settings, corpus).uri, KIND)
    model = artifacts.load(settings.model, KIND)
    recipe = Recipe.from_json(json.loads(model.read(MODEL_FILE))["decode_recipe"])
    shaped: dict[str, Any] = {"size": recipe.size, "fit": recipe.fit}
    if "split" not in settings.corpus.model_fields_set:
        shaped["split"] = "all_test"
    return settings.model_copy(update={"corpus": settings.corpus.model_copy(update=shaped)}), model


def learnt_from(settings: CorpusSettings, corpus: Corpus) -> dict[str, Any]:
    """What a model keeps of the archive and of the split that it learnt from: hashes of the archive's address and of
    its label tables, and the settings of the split."""
    archive = corpus.artifact.manifest["archive_uri"]
    return {
        "archive": hashlib.sha256(archive.encode()).hexdigest(),
        "label_tables": corpus.label_tables,
        "split": {name: getattr(settings, name) for name in ("split", *SPLIT_BY[settings.split])},
    }


def train(settings: Settings, corpus: Corpus) -> tuple[Artifact, bool]:
    """The model artifact, and whether anything had to be done. A run that was killed goes on from its checkpoint."""
    draft = model_draft(settings, corpus)
    done = artifacts.find(draft.uri)
    if done:
        return done, False
    training = settings.training
    workers = _workers_to_begin_with(training)
    require_cpus(workers, training.cpus_per_worker, READ_CPUS, workers * training.gpu)
    require_trainable(settings, corpus)
    require_tracking(settings)
    for caution in cautions(settings, workers):
        console.say(f"warning: {caution}")
    draft.begin()
    progress_uri = storage.join(settings.workspace, "runs", draft.input_id, PROGRESS_FILE)
    trainer = trainer_of(settings, corpus, draft.input_id, tracking_server())
    before, total = told_of(progress_uri).get("images", 0), planned_images(settings, corpus, training.epochs)
    with Progress.of(settings.workspace, draft, "train", total, before=min(before, total)) as progress:
        with _followed(progress_uri, progress, before):
            result = trainer.fit()
        assert result.checkpoint is not None, "a run that ends has reported its last checkpoint"
        run = load_state(result.checkpoint)["run"]
        if stopped_early(settings, run):
            progress.end_early(f"no better for {training.patience} epochs")
        return _export(draft, settings, corpus, run), True


def cautions(settings: Settings, workers: int) -> list[str]:
    """What is allowed, and may not be what a person wants. Ray must be running."""
    if settings.training.gpu:
        return []
    found = []
    if gpus := ray.cluster_resources().get("GPU", 0):
        found.append(f"training.gpu=false: training takes none of the cluster's GPUs ({gpus:g})")
    if workers > 1 and settings.network.normalisation == "batch":
        found.append(
            f"network.normalisation=batch on CPUs: each of {workers} workers has statistics of its own share of a"
            " batch, so that another number of workers trains another model; group does not depend on it"
        )
    return found


def _workers_to_begin_with(training: TrainingSettings) -> int:
    """How many workers Ray starts: of a range, as many as the cluster holds."""
    if training.min_workers is None:
        return training.workers
    held = sum(int((cpus + 1e-9) / training.cpus_per_worker) for cpus in nodes_cpus())
    if training.gpu:
        held = min(held, int(ray.cluster_resources().get("GPU", 0)))
    return min(training.workers, max(training.min_workers, held))


def trainer_of(
    settings: Settings,
    corpus: Corpus,
    run: str,
    server: str | None,
    beside: int = 0,
    callbacks: Sequence[UserCallback] = (),
) -> TorchTrainer:
    """The Ray Train run of that name; its state lies in the workspace, and a trainer of the same name goes on from it.

    `beside` runs of the same size share each machine's cores with it; `server` is MLflow's, as the driver knows it.
    """
    training = settings.training
    runs = storage.join(settings.workspace, "runs")
    filesystem, path = storage.filesystem(runs)
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": TrainJob(settings, corpus, storage.join(runs, run, PROGRESS_FILE), beside, server)},
        scaling_config=ScalingConfig(
            # Ray takes as many of a range as the cluster holds, and begins again from the checkpoint when that changes.
            num_workers=(training.min_workers, training.workers) if training.min_workers else training.workers,  # type: ignore[arg-type]
            use_gpu=training.gpu,
            resources_per_worker={"CPU": training.cpus_per_worker} | ({"GPU": 1} if training.gpu else {}),
        ),
        run_config=RunConfig(
            name=run,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=training.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=[*callbacks, _EndAtUserError()],  # type: ignore[list-item]  # Ray's types do not know that these are such
        ),
    )


class _EndAtUserError(UserCallback):
    """Ends a run when a worker says what its user has to mend: from the same checkpoint it would only fail again.

    Ray Train begins a run again after whatever error of a worker, but not after one of its own controller.
    """

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:  # noqa: ARG002
        for error in worker_exceptions.values():
            if mendable := user_error_in(error):
                raise ControllerError(mendable)


def planned_images(settings: Settings, corpus: Corpus, epochs: int) -> int:
    """Images that a run has seen after pretraining and so many epochs with labels."""
    training = settings.training
    return epoch_steps(settings, corpus) * training.batch_size * (training.pretraining + epochs)


def epoch_steps(settings: Settings, corpus: Corpus) -> int:
    """Optimizer steps of an epoch; the last images of an epoch that fill no batch are left out."""
    return training_images(settings, corpus) // settings.training.batch_size


def training_images(settings: Settings, corpus: Corpus) -> int:
    """Images that training sees."""
    if unseen := settings.training.unseen:
        return len(corpus.places(TRAIN, unseen))
    return int(corpus.artifact.manifest["splits"][TRAIN]["images"])


def validation_patients(settings: Settings, corpus: Corpus) -> int:
    """Patients that an epoch is judged by; with `training.unseen`, those who still have a finding."""
    if unseen := settings.training.unseen:
        facts = corpus.take(corpus.places(VALIDATION, unseen), ["patient_id", "findings"]).to_pylist()
        return len({row["patient_id"] for row in facts if row["findings"]})
    return int(corpus.artifact.manifest["splits"][VALIDATION]["patients"])


def require_trainable(settings: Settings, corpus: Corpus) -> None:
    """Refuse a network that cannot be built and a corpus that no run can train on, before workers start."""
    build_network(settings.network, len(FINDINGS))
    for finding in settings.training.unseen:
        if finding not in FINDINGS:
            near = difflib.get_close_matches(finding, FINDINGS, n=1, cutoff=0) or FINDINGS[:1]
            raise UserError(f"training.unseen: there is no finding {finding!r}; did you mean {near[0]!r}?")
    splits = corpus.artifact.manifest["splits"]
    if not any(count for split in splits.values() for count in split["findings"].values()):
        raise UserError(
            f"no image of {corpus.artifact.uri} has a finding, so there is nothing to train on: give the archive"
            " labels, or index it with the model of another archive, model=URI"
        )
    if (images := training_images(settings, corpus)) < settings.training.batch_size:
        raise UserError(
            f"{images} training images are fewer than training.batch_size="
            f"{settings.training.batch_size}: lower it, or prepare more images"
        )
    steps = epoch_steps(settings, corpus) * settings.training.epochs
    late = {
        "losses.contrastive_from": settings.losses.contrastive_from,
        "training.crop_from": settings.training.crop_from,
    }
    for key, share in late.items():
        if share > (steps - 1) / steps:
            raise UserError(
                f"{key}={share:g} leaves none of the {steps} optimizer steps: lower it, or raise training.epochs"
            )
    if (patients := validation_patients(settings, corpus)) < 2:
        raise UserError(
            f"{patients} validation patients: choosing an embedding takes at least two; raise"
            " corpus.validation_share, or prepare more patients"
        )
    if not any(splits[VALIDATION]["findings"].values()):
        raise UserError(
            "no validation image has a finding, so nothing can be asked for: raise corpus.validation_share, or prepare"
            " more patients"
        )


def stopped_early(settings: Settings, run: Mapping[str, Any]) -> bool:
    """Whether `training.patience` ended a run before its last epoch."""
    return len(run["history"]) < settings.training.epochs


def _export(draft: Draft, settings: Settings, corpus: Corpus, run: dict[str, Any]) -> Artifact:
    final = run["final"]
    best = run["history"][run["best_epoch"]]
    cosines = ", ".join(f"{cosine:.2f}" for cosine in best["centre_cosine"])
    console.say(f"mean cosine between the centres of each pass and step: {cosines}")
    if best["centres_collapsed"]:
        console.say(
            "warning: the centres of a step have collapsed onto one point (mean cosine above 0.9): see model.json"
        )
    if stopped_early(settings, run):
        console.say(
            f"training stopped after epoch {len(run['history'])} of {settings.training.epochs}: none of the last"
            f" {settings.training.patience} was better than epoch {run['best_epoch'] + 1}"
        )
    facts = {
        "network": settings.network.model_dump(),
        "findings": list(FINDINGS),
        "losses": settings.losses.model_dump(),
        "unseen": list(settings.training.unseen),
        "learnt": [name for name, learnt in zip((*FINDINGS, NO_FINDING), final["learnt"], strict=False) if learnt],
        "chosen": final["chosen"],
        "decode_recipe": corpus.recipe.to_json(),
        "corpus": corpus.artifact.input_id,
        **learnt_from(settings.corpus, corpus),
        "validation": final["validation"],
        "best_epoch": run["best_epoch"],
        "stopped_early": stopped_early(settings, run),
        "pretraining": run["pretraining"],
        "history": run["history"],
    }
    splits = corpus.artifact.manifest["splits"]
    counts = {f"{split}_images": splits[split]["images"] for split in SPLITS}
    counts |= {"train_images": training_images(settings, corpus), "steps": run["step"]}
    return write_model(draft, facts, run["best_network"], final["centring"], run["best_centres"], counts)


@contextlib.contextmanager
def _followed(uri: str, progress: Progress, before: int) -> Iterator[None]:
    """Take over what the first worker writes about its progress while `fit` blocks this thread."""
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(uri, stop, progress, before), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _follow(uri: str, stop: threading.Event, progress: Progress, seen: int) -> None:
    ended, retries = False, told_of(uri).get("retries", 0)
    while not ended:
        ended = stop.wait(POLL_S)
        try:
            found = storage.read_tagged(uri)
        except UserError as error:  # what is only shown does not end a run
            console.say(f"progress cannot be read: {error}")
            continue
        facts = json.loads(found[0]) if found else None
        if facts:
            storage.add_retries(max(0, facts["retries"] - retries))
            retries = facts["retries"]
        if facts and facts["images"] > seen:
            last = facts["last_epoch"]
            best = max((figures["map"] for figures in last.get("validation", {}).values()), default=None)
            note = f"{facts['phase']} {facts['epoch']} of {facts['epochs']}"
            if best is not None:
                note += f", validation mAP {100 * best:.1f}"
            elif "loss" in last:
                note += f", loss {last['loss']:.3f}"
            progress.advance(facts["images"] - seen, note)
            seen = facts["images"]
