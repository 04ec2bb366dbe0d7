"""Searching settings: a space of them, trials that train with a small budget, and what they found, by Ray Tune.

A trial is a Ray Train run with as many workers as the settings say; the trial itself only waits for it.
"""

import datetime
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import ray
import yaml
from pydantic import Field, ValidationError, model_validator
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cxr_retrieval import artifacts, console, storage
from cxr_retrieval.artifacts import Draft
from cxr_retrieval.config import NAME, Section, Settings, TrainingSettings, settings_fields, with_values
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.errors import UserError
from cxr_retrieval.progress import Progress
from cxr_retrieval.training.input import READ_CPUS
from cxr_retrieval.training.loop import CURVE
from cxr_retrieval.training.run import model_draft, require_trainable, trainer_of

KIND = "sweep"
METRIC = "value"  # validation mAP of an epoch's best embedding
POINT = "point"
TRIAL_CPUS = 0.05  # a trial only waits for its run, but Ray Tune knows none that takes nothing
# Not to be searched: where things are, what a trial's corpus is, and what it takes of the cluster.
FIXED = (
    *("workspace", "model", "corpus.", "phantom.", "index.", "publish.", "search.", "privacy.", "evaluation."),
    *("training.workers", "training.gpu", "training.cpus_per_worker"),  # how many trials fit is counted once
)
MOST_CORNERS = 1024
TRIAL_FAILURES = 1  # tries after a trial has failed: a node may be lost


class Axis(Section):
    """The values of one setting that a sweep looks at: exactly one of the four."""

    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None
    integers: tuple[int, int] | None = None
    choice: list[Any] | None = None

    @model_validator(mode="after")
    def _one(self) -> "Axis":
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            raise ValueError("give exactly one of uniform, log_uniform, integers, choice")
        ((kind, value),) = given.items()
        if kind == "choice":
            if len(value) < 2:
                raise ValueError("a choice needs two values or more")
        elif not value[0] < value[1]:
            raise ValueError(f"{kind} needs a lower and a higher bound, in this order")
        elif kind == "log_uniform" and value[0] <= 0:
            raise ValueError("log_uniform needs bounds above 0")
        return self

    @property
    def extremes(self) -> list[Any]:
        """The values that decide whether all of them are allowed: every choice, or both bounds."""
        return list(self.choice or self.uniform or self.log_uniform or self.integers or ())

    @property
    def domain(self) -> Any:
        """The axis as Ray Tune knows it."""
        if self.choice is not None:
            return tune.choice(self.choice)
        if self.integers is not None:
            return tune.randint(self.integers[0], self.integers[1] + 1)
        if self.log_uniform is not None:
            return tune.loguniform(*self.log_uniform)
        assert self.uniform is not None
        return tune.uniform(*self.uniform)

    def facts(self, key: str, default: Any) -> dict[str, Any]:
        """The axis as a report shows it."""
        low, high = (None, None) if self.choice is not None else self.extremes
        scale = "choice" if self.choice is not None else "log" if self.log_uniform is not None else "linear"
        meaning = {name: field.description for name, field in settings_fields()}[key]
        return {
            "key": key,
            "meaning": meaning,
            "scale": scale,
            "low": low,
            "high": high,
            "choices": self.choice,
            "default": default,
        }


