"""Promises of the command line that all jobs share: one line for what a user can mend, a traceback for a bug."""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ray.train import ControllerError

from cxr_retrieval import command, storage
from cxr_retrieval.command import settings_help
from cxr_retrieval.config import Settings, load_settings, settings_fields
from cxr_retrieval.errors import UserError, user_error_in
from cxr_retrieval.runtime import leaves_room, reserved_memory, start_ray

Run = Callable[..., list[tuple[str, Settings, argparse.Namespace]]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a job with these words on its command line; returns what was called: job or plan, and with what."""

    def call(
        *words: str, error: BaseException | None = None, **options: object
    ) -> list[tuple[str, Settings, argparse.Namespace]]:
        called: list[tuple[str, Settings, argparse.Namespace]] = []

        def job(settings: Settings, namespace: argparse.Namespace) -> None:
            called.append(("job", settings, namespace))
            if error:
                raise error

        def plan(settings: Settings, namespace: argparse.Namespace) -> None:
            called.append(("plan", settings, namespace))

        monkeypatch.setattr(sys, "argv", ["job", *words])
        command.run("test", "What the job is about.", job, plan, **options)  # type: ignore[arg-type]
        return called

    return call


def test_words_and_files_reach_the_job_with_an_absolute_workspace(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("seed: 1\ntraining: {epochs: 3}\n")
    (tmp_path / "b.yaml").write_text("training: {epochs: 4}\n")
    [(what, settings, _)] = run("--config", "a.yaml", "training.workers=2", "--config", "b.yaml", "workspace=here")
    assert what == "job"
    assert (settings.seed, settings.training.epochs, settings.training.workers) == (1, 4, 2)
    assert settings.workspace == str(tmp_path / "here")
    for name in ("check", "check_writing"):
        monkeypatch.setattr(storage, name, checked.append)
    assert run("workspace=s3://bucket/x/")[0][1].workspace == "s3://bucket/x"
    assert checked == ["s3://bucket/x/", "s3://bucket/x/runs"]  # asked before the job, for reading and for writing
    checked.clear()
    run("workspace=s3://bucket/x", "publish.to=s3://other/y")
    assert checked == ["s3://bucket/x", "s3://other/y", "s3://bucket/x/runs"], "only a publisher needs that right"
    checked.clear()
    run("workspace=s3://bucket/x", "publish.to=s3://other/y", writes=["publish.to"])
    assert checked[2:] == ["s3://other/y/objects"]


def test_a_path_with_an_equals_sign_is_a_path(run: Run) -> None:
    [(_, settings, options)] = run("./view=PA.png", "seed=3", "film.png", words="images")
    assert options.rest == ["./view=PA.png", "film.png"]
    assert settings.seed == 3


def test_plan_runs_the_plan_and_not_the_job(run: Run) -> None:
    assert [what for what, _, _ in run("--plan")] == ["plan"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["training.epoch=3"], "error: unknown setting 'training.epoch' in the command line: did you mean 'training"),
        (["training.epochs=0"], "error: setting training.epochs=0 in the command line: input should be greater"),
        (["--config", "no.yaml"], "error: config file no.yaml does not exist"),
        (["prepare"], "error: cannot read 'prepare' from the command line: write section.key=value"),
        (["workspace=/a\udcff"], "error: word 1 of the command line, workspace=/a\\udcff, is not UTF-8: rename"),
        (["workspace=gs://bucket"], "error: gs://bucket: only local paths, file:// and s3:// are supported"),
    ],
)
def test_a_wrong_word_is_refused_in_one_line_before_anything_starts(
    words: list[str], told: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*words, error=AssertionError("the job has started"))
    out, err = capsys.readouterr()
    assert ended.value.code == 1
    assert out == ""
    assert err.startswith(told)
    assert err.count("\n") == 1


def test_an_unknown_option_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("--paln")
    assert ended.value.code == 2
    assert "unrecognized arguments: --paln" in capsys.readouterr().err


def test_a_user_error_of_the_job_is_one_line_whatever_is_in_it(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    text = "/data/[bold]x[/bold]/:x:/" + "a long folder name/" * 30 + ": mend it [/]"
    with pytest.raises(SystemExit) as ended:
        run(error=UserError(text))
    assert ended.value.code == 1
    assert capsys.readouterr() == ("", f"error: {text}\n")


def test_an_interrupt_says_how_to_go_on(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(error=KeyboardInterrupt())
    assert ended.value.code == 130
    assert capsys.readouterr().err == "stopped; run the same command again to go on\n"


@pytest.mark.parametrize("bug", [ValueError("a bug"), KeyError("x"), OSError(5, "input/output error")])
def test_a_bug_is_not_made_a_line(bug: Exception, run: Run) -> None:
    with pytest.raises(type(bug)) as caught:
        run(error=bug)
    assert caught.value is bug


SCRIPT = """
from cxr_retrieval import command, storage
from cxr_retrieval.errors import UserError, user_error_in

def the_job_itself(settings, options):
    raise {error}("the text")

command.run("test", "about", the_job_itself, the_job_itself)
"""


@pytest.mark.parametrize(("error", "traceback"), [("UserError", False), ("ValueError", True)])
def test_a_process_ends_with_status_1_and_a_traceback_only_for_a_bug(error: str, traceback: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(error=error)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stdout == ""
    if traceback:
        assert done.stderr.startswith("Traceback (most recent call last):")
        assert "in the_job_itself" in done.stderr
        assert done.stderr.endswith("ValueError: the text\n")
    else:
        assert done.stderr == "error: the text\n"


def test_print_config_prints_yaml_that_loads_back(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        f"corpus.archive=/data/[bold]/:x:/{'long folder name/' * 20}end",
        "corpus.views=[PA, AP]",
        "training.learning_rate=3e-4",
        f"workspace={tmp_path / ('w' * 200)}",
    ]
    assert run("--print-config", *words) == []
    out, err = capsys.readouterr()
    assert err == ""
    (tmp_path / "printed.yaml").write_text(out)
    assert load_settings([str(tmp_path / "printed.yaml")]) == load_settings([], words)


def test_help_lists_every_setting_with_meaning_range_and_default(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("--help")
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert "What the job is about." in text
    for key, field in settings_fields():
        assert f"\n  {key}  (" in text
        assert f"      {field.description}\n" in text + "\n"
    assert "network.steps  (int, >= 1, <= 4; default 3)" in text
    assert "losses.form  (margin | softmax; default softmax)" in text
    assert "corpus.views  (list of text | null; default null)" in text
    assert "%" not in settings_help().replace("%%", "")


def test_a_jobs_own_words_and_options_are_told_from_settings(run: Run) -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--fast", action="store_true")

    def implied(options: argparse.Namespace) -> list[str]:
        return ["seed=9"] if options.fast else []

    options = {"arguments": arguments, "words": "image", "implied": implied}
    [(_, settings, namespace)] = run("a.png", "search.k=3", "--fast", "b.png", **options)
    assert namespace.rest == ["a.png", "b.png"]
    assert (settings.search.k, settings.seed) == (3, 9)


def test_a_user_error_is_found_behind_what_it_caused() -> None:
    user_error = UserError("mend it")
    outer = RuntimeError("outer")
    outer.__cause__ = ValueError("middle")
    outer.__cause__.__cause__ = user_error
    assert user_error_in(user_error) is user_error
    assert user_error_in(outer) is user_error
    assert user_error_in(ControllerError(user_error)) is user_error
    assert user_error_in(RuntimeError("a bug")) is None
    assert user_error_in(None) is None


def test_a_bug_while_a_user_error_is_handled_stays_a_bug() -> None:
    bug = KeyError("missing")
    bug.__context__ = UserError("mend it")
    assert user_error_in(bug) is None


def test_errors_that_cause_each_other_end_the_search() -> None:
    one, two = RuntimeError("one"), RuntimeError("two")
    one.__cause__, two.__cause__ = two, one
    assert user_error_in(one) is None


@pytest.mark.parametrize(
    "word", ["workspace=here", "workspace=/abs corpus.archive=there", "workspace=s3://b/x model=m"]
)
def test_a_submitted_job_refuses_a_relative_path_by_its_name(
    word: str, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(command.SUBMITTED, "{}")
    with pytest.raises(SystemExit):
        run(*word.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {word.split()[-1]} is a relative path")
    assert "s3://bucket/prefix" in line


def test_a_submitted_search_needs_no_workspace(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(command.SUBMITTED, "{}")
    assert run("film.png", words="images", on_cluster=False)


@pytest.mark.parametrize(
    ("nodes", "workers", "room"),
    [
        ([1.0] * 8, 8, False),  # 1.6 CPUs are left in all, and on no node a quarter
        ([1.0] * 8, 7, True),
        ([2.0], 2, True),
        ([1.6], 2, False),
        ([0.0, 2.0], 2, True),  # a head that offers none
        ([], 1, False),
    ],
)
def test_a_reading_task_needs_its_room_on_one_node(nodes: list[float], workers: int, room: bool) -> None:
    assert leaves_room(nodes, workers, 0.8, 0.25) is room


def test_no_task_asks_for_more_memory_than_a_node_has_which_ray_would_wait_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def node(cpus: float, memory: float) -> dict[str, object]:
        return {"Alive": True, "Resources": {"CPU": cpus, "memory": memory}}

    monkeypatch.setattr("ray.nodes", lambda: [node(8, 4e9), node(8, 6e9), node(0, 1e9)])
    assert (reserved_memory(10**9), reserved_memory(10**11)) == (10**9, 4 * 10**9)
    monkeypatch.setattr("ray.nodes", lambda: [node(0, 1e9)])  # until the first worker has come
    assert reserved_memory(10**11) == 10**11


def test_a_machine_that_is_too_busy_to_start_ray_is_told_in_one_line_and_other_faults_of_ray_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = "The current node timed out during startup. This could happen because the GCS has become overloaded."

    def init(**_: object) -> None:
        raise Exception(told)  # as Ray raises it

    monkeypatch.setattr("cxr_retrieval.runtime.ENVIRONMENT", {})
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(UserError, match=r"too busy.*run the same command again"):
        start_ray()
    told = "a fault of Ray"
    with pytest.raises(Exception, match="a fault of Ray"):
        start_ray()
