"""Promises of the sweep page: every trial is shown for what it is, and advice comes from the data or not at all."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cxr_retrieval.config import validate
from cxr_retrieval.report.advice import ENOUGH_FOR_EFFECT, REPEATS, next_steps
from cxr_retrieval.report.charts import (
    choice_axis,
    colour_bar,
    number_axis,
    percent_axis,
    plane,
    viridis,
)
from cxr_retrieval.report.importance import ENOUGH, importances
from cxr_retrieval.report.sweep import sweep_page
from cxr_retrieval.report.trials import read_trials

HOSTILE = "</svg><script>alert('x')</script><img src=x onerror=alert(1)>{{ 7 * 7 }}"
RATE, THRESHOLD = "losses.centre_rate", "network.crop_threshold"


def axis(key=RATE, **changes):
    known = {"key": key, "meaning": "what it is", "scale": "log", "low": 0.005, "high": 0.5, "choices": None}
    return {**known, "default": 0.05, **changes}


def threshold(**changes):
    return axis(THRESHOLD, **{"scale": "linear", "low": 0.3, "high": 0.7, "default": 0.5, **changes})


def trial(name, value, state="finished", curve=None, **changes):
    """A trial whose curve, unless given, peaks in the third of four epochs; its settings are the default ones."""
    if curve is None:
        curve = [] if value is None else [value - 0.02, value - 0.01, value, value - 0.001]
    known = {
        "id": name,
        "state": state,
        "settings": {RATE: 0.05, THRESHOLD: 0.5},
        "value": value,
        "value_epoch": None if value is None else curve.index(max(curve)) + 1,
        "epochs": len(curve),
        "seconds": 61.2,
        "error": None,
        "model": None,
        "curve": [{"epoch": i, "value": number, "loss": 0.4} for i, number in enumerate(curve, start=1)],
        "centre_cosine": None,
    }
    return {**known, **changes}


def at(rate, crop=0.5):
    return {RATE: rate, THRESHOLD: crop}


def sweep(trials, axes=None, **changes):
    done = [one for one in trials if one["state"] in ("finished", "stopped") and one["value"] is not None]
    known = {
        "name": "joint",
        "space_file": "tune_spaces/joint.yaml",
        "created": "2026-11-25 14:03 UTC",
        "software": {"ray": "2.60.0"},
        "objective": {"metric": "validation mAP", "mode": "max"},
        "search": "random",
        "scheduler": "asha",
        "epochs": 4,
        "seed": 0,
        "workers": 1,
        "corpus": "1a2b3c",
        "train_images": 4781,
        "validation_images": 700,
        "chance": 0.05,
        "axes": [axis(), threshold()] if axes is None else axes,
        "trials": trials,
        "best": max(done, key=lambda one: one["value"])["id"] if done else None,
    }
    return {**known, **changes}


def quiet(count=6):
    """Trials that ask for nothing: the best is in the middle of each axis, at the default, and far ahead."""
    others = [trial(f"o{i}", 0.10 + 0.001 * i, settings=at(0.02 + 0.01 * i, 0.42 + 0.02 * i)) for i in range(count - 1)]
    return [trial("best", 0.137), *others]


def measured(trials, spread=0.01, own=0.001, count=400):
    """The trials as judged on the same patients: what these have in common moves all values, `own` each by itself."""
    chance = np.random.default_rng(0)
    common = spread * chance.standard_normal(count)
    for one in trials:
        if one["value"] is not None:
            one["resampled"] = list(one["value"] + common + own * chance.standard_normal(count))
    return trials


def spread_out(count, value):
    """Trials all over the rate and the threshold, with the value that the shares of their ranges give."""
    shares = [(i * 0.618034 % 1, i * 0.754878 % 1) for i in range(1, count + 1)]
    return [
        trial(f"t{i:02d}", value(rate, crop), settings=at(0.005 * 100**rate, 0.3 + 0.4 * crop))
        for i, (rate, crop) in enumerate(shares)
    ]


class Page(HTMLParser):
    """Every element with its attributes, the text that a reader sees, and the marks of each plot by trial."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.plots = [], "", []
        self._silent, self._group = False, None
        self.feed(html)
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.elements.append((tag, attrs))
        self._silent = tag in ("style", "script")
        if tag == "svg" and attrs.get("role") == "img":
            self.plots.append((attrs["aria-label"], {}))
        if tag == "g":
            self._group = self.plots[-1][1].setdefault(attrs["data-trial"], [attrs])
        elif self._group is not None:
            self._group.append(attrs)

    def handle_endtag(self, tag):
        self._silent = False
        if tag == "g":
            self._group = None

    def handle_data(self, data):
        self.text += "" if self._silent else data

    def plot(self, beginning):
        return next(marks for label, marks in self.plots if label.startswith(beginning))

    def labels(self):
        return [label.partition(";")[0] for label, _ in self.plots]


def page(*args, **changes):
    return Page(sweep_page(sweep(*args, **changes)))