class Space(Section):
    """A file of `tune_spaces/`: which settings are searched, how, and with what budget."""

    name: str = Field(pattern=NAME, description="name of the sweep")
    search: Literal["random", "grid", "optuna"] = Field("random", description="how points are chosen")
    trials: int = Field(16, ge=1, le=10_000, description="points to try (random and optuna)")
    epochs: int = Field(4, ge=1, description="training.epochs of a trial")
    scheduler: Literal["asha", "none"] = Field("asha", description="asha: stop trials early that are behind")
    grace_epochs: int = Field(1, ge=1, description="epochs that every trial gets (asha)")
    reduction: int = Field(3, ge=2, description="one of so many trials goes on at every rung (asha)")
    seed: int = Field(0, ge=0, description="seed of the points")
    settings: dict[str, Any] = Field({}, description="settings that all trials share, and the best config has too")
    space: dict[str, Axis] = Field(min_length=1, description="settings to search, each with its values")

    @model_validator(mode="after")
    def _consistent(self) -> "Space":
        if self.search == "grid" and any(axis.choice is None for axis in self.space.values()):
            raise ValueError("search: grid needs a choice for every setting of the space")
        if self.scheduler == "asha" and self.grace_epochs > self.epochs:
            raise ValueError("grace_epochs is more than epochs")
        for key in (*self.space, *self.settings):
            if key.startswith(FIXED):
                raise ValueError(f"{key} cannot be searched: a sweep looks at how a model is trained")
        if "training.epochs" in {*self.space, *self.settings}:
            raise ValueError("training.epochs is the budget: set epochs")
        return self

    @property
    def count(self) -> int:
        """How many trials there are to run."""
        return (
            math.prod(len(axis.choice or ()) for axis in self.space.values()) if self.search == "grid" else self.trials
        )

    def points(self) -> list[dict[str, Any]]:
        """The points of a random or grid search, in their order; the same ones every time."""
        if self.search == "grid":
            combinations = itertools.product(*(axis.choice or () for axis in self.space.values()))
            return [dict(zip(self.space, values, strict=True)) for values in combinations]
        state = np.random.RandomState(self.seed)
        return [
            {key: _plain(axis.domain.sample(random_state=state)) for key, axis in self.space.items()}
            for _ in range(self.trials)
        ]


def read_space(file: str) -> Space:
    """A space from its YAML file. Raises UserError, one line, for whatever is wrong with it."""
    try:
        tree = yaml.safe_load(storage.read_bytes(file))
    except FileNotFoundError:
        raise UserError(f"tune space {file} does not exist") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"tune space {file} cannot be read: {' '.join(str(error).split())}") from None
    try:
        return Space.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(
            f"tune space {file}: {where + ': ' if where else ''}{message[0].lower()}{message[1:]}"
        ) from None


@dataclass(frozen=True)
class Sweep:
    """What is searched: a space around settings, on a corpus. Everything in it was checked against the schema."""

    space: Space
    file: str
    base: Settings
    corpus: Corpus

    @classmethod
    def of(cls, space: Space, file: str, settings: Settings, corpus: Corpus) -> "Sweep":
        """Check every setting that the space can give. Raises UserError for the first that the schema refuses."""
        base = with_values(settings, space.settings, file)
        sweep = cls(space, file, base, corpus)
        # Rules between settings too: every corner of the space, as far as they can be counted.
        corners = itertools.product(*(axis.extremes for axis in space.space.values()))
        for corner in itertools.islice(corners, MOST_CORNERS):
            sweep.trial_settings(dict(zip(space.space, corner, strict=True)))
        for point in space.points() if space.search != "optuna" else []:
            sweep.trial_settings(point)
        return sweep

    @property
    def draft(self) -> Draft:
        shaping = dict(model_draft(self.base, self.corpus).settings) | {"space": self.space.model_dump(mode="json")}
        folder = storage.join(self.base.workspace, "reports", "sweeps")
        return Draft.under(folder, KIND, shaping, (self.corpus.artifact.input_id,))

    def trial_settings(self, point: Mapping[str, Any]) -> Settings:
        """The settings of one trial: the base, the point, the small budget."""
        return with_values(self.base, {**point, "training.epochs": self.space.epochs}, self.file)

    def best_settings(self, point: Mapping[str, Any]) -> Settings:
        """What to train at full length: the base with the point."""
        return with_values(self.base, point, self.file)


