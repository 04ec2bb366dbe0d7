"""Promises of reading an archive in NIH's layout: each image has labels or a reason, a bad archive one line."""

import gzip
import os
import re
import tracemalloc
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cxr_retrieval import storage
from cxr_retrieval.config import CorpusSettings, PrivacySettings
from cxr_retrieval.corpus import archive
from cxr_retrieval.corpus.archive import Archive, ignored_text
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.corpus.limits import REMOVED
from cxr_retrieval.corpus.rows import rows_digest
from cxr_retrieval.errors import UserError
from cxr_retrieval.privacy import Pseudonyms
from cxr_retrieval.tombstones import NOBODY, RemovedPatients, remove

# NIH's own header: the unquoted commas inside the brackets make two columns of one.
HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
TABLE, BOXES = "Data_Entry_2017_v2020.csv", "BBox_List_2017.csv"


def line(image: str, findings: str = "No Finding", patient: str = "1", age: str = "58", view: str = "PA") -> str:
    return f"{image},{findings},0,{patient},{age},M,{view},2682,2749,0.143,0.143"


class Folder:
    """An archive that is being written. Its images are listed and not read, so any bytes will do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def images(self, *names: str) -> "Folder":
        for name in names:
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            (self.path / name).write_bytes(b"pixels of " + name.encode())
        return self

    def table(self, *lines: str, header: str = HEADER, name: str = TABLE) -> "Folder":
        (self.path / name).write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
        return self

    def read(self, **settings: Any) -> Archive:
        return Archive(CorpusSettings(archive=str(self.path), **settings))

    def rows(self, **settings: Any) -> dict[str, dict[str, Any]]:
        return {row["image_id"]: row for row in in_order(self.read(**settings))}

    def refused(self, **settings: Any) -> str:
        with pytest.raises(UserError) as caught:
            self.read(**settings)
        assert "\n" not in str(caught.value)
        assert str(self.path) in str(caught.value)
        return str(caught.value)


def in_order(found: Archive) -> list[dict[str, Any]]:
    return [row for partition in found.partitions() for row in partition.to_pylist()]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_a_row_says_what_nihs_table_says(folder: Folder) -> None:
    folder.images("images_001/images/00000007_003.png")
    folder.table("00000007_003.png,Hernia|Effusion,3,7,061,F,AP,2682,2749,0.143,0.143")
    row = folder.rows()["00000007_003.png"]
    expected = {
        "source_uri": str(folder.path / "images_001/images/00000007_003.png"),
        "size": 44,
        "reason": None,
        "excluded": None,
        "patient_id": "7",
        "study_id": "7_3",
        "study_date": None,
        "follow_up": 3,
        "age_years": 61,
        "sex": "F",
        "view": "AP",
        "findings": ["Effusion", "Hernia"],  # in the order of FINDINGS
        "unknown": [],
        "report_text": None,
        "boxes": [],
    }
    assert {name: row[name] for name in expected} == expected


@pytest.mark.parametrize(("told", "sex"), [("female", "F"), ("4711", None), ("", None)])
def test_a_sex_that_is_none_is_not_known_and_a_view_is_named_as_everywhere(
    told: str, sex: str | None, folder: Folder
) -> None:
    folder.images("a.png").table(f"a.png,Hernia,3,7,061,{told},pa,2682,2749,0.143,0.143")
    row = folder.rows()["a.png"]
    assert (row["sex"], row["view"]) == (sex, "PA")


@pytest.mark.parametrize("ending", [".bz2", ".xz", ".zst", ".zip"])
def test_a_table_is_packed_by_gzip_or_not_at_all(ending: str, folder: Folder) -> None:
    folder.images("a.png").table(line("a.png")).table(name=f"{BOXES}{ending}", header="not what its ending says")
    found = folder.read()
    assert (found.rows, found.ignored) == (1, {ending: 1})


def test_no_finding_is_an_empty_list_and_all_14_names_are_known(folder: Folder) -> None:
    folder.images("a.png", "b.png").table(line("a.png"), line("b.png", "|".join(FINDINGS)))
    rows = folder.rows()
    assert rows["a.png"]["findings"] == []
    assert rows["b.png"]["findings"] == list(FINDINGS)
    assert rows["a.png"]["reason"] is rows["b.png"]["reason"] is None


def test_rows_come_in_the_order_of_their_paths(folder: Folder) -> None:
    folder.images("images/b.png", "images-2/a.png", "images/a/c.png", "d.jpg", "e.JPEG").table()
    uris = [row["source_uri"] for row in in_order(folder.read())]
    assert uris == sorted(uris)
    assert len(uris) == 5


def test_label_rows_without_an_image_are_counted_apart(folder: Folder) -> None:
    found = folder.images("a.png").table(line("a.png"), line("b.png"), line("c.png"), line("c.png")).read()
    assert (found.rows, found.label_rows, found.labels_without_image) == (1, 4, 2)


def unlabelled(folder: Folder) -> None:
    folder.images("a.png", "b.png").table(line("a.png"))


def strange_finding(folder: Folder) -> None:
    folder.images("a.png", "b.png").table(line("a.png"), line("b.png", "Hernia|Gout"))


def no_findings_written(folder: Folder) -> None:
    folder.images("a.png", "b.png").table(line("a.png"), line("b.png", ""))


def nobody(folder: Folder) -> None:
    folder.images("a.png", "b.png").table(line("a.png"), line("b.png", patient=" "))


def nobody_by_a_programs_word(folder: Folder) -> None:
    folder.images("a.png", "b.png").table(line("a.png"), line("b.png", patient="NaN"))


def labelled_twice(folder: Folder) -> None:
    folder.images("a.png", "b.png").table(line("b.png"), line("a.png"), line("b.png", "Mass"))


def line_cut_short(folder: Folder) -> None:
    folder.images("a.png", "b.png").table(line("a.png"), "b.png,Hernia,0")


@pytest.mark.parametrize(
    ("write", "reason", "text"),
    [
        (unlabelled, "no_label_row", "the label table has no row for this image"),
        (strange_finding, "unknown_finding", "finding 'Gout' is none of the 14"),
        (no_findings_written, "unknown_finding", "finding '' is none of the 14"),
        (nobody, "no_patient", "the label row names no patient"),
        (nobody_by_a_programs_word, "no_patient", "the label row names no patient"),
        (labelled_twice, "labels_twice", "the label table has two rows for this image"),
        (line_cut_short, "no_patient", "the label row names no patient"),
    ],
)
def test_an_image_that_cannot_be_used_has_its_reason_and_the_others_stay(
    write: Callable[[Folder], None], reason: str, text: str, folder: Folder
) -> None:
    write(folder)
    rows = folder.rows()
    assert (rows["b.png"]["reason"], rows["b.png"]["text"]) == (reason, text)
    assert rows["b.png"]["split"] is None
    assert rows["a.png"]["reason"] is None


def test_images_of_one_name_are_all_refused(folder: Folder) -> None:
    rows = in_order(folder.images("x/a.png", "y/a.png", "b.png").table(line("a.png"), line("b.png")).read())
    assert [row["reason"] for row in rows] == [None, "name_twice", "name_twice"]
    assert rows[1]["text"] == "2 images of the archive have this name"


@pytest.mark.parametrize("age", ["414", "148", "-3", "", "abc", "\u00b2", "99999999999"])
def test_an_impossible_age_is_unknown_and_the_row_stays(age: str, folder: Folder) -> None:
    row = folder.images("a.png").table(line("a.png", age=age)).rows()["a.png"]
    assert (row["age_years"], row["reason"], row["patient_id"]) == (None, None, "1")


@pytest.mark.parametrize(
    ("age", "rule"), [("17", "age"), ("18", None), ("90", None), ("91", "age"), ("414", "age_unknown")]
)
def test_ages_are_kept_from_the_first_to_the_second_and_an_unknown_one_is_not(
    age: str, rule: str | None, folder: Folder
) -> None:
    row = folder.images("a.png").table(line("a.png", age=age)).rows(ages=[18, 90])["a.png"]
    assert (row["excluded"], row["reason"]) == (rule, None)
    assert folder.rows()["a.png"]["excluded"] is None


def test_an_image_that_two_rules_leave_out_is_counted_by_the_first(folder: Folder) -> None:
    folder.images("a.png", "b.png").table(line("a.png", age="5", view="LL"), line("b.png", view=""))
    rows = folder.rows(ages=[18, 90], views=["PA"])
    assert [rows[name]["excluded"] for name in ("a.png", "b.png")] == ["view", "view"]


@pytest.mark.parametrize(("age", "years"), [("058Y", 58), ("0", 0), ("120", 120)])
def test_an_age_is_read_in_either_edition_of_the_table(age: str, years: int, folder: Folder) -> None:
    assert folder.images("a.png").table(line("a.png", age=age)).rows()["a.png"]["age_years"] == years


@pytest.mark.parametrize("follow_up", ["", "x", "\u00b2", "99999999999"])
def test_a_follow_up_that_is_no_number_is_unknown_and_the_row_stays(follow_up: str, folder: Folder) -> None:
    row = folder.images("a.png").table(f"a.png,Mass,{follow_up},1,58,M,PA,1,1,1,1").rows()["a.png"]
    assert (row["follow_up"], row["reason"]) == (None, None)


def test_a_table_with_a_byte_order_mark_and_windows_line_ends_is_read(folder: Folder) -> None:
    folder.images("a.png")
    (folder.path / TABLE).write_bytes(("\ufeff" + HEADER + "\r\n" + line("a.png") + "\r\n").encode())
    assert folder.rows()["a.png"]["reason"] is None


def test_a_compressed_table_is_read(folder: Folder) -> None:
    folder.images("a.png")
    (folder.path / f"{TABLE}.gz").write_bytes(gzip.compress(f"{HEADER}\n{line('a.png')}\n".encode()))
    assert folder.rows()["a.png"]["reason"] is None


def test_boxes_are_read_below_nihs_header_and_infiltrate_is_infiltration(folder: Folder) -> None:
    folder.images("a.png", "b.png").table(line("a.png", "Infiltration|Mass"), line("b.png"))
    lines = ["a.png,Infiltrate,1.5,2,30,40,,", "a.png,Mass,5,6,7,8.25,,", ""]
    folder.table(*lines, header="Image Index,Finding Label,Bbox [x,y,w,h],,,", name=BOXES)
    rows = folder.rows()
    assert rows["a.png"]["boxes"] == [
        {"finding": "Infiltration", "x": 1.5, "y": 2.0, "w": 30.0, "h": 40.0},
        {"finding": "Mass", "x": 5.0, "y": 6.0, "w": 7.0, "h": 8.25},
    ]
    assert rows["b.png"]["boxes"] == []


def test_a_box_of_a_finding_that_its_image_lacks_or_that_is_none_is_counted_and_not_kept(folder: Folder) -> None:
    folder.images("a.png", "b.png").table(line("a.png", "Mass"), line("b.png"), line("elsewhere.png", "Mass"))
    boxes = ["a.png,Mass", "a.png,Bogus", "a.png,Nodule", "b.png,Mass", "elsewhere.png,Mass", "nobody.png,Mass"]
    folder.table(
        *(f"{box},1,2,30,40" for box in boxes), header="Image Index,Finding Label,Bbox [x,y,w,h],,,", name=BOXES
    )
    found = folder.read()
    rows = {row["image_id"]: [box["finding"] for box in row["boxes"]] for row in in_order(found)}
    assert rows == {"a.png": ["Mass"], "b.png": []}
    assert found.boxes_left_out == {"unknown_finding": 1, "not_in_labels": 2}


@pytest.mark.parametrize(
    "box", ["a.png,Mass,1,2,3", "a.png,Mass,1,2,3,x", "a.png,Mass,1,2,nan,4", "a.png,Mass,1,2,0,4"]
)
def test_a_line_that_is_no_box_is_named_by_file_and_number(box: str, folder: Folder) -> None:
    folder.images("a.png").table(line("a.png", "Mass"))
    folder.table("a.png,Mass,1,2,3,4", box, header="Image Index,Finding Label,Bbox [x,y,w,h],,,", name=BOXES)
    assert f"{BOXES}: line 3 is no box" in folder.refused()


def test_an_archive_without_an_image_is_refused(folder: Folder) -> None:
    folder.table(line("a.png"))
    assert "the archive is empty, no .png, .jpg, .jpeg, .dcm, .dicom file in it" in folder.refused()


def test_files_of_other_kinds_are_counted_by_their_endings(folder: Folder) -> None:
    folder.images("a.png", "scans/1.tif", "scans/2.TIF", "README", "notes.txt", "old/Data_Entry_2017.csv", ".hidden")
    folder.images("scans/1.2.840.10008", "scans/1.2.840.10009", "scan.Smith John", "Jane.Smith")
    folder.table(line("a.png")).table(name="train_val_list.txt")
    ignored = folder.read().ignored
    # What may be a patient's name is not told as an ending.
    assert ignored == {".csv": 1, ".tif": 2, ".txt": 1, "another ending": 4, "no ending": 1}
    told = "files of other kinds that were left alone: 9 (.csv 1, .tif 2, .txt 1, another ending 4, no ending 1)"
    assert ignored_text(ignored) == told
    (folder.path / "a.png").unlink()
    assert told in folder.refused()


def test_a_missing_folder_is_refused(folder: Folder) -> None:
    folder.path /= "nowhere"
    assert "there is no such folder" in folder.refused()


def test_no_archive_at_all_is_refused() -> None:
    with pytest.raises(UserError, match=r"^corpus.archive is not set"):
        Archive(CorpusSettings())


def test_an_archive_without_a_label_table_is_refused(folder: Folder) -> None:
    folder.images("a.png").table(name="labels.csv")
    assert "no label table Data_Entry_2017*.csv" in folder.refused()


def test_two_label_tables_are_refused_by_name(folder: Folder) -> None:
    folder.images("a.png").table(line("a.png")).table(line("a.png"), name="Data_Entry_2017.csv")
    assert re.search(r"two tables of one kind, \S+\.csv and \S+\.csv: keep one", folder.refused())


@pytest.mark.parametrize(
    "column", ["Image Index", "Finding Labels", "Patient ID", "View Position", "Follow-up #", "Patient Gender"]
)
def test_a_missing_column_is_named(column: str, folder: Folder) -> None:
    folder.images("a.png").table(line("a.png"), header=HEADER.replace(column, "Something"))
    assert f"{TABLE}: column {column!r} is missing" in folder.refused()


def test_an_empty_table_lacks_its_columns(folder: Folder) -> None:
    folder.images("a.png")
    (folder.path / TABLE).touch()
    assert "column 'Image Index' is missing" in folder.refused()


@pytest.mark.parametrize("whole", [True, False])
def test_a_compressed_table_that_is_damaged_is_named(whole: bool, folder: Folder) -> None:
    folder.images("a.png")
    data = gzip.compress(f"{HEADER}\n{line('a.png')}\n".encode())
    (folder.path / f"{TABLE}.gz").write_bytes(b"no gzip at all" if whole else data[:-20])
    assert f"{TABLE}.gz cannot be read as a table" in folder.refused()


def lists(folder: Folder, train: list[str], test: list[str]) -> None:
    """NIH's own split."""
    for name, images in (("train_val_list.txt", train), ("test_list.txt", test)):
        (folder.path / name).write_text("\n".join(images) + "\n")


