"""What a sweep searched, how, and what that cost, in sentences."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cxr_retrieval.report.trials import Trial, Trials, as_number, as_text, as_time, as_whole, counted, listed

_CHOSEN = {
    "random": "drawn at random, every setting on its own",
    "grid": "every combination of the choices once",
    "optuna": "chosen one after another by Optuna (TPE), each from the values of those before",
}


def searched(sweep: Mapping[str, Any], run: Trials) -> list[str]:
    """Sentences about the points of a sweep, who stopped them, and their budget; what is not known is left out."""
    search, planned = str(sweep.get("search")), as_whole(sweep.get("planned")) or len(run.trials)
    seed = f" (seed {as_text(sweep['seed'])})" if search in ("random", "optuna") and "seed" in sweep else ""
    sentences = [f"{counted(planned, 'point')}, {_CHOSEN[search]}{seed}."] if search in _CHOSEN else []
    sentences += _budget(sweep, run, planned)
    sentences += _stopping(sweep, run)
    if shared := sweep.get("settings"):
        words = [f"{key} = {as_text(value)}" for key, value in shared.items()]
        sentences.append(f"All trials share {listed(words)}, which the best config does not take over.")
    return sentences


def _budget(sweep: Mapping[str, Any], run: Trials, planned: int) -> list[str]:
    if run.epochs is None:
        return []
    images = as_whole(sweep.get("train_images"))
    each = f" of {images:,} training images" if images else ""
    return [f"A trial has {counted(run.epochs, 'epoch')}{each}, the sweep {planned * run.epochs:,} epochs at most."]


def _stopping(sweep: Mapping[str, Any], run: Trials) -> list[str]:
    if sweep.get("scheduler") == "none":
        return ["No trial is stopped early."]
    grace, reduction = as_whole(sweep.get("grace_epochs")), as_whole(sweep.get("reduction"))
    if sweep.get("scheduler") != "asha" or run.epochs is None or not grace or grace < 1:
        return []
    if reduction is None or reduction < 2:
        return [f"ASHA stops trials that are behind, none before {counted(grace, 'epoch')}."]
    levels = range(math.ceil(math.log(max(run.epochs / grace, 1), reduction) - 1e-9))
    rungs = [str(grace * reduction**level) for level in levels]
    if not rungs:
        return ["No trial is stopped early: the grace is the whole budget."]
    return [
        f"ASHA stops trials early: after {listed(rungs)} {'epoch' if rungs == ['1'] else 'epochs'} only the best one in"
        f" {reduction} of those that came so far goes on."
    ]


@dataclass(frozen=True)
class Cost:
    """What trials took: seconds, training images, and hours of the CPUs and GPUs that were held; None: not known."""

    seconds: float | None
    images: int | None
    cpu_hours: float | None
    gpu_hours: float | None


def costs(sweep: Mapping[str, Any], run: Trials) -> dict[str, Cost]:
    """What each trial took, by its id."""
    cpus, gpus = as_number(sweep.get("trial_cpus")), as_number(sweep.get("trial_gpus"))

    def hours(trial: Trial, held: float | None) -> float | None:
        return None if held is None or trial.seconds is None else held * trial.seconds / 3600

    return {trial.id: Cost(trial.seconds, trial.images, hours(trial, cpus), hours(trial, gpus)) for trial in run.trials}


def total(costs: Mapping[str, Cost]) -> Cost:
    """The sum over trials of what is known."""

    def added(name: str) -> float | None:
        known = [getattr(cost, name) for cost in costs.values() if getattr(cost, name) is not None]
        return sum(known) if known else None

    return Cost(added("seconds"), as_whole(added("images")), added("cpu_hours"), added("gpu_hours"))


def spent(sweep: Mapping[str, Any], run: Trials) -> list[str]:
    """Sentences about what the sweep cost and what early stopping saved."""
    each = costs(sweep, run)
    whole = total(each)
    if whole.seconds is None or not run.trials:
        return []
    parts = [f"{as_time(whole.seconds)} added up"]
    parts += [f"{whole.images:,} training images"] if whole.images is not None else []
    parts += [f"{hours:.2f} {name}-hours held" for name, hours in _hours(whole)]
    sentences = [f"{counted(len(run.trials), 'trial')} took {listed(parts)}."]
    if _hours(whole):
        sentences.append("Held is what the cluster set aside for a trial, at work or not.")
    failed = sum(trial.seconds or 0 for trial in run.trials if trial.state == "failed")
    if failed:
        sentences.append(f"{as_time(failed)} of it went to trials that failed.")
    return sentences + _saved(run, whole.seconds)


def _hours(cost: Cost) -> list[tuple[str, float]]:
    return [(name, hours) for name, hours in (("CPU", cost.cpu_hours), ("GPU", cost.gpu_hours)) if hours]


def _saved(run: Trials, seconds: float) -> list[str]:
    """What the epochs that stopped trials did not run would have taken, each at its own trial's pace."""
    stopped = [trial for trial in run.trials if trial.state == "stopped" and trial.epochs and trial.seconds]
    if run.epochs is None or not stopped:
        return []
    left = {trial: max(run.epochs - trial.epochs, 0) for trial in stopped}
    saved = sum(epochs * (trial.seconds or 0) / trial.epochs for trial, epochs in left.items())
    if saved <= 0:
        return []
    return [
        f"Stopping {counted(len(stopped), 'trial')} early saved about {as_time(saved)},"
        f" {saved / (seconds + saved):.0%} of what all of them would have taken: an estimate, as if each of the"
        f" {sum(left.values())} epochs left out had taken as long as an epoch of its trial did, its start included."
        " What was saved is paid for in doubt: a trial that was stopped might have caught up."
    ]
