"""Searching settings: trials of a space that train with a small budget, and what they found, by Ray Tune.

A trial is a Ray Train run with as many workers as the settings say; the trial itself only waits for it.

Every trial that has ended leaves one file in `runs/SWEEP`, and a sweep that is run again goes on from these files: Ray
Tune's own state, stored when a driver is killed, may lack a trial that its searcher still waits for (Ray 2.60).
"""

import datetime
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import optuna
import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cxr_retrieval import artifacts, console, storage
from cxr_retrieval.artifacts import Draft
from cxr_retrieval.config import Settings, TrainingSettings
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.errors import UserError, user_error_in
from cxr_retrieval.progress import Progress
from cxr_retrieval.runtime import leaves_room, nodes_cpus
from cxr_retrieval.training.input import READ_CPUS
from cxr_retrieval.training.loop import CURVE, RESAMPLED
from cxr_retrieval.training.run import model_draft, planned_images, require_trainable, trainer_of
from cxr_retrieval.training.space import Space, best_settings, plain, trial_settings, value_of
from cxr_retrieval.training.telling import PROGRESS_FILE, told_of
from cxr_retrieval.training.tracking import require_tracking, tracking_server

KIND = "sweep"
METRIC = "value"  # validation mAP of an epoch's best embedding
MODE = "max"
REFUSED = "refused"  # in what a trial reports: why it cannot be run
ENDED, BEGUN = "trial-", "point-"  # files of the ledger
TRIAL = "trial"  # what a trial is given: its number in the sweep, and the settings to try
TRIAL_CPUS = 0.05  # a trial only waits for its run, but Ray Tune knows none that takes nothing
TRIAL_FAILURES = 1  # tries after a trial has failed: a node may be lost


@dataclass(frozen=True)
class Sweep:
    """What is searched: a space around a user's settings, on a corpus."""

    space: Space
    file: str
    settings: Settings
    corpus: Corpus

    @cached_property
    def draft(self) -> Draft:
        shaping = dict(model_draft(self.settings, self.corpus).settings) | {"space": self.space.model_dump(mode="json")}
        folder = storage.join(self.settings.workspace, "reports", "sweeps")
        return Draft.under(folder, KIND, shaping, (self.corpus.artifact.input_id,))

    @property
    def folder(self) -> str:
        """Where the trials that have ended are kept while the sweep runs."""
        return storage.join(self.settings.workspace, "runs", self.draft.input_id)

    def run_name(self, number: int, point: Mapping[str, Any]) -> str:
        """The run of a trial: the same trial has the same one, another point of that number another."""
        digest = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()
        return f"{self.draft.input_id}-{number:05d}-{digest[:8]}"

    def progress_uri(self, number: int, point: Mapping[str, Any]) -> str:
        """What the workers of a trial tell of themselves."""
        return storage.join(self.settings.workspace, "runs", self.run_name(number, point), PROGRESS_FILE)

    def trial_settings(self, point: Mapping[str, Any]) -> Settings:
        """The settings of one trial: the user's, those of the space, the point, the small budget."""
        return trial_settings(self.settings, self.space, self.file, point)

    def best_settings(self, point: Mapping[str, Any]) -> Settings:
        """What to train at full length."""
        return best_settings(self.settings, self.space, self.file, point)


def trials_at_once(training: TrainingSettings, nodes: Sequence[float], gpus: float) -> int:
    """How many trials the cluster holds: each with its workers and one reading task. Raises UserError for none.

    `nodes`: the CPUs of each. However the workers come to lie, a node has to be left that can read for them.
    """
    beside = READ_CPUS + TRIAL_CPUS
    fit = int((sum(nodes) + 1e-9) / (training.workers * training.cpus_per_worker + beside))
    if training.gpu:
        fit = min(fit, int(gpus / training.workers))
    while fit and not leaves_room(nodes, fit * training.workers, training.cpus_per_worker, beside):
        fit -= 1
    if fit == 0:
        raise UserError(
            f"a trial with training.workers={training.workers}, training.cpus_per_worker={training.cpus_per_worker:g},"
            f" training.gpu={str(training.gpu).lower()} does not fit the cluster (CPUs of the nodes:"
            f" {', '.join(f'{cpus:g}' for cpus in nodes)}; {gpus:g} GPUs), of which its reading takes {READ_CPUS:g}"
            " CPUs: lower one of them"
        )
    return fit