def test_nihs_lists_decide_the_split(folder: Folder) -> None:
    names = [f"{n:03d}.png" for n in range(60)]
    folder.images(*names).table(*(line(name, patient=str(n // 2)) for n, name in enumerate(names)))
    lists(folder, names[:40], names[40:])
    rows = folder.rows(split="official", validation_share=0.3)
    assert all((rows[name]["split"] == "test") == (n >= 40) for n, name in enumerate(names))
    assert {rows[name]["split"] for name in names[:40]} == {"train", "validation"}


def test_nihs_lists_are_needed_where_they_are_asked_for(folder: Folder) -> None:
    folder.images("a.png").table(line("a.png"))
    assert "corpus.split=official needs NIH's train_val_list.txt" in folder.refused(split="official")
    folder.table(name="train_val_list.txt")
    assert "corpus.split=official needs NIH's test_list.txt" in folder.refused(split="official")


def test_a_list_that_tears_a_patient_apart_is_refused_before_any_work(folder: Folder) -> None:
    folder.images("a.png", "b.png", "c.png").table(line("a.png"), line("b.png"), line("c.png", patient="2"))
    lists(folder, ["b.png"], ["a.png", "c.png"])
    assert "puts into more than one split: 1;" in folder.refused(split="official")
    lists(folder, ["a.png", "b.png", "c.png"], ["c.png"])
    assert "puts into more than one split: 1;" in folder.refused(split="official")


def test_a_film_in_no_list_goes_with_its_patient_and_one_of_an_unlisted_patient_is_left_out(folder: Folder) -> None:
    folder.images("a.png", "b.png", "c.png", "d.png", "e.png")
    whose = {"a.png": "1", "b.png": "1", "c.png": "2", "d.png": "2", "e.png": "3"}
    folder.table(*(line(name, patient=patient) for name, patient in whose.items()))
    lists(folder, ["c.png"], ["a.png", "gone.png"])
    rows = folder.rows(split="official", validation_share=0.001)
    assert {name: row["split"] for name, row in rows.items() if not row["excluded"]} == {
        "a.png": "test",
        "b.png": "test",
        "c.png": "train",
        "d.png": "train",
    }
    assert rows["e.png"]["excluded"] == "not_listed"
    assert folder.rows()["e.png"]["excluded"] is None


def test_everything_can_be_test(folder: Folder) -> None:
    names = [f"{n}.png" for n in range(20)]
    folder.images(*names).table(*(line(name, patient=name) for name in names))
    assert {row["split"] for row in folder.rows(split="all_test").values()} == {"test"}


def test_the_view_rule_excludes_and_nothing_else_changes(folder: Folder) -> None:
    folder.images("a.png", "b.png", "c.png")
    folder.table(line("a.png"), line("b.png", view="AP"), line("c.png", view=""))
    every, frontal = folder.rows(), folder.rows(views=["PA"])
    assert {name: row["excluded"] for name, row in frontal.items()} == {"a.png": None, "b.png": "view", "c.png": "view"}
    assert every["a.png"] == frontal["a.png"]
    assert not any(row["excluded"] for row in every.values())


def test_the_digest_follows_labels_and_files_and_not_the_chunks_of_the_table(folder: Folder) -> None:
    def digest() -> str:
        return rows_digest(pa.concat_tables(folder.read().partitions()))

    names = [f"{letter}.png" for letter in "abdefghijk"]
    folder.images(*names).table(*map(line, names))
    seen = {digest()}
    assert rows_digest(pa.concat_tables(folder.read(partition_images=8).partitions())) in seen
    folder.table(*(line(name, "Mass") for name in names))
    seen.add(digest())
    (folder.path / "a.png").write_bytes(b"longer than it was before")
    seen.add(digest())
    (folder.path / "a.png").write_bytes(b"of that size, and other ones")
    (folder.path / "a.png").write_bytes(b"shorter than it was before"[:25])
    seen.add(digest())
    folder.images("c.png")
    seen.add(digest())
    assert len(seen) == 5


def test_a_file_that_is_larger_than_any_image_is_refused_by_its_listing(folder: Folder) -> None:
    folder.images("a.png", "b.png").table(line("a.png"), line("b.png"))
    os.truncate(folder.path / "a.png", 40 << 30)
    rows = folder.rows(max_pixels=1000)
    assert (rows["a.png"]["reason"], rows["b.png"]["reason"]) == ("too_large", None)
    assert rows["a.png"]["text"].startswith("42,949,672,960 bytes, more than 16,781,216,")


def test_a_name_that_is_no_text_is_quarantined_beside_one_that_looks_like_its_escape_and_the_others_stay(
    folder: Folder,
) -> None:
    folder.images("a.png").table(line("a.png"))
    for name in (b"b\xff.png", b"b\xfe.png", b"d\xff/b.png", b"b\x1aff.png"):
        path = Path(os.fsdecode(os.fsencode(folder.path) + b"/" + name))
        path.parent.mkdir(exist_ok=True)
        path.touch()
    rows = in_order(folder.read())
    assert {row["image_id"]: row["reason"] for row in rows} == {
        "a.png": None,
        "b\\x1aff.png": "bad_name",
        "b\\x1afe.png": "bad_name",
        "b\\x1a1aff.png": "bad_name",
        "b.png": "bad_name",
    }
    assert all(row["source_uri"].encode() for row in rows)


def test_images_whose_names_begin_with_a_dot_are_left_alone_and_counted(folder: Folder) -> None:
    folder.images("a.png", "._a.png", "d/.b.jpg", ".DS_Store").table(line("a.png"))
    found = folder.read()
    assert (found.rows, found.ignored) == (1, {"names with a dot in front": 2})


def test_a_full_temporary_folder_is_said(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{n}.png" for n in range(300)]
    folder.images(*names).table(*map(line, names))
    monkeypatch.setattr(archive, "TABLES", archive.TABLES + "PRAGMA max_page_count = 1;")
    assert "do not fit into the temporary folder: database or disk is full; set TMPDIR" in folder.refused()


def test_partitions_are_cut_in_the_order_of_the_paths_and_read_again_at_will(folder: Folder) -> None:
    names = [f"{n:02d}.png" for n in range(19)]
    folder.images(*names).table(*map(line, names))
    found = folder.read(partition_images=8)
    for _ in range(2):
        cut = [rows["image_id"].to_pylist() for rows in found.partitions()]
        assert cut == [names[:8], names[8:16], names[16:]]


def cut_after(folder: Folder, before: Archive, removed: RemovedPatients = NOBODY) -> list[list[str]]:
    """The partitions of an archive that was cut before, by the names of their images."""
    settings = CorpusSettings(archive=str(folder.path), partition_images=8)
    found = Archive(settings, removed, before.partitions())
    return [rows["image_id"].to_pylist() for rows in found.partitions()]


def test_images_keep_their_partition_and_new_ones_come_behind(folder: Folder) -> None:
    names = [f"{n:02d}.png" for n in range(0, 24, 2)]
    folder.images(*names).table(*map(line, names))
    before = folder.read(partition_images=8)
    more = ["01.png", "99.png"]
    (folder.path / names[3]).unlink()
    folder.images(*more).table(*map(line, [*names, *more]))
    kept = [name for name in names if name != names[3]]
    assert cut_after(folder, before) == [kept[:7], kept[7:], more]


def test_what_is_removed_keeps_its_place_and_says_nothing(folder: Folder, tmp_path: Path) -> None:
    names = [f"{n:02d}.png" for n in range(12)]
    folder.images(*names).table(*(line(name, patient=str(n // 2)) for n, name in enumerate(names)))
    before = folder.read(partition_images=8)
    remove(str(tmp_path), "2", Pseudonyms(None))
    removed = RemovedPatients.of(str(tmp_path), PrivacySettings(pseudonymise=False))
    once = cut_after(folder, before, removed)
    marks = [removed.mark(name) for name in names[4:6]]
    assert once == [[*names[:4], *marks, *names[6:8]], names[8:]]
    again = Archive(CorpusSettings(archive=str(folder.path), partition_images=8), removed, before.partitions())
    assert cut_after(folder, again, removed) == once
    assert [row["excluded"] for row in in_order(again)].count(REMOVED) == 2
    assert all(row["source_uri"] is None and row["patient_id"] is None for row in in_order(again) if row["excluded"])


def test_the_sample_of_real_x_rays_has_no_image_to_refuse(nih_sample: Path) -> None:
    rows = in_order(Archive(CorpusSettings(archive=str(nih_sample / "dev"))))
    assert len(rows) == 7087
    assert not any(row["reason"] or row["excluded"] for row in rows)
    assert sum(len(row["boxes"]) for row in rows) > 0
    assert {box["finding"] for row in rows for box in row["boxes"]} <= set(FINDINGS)


def test_reading_four_times_the_images_holds_no_more_memory(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what Python holds; SQLite's own memory is bounded by its cache."""
    peaks = []
    for images in (4000, 16_000):
        folder.table(*(line(f"{n:06d}.png") for n in range(images)))
        table = [storage.StoredFile(TABLE, str(folder.path / TABLE), 1, 0.0)]
        listed = chain(
            table, (storage.StoredFile(f"{n:06d}.png", f"/archive/{n:06d}.png", 10**6, 0.0) for n in range(images))
        )
        monkeypatch.setattr(storage, "list_files", lambda *_, found=listed: found)
        tracemalloc.start()
        read = sum(rows.num_rows for rows in folder.read(partition_images=64).partitions())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert read == images
    assert peaks[1] - peaks[0] < 1_000_000, "more than buffers: 12,000 rows take 18 MB"