def trials_at_once(training: TrainingSettings, cpus: float, gpus: float) -> int:
    """How many trials the cluster holds: each with its workers and one reading task. Raises UserError for none."""
    fit = int((cpus + 1e-9) / (training.workers * training.cpus_per_worker + READ_CPUS + TRIAL_CPUS))
    if training.gpu:
        fit = min(fit, int(gpus / training.workers))
    if fit == 0:
        raise UserError(
            f"a trial with training.workers={training.workers}, training.cpus_per_worker={training.cpus_per_worker:g},"
            f" training.gpu={str(training.gpu).lower()} does not fit {cpus:g} CPUs and {gpus:g} GPUs, of which its"
            f" reading takes {READ_CPUS:g} CPUs: lower one of them"
        )
    return fit


class _EpochReport(TuneReportCallback):
    """Tells Ray Tune of every epoch that ended; of reports in between it tells nothing."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        curve = metrics[0].get(CURVE)
        if curve:
            told = {**curve[-1], CURVE: json.dumps(curve)}
            super().after_report(run_context, [told], checkpoint)


def _run_trial(config: dict[str, Any], sweep: Sweep, beside: int) -> None:
    """One trial. Its run is named by it, without a time: resumed, it goes on from its checkpoint."""
    settings = sweep.trial_settings(config.get(POINT) or config)
    require_trainable(settings, sweep.corpus)  # what no try will mend fails before workers start
    run = f"{sweep.draft.input_id}-{tune.get_context().get_trial_id()}"
    # Not from within the trial's placement group: all that the run starts would be looked for in there, where there is
    # no room for it, and what gives an early-stopped trial's workers back would never start (Ray 2.60).
    here = ray.get_runtime_context()
    outside = NodeAffinitySchedulingStrategy(here.get_node_id(), soft=True)
    # What gives the workers back asks the cluster by its address, and without one asks whichever Ray began last.
    address = {"env_vars": {"RAY_ADDRESS": here.gcs_address}}
    fit = ray.remote(num_cpus=0, max_retries=0)(_fit).options(scheduling_strategy=outside, runtime_env=address)
    ray.get(fit.remote(settings, sweep.corpus, run, beside, _EpochReport()))


def _fit(settings: Settings, corpus: Corpus, run: str, beside: int, report: _EpochReport) -> None:
    """The run of a trial. Runs in a task that ends with the trial, and its workers with it."""
    trainer_of(settings, corpus, run, beside, [report]).fit()


class _Shown(tune.Callback):
    """Counts trials that ended, whichever way, on the driver that runs the sweep now.

    What it shows to belongs to the class: Ray Tune keeps the callback with the sweep's state, which outlives a driver.
    """

    progress: ClassVar[Progress]
    best: ClassVar[float]

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        _Shown.best = max(_Shown.best, result[METRIC])

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        _Shown.progress.advance(1, f"best validation mAP {100 * _Shown.best:.1f}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        _Shown.progress.advance(1, f"trial {trial.trial_id} failed")


def run_sweep(sweep: Sweep) -> dict[str, Any]:
    """Run what is left of a sweep: the facts of `sweep.json`. Ray must be running.

    Raises UserError where no trial fits the cluster or nothing can be trained on the corpus.
    """
    space, draft = sweep.space, sweep.draft
    require_trainable(sweep.base, sweep.corpus)
    resources = ray.cluster_resources()
    at_once = trials_at_once(sweep.base.training, resources.get("CPU", 0.0), resources.get("GPU", 0.0))
    draft.begin()
    count = space.count
    filesystem, runs = storage.filesystem(storage.join(sweep.base.workspace, "runs"))
    trainable = tune.with_resources(
        tune.with_parameters(_run_trial, sweep=sweep, beside=min(at_once, count) - 1), {"CPU": TRIAL_CPUS}
    )
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ray Tune would return a sweep that was stopped as if it had ended
    with Progress(sweep.base.workspace, draft, "tune", count, "trials") as progress:
        _Shown.progress, _Shown.best = progress, 0.0
        path = storage.join(runs, draft.input_id)
        if tune.Tuner.can_restore(path, storage_filesystem=filesystem):
            console.say("going on with a sweep that was begun before")
            tuner = tune.Tuner.restore(path, trainable, storage_filesystem=filesystem, restart_errored=True)
        else:
            tuner = tune.Tuner(
                trainable,
                param_space=_param_space(space),
                tune_config=tune.TuneConfig(
                    metric=METRIC,
                    mode="max",
                    num_samples=count if space.search == "optuna" else 1,
                    max_concurrent_trials=at_once,
                    scheduler=_scheduler(space),
                    search_alg=OptunaSearch(seed=space.seed) if space.search == "optuna" else None,
                    trial_dirname_creator=lambda trial: trial.trial_id,
                ),
                run_config=tune.RunConfig(
                    name=draft.input_id,
                    storage_path=runs,
                    storage_filesystem=filesystem,
                    callbacks=[_Shown()],
                    failure_config=tune.FailureConfig(max_failures=TRIAL_FAILURES),
                    verbose=0,
                ),
            )
        results = tuner.fit()
        if len(results) < count:
            raise UserError(f"{len(results)} of {count} trials have ended: run the same command again, it goes on")
        return _facts(sweep, [_trial(sweep, results[number]) for number in range(len(results))])


def _param_space(space: Space) -> dict[str, Any]:
    if space.search == "optuna":
        return {key: axis.domain for key, axis in space.space.items()}
    return {POINT: tune.grid_search(space.points())}


def _scheduler(space: Space) -> ASHAScheduler | None:
    if space.scheduler == "none":
        return None
    return ASHAScheduler(
        time_attr="epoch", max_t=space.epochs, grace_period=space.grace_epochs, reduction_factor=space.reduction
    )


def _trial(sweep: Sweep, result: Any) -> dict[str, Any]:
    """One trial as the report shows it."""
    config = result.config.get(POINT) or result.config
    metrics = result.metrics or {}
    curve = json.loads(metrics.get(CURVE, "[]"))
    best = max(curve, key=lambda point: point["value"], default=None)
    epochs = len(curve)
    state = "failed" if result.error else "finished" if epochs == sweep.space.epochs else "stopped"
    return {
        "id": Path(result.path).name.rpartition("_")[2],  # its number in the sweep
        "state": state,
        "settings": {key: _plain(config[key]) for key in sweep.space.space},
        "value": best and best["value"],
        "value_epoch": best and best["epoch"],
        "epochs": epochs,
        "seconds": round(metrics.get("time_total_s", 0.0), 1),
        "error": _last_line(result.error) if result.error else None,
        "curve": curve,
        "centre_cosine": best and best["centre_cosine"],
    }


def _facts(sweep: Sweep, trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    space, manifest = sweep.space, sweep.corpus.artifact.manifest
    tried = [trial for trial in trials if trial["value"] is not None]
    best = max(tried, key=lambda trial: trial["value"], default=None)
    return {
        "name": space.name,
        "space_file": sweep.file,
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "software": artifacts.software(),
        "objective": {"metric": "validation mAP", "mode": "max"},
        "search": space.search,
        "scheduler": space.scheduler,
        "grace_epochs": space.grace_epochs,
        "epochs": space.epochs,
        "seed": space.seed,
        "workers": sweep.base.training.workers,
        "corpus": sweep.corpus.artifact.input_id,
        "train_images": manifest["splits"]["train"]["images"],
        "validation_images": manifest["splits"]["validation"]["images"],
        "chance": None,
        "axes": [axis.facts(key, value_of(sweep.base, key)) for key, axis in space.space.items()],
        "trials": list(trials),
        "best": best and best["id"],
    }


def value_of(settings: Settings, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = settings
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


def _plain(value: Any) -> Any:
    """A sampled value as YAML and JSON write it."""
    return value.item() if isinstance(value, np.generic) else value
