"""A sweep as one HTML file: where in the space good trials lie, how they learnt, and what the data asks for next."""

import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any

from cxr_retrieval.report.account import costs, searched, spent, total
from cxr_retrieval.report.advice import next_steps
from cxr_retrieval.report.charts import percent_axis
from cxr_retrieval.report.importance import importances
from cxr_retrieval.report.pages import render
from cxr_retrieval.report.trial_plots import (
    across_settings,
    against,
    heat_map,
    learning_curves,
    setting_map,
    with_intervals,
)
from cxr_retrieval.report.trials import (
    STATES,
    Axis,
    Trials,
    as_percent,
    as_points,
    as_text,
    as_time,
    counted,
    listed,
    read_trials,
)

_NAMED = 8
_SCALES = {"log": "evenly over powers", "linear": "evenly", "choice": "one of these"}


def sweep_page(sweep: Mapping[str, Any]) -> str:
    """HTML text of one offline file about a sweep, given as the content of its `sweep.json`.

    Only `trials` and `axes` are needed, and may be empty. Values are in 0 to 1 and shown in percent. Trials without a
    value, and settings that an axis cannot hold, are listed and left out of the plots.
    """
    run = read_trials(sweep)
    values = percent_axis(run.metric, (trial.value for trial in run.trials if trial.value is not None))
    heat = heat_map(run, values)
    scatter = None if heat else setting_map(run, values)
    each = [chart for axis in run.axes if (chart := against(run, axis))]
    # Where there is no map, the plots of one setting each say what it would have said.
    leading, others = ([scatter] if scatter else [], each) if heat or scatter else (each, [])
    return render(
        "sweep.html.j2",
        title=f"Sweep: {sweep.get('name') or 'without a name'}",
        facts=_facts(sweep),
        run=run,
        states=STATES,
        as_time=as_time,
        summary=_summary(run),
        care=_care(run),
        heat=heat,
        leading=leading,
        others=others,
        curves=learning_curves(run),
        parallel=across_settings(run, values),
        intervals=with_intervals(run),
        rows=_rows(sweep, run),
        total=total(costs(sweep, run)),
        cosines=any(trial.centre_cosine is not None for trial in run.trials),
        errors=any(trial.error for trial in run.trials),
        importances=importances(run) if len(run.axes) > 1 else None,
        searched=searched(sweep, run),
        settings=[_setting(run, axis) for axis in run.axes],
        spent=spent(sweep, run),
        next_steps=next_steps(sweep),
    )


def _summary(run: Trials) -> list[str]:
    """Sentences in plain words: what ran, and what came out."""
    states = Counter(trial.state for trial in run.trials)
    if not run.trials:
        return ["No trial was run."]
    parts = [f"{states[state]} {words}" for state, words in STATES.items() if states[state]]
    sentences = [f"{counted(len(run.trials), 'trial')}: {listed(parts)}."]
    if run.best is None:
        return [*sentences, "No trial is the best: none gave a value to choose by."]
    best, values = run.best, [trial.reached for trial in run.ranked]
    when = f" in epoch {best.value_epoch}" if best.value_epoch is not None else ""
    how = f", with {best.words(run.axes)}" if run.axes else ""
    sentences.append(f"The best, trial {best.id}, reached a {run.metric} of {as_percent(best.reached)}{when}{how}.")
    if run.chance is not None:
        sentences.append(f"Chance is {as_percent(run.chance)}.")
    if len(values) > 1:
        middle = statistics.median(values)
        early = sum(trial.state == "stopped" for trial in run.ranked)
        fewer = f" ({early} of them stopped early, after fewer epochs)" if early else ""
        sentences.append(
            f"The {len(values)} trials with a value{fewer} spread from {as_percent(min(values))} to"
            f" {as_percent(max(values))}, with a standard deviation of {as_points(statistics.stdev(values))}; the best"
            f" is {as_points(best.reached - middle)} ahead of their median, {as_percent(middle)}."
        )
    return sentences + _against_default(run)


def _care(run: Trials) -> list[str]:
    """What may be made of the differences between trials."""
    if run.best is None:
        return []
    return _apart(run) if run.paired else _assumed_apart(run)


