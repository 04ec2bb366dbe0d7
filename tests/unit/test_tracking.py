"""Curves of a run in TensorBoard and MLflow, as their own readers see them."""

import importlib
import logging
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cxr_retrieval import storage
from cxr_retrieval.config import Settings, load_settings
from cxr_retrieval.errors import UserError
from cxr_retrieval.training import tracking
from cxr_retrieval.training.tracking import EXPERIMENT, epoch_figures, require_tracking, tracker_of


def settings(kind: str | None) -> Settings:
    return load_settings(words=[f"training.tracking={kind or 'null'}"])


def points(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, round(event.value, 6)) for event in events.Scalars(name)]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file:{tmp_path / 'mlruns'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def test_tensorboard_reads_what_was_told_and_a_run_that_goes_on_takes_the_lost_steps_back(tmp_path: Path) -> None:
    run = str(tmp_path / "runs" / "abc")
    first = tracker_of(settings("tensorboard"), run, 0, None)
    for step in (10, 20, 30):
        first.log(step, {"loss": 1.0 / step})
    first.send()
    again = tracker_of(settings("tensorboard"), run, 20, None)  # its last checkpoint was of step 20
    again.log(25, {"loss": 0.5})
    again.send()
    found = points(Path(run) / "tensorboard", "loss")
    assert found == [(10, 0.1), (20, 0.05), (25, 0.5)]


def test_tensorboard_files_of_a_workspace_on_s3_are_sent_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def keep(uri: str, data: bytes) -> None:
        assert uri.startswith("s3://bucket/runs/abc/tensorboard/")
        (tmp_path / uri.rpartition("/")[2]).write_bytes(data)

    monkeypatch.setattr(storage, "write_bytes", keep)
    tracker = tracker_of(settings("tensorboard"), "s3://bucket/runs/abc", 0, None)
    tracker.log(1, {"loss": 0.25})
    tracker.send()
    tracker.log(2, {"loss": 0.125})
    tracker.send()
    assert points(tmp_path, "loss") == [(1, 0.25), (2, 0.125)]


def test_mlflow_has_one_run_with_settings_and_curves_also_after_a_restart(server: str) -> None:
    require_tracking(settings("mlflow"))
    for step in (1, 2):  # the second one goes on
        tracker_of(settings("mlflow"), "/somewhere/runs/abc", step, server).log(
            step, {"validation/map/global": 0.1 * step}
        )
    client = MlflowClient(tracking_uri=server)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "abc"
    assert run.data.params["losses.centre_rate"] == "0.05"
    history = client.get_metric_history(run.info.run_id, "validation/map/global")
    assert [(point.step, round(point.value, 6)) for point in history] == [(1, 0.1), (2, 0.2)]


def test_mlflow_is_told_how_a_run_ends_and_that_it_goes_on(server: str) -> None:
    client = MlflowClient(tracking_uri=server)

    def status() -> str:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id])
        return str(run.info.status)

    tracker_of(settings("mlflow"), "/somewhere/runs/abc", 0, server).end(failed=True)
    assert status() == "FAILED"
    tracker = tracker_of(settings("mlflow"), "/somewhere/runs/abc", 1, server)
    assert status() == "RUNNING"
    tracker.end()
    assert status() == "FINISHED"


def test_a_tracker_that_fails_later_ends_nothing_and_is_said(
    server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = tracker_of(settings("mlflow"), "runs/abc", 0, server)

    def broken(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(MlflowClient, "log_metric", broken)
    with caplog.at_level(logging.WARNING):
        tracker.log(7, {"loss": 1.0})
        tracker.log(8, {"loss": 1.0})
        tracker.send()
        tracker.end()
        tracker_of(settings("mlflow"), "runs/abc", 0, "http://127.0.0.1:9").log(1, {"loss": 1.0})
    told = [record.getMessage() for record in caplog.records if record.name == tracking.logger.name]
    assert told[0] == "the run goes on untracked: no route"  # once, and not with every step
    assert len(told) == 2
    assert "127.0.0.1" in told[1]


def test_what_cannot_track_is_refused_before_workers_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"training\.tracking=mlflow: set MLFLOW_TRACKING_URI"):
        require_tracking(settings("mlflow"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI=http://127\.0\.0\.1:9 does not answer"):
        require_tracking(settings("mlflow"))

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"pip install 'cxr-retrieval\[tracking\]'"):
        require_tracking(settings("tensorboard"))
    require_tracking(settings(None))


def test_without_a_tracker_nothing_is_written(tmp_path: Path) -> None:
    tracker = tracker_of(settings(None), str(tmp_path / "runs"), 0, None)
    tracker.log(1, {"loss": 1.0})
    tracker.send()
    assert not list(tmp_path.iterdir())


def test_an_epoch_is_told_with_every_embedding() -> None:
    record = dict.fromkeys(("loss", "ccloss", "cross_entropy", "images_per_second"), 0.5)
    record |= {"centre_cosine": [0.2, 0.4], "validation": {"global": {"map": 0.1}, "profile": {"map": 0.2}}}
    record |= {"ccloss_by_table": [1.0, 2.0, 3.0, None], "cross_entropy_by_table": [4.0, 5.0, None, None]}
    told = epoch_figures(record)
    assert told["centre_cosine"] == pytest.approx(0.3)
    assert (told["ccloss/whole/step2"], told["ccloss/crop/step1"], told["cross_entropy/whole/step2"]) == (2.0, 3.0, 5.0)
    assert not [name for name in told if name in ("ccloss/crop/step2", "cross_entropy/crop/step1")], "not seen yet"
    assert (told["validation/map/global"], told["validation/map/profile"]) == (0.1, 0.2)
    assert tracking.MODULES.keys() == {"tensorboard", "mlflow"}