def cells(html):
    """The text of a page with a space between the cells of its tables."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def classes(marks):
    return {name for attrs in marks for name in attrs.get("class", "").split()}


def advice(trials, axes=None, **changes):
    return "\n".join(next_steps(sweep(trials, axes, **changes)))


# The page.


def test_nothing_is_fetched_from_outside():
    html = sweep_page(sweep(quiet()))
    assert not re.search(r"https?://|@import|url\(|<link|<script|<img|\ssrc=", html)
    assert "script-src 'none'" in html


def test_the_page_says_first_that_it_is_no_medical_device():
    text = page(quiet()).text
    assert text.index("Research system, no medical device") < text.index("6 trials")


def test_plots_come_before_the_table():
    html = sweep_page(sweep(quiet()))
    assert html.rindex("</svg>") < html.index("<table>") < html.index("What to run next")


def test_every_plot_is_named_for_who_cannot_see_it_and_both_its_axes_are_titled():
    html = sweep_page(sweep(quiet()))
    plots = re.findall(r'<svg viewBox[^>]*role="img" aria-label="([^"]+)".*?</svg>', html, flags=re.S)
    assert [label.partition(";")[0] for label in plots] == Page(html).labels()
    for plot in re.findall(r"<svg viewBox.*?</svg>", html, flags=re.S):
        titles = re.findall(r'<text class="axis"[^>]*>(?:<title>(.*?)</title>)?', plot)
        assert len(titles) >= 2
    assert "validation mAP, percent" in html


def test_the_summary_counts_trials_by_how_they_ended():
    trials = [*quiet(), trial("s", 0.09, "stopped", [0.09]), trial("f", None, "failed", error="no memory")]
    text = page(trials).text
    assert "8 trials: 6 finished, 1 stopped early and 1 failed." in text
    assert "The best, trial best, reached a validation mAP of 13.7% in epoch 3" in text
    assert "losses.centre_rate = 0.05, network.crop_threshold = 0.5" in text


def test_the_summary_says_how_far_the_best_is_from_the_median_from_chance_and_from_the_defaults():
    trials = [trial("a", 0.12, settings=at(0.1)), trial("b", 0.10, settings=at(0.2)), trial("c", 0.09)]
    text = page(trials, chance=0.08).text
    assert "spread from 9.0% to 12.0%, with a standard deviation of 1.5 points" in text
    assert "the best is 2.0 points ahead of their median, 10.0%" in text
    assert "Chance is 8.0%" in text
    assert "The default settings, trial c, gave 9.0%: 3.0 points behind the best." in text


def test_two_values_within_the_noise_are_said_not_to_be_told_apart():
    apart = "the two are not told apart"
    assert apart in page([trial("a", 0.137), trial("b", 0.134)]).text
    assert apart not in page([trial("a", 0.137), trial("b", 0.120)]).text


def test_fewer_validation_images_tell_less_apart():
    trials = [trial("a", 0.137), trial("b", 0.127)]
    assert "the two are not told apart" not in page(trials, validation_images=700).text
    assert "the two are not told apart" in page(trials, validation_images=100).text


def test_the_best_trial_is_marked_on_the_map():
    marks = page(quiet()).plot("validation mAP over")
    assert len(marks) == 6
    assert [name for name, group in marks.items() if "ring" in classes(group)] == ["best"]
    assert ">best: best</text>" in sweep_page(sweep(quiet()))


def test_no_trial_is_drawn_under_a_worse_one():
    for _, marks in page(quiet()).plots:
        assert list(marks) == ["o0", "o1", "o2", "o3", "o4", "best"]


def test_trials_lie_on_the_map_where_their_settings_are():
    trials = [trial(name, 0.1, settings=at(rate)) for name, rate in (("low", 0.005), ("mid", 0.05), ("high", 0.5))]
    marks = page(trials).plot("validation mAP over")
    left, middle, right = (
        next(float(attrs["cx"]) for attrs in marks[name] if "spot" in attrs.get("class", ""))
        for name in ("low", "mid", "high")
    )
    # The rate is searched in powers, so its middle is the geometric one.
    assert left < middle < right
    assert middle == pytest.approx((left + right) / 2, abs=0.02)


def test_the_colour_on_the_map_is_the_value():
    marks = page([trial("a", 0.10), trial("b", 0.14)]).plot("validation mAP over")
    (low,), (high,) = (
        [attrs["style"] for attrs in marks[name] if "style" in attrs and "spot" in attrs["class"]]
        for name in ("a", "b")
    )
    assert low == f"fill: {viridis(0)}"
    assert high == f"fill: {viridis(1)}"


@pytest.mark.parametrize("state", ["finished", "stopped", "failed", "unfinished"])
def test_how_a_trial_ended_is_seen_by_its_shape(state):
    trials = [*quiet(), trial("t", None if state == "failed" else 0.09, state, error="no memory")]
    shown = page(trials)
    assert state in classes(shown.plot("validation mAP over")["t"])
    assert {"finished": "finished", "stopped": "stopped early"}.get(state, state) in shown.text


def test_a_failed_trial_is_listed_with_its_error():
    trials = [trial("f", None, "failed", error="OutOfMemoryError: worker was killed"), *quiet()]
    html = sweep_page(sweep(trials))
    last = re.findall(r'<tr class="(\w+)">', html)[-1]
    assert last == "failed"
    assert "OutOfMemoryError: worker was killed" in html[html.rindex('<tr class="failed">') :]


def test_markup_in_an_error_is_text():
    html = sweep_page(sweep([*quiet(), trial("f", None, "failed", error=HOSTILE)]))
    assert "<script" not in html
    assert HOSTILE in Page(html).text


def test_markup_anywhere_is_text():
    key, choice = f"{HOSTILE}.a", axis(f"{HOSTILE}.b", scale="choice", choices=[HOSTILE, True], default=HOSTILE)
    trials = [
        trial(f"{HOSTILE}{i}", 0.1 + i / 100, settings={key: 0.01 * (i + 1), choice["key"]: HOSTILE}, model=HOSTILE)
        for i in range(6)
    ]
    axes = [axis(key, meaning=HOSTILE), choice]
    changes = dict.fromkeys(("name", "space_file", "created", "search", "scheduler", "corpus"), HOSTILE)
    objective = {"metric": HOSTILE, "mode": "max"}
    html = sweep_page(sweep(trials, axes, objective=objective, software={HOSTILE: HOSTILE}, **changes))
    assert "<script" not in html
    assert "<img" not in html
    assert html.count("<svg") == html.count("</svg>")


def test_a_long_error_is_shown_whole_once():
    error = "x" * 5000
    assert page([*quiet(), trial("f", None, "failed", error=error)]).text.count(error) == 1


def test_the_leaderboard_goes_by_value_with_failures_last():
    trials = [
        trial("f", None, "failed", error="no memory"),
        trial("u", 0.2, "unfinished"),
        trial("low", 0.10),
        trial("s", 0.11, "stopped", [0.11]),
        trial("high", 0.12),
    ]
    html = sweep_page(sweep(trials))
    rows = re.findall(r'<tr class="\w+"><td>(\d*)</td><th scope="row">(\w+)', html)
    assert rows == [("1", "high"), ("2", "s"), ("3", "low"), ("", "u"), ("", "f")]


def test_where_less_is_better_the_least_leads():
    trials = [trial("low", 0.10), trial("high", 0.12)]
    html = sweep_page(sweep(trials, objective={"metric": "loss", "mode": "min"}, best="low", chance=None))
    assert re.findall(r'<tr class="\w+"><td>1</td><th scope="row">(\w+)', html) == ["low"]
    assert "less is better" in html


def test_every_setting_has_its_column():
    html = sweep_page(sweep(quiet()))
    head = re.search(r"<thead>.*?</thead>", html, flags=re.S).group().replace("<wbr>", "")
    assert RATE in head
    assert THRESHOLD in head
    assert "Error" not in head
    assert "Cosine" not in head


def test_centres_that_collapse_are_in_the_table_where_they_were_measured():
    html = sweep_page(sweep([trial("a", 0.1, centre_cosine=0.93)]))
    assert "<td>0.93</td>" in html
    assert "collapsed onto one point" in html


def test_learning_curves_end_where_a_trial_was_stopped():
    trials = [*quiet(), trial("s", 0.09, "stopped", [0.08, 0.09])]
    curves = page(trials).plot("Learning curves")
    corners = {
        name: len(attrs["points"].split()) for name, marks in curves.items() for attrs in marks if "points" in attrs
    }
    assert (corners["s"], corners["best"]) == (2, 4)
    assert "stopped" in classes(curves["s"])


def test_two_numeric_settings_in_every_combination_are_a_heat_map_with_the_values_written():
    trials = [
        trial(
            f"{row}{column}", 0.1 + row / 100 + column / 1000, settings=at((0.01, 0.05, 0.2)[column], (0.4, 0.6)[row])
        )
        for row in range(2)
        for column in range(3)
    ]
    html = sweep_page(sweep(trials))
    written = re.findall(r'<text class="figure[^>]*>([\d.]+)<', html)
    assert sorted(written) == ["10.0", "10.1", "10.2", "11.0", "11.1", "11.2"]
    marks = Page(html).plot("validation mAP over")
    cells = {name: next(attrs for attrs in group if "cell" in attrs.get("class", "")) for name, group in marks.items()}
    assert float(cells["00"]["x"]) < float(cells["01"]["x"]) < float(cells["02"]["x"])
    # The greater threshold stands above the lesser one, as on any axis.
    assert float(cells["10"]["y"]) < float(cells["00"]["y"])


def test_a_grid_with_a_hole_is_a_scatter():
    trials = [
        trial(str(i), 0.1, settings=at(rate, crop))
        for i, (rate, crop) in enumerate([(0.1, 0.4), (0.1, 0.6), (0.2, 0.4)])
    ]
    assert 'class="figure' not in sweep_page(sweep(trials))


def test_a_failed_cell_of_a_grid_has_no_colour():
    pairs = [(0.1, 0.4), (0.1, 0.6), (0.2, 0.4), (0.2, 0.6)]
    trials = [trial(str(i), 0.1 + i / 100, settings=at(*pair)) for i, pair in enumerate(pairs)]
    trials[0] |= {"state": "failed", "value": None, "error": "no memory"}
    marks = page(trials).plot("validation mAP over")
    assert "empty" in classes(marks["0"])
    assert "empty" not in classes(marks["1"])


def test_one_setting_is_a_plot_of_the_value_against_it():
    trials = [trial(str(i), 0.1 + i / 100, settings={RATE: 0.01 * (i + 1)}) for i in range(4)]
    assert page(trials, [axis()]).labels() == [
        f"validation mAP against {RATE}",
        "Learning curves: validation mAP by epoch",
    ]


def test_three_settings_have_a_plot_each_beside_the_map():
    form = axis("losses.form", scale="choice", low=None, high=None, choices=["margin", "softmax"], default="softmax")
    trials = [trial(str(i), 0.1, settings={**at(0.01 * (i + 1)), "losses.form": "margin"}) for i in range(4)]
    labels = page(trials, [form, axis(), threshold()]).labels()
    assert f"validation mAP over {RATE} and {THRESHOLD}" in labels
    assert [label for label in labels if "against" in label] == [
        f"validation mAP against {key}" for key in ("losses.form", RATE, THRESHOLD)
    ]


def test_a_choice_is_a_strip_for_each_of_its_values_whatever_they_are():
    choices = [True, False, None, 3, "a & b", ["PA"]]
    odd = axis("odd", scale="choice", low=None, high=None, choices=choices, default=None)
    trials = [trial(str(i), 0.1, settings={"odd": choice}) for i, choice in enumerate(choices)]
    html = sweep_page(sweep(trials, [odd]))
    plot = html[html.index('aria-label="validation mAP against odd') :]
    for text in ("true", "false", "null", "3", "a &amp; b", "[&#34;PA&#34;]"):
        assert f">{text}</text>" in plot
    assert len(Page(html).plot("validation mAP against odd")) == len(choices)


def test_trials_without_a_value_stand_at_the_foot():
    shown = page([*quiet(), trial("f", None, "failed", error="no memory")])
    assert "f" in shown.plot(f"validation mAP against {RATE}")
    assert "At the foot: without a value" in shown.text
    assert "At the foot" not in page(quiet()).text


@pytest.mark.parametrize(
    "trials",
    [
        [],
        [trial("one", 0.137)],
        [trial("one", None, "failed", error="no memory")],
        [trial(str(i), None, "failed", error="no memory") for i in range(8)],
        [trial(str(i), None, "unfinished") for i in range(3)],
        [trial(str(i), 0.12) for i in range(30)],
        [trial("odd", math.nan, curve=[math.nan, 0.1]), trial("a", 0.0), trial("b", 1.0)],
        [trial("bare", 0.1, settings={}), trial("text", 0.1, settings={RATE: "fast", THRESHOLD: None})],
    ],
    ids=["none", "one", "one failed", "all failed", "unfinished", "identical", "not a number", "settings missing"],
)
def test_a_page_is_made_of_any_outcome(trials):
    html = sweep_page(sweep(trials, best=trials[0]["id"] if trials and trials[0]["value"] else None))
    assert not {"nan", "inf", "infinity"} & set(re.findall(r"[a-z]+", html.lower()))
    assert all(re.search(rf'<th scope="row">{one["id"]}\b', html) for one in trials)
    assert "What to run next" in html


def test_a_sweep_without_trials_says_so():
    text = page([]).text
    assert "No trial was run." in text
    assert "This sweep holds no trials." in text


def test_the_command_that_trains_the_best_is_given_where_there_is_a_best():
    command = "python -m jobs.train --config best.yaml"
    assert command in page(quiet()).text
    assert "in the same folder as this file" in page(quiet()).text
    assert command not in page([trial("f", None, "failed", error="no memory")]).text


def test_a_hundred_trials_are_all_listed_and_drawn():
    trials = [trial(f"t{i}", 0.1 + i / 5000, settings=at(0.005 * 1.04**i, 0.3 + i / 300)) for i in range(100)]
    html = sweep_page(sweep(trials))
    assert html.count('<th scope="row">') == 100
    assert all(len(marks) == 100 for _, marks in Page(html).plots)


def test_what_was_read_from_json_gives_the_same_page():
    written = sweep([*quiet(), trial("f", None, "failed", error="no memory")])
    assert sweep_page(json.loads(json.dumps(written))) == sweep_page(written)


def test_a_sweep_is_left_as_it_was_given():
    content = sweep(quiet())
    before = json.dumps(content)
    sweep_page(content)
    assert json.dumps(content) == before


@st.composite
def sweeps(draw):
    shape = draw(st.sampled_from(["log", "linear", "choice"]))
    number = st.floats(1e-6, 1e6)
    low, high = sorted(draw(st.tuples(number, number)))
    bounds = {"low": low, "high": high} if shape != "choice" else {"low": None, "high": None}
    choices = draw(st.lists(st.one_of(st.booleans(), st.none(), st.integers(-5, 5), st.text(max_size=40)), max_size=5))
    axes = [axis("x", scale=shape, choices=choices if shape == "choice" else None, **bounds), threshold()]
    value = st.one_of(st.none(), st.floats(0, 1))
    setting = st.one_of(
        st.floats(low, high), st.sampled_from(choices or [None]), st.sampled_from([math.nan, math.inf, -1.5])
    )
    trials = [
        trial(
            f"t{i}",
            draw(value),
            draw(st.sampled_from(["finished", "stopped", "failed", "unfinished"])),
            settings={"x": draw(setting), THRESHOLD: draw(st.floats(0.3, 0.7))},
        )
        for i in range(draw(st.integers(0, 12)))
    ]
    return sweep(trials, axes, chance=draw(value), epochs=draw(st.one_of(st.none(), st.integers(1, 40))))


@given(sweeps())
@settings(max_examples=60)
def test_every_sweep_has_a_page_that_lists_each_trial(given_sweep):
    html = sweep_page(given_sweep)
    assert html.count('<th scope="row">') == len(given_sweep["trials"])
    for _, marks in Page(html).plots:
        for group in marks.values():
            for attrs in group:
                for name in ("cx", "cy", "x", "y"):
                    assert math.isfinite(float(attrs.get(name, 0)))


# Intervals, and what they tell apart.


def test_a_trial_is_told_apart_on_the_same_patients_where_intervals_overlap():
    trials = measured([trial("a", 0.137), trial("b", 0.125), trial("c", 0.136)])
    run = read_trials(sweep(trials))
    assert run.trials[1].interval[1] > run.trials[0].interval[0]
    assert [one.id for one in run.near()] == ["c"]
    text = page(trials).text
    assert "1 of 2 other trials is not told apart from the best" in text
    assert "on the same patients: c." in text
    assert "assumed" not in text


def test_the_margin_is_that_of_the_difference_and_not_of_the_values():
    trials = measured([trial("a", 0.137), trial("b", 0.125)], own=0.002)
    gap = read_trials(sweep(trials)).gap(read_trials(sweep(trials)).trials[1])
    assert gap.paired
    assert gap.size == pytest.approx(0.012)
    assert gap.margin == pytest.approx(1.96 * 0.002 * math.sqrt(2), rel=0.15)


def test_every_trial_is_in_the_table_with_its_interval_and_the_best_on_top_of_the_plot():
    trials = measured(quiet())
    html = sweep_page(sweep(trials))
    assert len(re.findall(r"<td>\d+\.\d to \d+\.\d</td>", html)) == 6
    marks = Page(html).plot("95% intervals")
    heights = {
        name: next(float(one["cy"]) for one in group if "spot" in one.get("class", "")) for name, group in marks.items()
    }
    assert min(heights, key=heights.get) == "best"
    assert all(any(one.get("class") == "whisker" for one in group) for group in marks.values())


def test_a_page_without_measured_intervals_says_that_its_margin_is_assumed():
    text = page(quiet()).text
    assert "intervals were not kept" in text
    assert "a margin that is assumed" in text
    assert "95% intervals" not in text


def test_a_trial_whose_resamples_are_missing_is_compared_by_the_assumed_margin():
    trials = measured([trial("a", 0.137), trial("b", 0.125)])
    trials[1]["resampled"] = []
    run = read_trials(sweep(trials))
    assert not run.paired
    assert not run.gap(run.trials[1]).paired
    assert "intervals were not kept" in page(trials).text


def test_two_trials_that_are_the_same_are_not_told_apart():
    trials = measured([trial("a", 0.137), trial("b", 0.12)])
    trials[1] |= {"value": 0.137, "resampled": trials[0]["resampled"]}
    assert [one.id for one in read_trials(sweep(trials)).near()] == ["b"]


# All settings at once.


def test_every_trial_is_a_line_over_all_settings_to_its_value_in_its_colour():
    lines = page([trial("a", 0.10), trial("b", 0.14), trial("f", None, "failed", error="no memory")]).plot(
        "Every trial"
    )
    threads = {name: next(one for one in group if one.get("class") == "thread") for name, group in lines.items()}
    assert [len(threads[name]["points"].split()) for name in "abf"] == [3, 3, 2]
    assert threads["a"]["style"] == f"stroke: {viridis(0)}"
    assert threads["b"]["style"] == f"stroke: {viridis(1)}"
    assert "failed" in classes(lines["f"])


def test_a_trial_that_lacks_a_setting_has_no_line():
    assert set(page([trial("a", 0.1), trial("b", 0.1, settings={RATE: 0.1})]).plot("Every trial")) == {"a"}


# Which settings matter.


def test_the_setting_that_makes_the_difference_is_the_most_important():
    for value in (lambda rate, _: 0.1 + rate / 50, lambda rate, _: 0.1 - abs(rate - 0.5) / 50):
        found = importances(read_trials(sweep(spread_out(40, value)))).settings
        assert found[0].axis.key == RATE
        assert sum(one.share for one in found) == pytest.approx(1)
        assert all(one.low <= one.high for one in found)


def test_where_less_is_better_the_best_are_the_least():
    def gains(rate, crop):
        return 0.1 + (rate / 50 if rate > 0.7 else 0) + crop / 1e6

    high = importances(read_trials(sweep(spread_out(40, gains))))
    turned = sweep(spread_out(40, lambda rate, crop: 0.3 - gains(rate, crop)), objective={"metric": "x", "mode": "min"})
    assert [one.share for one in importances(read_trials(turned)).settings] == pytest.approx(
        [one.share for one in high.settings]
    )


def test_few_trials_tell_no_importance_and_the_page_says_why():
    few = spread_out(ENOUGH - 1, lambda rate, _: 0.1 + rate / 50)
    assert importances(read_trials(sweep(few))).settings == ()
    text = page(few).text
    assert f"No importance is shown: {ENOUGH - 1} trials with a value are too few" in text
    assert f"needs {ENOUGH} trials" in text
    assert importances(read_trials(sweep(spread_out(ENOUGH, lambda rate, _: 0.1 + rate / 50)))).settings


def test_equal_values_tell_no_importance():
    assert "all trials have the same value" in page(spread_out(20, lambda *_: 0.1)).text


def test_importance_is_shown_with_its_spread_over_trials():
    html = sweep_page(sweep(spread_out(20, lambda rate, _: 0.1 + rate / 50)))
    section = html[html.index("Which settings matter") : html.index("What was searched")]
    assert "resamples of the 20 trials" in section
    assert len(re.findall(r"<td>\d+ to \d+</td>", section)) == 2


def test_a_sweep_of_one_setting_has_no_importance():
    assert "Which settings matter" not in page(along(20, scattered), [threshold()]).text


def test_advice_does_not_fix_what_is_important():
    def gated(rate, crop):
        return 0.1 + (0.02 if abs(crop - 0.5) < 0.15 else 0.0) + rate / 1e5

    assert "Fix network.crop_threshold" not in advice(spread_out(40, gated))


# What was searched, and what it cost.


def test_the_page_says_what_was_searched_how_and_within_which_budget():
    shared = {"losses.contrastive_from": 0}
    text = cells(sweep_page(sweep(quiet(), planned=16, reduction=3, grace_epochs=1, settings=shared)))
    assert "16 points, drawn at random, every setting on its own (seed 0)." in text
    assert "A trial has 4 epochs of 4,781 training images, the sweep 64 epochs at most." in text
    assert "after 1 and 3 epochs only the best one in 3 of those that came so far goes on" in text
    assert "All trials share losses.contrastive_from = 0, which the best config does not take over." in text
    assert "0.005 to 0.5 evenly over powers 0.02 to 0.06" in text


def test_a_grid_and_a_search_that_nobody_stops_are_called_so():
    text = page(quiet(), search="grid", scheduler="none").text
    assert "every combination of the choices once" in text
    assert "No trial is stopped early." in text


def test_costs_are_in_the_table_and_added_up():
    trials = [trial("a", 0.12, seconds=3600, images=4000), trial("b", 0.11, seconds=1800, images=2000)]
    text = cells(sweep_page(sweep(trials, trial_cpus=1.5, trial_gpus=2)))
    assert "2 trials took 90 min added up, 6,000 training images, 2.25 CPU-hours held and 3.00 GPU-hours held." in text
    assert "60 min 4,000 1.50 2.00" in text
    assert "All 8 90 min 6,000 2.25 3.00" in text
    assert "GPU" not in page(trials, trial_cpus=1.5, trial_gpus=0).text


def test_what_early_stopping_saved_is_said_to_be_estimated():
    trials = [trial("a", 0.12, seconds=400), trial("s", 0.09, "stopped", [0.09], seconds=100)]
    text = page(trials).text
    assert "Stopping 1 trial early saved about 5 min, 38% of what all of them would have taken: an estimate" in text
    assert "saved" not in page(quiet()).text


def test_what_failed_trials_took_is_told():
    failed = trial("f", None, "failed", error="no memory", seconds=50)
    assert "50 s of it went to trials that failed." in page([*quiet(), failed]).text


# What to run next.


def test_where_nothing_is_amiss_nothing_is_advised():
    assert next_steps(sweep(quiet())) == []
    assert "Nothing in these trials asks for another sweep" in page(quiet()).text


@pytest.mark.parametrize("count", range(5))
def test_of_fewer_than_five_trials_only_that_is_said(count):
    edge = [trial(str(i), 0.1, settings=at(0.5, 0.7), curve=[0.08, 0.1]) for i in range(count)]
    (step,) = next_steps(sweep(edge))
    assert "too few to say more" in step
    assert "too few" not in advice(quiet(5))


def test_failures_are_to_be_mended_first():
    failed = [
        trial(f"f{i}", None, "failed", error=error) for i, error in enumerate(["no memory", "no memory", "no disk"])
    ]
    steps = next_steps(sweep([*quiet(), *failed]))
    assert steps[0].startswith("Mend what failed")
    assert "3 of 9 trials failed, most often with: no memory" in steps[0]
    assert "failed" not in advice(quiet())


@pytest.mark.parametrize(
    ("rate", "said"),
    [
        (0.48, "Widen losses.centre_rate upwards, to between 0.005 and 1:"),
        (0.0051, "Widen losses.centre_rate downwards, to between 0.0005 and 0.5:"),
        (0.05, None),
        (0.2, None),
    ],
)
def test_a_best_at_the_edge_of_an_axis_widens_it_in_that_direction(rate, said):
    found = advice([trial("edge", 0.14, settings=at(rate)), *quiet()])
    assert said in found if said else "Widen" not in found


@pytest.mark.parametrize(("crop", "bound"), [(0.69, "0.3 and 0.9"), (0.31, "0.1 and 0.7")])
def test_an_even_axis_is_widened_by_half_its_range(crop, bound):
    found = advice([trial("edge", 0.14, settings=at(0.05, crop)), *quiet()])
    assert f"Widen network.crop_threshold {'upwards' if crop > 0.5 else 'downwards'}, to between {bound}:" in found


def test_an_axis_that_ends_where_its_setting_does_is_not_widened():
    widest = axis(high=1.0)
    assert "Widen" not in advice([trial("edge", 0.14, settings=at(1.0)), *quiet()], [widest, threshold()])


@given(st.floats(0.001, 0.999), st.floats(0.001, 0.999), st.booleans(), st.sampled_from(["log", "linear"]))
def test_new_bounds_are_further_out_and_allowed(one, other, up, scale):
    low, high = sorted((one, other))
    assume(high > 1.001 * low)
    for key in (RATE, THRESHOLD):
        edge = trial("edge", 0.14, settings={key: high if up else low})
        middle = math.sqrt(low * high)
        others = [trial(str(i), 0.1, settings={key: middle}) for i in range(5)]
        found = advice([edge, *others], [axis(key, scale=scale, low=low, high=high)])
        bounds = [float(bound) for bound in re.search(r"to between (\S+) and (\S+):", found).groups()]
        assert bounds[1] > high if up else bounds[0] < low
        for bound in bounds:
            validate({key: (bound, "the new space")})


def test_whole_numbers_are_widened_to_whole_numbers():
    steps = axis("network.dimensions", scale="linear", low=16, high=64, default=32)
    trials = [trial(str(i), 0.1 + i / 100, settings={"network.dimensions": 14 + 10 * i}) for i in range(6)]
    assert "to between 16 and 88:" in advice(trials, [steps])


def test_the_greatest_of_numeric_choices_asks_for_greater_ones():
    sizes = axis("network.dimensions", scale="choice", low=None, high=None, choices=[32, 64, 128], default=64)
    trials = [trial(str(i), 0.1 + i / 100, settings={"network.dimensions": (32, 64, 128)[i % 3]}) for i in range(6)]
    assert "Try choices of network.dimensions above 128" in advice(trials, [sizes])
    trials[4]["value"] = 0.5
    assert "Try choices" not in advice(trials, [sizes])


def test_a_choice_that_is_no_number_has_no_edge():
    flag = axis("training.jigsaw", scale="choice", low=None, high=None, choices=[False, True], default=False)
    trials = [trial(str(i), 0.1 + i / 100, settings={"training.jigsaw": bool(i % 2)}) for i in range(6)]
    assert not re.search("Widen|Try choices", advice(trials, [flag]))


def test_trials_within_the_noise_of_the_best_are_repeated_with_other_seeds():
    found = advice([*quiet(), trial("rival", 0.1345)])
    assert "Repeat trials best and rival with other seeds" in found
    assert "Repeat" not in advice([*quiet(), trial("rival", 0.12)])


def test_advice_repeats_those_that_the_intervals_do_not_tell_apart():
    trials = measured([*quiet(), trial("rival", 0.1345)], own=0.003)
    assert "Repeat trials best and rival with other seeds (seed=1, seed=2): 2 trials are not told apart" in advice(
        trials
    )
    assert "Repeat" not in advice(measured(trials, own=0.0001))


def test_a_best_whose_interval_holds_chance_chooses_no_setting():
    assert "Find out why nothing is learnt" in advice(measured(quiet(), spread=0.05), chance=0.1)
    assert "Find out" not in advice(measured(quiet(), spread=0.01), chance=0.1)


def test_of_many_within_the_noise_only_the_first_few_are_repeated():
    found = advice([trial(f"t{i:02d}", 0.137 - i / 100000) for i in range(20)])
    assert f"Repeat the {REPEATS} best trials, t00, t01, t02, t03 and t04, with other seeds" in found
    assert "20 trials lie within" in found


def test_values_that_still_rise_ask_for_more_epochs():
    rising = [trial(str(i), 0.12 + i / 50, curve=[0.1, 0.11, 0.12 + i / 50]) for i in range(5)]
    assert "Train longer, for 6 epochs instead of 3: 5 of 5 finished trials" in advice(rising)


def test_one_late_peak_among_many_does_not_ask_for_more_epochs():
    late = trial("late", 0.15, curve=[0.1, 0.11, 0.15])
    assert "Train longer" not in advice([late, *quiet()])


def test_late_peaks_of_others_do_not_ask_for_more_epochs_where_the_best_had_peaked():
    rising = [trial(str(i), 0.12, curve=[0.1, 0.11, 0.12]) for i in range(5)]
    assert "Train longer" not in advice([trial("best", 0.15), *rising])


def stopped(count, epochs):
    return [trial(f"s{i}", 0.09, "stopped", [0.09] * epochs) for i in range(count)]


def test_most_trials_stopped_at_the_first_rung_ask_for_a_larger_grace():
    assert "a grace of 2 epochs: 7 of 13 trials were stopped after 1 epoch" in advice([*quiet(), *stopped(7, 1)])
    assert "grace" not in advice([*quiet(), *stopped(3, 1)])


def test_a_grace_that_leaves_no_epoch_to_save_is_not_asked_for():
    assert "a grace of 3 epochs" in advice([*quiet(), *stopped(7, 2)])
    assert "grace" not in advice([*quiet(), *stopped(7, 3)])


def along(count, value):
    """Trials along the crop threshold, with the value that a share of its range gives; rates do not move with it."""
    return [
        trial(f"t{i:02d}", value(i / (count - 1)), settings=at(0.05, 0.3 + 0.4 * i / (count - 1))) for i in range(count)
    ]


def scattered(share):
    return 0.12 + 0.02 * ((share * 997) % 1 - 0.5)


def test_a_setting_without_visible_effect_is_fixed_at_its_default():
    found = advice(along(40, scattered), [threshold()])
    assert "Fix network.crop_threshold at its default, 0.5" in found
    assert "over 40 trials" in found


@pytest.mark.parametrize(
    "value",
    [
        lambda share: 0.1 + 0.02 * share,
        lambda share: 0.12 - 0.02 * share,
        lambda share: 0.12 - 0.1 * (share - 0.5) ** 2,
    ],
    ids=["rising", "falling", "best in the middle"],
)
def test_a_setting_with_an_effect_is_not_fixed(value):
    assert "Fix" not in advice(along(40, value), [threshold()])


def test_few_trials_do_not_show_that_a_setting_has_no_effect():
    assert "Fix" not in advice(along(ENOUGH_FOR_EFFECT - 1, scattered), [threshold()])


def test_identical_values_show_nothing_of_any_setting():
    assert "Fix" not in advice(along(40, lambda _: 0.12), [threshold()])


def test_a_setting_without_effect_is_not_widened_too():
    trials = along(40, scattered)
    trials[-1] |= {"value": 0.14}
    found = advice(trials, [threshold()])
    assert "Fix network.crop_threshold" in found
    assert "Widen" not in found


def test_a_best_that_is_no_better_than_chance_chooses_no_setting():
    trials = [trial("edge", 0.14, settings=at(0.5)), *quiet()]
    (step,) = next_steps(sweep(trials, chance=0.138))
    assert step.startswith("Find out why nothing is learnt")
    assert "Find out" not in advice(trials, chance=0.1)
    assert "Find out" not in advice(trials, chance=None)


def test_defaults_that_were_never_tried_are_to_be_tried():
    trials = [trial(str(i), 0.1 + i / 100, settings=at(0.02)) for i in range(6)]
    assert "Run the default settings as a trial (losses.centre_rate = 0.05, network.crop_threshold = 0.5)" in advice(
        trials
    )
    assert "default settings" not in advice(quiet())


@given(st.permutations(range(8)))
@settings(max_examples=20)
def test_advice_does_not_depend_on_the_order_of_trials(order):
    trials = [trial(f"t{i}", 0.1 + i / 300, settings=at(0.006 * (i + 1), 0.3 + i / 20)) for i in range(8)]
    assert next_steps(sweep([trials[i] for i in order])) == next_steps(sweep(trials))


# What the plots are made of.


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [(0.005, 0.5, True), (0.04, 0.06, True), (1e-6, 1e6, True), (0.3, 0.8, False), (16, 64, False), (-3, 4, False)],
)
def test_an_axis_of_numbers_has_a_few_grid_lines_between_its_ends(low, high, log):
    made = number_axis("key", "what it is", [high, low], log)
    assert (made.low, made.high) == (low, high)
    assert 2 <= len(made.ticks) <= 8
    assert all(-1e-6 <= made.share(value) <= 1 + 1e-6 for value, _ in made.ticks)
    assert len({text for _, text in made.ticks}) == len(made.ticks)


@pytest.mark.parametrize("log", [True, False])
def test_an_axis_of_one_number_has_it_in_its_middle(log):
    assert number_axis("key", "", [0.05], log).share(0.05) == pytest.approx(0.5)


def test_the_colours_grow_lighter_from_the_least_to_the_greatest():
    def lightness(colour):
        red, green, blue = bytes.fromhex(colour[1:])
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    shades = [lightness(viridis(i / 50)) for i in range(51)]
    assert shades == sorted(shades)
    assert (viridis(-1), viridis(2)) == (viridis(0), viridis(1))


def test_a_colour_bar_writes_its_figures_beside_their_colours():
    values = percent_axis("mAP", [0.10, 0.14])
    area = plane(choice_axis("x", "", ["a"]), values, 400, 300, beside=80)
    bar = colour_bar(values, area)
    assert (bar.levels[0].y, bar.levels[-1].y) == (area.bottom, area.top)
    assert bar.strips[0][2] != bar.strips[-1][2]
    assert sum(tall for _, tall, _ in bar.strips) >= area.bottom - area.top


def test_long_names_of_choices_are_shortened_to_their_room():
    area = plane(choice_axis("x", "", ["n" * 60] * 8), percent_axis("mAP", []), 500, 300)
    width = (area.right - area.left) / 8
    assert all(len(tick.text) * 6 <= width for tick in area.columns)
