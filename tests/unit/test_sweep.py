"""Promises about what a sweep may look at: refused in one line before it starts, and the same points every time."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_retrieval import storage
from cxr_retrieval.config import Settings, TrainingSettings, dump_settings, load_settings, with_values
from cxr_retrieval.errors import UserError
from cxr_retrieval.evaluation.retrieval import retrieve
from cxr_retrieval.evaluation.tables import chance_levels
from cxr_retrieval.training import sweep, validation
from cxr_retrieval.training.space import Axis, Space, best_settings, check_space, read_space
from cxr_retrieval.training.sweep import trials_at_once

SPACES = sorted((Path(__file__).parents[2] / "tune_spaces").glob("*.yaml"))
CENTRE = {"losses.centre_rate": {"log_uniform": [0.01, 0.5]}}


def space(tmp_path: Path, **values: Any) -> Space:
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump({"name": "x", "space": CENTRE} | values))
    return read_space(str(file))


def test_the_four_spaces_that_come_with_it_are_there() -> None:
    assert [file.stem for file in SPACES] == ["centers", "crop", "joint", "smoke"]
    searched = {key for file in SPACES for key in read_space(str(file)).space}
    assert {"losses.centre_rate", "network.crop_threshold"} <= searched


@pytest.mark.parametrize("file", SPACES, ids=lambda file: file.stem)
def test_what_a_space_searches_is_at_work_within_its_budget(file: Path) -> None:
    """A trial is short: what joins late in a full run must join at once in it, or the search sees nothing of it."""
    found = read_space(str(file))
    if any(key.startswith("losses.c") for key in found.space):
        assert found.settings["losses.contrastive_from"] == 0
    if any(key.startswith("network.crop") for key in found.space):
        assert found.settings["training.crop_from"] == 0


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"space": {}}, "space: dictionary should have at least 1 item"),
        ({"space": {"losses.centre_rate": {}}}, "exactly one of uniform, log_uniform, integers, choice"),
        ({"space": {"losses.centre_rate": {"uniform": [0.5, 0.1]}}}, "a lower and a higher bound"),
        ({"space": {"losses.centre_rate": {"log_uniform": [0, 0.1]}}}, "bounds above 0"),
        ({"space": {"losses.centre_rate": {"choice": [0.1]}}}, "two values or more"),
        ({"space": {"losses.centre_rate": {"normal": [0, 1]}}}, "extra inputs are not permitted"),
        ({"search": "grid"}, "grid needs a choice for every setting"),
        ({"grace_epochs": 5, "epochs": 4}, "grace_epochs is more than epochs"),
        ({"space": {"corpus.size": {"choice": [64, 128]}}}, "corpus.size cannot be searched"),
        ({"settings": {"training.epochs": 3}}, "training.epochs is the budget"),
        ({"space": {"training.unseen": {"choice": [[], ["Mass"]]}}}, "judged on different images"),
        ({"search": "bayes"}, "input should be 'random', 'grid' or 'optuna'"),
        ({"trails": 3}, "trails: extra inputs are not permitted"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused_in_one_line(values: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        space(tmp_path, **values)
    assert told in str(caught.value)
    assert "space.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_space_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_space(str(tmp_path / "none.yaml"))
    for text in ("a: [", "- 1", ""):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=r"tune space .*bad\.yaml") as caught:
            read_space(str(tmp_path / "bad.yaml"))
        assert "\n" not in str(caught.value)


@settings(max_examples=40)
@given(st.integers(0, 1000), st.floats(0.001, 0.5), st.floats(0.001, 0.4))
def test_points_lie_in_the_space_and_are_the_same_every_time(seed: int, low: float, width: float) -> None:
    axes = {
        "losses.centre_rate": Axis(log_uniform=(low, low + width)),
        "network.steps": Axis(integers=(1, 3)),
        "network.crop_threshold": Axis(uniform=(low, low + width)),
        "losses.form": Axis(choice=["margin", "softmax"]),
    }
    found = Space(name="x", trials=7, seed=seed, space=axes)
    points = found.points()
    assert points == found.points()
    assert len(points) == 7
    for point in points:
        assert low <= point["losses.centre_rate"] <= low + width
        assert low <= point["network.crop_threshold"] <= low + width
        assert point["network.steps"] in (1, 2, 3)
        assert point["losses.form"] in ("margin", "softmax")
        assert all(type(value) in (int, float, str) for value in point.values()), "YAML and JSON write them"


def test_a_grid_has_every_combination_once() -> None:
    axes = {"losses.centre_rate": Axis(choice=[0.1, 0.2]), "network.steps": Axis(choice=[1, 2, 3])}
    points = Space(name="x", search="grid", space=axes).points()
    assert len(points) == 6
    assert {(p["losses.centre_rate"], p["network.steps"]) for p in points} == {
        (rate, steps) for rate in (0.1, 0.2) for steps in (1, 2, 3)
    }


@pytest.mark.parametrize(
    ("training", "nodes", "gpus", "trials"),
    [
        ({}, [2], 0, 2),
        ({"workers": 2}, [2], 0, 1),
        ({"workers": 2, "cpus_per_worker": 4.0, "gpu": True}, [64], 8, 4),
        ({"workers": 2, "cpus_per_worker": 4.0, "gpu": True}, [20], 8, 2),
        ({"workers": 2, "cpus_per_worker": 0.8}, [1, 1, 1, 1], 0, 1),  # two would leave no node that can read
    ],
)
def test_as_many_trials_run_as_the_cluster_holds(training: Any, nodes: list[float], gpus: float, trials: int) -> None:
    assert trials_at_once(TrainingSettings(**training), nodes, gpus) == trials


def test_a_trial_that_fits_nowhere_is_refused_with_the_numbers() -> None:
    with pytest.raises(UserError, match=r"training\.workers=4.*CPUs of the nodes: 2; 0 GPUs"):
        trials_at_once(TrainingSettings(workers=4), [2], 0)
    with pytest.raises(UserError, match=r"training\.gpu=true.*0 GPUs"):
        trials_at_once(TrainingSettings(gpu=True), [64], 0)
    with pytest.raises(UserError, match="CPUs of the nodes: 1, 1"):  # enough of them, but none is left to read
        trials_at_once(TrainingSettings(workers=2, cpus_per_worker=0.8), [1, 1], 0)
    with pytest.raises(UserError, match="CPUs of the nodes: 4, 4"):  # enough of them, but no node holds a worker
        trials_at_once(TrainingSettings(cpus_per_worker=5), [4, 4], 0)


def test_the_best_point_is_a_config_that_train_takes_without_what_the_small_budget_asked_for(tmp_path: Path) -> None:
    found = space(tmp_path, settings={"losses.contrastive_from": 0, "losses.smoothing": 0.1}, epochs=2)
    mine = load_settings((), [f"workspace={tmp_path}", "training.epochs=40", "losses.contrastive_from=0.6"])
    searched = sweep.Sweep(found, str(tmp_path / "space.yaml"), mine, prepared(1))
    point = {"losses.centre_rate": 0.037}
    trial = searched.trial_settings(point)
    assert (trial.losses.centre_rate, trial.losses.contrastive_from, trial.training.epochs) == (0.037, 0, 2)
    file = tmp_path / "best.yaml"
    file.write_text(dump_settings(searched.best_settings(point)))
    assert load_settings([str(file)]) == with_values(mine, {**point, "losses.smoothing": 0.1}, "x")
    with pytest.raises(UserError, match=r"losses\.centre_rate=3.*space\.yaml.*less than or equal to 1"):
        searched.best_settings({"losses.centre_rate": 3})


def trial_that_ended(number: int, values: list[float], rate: float) -> dict[str, Any]:
    curve = [{"epoch": epoch, "value": value, "chance": 0.1} for epoch, value in enumerate(values, start=1)]
    settings = {"losses.centre_rate": rate}
    return {"id": f"{number:05d}", "curve": curve, "value": max(values), "joined": True, "settings": settings}


def test_a_sweep_that_goes_on_compares_with_the_trials_that_ended_before() -> None:
    space = Space(name="x", epochs=4, reduction=2, space={"losses.centre_rate": Axis(uniform=(0.0, 1.0))})
    before = [trial_that_ended(number, [0.3 + number / 100, 0.4], 0.1 * number) for number in range(4)]
    for value, action in ((0.2, "STOP"), (0.5, "CONTINUE")):
        asha: Any = sweep._scheduler(space, before)
        new = SimpleNamespace(trial_id="new")
        asha.on_trial_add(None, new)
        assert asha.on_trial_result(None, new, {"epoch": 1, "value": value}) == action


class Named(sweep.Sweep):
    """A sweep that needs no corpus for its name."""

    @property
    def folder(self) -> str:
        return f"{self.settings.workspace}/runs/x"


def test_optuna_knows_what_ended_before_and_gives_out_first_what_had_begun(tmp_path: Path) -> None:
    axes = {"losses.centre_rate": Axis(uniform=(0.0, 1.0))}
    space = Space(name="x", search="optuna", trials=5, space=axes)
    settings = Settings(workspace=str(tmp_path))
    one = Named(space, "space.yaml", settings, None)  # type: ignore[arg-type]
    fresh = sweep._Optuna(one, {}, range(5))
    before = {0: trial_that_ended(0, [0.3], 0.25), 3: trial_that_ended(3, [0.4], 0.75)}
    begun = {"losses.centre_rate": 0.625}
    storage.write_bytes(f"{one.folder}/point-00002.json", json.dumps(begun).encode())  # cut off before it ended
    going_on = sweep._Optuna(one, before, [1, 2, 4])
    for searcher in (fresh, going_on):
        searcher.set_search_properties(None, None, {key: axis.domain for key, axis in axes.items()})
    known = [(trial.params, trial.value) for trial in going_on._ot_study.get_trials()]
    assert known == [({"losses.centre_rate": 0.25}, 0.3), ({"losses.centre_rate": 0.75}, 0.4)]
    suggested = [going_on.suggest(str(n))["trial"] for n in range(3)]
    assert [number for number, _ in suggested] == [2, 1, 4]
    assert suggested[0][1] == begun, "what had begun is the same trial"
    first = fresh.suggest("0")["trial"][1]["losses.centre_rate"]
    rates = [point["losses.centre_rate"] for _, point in suggested]
    assert len({first, *rates}) == 4, "a sweep that goes on does not begin with the points that it began with"
    assert all(type(rate) is float and 0 <= rate <= 1 for rate in rates)


def prepared(images: int) -> Any:
    """A corpus of which only counts are known."""
    manifest = {"splits": {"train": {"images": images}, "validation": {"images": 1}}}
    return SimpleNamespace(artifact=SimpleNamespace(manifest=manifest, input_id="corpus"))


def test_the_best_trial_is_none_that_failed() -> None:
    space = Space(name="x", epochs=2, space={"losses.centre_rate": Axis(uniform=(0.0, 1.0))})
    trials = [
        trial_that_ended(0, [0.3], 0.1) | {"state": "finished"},
        trial_that_ended(1, [0.9], 0.2) | {"state": "failed"},
    ]
    facts = sweep._facts(sweep.Sweep(space, "space.yaml", Settings(), prepared(1)), trials)
    assert (facts["best"], facts["chance"]) == ("00000", 0.1)
    assert sweep._facts(sweep.Sweep(space, "space.yaml", Settings(), prepared(1)), trials[1:])["best"] is None


def test_a_sweep_keeps_what_was_searched_and_what_a_trial_held_of_the_cluster() -> None:
    rate = {"losses.centre_rate": Axis(uniform=(0.0, 1.0))}
    space = Space(name="x", trials=9, reduction=4, settings={"training.crop_from": 0}, space=rate)
    base = load_settings((), ["training.workers=2", "training.cpus_per_worker=1.5", "training.gpu=true"])
    facts = sweep._facts(sweep.Sweep(space, "space.yaml", base, prepared(100)), [])
    assert (facts["planned"], facts["reduction"], facts["settings"]) == (9, 4, {"training.crop_from": 0})
    assert (facts["trial_cpus"], facts["trial_gpus"]) == (3.3, 2)


def test_a_trial_keeps_its_images_and_its_value_in_resamples_of_the_patients() -> None:
    space = Space(name="x", epochs=3, space={"losses.centre_rate": Axis(uniform=(0.0, 1.0))})
    base = load_settings((), ["training.batch_size=32"])
    searched = sweep.Sweep(space, "space.yaml", base, prepared(100))
    curve = [{"epoch": epoch, "value": epoch / 10, "centre_cosine": 0.1, "joined": True} for epoch in (1, 2)]
    result = {"curve": json.dumps(curve), "resampled": json.dumps([0.19, 0.21]), "time_total_s": 12.34}
    config = {sweep.TRIAL: (3, {"losses.centre_rate": 0.1})}
    trial = sweep._trial(searched, config, result, None)
    assert (trial["state"], trial["images"], trial["resampled"]) == ("stopped", 2 * 96, [0.19, 0.21])
    failed = sweep._trial(searched, config, {}, "no memory")
    assert (failed["images"], failed["resampled"]) == (0, [])


def test_a_trials_value_is_of_an_epoch_that_training_would_keep() -> None:
    space = Space(name="x", epochs=3, space={"losses.centre_rate": Axis(uniform=(0.0, 1.0))})
    searched = sweep.Sweep(space, "space.yaml", Settings(), prepared(100))

    def trial(number: int, *epochs: tuple[float, bool]) -> dict[str, Any]:
        curve = [
            {"epoch": epoch, "value": value, "centre_cosine": 0.1, "joined": joined, "chance": 0.1}
            for epoch, (value, joined) in enumerate(epochs, start=1)
        ]
        return sweep._trial(searched, {sweep.TRIAL: (number, {})}, {"curve": json.dumps(curve)}, None)

    whole, cut_short = trial(0, (0.5, False), (0.3, True), (0.2, True)), trial(1, (0.6, False))
    assert (whole["value"], whole["value_epoch"]) == (0.3, 2), "before, crop or CCLoss was not trained"
    assert cut_short["value"] == 0.6, "what its curve shows is not lost"
    assert sweep._facts(searched, [whole, cut_short])["best"] == "00000", "nor is it ahead of what was trained"


def test_resamples_are_of_patients_who_count_and_the_same_in_every_run() -> None:
    chance = torch.Generator().manual_seed(1)
    vectors = torch.nn.functional.normalize(torch.randn(40, 8, generator=chance), dim=1)
    labels = (torch.rand(40, 3, generator=chance) > 0.6).long()
    patients = torch.arange(40) // 2

    def resampled(vectors: torch.Tensor, labels: torch.Tensor) -> tuple[list[float], float]:
        query = (labels == 1).any(1)
        figures = retrieve(vectors[query], vectors, labels[query], labels, patients[query], patients)
        return validation._resampled(figures, patients[query]), validation._headline(figures)["map"]

    found, value = resampled(vectors, labels)
    assert len(found) == validation.RESAMPLES
    assert sum(found) / len(found) == pytest.approx(value, abs=0.02)
    turned = -vectors[:, [1, 0, *range(2, 8)]]
    assert resampled(turned, labels)[0] == found, "a turned space ranks the same, and is resampled the same"
    alone = torch.zeros_like(labels)
    alone[0, 0] = 1  # nobody else has the finding of the only query
    assert resampled(vectors, alone) == ([], 0.0)


def test_points_that_optuna_may_choose_are_checked_before_anything_starts() -> None:
    space = Space(
        name="x",
        search="optuna",
        space={"training.lanes": Axis(integers=(2, 8)), "training.learning_rate": Axis(uniform=(0.1, 0.2))},
    )
    settings = load_settings((), ["training.batch_size=16"])
    with pytest.raises(UserError, match=r"training\.batch_size"):  # lanes of 2 and 8 are its corners, and fit
        check_space(space, "space.yaml", settings)


def test_what_won_under_the_settings_of_a_space_is_trained_under_them(tmp_path: Path) -> None:
    axis = {"losses.no_finding": {"choice": ["ignore", "negatives_only"]}}  # the second needs the margin form
    found = space(tmp_path, search="grid", settings={"losses.form": "margin"}, space=axis)
    check_space(found, "space.yaml", Settings())
    best = best_settings(Settings(), found, "space.yaml", {"losses.no_finding": "negatives_only"})
    assert (best.losses.form, best.losses.no_finding) == ("margin", "negatives_only")
    with pytest.raises(UserError, match=r"negatives_only needs losses\.form=margin"):
        check_space(space(tmp_path, search="grid", space=axis), "space.yaml", Settings())


def test_every_figure_of_an_epoch_has_its_chance_level() -> None:
    generator = torch.Generator().manual_seed(1)
    vectors = torch.nn.functional.normalize(torch.randn(40, 8, generator=generator), dim=1)
    labels, patients = (torch.rand(40, 3, generator=generator) > 0.6).long(), torch.arange(40)
    query = (labels == 1).any(1)
    figures = retrieve(vectors[query], vectors, labels[query], labels, patients[query], patients)
    told, chance = validation._headline(figures), chance_levels(figures)
    for name, value_Q in (("recall_at_8", chance.recall[:, -1]), ("precision_at_8", chance.precision[:, -1])):
        assert told[f"chance_{name}"] == pytest.approx(float(value_Q.mean()))
    nobody = retrieve(vectors[:1], vectors, labels[:1] * 0, labels * 0, patients[:1], patients)
    assert validation._headline(nobody) == dict.fromkeys(told, 0.0)
