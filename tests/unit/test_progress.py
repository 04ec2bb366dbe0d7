"""Promises about what another terminal sees of a job: finished, running, failed or silent, and how far."""

import datetime
import json
import time
from pathlib import Path

import pytest

from cxr_retrieval import progress, storage
from cxr_retrieval.artifacts import Draft
from cxr_retrieval.progress import Progress, statuses


def draft(workspace: Path) -> Draft:
    return Draft.under(str(workspace / "things"), "thing", {"a": 1}, ()).begin()


def test_work_is_running_while_it_runs_and_finished_when_its_block_has_ended(tmp_path: Path) -> None:
    thing = draft(tmp_path)
    with Progress.of(str(tmp_path), thing, "make", 10, before=4) as work:
        (seen,) = statuses(str(tmp_path))
        assert (seen.state(), seen.done, seen.total) == ("running", 4, 10)
        work.advance(6, "all of it")
    (seen,) = statuses(str(tmp_path))
    assert (seen.done, seen.note, seen.uri) == (10, "all of it", thing.uri)
    assert seen.rate > 0
    assert seen.state() == "finished"


def test_what_was_there_already_is_no_part_of_the_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(str(tmp_path), "publish-x", "there@latest", "publish", 1_000_000_000, "bytes") as work:
        work.found(999_999_990)
        time.sleep(0.05)
        work.advance(10)
    (seen,) = statuses(str(tmp_path))
    assert (seen.done, seen.total, seen.uri) == (1_000_000_000, 1_000_000_000, "there@latest")
    assert 0 < seen.rate < 1000
    assert "publish: 10 of 10 bytes" in capsys.readouterr().err


def test_work_that_ends_early_shows_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(str(tmp_path), "train-x", "there", "train", 100, before=10) as work:
        work.advance(40)
        work.end_early("no better for 2 epochs")
    (seen,) = statuses(str(tmp_path))
    assert (seen.state(), seen.done, seen.total, seen.note) == ("finished", 50, 50, "no better for 2 epochs")
    assert "train: 40 of 40 images" in capsys.readouterr().err


def test_work_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError), Progress.of(str(tmp_path), draft(tmp_path), "make", 10):
        raise ValueError("first\nsecond")
    (seen,) = statuses(str(tmp_path))
    assert (seen.state(), seen.error) == ("failed", "first second")


def test_a_driver_that_lives_is_heard_of_and_one_that_was_killed_falls_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.05)
    thing = draft(tmp_path)
    with Progress.of(str(tmp_path), thing, "make", 10):
        (first,) = statuses(str(tmp_path))
        for _ in range(200):  # no step of the work is needed for it
            (later,) = statuses(str(tmp_path))
            if later.updated > first.updated:
                break
            time.sleep(0.02)
        assert later.updated > first.updated
    (file,) = storage.list_files(str(tmp_path / "runs" / "progress"))
    facts = json.loads(storage.read_bytes(file.uri))
    old = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=progress.SILENT_S + 1)
    storage.write_bytes(file.uri, json.dumps(facts | {"updated": old.isoformat(), "finished": False}).encode())
    (seen,) = statuses(str(tmp_path))
    assert seen.state() == "silent"


def test_a_run_that_goes_on_is_running_again(tmp_path: Path) -> None:
    thing = draft(tmp_path)
    with pytest.raises(ValueError), Progress.of(str(tmp_path), thing, "make", 10):
        raise ValueError("no")
    with Progress.of(str(tmp_path), thing, "make", 10, before=5):
        (seen,) = statuses(str(tmp_path))
        assert (seen.state(), seen.error, seen.done) == ("running", None, 5)


def test_a_workspace_without_work_has_no_states(tmp_path: Path) -> None:
    assert list(statuses(str(tmp_path))) == []
