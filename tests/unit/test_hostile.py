"""Promises to whoever points this at an archive that means harm, or was copied badly: tables, names and links."""

import csv
import gzip
import os
import tracemalloc
from pathlib import Path

import pytest

from cxr_retrieval import console, storage
from cxr_retrieval.corpus.formats import labels
from cxr_retrieval.corpus.formats.labels import MOST_ROW
from tests.unit.test_archive import BOXES, HEADER, TABLE, Folder, in_order, line
from tests.unit.test_formats import read

BIG = 64 << 20  # characters of a table that must not be held
HELD = 8 << 20  # bytes that reading it may take


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path).images("a.png", "b.png")


def refused_within(folder: Folder) -> str:
    """What is said of the archive, which must not take more than HELD."""
    tracemalloc.start()
    try:
        told = folder.refused()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < HELD
    assert told.isprintable()
    return told


@pytest.mark.parametrize(
    ("rest", "what"),
    [
        ('"a.png,' + f"\n{line('b.png')}" * 3, "unexpected end of data"),
        ('"a.png,' + f"\n{line('b.png')}" * 2000, f"more than {MOST_ROW:,} characters; is a quote not closed?"),
        ('"a.png" or so,Mass,0,1', "',' expected after '\"'"),
        ("," * 1_000_000, "more than"),
        ('"x\n",' * 100_000, "more than"),
        ("x" * BIG, "more than"),
    ],
    ids=["unclosed quote", "unclosed quote, long rest", "text after a quote", "columns", "lines of a row", "cell"],
)
def test_a_row_that_cannot_be_one_is_refused_by_its_line_and_not_held(rest: str, what: str, folder: Folder) -> None:
    folder.table(line("a.png"), rest)
    told = refused_within(folder)
    assert f"{TABLE}: the row that begins in line 3 cannot be read: " in told
    assert what in told


