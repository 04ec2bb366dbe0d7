"""Search settings of the training by Ray Tune: centre rate and crop threshold first, any other by a file of its own.

  python -m jobs.tune --space tune_spaces/joint.yaml --config jobs/configs/nih_small.yaml corpus.archive=DIR
  ray job submit --working-dir . -- python -m jobs.tune --space FILE --config FILE workspace=s3://bucket/prefix

Every trial trains a model with the space's small budget; killed and run again, the sweep goes on. Writes `sweep.html`,
`sweep.json`, and `best.yaml`, your config with the best point, which `jobs.train --config` takes as it is.
"""

import argparse
import json
from typing import Any

from cxr_retrieval import artifacts, command, config, console, storage
from cxr_retrieval.artifacts import Artifact, Draft
from cxr_retrieval.config import Settings
from cxr_retrieval.corpus.preparation import find_prepared, prepare
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.errors import UserError
from cxr_retrieval.progress import Progress
from cxr_retrieval.report.advice import next_steps
from cxr_retrieval.report.sweep import sweep_page
from cxr_retrieval.runtime import start_ray
from cxr_retrieval.training.space import MOST_TRIALS, Space, check_space, read_space
from cxr_retrieval.training.sweep import Sweep, ended_trials, run_sweep

SWEEP_FILE, REPORT_FILE, BEST_FILE = "sweep.json", "sweep.html", "best.yaml"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--space", required=True, metavar="FILE", help="settings to search and how, as in tune_spaces/")
    parser.add_argument("--trials", type=int, help="points to try, in place of the space's own number")


def run(settings: Settings, options: argparse.Namespace) -> None:
    if settings.model is not None:
        raise UserError("model is set, but this job trains its own: leave it out")
    space = chosen_space(options)
    check_space(space, options.space, settings)
    start_ray(settings)
    corpus = Corpus(prepare(settings.corpus, settings.workspace, settings.privacy)[0])
    sweep = Sweep(space, options.space, settings, corpus)
    done = artifacts.find(sweep.draft.uri)
    show_sweep(done or finished(sweep), worked=done is None)


def chosen_space(options: argparse.Namespace) -> Space:
    space = read_space(options.space)
    if options.trials is None:
        return space
    if space.search == "grid" or not 1 <= options.trials <= MOST_TRIALS:
        raise UserError(
            f"--trials={options.trials}: a number from 1 to {MOST_TRIALS:,}, and not for a grid, which has its own"
        )
    return space.model_copy(update={"trials": options.trials})


def finished(sweep: Sweep) -> Artifact:
    """Run what is left of the sweep and write its three files."""
    draft, count = sweep.draft.begin(), sweep.space.count
    before = {number: trial for number, trial in ended_trials(sweep).items() if trial["state"] != "failed"}
    if before:
        console.say(f"going on with a sweep of which {len(before)} of {count} trials have ended")
    with Progress.of(sweep.settings.workspace, draft, "tune", count, "trials", before=len(before)) as progress:
        return written(sweep, draft, run_sweep(sweep, before, progress))


def written(sweep: Sweep, draft: Draft, facts: dict[str, Any]) -> Artifact:
    files = [
        draft.write(SWEEP_FILE, json.dumps(facts, indent=1).encode()),
        draft.write(REPORT_FILE, sweep_page(facts).encode()),
    ]
    states = [trial["state"] for trial in facts["trials"]]
    if facts["best"] is None:
        raise UserError(
            f"all {len(states)} trials failed, the last one: {facts['trials'][-1]['error']}; see"
            f" {storage.join(draft.uri, REPORT_FILE)}"
        )
    best = next(trial for trial in facts["trials"] if trial["id"] == facts["best"])
    files.append(draft.write(BEST_FILE, config.dump_settings(sweep.best_settings(best["settings"])).encode()))
    counts = {state: states.count(state) for state in ("finished", "stopped", "failed")}
    return draft.finish(files, {"trials": len(states), **counts}, best=best)


def show_sweep(sweep: Artifact, *, worked: bool) -> None:
    facts = json.loads(sweep.read(SWEEP_FILE))
    keys = [axis["key"] for axis in facts["axes"]]
    trials = sorted(facts["trials"], key=lambda trial: -1.0 if trial["value"] is None else -1 - trial["value"])
    rows = [
        [
            trial["id"],
            trial["state"],
            "" if trial["value"] is None else f"{100 * trial['value']:.1f}",
            trial["epochs"],
            round(trial["seconds"]),
            *(_short(trial["settings"][key]) for key in keys),
            trial["error"] or "",
        ]
        for trial in trials
    ]
    title = f"Sweep {facts['name']}" if worked else f"Sweep {facts['name']} (finished before, nothing to do)"
    console.show_table(title, ["trial", "state", "validation mAP", "epochs", "seconds", *keys, "error"], rows)
    for line in next_steps(facts):
        console.say(f"next: {line}")
    console.say(f"report: {storage.join(sweep.uri, REPORT_FILE)}")
    console.out.print(f"best: {storage.join(sweep.uri, BEST_FILE)}", soft_wrap=True)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plan(settings: Settings, options: argparse.Namespace) -> None:
    space = chosen_space(options)
    check_space(space, options.space, settings)
    corpus = Corpus(find_prepared(settings.corpus, settings.workspace, settings.privacy))
    sweep = Sweep(space, options.space, settings, corpus)
    images = corpus.artifact.manifest["splits"]["train"]["images"]
    searched = space.space.get("training.pretraining")
    pretraining = sweep.trial_settings(space.points()[0]).training.pretraining
    passes = space.epochs + (max(searched.extremes) if searched else pretraining)
    state = "finished" if artifacts.find(sweep.draft.uri) else "to do"
    console.show_table(
        "Plan of tune",
        ["trials", "search", "epochs of a trial", "images at most", "workers of a trial", "state", "where"],
        [
            [
                space.count,
                space.search,
                space.epochs,
                space.count * passes * images,
                settings.training.workers,
                state,
                sweep.draft.uri,
            ]
        ],
    )


if __name__ == "__main__":
    command.run("tune", __doc__, run, plan, arguments)
