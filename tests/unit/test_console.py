"""Promises of what a person sees: text as it is, tables that keep their cells, progress that a log can hold."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from cxr_retrieval import console

AS_IT_IS = "[PA, AP] [bold]x[/bold] [/] :x: :warning: 50% 0x1F"


@pytest.mark.parametrize("text", [AS_IT_IS, "word " * 100 + "end", "s3://bucket/" + "x" * 300])
def test_a_line_is_one_line_as_it_is_on_standard_error(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    console.say(text)
    assert capsys.readouterr() == ("", text + "\n")


def test_a_table_keeps_its_cells_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_table("Title [x]", ["where", "images"], [[AS_IT_IS, 1234567], ["b", 8]])
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("Title [x]")
    assert AS_IT_IS in out
    assert "\u2502 1,234,567 \u2502" in out
    assert "\u2502         8 \u2502" in out  # numbers are aligned to the right


def test_a_table_shows_fractions_shortly_and_none_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_table("Title", ["share", "name"], [[0.25, None], [12.0, "x"]])
    out = capsys.readouterr().out
    assert "0.2" in out
    assert "12.0" in out
    assert "None" in out


def test_a_long_cell_is_folded_and_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/" + "folder/" * 60 + "end"
    console.show_table("Title", ["where"], [[path]])
    lines = [line.strip("\u2502 ") for line in capsys.readouterr().out.splitlines() if line.startswith("\u2502")]
    assert "".join(lines) == path
    assert len(lines) > 1


def test_a_table_without_rows_has_its_columns(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_table("Title", ["rank", "image"], [])
    assert "rank" in capsys.readouterr().out


def test_a_log_gets_a_line_when_all_is_done_with_a_rate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("cxr_retrieval.console.time.monotonic", lambda: now)
    with console.Meter("prepare", 3000) as meter:
        now += 5
        meter.advance(500)  # too early for a line
        now += 7
        meter.advance(500, "slow disk")
        now += 1
        meter.advance(500)
        now += 2
        meter.advance(1500)
    assert capsys.readouterr().err.splitlines() == [
        "prepare: 1,000 of 3,000 images, 83 images/s slow disk",
        "prepare: 3,000 of 3,000 images, 200 images/s",
    ]


def test_a_terminal_gets_a_bar_that_is_put_away_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=screen, force_terminal=True, width=120))

    def draw() -> None:
        with console.Meter("draw", 10, "films") as meter:
            meter.advance(4)
            raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        draw()
    assert "4/10" in screen.getvalue()
    assert "films/s" in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[?25h")  # the cursor is back
    with console.Meter("draw", 10):
        pass  # a second bar is possible


def test_nothing_is_written_to_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    console.say("x")
    assert not list(tmp_path.iterdir())