class _EpochReport(TuneReportCallback):
    """Tells Ray Tune of every epoch that ended; of reports in between it tells nothing."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        curve = metrics[0].get(CURVE)
        if curve:
            told = {**curve[-1], CURVE: json.dumps(curve), RESAMPLED: json.dumps(metrics[0][RESAMPLED])}
            super().after_report(run_context, [told], checkpoint)


def _run_trial(config: dict[str, Any], sweep: Sweep, beside: int, server: str | None) -> None:
    """One trial. Its run is named by it, without a time: begun again, it goes on from its checkpoint."""
    number, point = config[TRIAL]
    settings = sweep.trial_settings(point)
    run = sweep.run_name(number, point)
    # Not from within the trial's placement group: all that the run starts would be looked for in there, where there is
    # no room for it, and what gives an early-stopped trial's workers back would never start (Ray 2.60).
    here = ray.get_runtime_context()
    outside = NodeAffinitySchedulingStrategy(here.get_node_id(), soft=True)
    # What gives the workers back asks the cluster by its address, and without one asks whichever Ray began last.
    address = {"env_vars": {"RAY_ADDRESS": here.gcs_address}}
    fit = ray.remote(num_cpus=0, max_retries=0)(_fit).options(scheduling_strategy=outside, runtime_env=address)
    try:
        require_trainable(settings, sweep.corpus)
        ray.get(fit.remote(settings, sweep.corpus, run, server, beside, _EpochReport()))
    except Exception as error:
        mendable = user_error_in(error)
        if mendable is None:
            raise
        # No other try will mend it: reported and not raised, so that Ray Tune makes none.
        tune.report({METRIC: 0.0, REFUSED: str(mendable)})


def _fit(settings: Settings, corpus: Corpus, run: str, server: str | None, beside: int, report: _EpochReport) -> None:
    """The run of a trial. Runs in a task that ends with the trial, and its workers with it."""
    trainer_of(settings, corpus, run, server, beside, [report]).fit()


class _Ledger(tune.Callback):
    """Writes down every trial that has ended, whichever way, and shows how far the sweep is.

    What it shows to belongs to the class: Ray Tune keeps its callbacks with a state of its own.
    """

    progress: ClassVar[Progress]

    def __init__(self, sweep: Sweep, best: float) -> None:
        self._sweep, self._best = sweep, best

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._write(trial, (trial.last_result or {}).get(REFUSED))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._write(trial, _last_line(Path(trial.error_file).read_text()))

    def _write(self, trial: Trial, error: str | None) -> None:
        facts = _trial(self._sweep, trial.config, trial.last_result or {}, error)
        try:
            storage.add_retries(told_of(self._sweep.progress_uri(*trial.config[TRIAL])).get("retries", 0))
            storage.write_bytes(_ledger_file(self._sweep, facts["id"]), json.dumps(facts, indent=1).encode())
        except UserError as unwritten:  # raised here, Ray Tune would take it for a failure of the trial
            console.say(f"trial {facts['id']} is not written down: {unwritten}")
            return
        self._best = max(self._best, 0.0 if error else facts["value"] or 0.0)
        told = f"trial {facts['id']} failed" if error else f"best validation mAP {100 * self._best:.1f}"
        _Ledger.progress.advance(1, told)


def _ledger_file(sweep: Sweep, trial: str) -> str:
    return storage.join(sweep.folder, f"{ENDED}{trial}.json")


def ended_trials(sweep: Sweep) -> dict[int, dict[str, Any]]:
    """The trials that have ended so far, by their numbers."""
    return _written(sweep, ENDED)


def _begun(sweep: Sweep) -> dict[int, dict[str, Any]]:
    """The points that Optuna has given out so far, by their numbers."""
    return _written(sweep, BEGUN)


def _written(sweep: Sweep, kind: str) -> dict[int, dict[str, Any]]:
    try:
        files = [file for file in storage.list_files(sweep.folder) if file.path.startswith(kind)]
    except FileNotFoundError:
        return {}
    return {int(file.path.removeprefix(kind)[:5]): json.loads(storage.read_bytes(file.uri)) for file in files}


def run_sweep(sweep: Sweep, before: Mapping[int, dict[str, Any]], progress: Progress) -> dict[str, Any]:
    """Run what is left of a sweep of which the trials `before` have ended: the facts of `sweep.json`.

    Ray must be running. Raises UserError where no trial fits the cluster or nothing can be trained on the corpus.
    """
    require_trainable(sweep.trial_settings(sweep.space.points()[0]), sweep.corpus)
    require_tracking(sweep.settings)
    at_once = trials_at_once(sweep.settings.training, nodes_cpus(), ray.cluster_resources().get("GPU", 0.0))
    _Ledger.progress = progress
    if len(before) < sweep.space.count:
        _tuner(sweep, before, at_once).fit()
    ended = ended_trials(sweep)
    if len(ended) < sweep.space.count:
        raise UserError(
            f"{len(ended)} of {sweep.space.count} trials have ended: run the same command again, it goes on"
        )
    return _facts(sweep, [ended[number] for number in sorted(ended)])


def _tuner(sweep: Sweep, before: Mapping[int, dict[str, Any]], at_once: int) -> tune.Tuner:
    """The rest of a sweep, of which `before` has ended."""
    space, left = sweep.space, [number for number in range(sweep.space.count) if number not in before]
    on_a_node = math.ceil(min(at_once, len(left)) / len(nodes_cpus()))  # trials whose workers share its cores
    filesystem, folder = storage.filesystem(sweep.folder)
    best = max((trial["value"] or 0.0 for trial in before.values()), default=0.0)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # what they would write is in the ledger
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ray Tune would return a sweep that was stopped as if it had ended
    chosen = space.search == "optuna"
    points = [] if chosen else space.points()
    return tune.Tuner(
        tune.with_resources(
            tune.with_parameters(_run_trial, sweep=sweep, beside=on_a_node - 1, server=tracking_server()),
            {"CPU": TRIAL_CPUS},
        ),
        param_space={key: axis.domain for key, axis in space.space.items()}
        if chosen
        else {TRIAL: tune.grid_search([(number, points[number]) for number in left])},
        tune_config=tune.TuneConfig(
            num_samples=len(left) if chosen else 1,
            max_concurrent_trials=at_once,
            scheduler=_scheduler(space, before.values()),
            search_alg=_Optuna(sweep, before, left) if chosen else None,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=folder,
            storage_filesystem=filesystem,
            callbacks=[_Ledger(sweep, best)],
            failure_config=tune.FailureConfig(max_failures=TRIAL_FAILURES),
            verbose=0,
        ),
    )


class _Optuna(OptunaSearch):
    """Optuna that knows the trials which have ended, and gives out those first which had begun.

    Every point is written down as it is given out, so that a trial that was cut off is the same one when it is begun
    again.
    """

    def __init__(self, sweep: Sweep, before: Mapping[int, dict[str, Any]], left: Sequence[int]) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space = sweep.space
        known = [trial for trial in before.values() if trial["value"] is not None]
        super().__init__(
            metric=METRIC,
            mode=MODE,
            seed=space.seed + len(before),  # or it would begin with the points that it began with before
            points_to_evaluate=[trial["settings"] for trial in known] or None,
            evaluated_rewards=[trial["value"] for trial in known] or None,
        )
        self._sweep = sweep
        self._begun = {number: point for number, point in _begun(sweep).items() if number in left}
        self._left = [*self._begun, *(number for number in left if number not in self._begun)]

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        number = self._left.pop(0)
        if number in self._begun:
            study: Any = self._ot_study
            study.enqueue_trial(self._begun[number])
        suggested = super().suggest(trial_id)
        assert suggested is not None, "Optuna always has one more point"
        point = {key: plain(value) for key, value in suggested.items()}
        storage.write_bytes(storage.join(self._sweep.folder, f"{BEGUN}{number:05d}.json"), json.dumps(point).encode())
        return {TRIAL: (number, point)}


def _scheduler(space: Space, before: Iterable[dict[str, Any]]) -> ASHAScheduler | None:
    """What stops trials early, with the curves of those that have ended to compare with."""
    if space.scheduler == "none":
        return None
    asha = ASHAScheduler(
        time_attr="epoch",
        metric=METRIC,
        mode=MODE,
        max_t=space.epochs,
        grace_period=space.grace_epochs,
        reduction_factor=space.reduction,
    )
    told: Any = asha  # of what is told, it looks at the trial's name only
    for trial in before:
        known = SimpleNamespace(trial_id=f"before-{trial['id']}")
        told.on_trial_add(None, known)
        for epoch in trial["curve"]:
            told.on_trial_result(None, known, epoch)
    return asha


def _trial(sweep: Sweep, config: dict[str, Any], result: dict[str, Any], error: str | None) -> dict[str, Any]:
    """One trial as the report shows it."""
    number, point = config[TRIAL]
    curve = json.loads(result.get(CURVE, "[]"))
    # A trial that was stopped before crop and CCLoss had joined has no epoch that training would keep.
    joined = [epoch for epoch in curve if epoch["joined"]]
    best = max(joined or curve, key=lambda epoch: epoch["value"], default=None)
    epochs = len(curve)
    settings = sweep.trial_settings(point)
    patience = settings.training.patience
    ended = epochs == sweep.space.epochs or (best and patience is not None and epochs - best["epoch"] >= patience)
    return {
        "id": f"{number:05d}",
        "state": "failed" if error else "finished" if ended else "stopped",
        "settings": point,
        "value": best and best["value"],
        "value_epoch": best and best["epoch"],
        "joined": bool(joined),
        "epochs": epochs,
        "seconds": round(result.get("time_total_s", 0.0), 1),
        "images": planned_images(settings, sweep.corpus, epochs) if epochs else 0,
        "error": error,
        "curve": curve,
        "resampled": json.loads(result.get(RESAMPLED, "[]")),
        "centre_cosine": best and best["centre_cosine"],
    }


def _facts(sweep: Sweep, trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    space, training, manifest = sweep.space, sweep.settings.training, sweep.corpus.artifact.manifest
    tried = [trial for trial in trials if trial["state"] != "failed" and trial["value"] is not None]
    best = max(tried, key=lambda trial: (trial["joined"], trial["value"]), default=None)
    return {
        "name": space.name,
        "space_file": sweep.file,
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "software": artifacts.software(),
        "objective": {"metric": "validation mAP", "mode": "max"},
        "search": space.search,
        "planned": space.count,
        "scheduler": space.scheduler,
        "grace_epochs": space.grace_epochs,
        "reduction": space.reduction,
        "epochs": space.epochs,
        "seed": space.seed,
        "settings": space.settings,
        "workers": training.workers,
        "trial_cpus": round(training.workers * training.cpus_per_worker + READ_CPUS + TRIAL_CPUS, 3),
        "trial_gpus": training.workers * training.gpu,
        "corpus": sweep.corpus.artifact.input_id,
        "train_images": manifest["splits"]["train"]["images"],
        "validation_images": manifest["splits"]["validation"]["images"],
        "chance": next((trial["curve"][0]["chance"] for trial in trials if trial["curve"]), None),
        "axes": [axis.facts(key, value_of(sweep.settings, key)) for key, axis in space.space.items()],
        "trials": list(trials),
        "best": best and best["id"],
    }


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2].strip()[:300]