@pytest.mark.parametrize("text", ["\n", f"{line('a.png')}\n"], ids=["blank lines", "rows"])
def test_a_packed_table_that_unpacks_without_end_is_refused_and_not_held(
    text: str, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labels, "ALWAYS_UNPACKED", 1 << 16)
    data = f"{HEADER}\n".encode() + text.encode() * ((1 << 20) // len(text))
    (folder.path / f"{TABLE}.gz").write_bytes(gzip.compress(data))
    assert f"{TABLE}.gz: the row that begins in line " in (told := refused_within(folder))
    assert "unpacks to more than 200 times its size" in told


def test_a_packed_cell_without_end_is_refused_and_not_held(folder: Folder) -> None:
    with gzip.open(folder.path / f"{TABLE}.gz", "wb") as file:
        for _ in range(BIG >> 20):
            file.write(b"x" * (1 << 20))
    assert "line 1 cannot be read: more than" in refused_within(folder)


def test_a_quoted_cell_of_many_lines_is_one_cell(folder: Folder) -> None:
    folder.table('"a\n.png",Mass,0,1', line("b.png"))
    rows = folder.rows()
    assert (rows["a.png"]["reason"], rows["b.png"]["reason"]) == ("no_label_row", None)


@pytest.mark.parametrize("mark", ["\x00", "\x1b[2J", "\n", "\u202e", "\x9b1m"])
def test_what_would_move_a_terminal_is_told_in_escapes_wherever_a_table_holds_it(mark: str, folder: Folder) -> None:
    escaped = console.printable(f"x{mark}y")
    assert escaped.isprintable()
    with (folder.path / TABLE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER.split(","))
        writer.writerow(["a.png", "Mass", "0", f"x{mark}y", "58", "M", f"x{mark}y"])
        writer.writerow(["b.png", f"x{mark}y", "0", "1"])
    rows = folder.rows()
    assert (rows["a.png"]["patient_id"], rows["a.png"]["view"]) == (escaped, escaped)
    assert rows["b.png"]["reason"] == "unknown_finding"
    assert rows["b.png"]["text"].isprintable()


def test_bytes_that_are_no_text_are_escaped_and_two_patients_stay_two(folder: Folder) -> None:
    rows = b"a.png,Mass,0,M\xfcller,58\nb.png,Mass,0,M\xe4ller,58\n"
    (folder.path / TABLE).write_bytes(f"{HEADER}\n".encode() + rows)
    found = folder.rows()
    assert (found["a.png"]["patient_id"], found["b.png"]["patient_id"]) == ("M\\xfcller", "M\\xe4ller")


def test_a_row_of_more_cells_than_columns_is_refused_and_not_read_shifted(folder: Folder) -> None:
    folder.table(line("a.png"), line("b.png", "Mass,Effusion"))
    assert f"{TABLE}: row 3 has 12 cells, and the table 11 columns: put cells with commas into" in folder.refused()
    folder.table(line("a.png") + ",, ,", line("b.png"))  # empty ones are nothing
    assert len(folder.rows()) == 2


def test_a_table_that_has_a_column_twice_is_refused(folder: Folder) -> None:
    (folder.path / TABLE).write_text(f"{HEADER},Patient ID\n{line('a.png')},2\n")
    assert f"{TABLE}: there are two columns 'Patient ID': leave the one that counts" in folder.refused()


@pytest.mark.parametrize(
    "name", ["../secret.png", "/secret.png", "..\\secret.png", "a/../../secret.png", "./../secret.png"]
)
def test_a_path_in_a_table_is_compared_with_the_listing_and_never_opened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "archive"
    archive.mkdir()
    for path in (tmp_path / "secret.png", archive / "a.png", archive / "b.png"):
        path.write_bytes(b"x")
    (archive / "list.csv").write_text(
        f"file,pid\n{name},1\n{name.replace('secret', 'a')},1\n{tmp_path}/secret.png,1\nb.png,1\n"
    )
    opened: list[str] = []
    for door in ("read_bytes", "open_text", "arrow_reader", "read_beginning"):
        real = getattr(storage, door)
        monkeypatch.setattr(storage, door, lambda uri, *rest, real=real: opened.append(uri) or real(uri, *rest))
    rows = read(archive, "csv", columns={"image": "file", "patient": "pid"})
    assert [row["source_uri"] for row in rows.values()] == [f"{archive}/a.png", f"{archive}/b.png"]
    assert set(opened) == {str(archive / "list.csv")}


@pytest.mark.parametrize("name", ["x\ny.png", "x\x1b[31m.png", "x\u202egnp.png", "d\x07/y.png"])
def test_an_image_whose_name_cannot_be_shown_is_quarantined_under_one_that_can(name: str, folder: Folder) -> None:
    folder.images(name).table(line("a.png"), line("b.png"), f'"{name}",Mass,0,1,58,M,PA')
    rows = in_order(folder.read())
    (bad,) = (row for row in rows if row["reason"])
    assert (bad["reason"], bad["text"]) == ("bad_name", "its path has characters that cannot be shown; rename it")
    assert bad["image_id"] == console.printable(name.rpartition("/")[2])
    assert bad["source_uri"] == str(folder.path / name)
    assert len(rows) == 3


def test_what_is_said_and_shown_is_one_line_without_escape_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("error: /archive/x\ny\x1b[2J.csv: two tables\n")
    console.show_table("of x\x1b]0;title\x07", ["image"], [["a\x1b[2Jb\nc\udcff"]])
    shown = capsys.readouterr()
    assert shown.err == "error: /archive/x\\ny\\x1b[2J.csv: two tables\n"
    assert "\x1b" not in shown.out
    assert "of x\\x1b]0;title\\x07" in shown.out
    assert "a\\x1b[2Jb\\nc\\udcff" in shown.out


def test_a_table_whose_name_is_no_text_is_refused(folder: Folder) -> None:
    (folder.path / os.fsdecode(b"Data_Entry_2017\xff.csv")).write_text(HEADER)
    assert "the name of a table is not UTF-8: 'Data_Entry_2017\\udcff.csv'; rename it" in folder.refused()


def test_a_table_that_is_a_pipe_or_vanished_is_refused_and_not_waited_for(folder: Folder) -> None:
    os.mkfifo(folder.path / TABLE)
    assert f"{TABLE}: there is no such table" in folder.refused()


def test_an_image_that_is_a_folder_is_a_folder_and_a_pipe_is_a_row_that_cannot_be_read(folder: Folder) -> None:
    folder.images("c.png/d.png").table(*(line(name) for name in ("a.png", "b.png", "c.png", "d.png", "e.png")))
    os.mkfifo(folder.path / "e.png")
    found = folder.read()
    assert [row["image_id"] for row in in_order(found)] == ["a.png", "b.png", "d.png", "e.png"]
    assert found.labels_without_image == 1
    with pytest.raises(FileNotFoundError, match="no file but a folder, pipe or device"):
        storage.read_bytes(str(folder.path / "e.png"))


def test_a_link_out_of_the_archive_is_refused_before_it_is_followed(folder: Folder, tmp_path: Path) -> None:
    folder.path = tmp_path / "archive"
    folder.images("a.png").table(line("a.png"))
    (folder.path / "p.png").symlink_to("/etc/passwd")
    assert f"{folder.path}: a link in it leads out of it" in folder.refused()


@pytest.mark.parametrize("side", ["1e300", "inf", "-1e7", "1e7"])
def test_a_box_larger_than_any_image_is_refused_by_its_line(side: str, folder: Folder) -> None:
    folder.table(line("a.png", "Mass"))
    folder.table(f"a.png,Mass,{side},2,3,4", header="Image Index,Finding Label,Bbox [x,y,w,h],,,", name=BOXES)
    assert f"{BOXES}: line 2 is no box" in folder.refused()
