"""Every benchmark runs, small, and writes what it measured in the agreed form."""

import contextlib
import importlib
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import archive, claim, index_peers, losses
from benchmarks.contest import CURVE_POINTS, EVALUATED
from cxr_retrieval.config import LossSettings

SMALL = {
    "prepare": {"IMAGES": 128 * (os.cpu_count() or 1), "PARTS": 4, "SIDE": 128, "SIZE": 64, "ROUNDS": 1},
    "resume": {"IMAGES": 160, "SIDE": 128, "SIZE": 64, "PARTS": 10},
    "memory": {
        "IMAGES": 16,
        "PART": 8,
        "SIDE": 128,
        "TIMES": 2,
        "ROUNDS": 1,
        "KINDS": {},
        "WITH_MODEL": {"embed and evaluate": ("evaluate", "all_test", [])},
    },
    "listing": {"IMAGES": 3000, "TIMES": 2, "ROUNDS": 1, "PART": 32, "SIDE": 128, "DRAWN": 8},
    "embed": {"IMAGES": 32 * (os.cpu_count() or 1), "PART": 16, "SIDE": 128, "BATCH": 16, "ROUNDS": 1},
    "input": {"IMAGES": 120, "SIDE": 128, "ROUNDS": 1, "EPOCHS": 1},
    "workers": {"IMAGES": 160, "SIDE": 128, "ROUNDS": 1, "STEPS": 1, "ROWS": 8},
    "phantom_auc": {"IMAGES": 150, "SIDE": 128, "STEPS": 20, "VALIDATION_SHARE": 0.1},
    "serve": {"IMAGES": 48, "SIDE": 128, "CLIENTS": 4, "SEARCHES": 1, "ROUNDS": 1},
    "ccloss_speed": {"SIZES": (128, 256, 512), "MOST_PAIRED": 256, "ROUNDS": 1},
    "object_storage": {"IMAGES": 48, "SIDE": 128, "SIZE": 64, "PART": 48, "ROUNDS": 1},
    "index_peers": {
        "ROWS": 6000,
        "DIMENSIONS": 16,
        "QUERIES": 20,
        "SHARD_ROWS": 2500,
        "CLUSTERS": 10,
        "LATENCY_MS": 0.01,
        "ROUNDS": 1,
    },
    "search": {"ROUNDS": 1},
    "open_version": {
        "SHARDS": 2,
        "SIZES": {"faiss": 1000, "rows": 1000, "sidecar": 1000, "thumbnails": 100_000},
        "ROUNDS": 1,
    },
}


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_writes_its_claim_with_what_it_was_measured_against(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    for constant, value in SMALL[name].items():
        monkeypatch.setattr(module, constant, value)
    if name == "search":
        for constant, value in SMALL["index_peers"].items():
            monkeypatch.setattr(index_peers, constant, value)
    if name == "object_storage":  # the server of this session, which its Ray's workers know
        request.getfixturevalue("faults")
        monkeypatch.setattr(module, "running", lambda _: contextlib.nullcontext(SimpleNamespace(variables={})))
    monkeypatch.setattr(claim, "RESULTS", tmp_path)
    monkeypatch.setattr(archive, "RESULTS", tmp_path)
    module.main()
    claims = json.loads((tmp_path / f"{name}.json").read_text())
    assert claims
    for written in claims:
        _check(written)


def _check(written: dict[str, Any]) -> None:
    assert {"claim", "against", "ratio", "target", "holds", "samples", "machine"} <= set(written)
    assert written["ratio"] > 0
    assert written["holds"] == (written["ratio"] >= written["target"])


def test_every_benchmark_has_a_small_run_in_the_tests() -> None:
    parts = {"__init__", "claim", "archive", "contest", "job", "peers"}
    modules = {path.stem for path in Path(claim.__file__).parent.glob("*.py")} - parts
    assert modules == {*SMALL, "losses"}


def test_the_claims_about_peers_tell_the_recall_that_was_reached_and_the_bytes_on_disk() -> None:
    def measured(name: str, size: int, recall: float) -> Any:
        found = index_peers.Measured(SimpleNamespace(name=name, target=1.0), bytes=size, builds=[2.0])  # type: ignore[arg-type]
        found.rounds = [index_peers.Searched(index_peers.Setting(1, 1), recall, np.array([1e-3]))]
        return found

    search, build = index_peers.claims("rows", measured("ours", 3_000_000, 0.96), measured("other", 5_000_000, 0.99))
    assert search.figures["ours_recall_percent"] == pytest.approx(96)
    assert search.figures["other_recall_percent"] == pytest.approx(99)
    assert (build.figures["ours_megabytes"], build.figures["other_megabytes"]) == (3.0, 5.0)


def test_make_bench_runs_every_benchmark_but_the_one_that_takes_hours() -> None:
    makefile = (Path(claim.__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    (names,) = re.findall(r"for name in (.*?);.*benchmarks\.", makefile)
    assert sorted(names.split()) == sorted(SMALL)


def curve_of(folder: Path, name: str) -> list[dict[str, float]]:
    """Looks at the validation patients of a run of seed 0, without their times."""
    curve = json.loads(losses.file_of(folder / "tiny", name, 0).read_text())["curve"]
    return [{key: value for key, value in point.items() if key != "seconds"} for point in curve]


@pytest.mark.usefixtures("ray_session")
def test_losses_are_compared_seed_by_seed_and_only_what_is_missing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module, name in ((claim, "RESULTS"), (archive, "RESULTS"), (losses, "RESULTS"), (losses, "OUT")):
        monkeypatch.setattr(module, name, tmp_path)
    monkeypatch.setattr(losses.ray, "shutdown", lambda: None)  # this session's Ray lives on
    monkeypatch.setattr(losses, "PHANTOM_SHARES", {})  # of so few most have to train
    words = ["--phantoms=150", "--name=tiny", "--minutes=0.01", "--seeds=1"]
    losses.main(words)
    every = list(losses.rivals(LossSettings(), 0))
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "tiny").glob("*-0.json")}
    assert len(files) == len(every)
    entry = json.loads(losses.file_of(tmp_path / "tiny", "CCLoss", 0).read_text())
    budget = json.loads((tmp_path / "tiny" / "budget.json").read_text())
    assert entry["steps"] == budget["steps"] >= 20
    assert [point["share"] for point in entry["curve"]] == sorted({point["share"] for point in entry["curve"]})
    assert len(entry["curve"]) == CURVE_POINTS
    trunk = [curve_of(tmp_path, name)[:2] for name in every]
    assert all(points == trunk[0] for points in trunk), "up to where the loss joins, all entries of a seed are one"
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert set(summary) == {f"test/{name}" for name in EVALUATED}
    assert list(summary["test/global"]) == every
    for name, facts in summary["test/global"].items():
        assert set(facts["figures"]) == set(losses.NAMES)
        assert ("ccloss_minus_this" in facts) == (name != "CCLoss")
    for written in json.loads((tmp_path / "losses-tiny.json").read_text()):
        assert written["ratio"] > 0
        assert not written["holds"], "one seed shows nothing"
    with pytest.raises(SystemExit, match="choose another --name"):
        losses.main([*words[:2], "--minutes=0.02", "--seeds=1"])
    losses.file_of(tmp_path / "tiny", "all pairs", 0).unlink()
    losses.main(words)
    again = {file: file.stat().st_mtime_ns for file in files}
    assert [file.name for file in files if again[file] != files[file]] == ["all_pairs-0.json"]
    assert "semi-hard triplets" in capsys.readouterr().out