def _apart(run: Trials) -> list[str]:
    """What the intervals of differences on the same patients say, and what they cannot say."""
    assert run.best is not None
    near, others = run.near(), len(run.ranked) - 1
    sentences = []
    if near:
        some = f"{len(near)} of {counted(others, 'other trial')}" if others > 1 else "The other trial"
        names = listed([trial.id for trial in near[:_NAMED]] + ["others"] * (len(near) > _NAMED))
        sentences.append(
            f"{some} {'is' if len(near) == 1 else 'are'} not told apart from the best, by the 95% interval of the"
            f" difference on the same patients: {names}."
        )
    elif others:
        sentences.append("Every other trial is told apart from the best, on the same patients.")
    return [
        *sentences,
        "Read differences with care: intervals say how values would move with other patients; each trial is one run"
        " with one seed, and what another seed would give they do not say. The best of several noisy figures is also"
        " flattered by having been picked.",
    ]


def _assumed_apart(run: Trials) -> list[str]:
    judges = f" on {run.validation_images:,} validation images" if run.validation_images else ""
    basis = "about one standard error of one value" if run.validation_images else "assumed"
    sentences = [
        f"Read differences with care: each trial is one run with one seed, judged{judges}, and a difference under"
        f" {as_points(run.assumed_noise)} ({basis}, where intervals were not kept) is not told apart from noise; the"
        " best of several noisy figures is also flattered by having been picked."
    ]
    for trial in run.near()[:1]:
        close = f"Trial {trial.id}, with {as_percent(trial.reached)}, is that close to the best"
        sentences.append(f"{close}: the two are not told apart.")
    return sentences


def _against_default(run: Trials) -> list[str]:
    if not run.axes:
        return []
    trial = run.default()
    if trial is None:
        words = ", ".join(f"{axis.key} = {as_text(axis.default)}" for axis in run.axes)
        return [f"The default settings ({words}) were not among the trials."]
    if trial is run.best:
        return ["The best settings are the default ones."]
    gap = run.gap(trial)
    apart = "" if gap.told_apart else ", not told apart from it"
    return [
        f"The default settings, trial {trial.id}, gave {as_percent(trial.reached)}:"
        f" {as_points(gap.size)} {'behind' if gap.size >= 0 else 'ahead of'} the best{apart}."
    ]


def _facts(sweep: Mapping[str, Any]) -> list[tuple[str, object]]:
    objective = sweep.get("objective") or {}
    aim = {"max": "more is better", "min": "less is better"}.get(str(objective.get("mode")))
    search = [part for part in (sweep.get("search"), sweep.get("scheduler")) if part and part != "none"]
    software = sweep.get("software")
    if isinstance(software, Mapping):
        software = ", ".join(f"{name} {version}" for name, version in software.items())
    return [
        ("Objective", ", ".join(part for part in (objective.get("metric"), aim) if part)),
        ("Search space", sweep.get("space_file")),
        ("Search", ", ".join(search)),
        ("Epochs of a trial", sweep.get("epochs")),
        ("Seed", sweep.get("seed")),
        ("Workers of a trial", sweep.get("workers")),
        ("Training images", sweep.get("train_images")),
        ("Validation images", sweep.get("validation_images")),
        ("Corpus", sweep.get("corpus")),
        ("Created", sweep.get("created")),
        ("Software", software),
    ]


def _setting(run: Trials, axis: Axis) -> dict[str, Any]:
    """A searched setting in words: its values, the default, what was tried, and what the best trial has."""
    if axis.choices:
        values = listed([as_text(choice) for choice in axis.choices])
    elif axis.low is None or axis.high is None:
        values = ""
    else:
        values = f"{as_text(axis.low)} to {as_text(axis.high)}"
    tried = sorted(number for trial in run.trials if (number := trial.number(axis)) is not None)
    return {
        "key": axis.key,
        "meaning": axis.meaning,
        "searched": values,
        "scale": _SCALES.get(axis.scale, axis.scale),
        "tried": f"{as_text(tried[0])} to {as_text(tried[-1])}" if axis.numeric and tried else "",
        "default": as_text(axis.default),
        "best": as_text(run.best.settings.get(axis.key)) if run.best else "",
    }


def _rows(sweep: Mapping[str, Any], run: Trials) -> list[dict[str, Any]]:
    """The leaderboard: by value, then what is not done, then what failed."""
    rest = [trial for trial in run.trials if trial not in run.ranked]
    rest.sort(key=lambda trial: trial.state == "failed")
    each = costs(sweep, run)
    return [
        {
            "rank": rank if rank <= len(run.ranked) else None,
            "trial": trial,
            "best": trial is run.best,
            "gap": run.gap(trial) if run.best and trial in run.ranked and trial is not run.best else None,
            "settings": [as_text(trial.settings[axis.key]) if axis.key in trial.settings else "" for axis in run.axes],
            "cost": each[trial.id],
        }
        for rank, trial in enumerate([*run.ranked, *rest], start=1)
    ]
