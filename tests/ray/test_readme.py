"""The README's commands, run as they stand on a small phantom archive."""

import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml

from cxr_retrieval.index.search import Retriever
from cxr_retrieval.privacy import KEY_VARIABLE

README = (Path(__file__).parents[2] / "README.md").read_text()
# So small that the walk takes seconds; the README's own settings stay in force beside them.
SMALL = {
    "corpus": {"size": 64, "partition_images": 32, "row_group_images": 16, "validation_share": 0.25},
    "network": {"dimensions": 16},
    "training": {"epochs": 1, "batch_size": 16, "lanes": 2},
    "embedding": {"workers": 1},
    "evaluation": {"draws": 100},
    "index": {"shard_rows": 50},
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def job_commands() -> list[list[str]]:
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("python -m jobs.")]


def served_page(words: list[str]) -> str:
    """The search page that the command serves, on a free port; the server is stopped afterwards."""
    command = [sys.executable, "-m", "jobs.serve", *words, "serve.port=0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            told = next(line for line in server.stderr if line.startswith("search page: "))
            with urllib.request.urlopen(told.split()[2], timeout=30) as answer:
                page: str = answer.read().decode()
                return page
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(30) in (0, 130)


@pytest.mark.usefixtures("ray_session")
def test_every_job_command_of_the_readme_runs_as_it_stands(
    phantom_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load(blocks("yaml")[0])
    for section, values in SMALL.items():
        settings[section] = settings.get(section, {}) | values
    settings["corpus"]["archive"] = str(phantom_archive)
    Path("my.yaml").write_text(yaml.safe_dump(settings))
    image = next((phantom_archive / "images").iterdir())
    Path("tune_spaces").symlink_to(Path(__file__).parents[2] / "tune_spaces")
    monkeypatch.setenv(KEY_VARIABLE, "0123456789abcdef" * 4)
    commands = job_commands()
    assert len(commands) >= 8
    for command in commands:
        model = next(Path("workspace/models").glob("*/manifest.json"), Path("none")).parent
        replaced = {"IMAGE": str(image), "MODEL": str(model), "OTHER_ARCHIVE": str(phantom_archive), "PATIENT": "2"}
        words = command[3:]
        for name, value in replaced.items():
            words = [re.sub(rf"\b{name}\b", value, word) for word in words]
        if command[2] == "jobs.tune":
            words.append("--plan")  # a sweep itself takes a minute: test_tune runs one
        if command[2] == "jobs.serve":
            assert "Find similar chest X-rays" in served_page(words)
            continue
        monkeypatch.setattr(sys, "argv", [command[2], *words])
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
        if command[2] == "jobs.evaluate":
            assert "Recall@2" in capsys.readouterr().out
    assert Path("similar.html").stat().st_size > 0
    retriever = Retriever.open("workspace/indexes/chest@latest")
    assert 0 < retriever.images == retriever.facts["rows"] < len(list((phantom_archive / "images").iterdir()))
    capsys.readouterr()
    shutil.copy(image, "film.png")
    (script,) = blocks("python")
    exec(compile(script, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 8


def test_the_two_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("sh")), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"make {target}"
