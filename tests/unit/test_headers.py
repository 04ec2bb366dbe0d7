"""Promises of the header scan: what is looked into, how far it is read, what is kept, and of whom nothing is."""

import errno
import json
import os
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from cxr_retrieval import storage
from cxr_retrieval.config import CorpusSettings, PrivacySettings
from cxr_retrieval.corpus import headers as scanning
from cxr_retrieval.corpus.archive import WITHOUT_IMAGE, Archive
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.corpus.headers import HEADERS, HEADERS_FILE, Headers
from cxr_retrieval.corpus.limits import REMOVED
from cxr_retrieval.corpus.preparation import plan_corpus
from cxr_retrieval.errors import UserError
from cxr_retrieval.index.removal import workspace_holdings
from cxr_retrieval.privacy import Pseudonyms
from cxr_retrieval.tombstones import NOBODY, RemovedPatients, remove
from tests.dicoms import SECRET, dataset, ramp, written
from tests.exports import PIXELS, Export, ScannedHere, film, without_image


@pytest.fixture
def export(tmp_path: Path) -> Export:
    return Export(tmp_path)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every file that is read for its header, and how much of it is asked for."""
    seen: list[tuple[str, int]] = []
    real = storage.read_beginning

    def counted(uri: str, length: int) -> bytes:
        seen.append((Path(uri).name, length))
        return real(uri, length)

    monkeypatch.setattr(storage, "read_beginning", counted)
    return seen


def test_a_row_says_what_its_header_says_and_nothing_else(export: Export) -> None:
    facts = {"StudyDate": "20240229", "Modality": "DX", "ViewPosition": "PA", "PatientSex": "F", "PatientAge": "058Y"}
    export.put(a__IM1=film(patient="4711", **facts))
    row = export.rows()["a/IM1"]
    assert (row["patient_id"], row["study_id"], row["view"], row["sex"], row["age_years"]) == (
        "4711",
        "1.2.3",
        "PA",
        "F",
        58,
    )
    assert str(row["study_date"]) == "2024-02-29"
    assert row["findings"] == []
    assert row["unknown"] == list(FINDINGS)
    assert SECRET not in repr(row) + repr(export.kept())


@pytest.mark.parametrize("below", ["", "/deep/inside"])
def test_a_workspace_in_an_archive_of_which_every_file_may_be_an_image_is_refused(below: str, export: Export) -> None:
    export.put(IM1=film())
    settings = CorpusSettings(archive=f"{export.archive}/", format="dicom")
    with pytest.raises(UserError, match=r"workspace .* lies in the archive .*: set workspace to a folder outside"):
        plan_corpus(settings, f"{export.archive}{below}", PrivacySettings(pseudonymise=False))
    beside = plan_corpus(settings, f"{export.archive}-work", PrivacySettings(pseudonymise=False))
    assert beside.archive.unscanned == 1


def test_dicom_is_known_by_its_bytes_and_what_is_no_image_is_left_alone_and_counted(export: Export) -> None:
    export.put(IM1=film(), deep__er__2=film(), x_dcm=film(), DICOMDIR=without_image(uid.MediaStorageDirectoryStorage))
    export.put(report=without_image(), note=b"hello", empty=b"")
    (export.archive / "viewer.exe").write_bytes(b"MZ")
    (export.archive / "scan.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    found = export.read()
    assert found.rows == 3
    assert found.ignored == {WITHOUT_IMAGE: 2, "no ending": 2, ".exe": 1, ".png": 1}


def test_what_is_called_dicom_and_cannot_be_read_is_a_row_with_its_reason(export: Export) -> None:
    data = film()
    export.put(
        fine=data,
        cut=data[: data.index(b"4711") if b"4711" in data else data.index(b"p1")],
        bare=data[data.index(b"\x08\x00\x16\x00") :],
    )
    for name, bad in (("text.dcm", b"no DICOM"), ("empty.DICOM", b"")):
        (export.archive / name).write_bytes(bad)
    rows = export.rows()
    assert {name: row["reason"] for name, row in rows.items()} == {
        "fine": None,
        "cut": "damaged",
        "bare": "not_an_image",
        "text.dcm": "not_an_image",
        "empty.DICOM": "not_an_image",
    }
    assert rows["empty.DICOM"]["text"] == "no DICOM, though it is called so: 0 bytes"


def test_an_image_without_a_patient_is_a_row_with_its_reason(export: Export) -> None:
    row = export.put(a=film(patient=None)).rows()["a"]
    assert (row["reason"], row["text"]) == ("no_patient", "the header names no patient")


def test_other_modalities_than_radiographs_are_excluded_by_rule(export: Export) -> None:
    export.put(ct=film(Modality="CT"), dx=film(Modality="DX"), silent=film(), odd=film(Modality="JANE^DOE"))
    assert {name: row["excluded"] for name, row in export.rows().items()} == {
        "ct": "modality",
        "dx": None,
        "silent": None,
        "odd": None,
    }


def test_films_of_another_part_of_the_body_are_excluded_by_rule_and_what_tells_none_is_kept(export: Export) -> None:
    kept = [
        "CHEST",
        "Chest",
        "PORT CHEST",
        "CHESTABDOMEN",
        "THORAX",
        "TORAX",
        "LUNG",
        "LUNGS",
        "UNKNOWN",
        "",
        "C-SPINE",
    ]
    left_out = ["HAND", "ABDOMEN", "SKULL", "THORACICSPINE", "WHOLEBODY"]
    export.put(silent=film(), ct=film(Modality="CT", BodyPartExamined="HAND"))
    export.put(**{f"p{place}": film(BodyPartExamined=part) for place, part in enumerate(kept + left_out)})
    rules = {name: row["excluded"] for name, row in export.rows().items()}
    assert rules.pop("silent") is None
    assert rules.pop("ct") == "modality"
    assert [rules[f"p{place}"] for place in range(len(rules))] == [None] * len(kept) + ["body_part"] * len(left_out)


def large(size: int, element: str = "long") -> bytes:
    """A film whose header has that many bytes before what tells of the image."""
    made = dataset(PIXELS)
    made.PatientID, made.StudyInstanceUID = "p1", "1.2.3"
    if element == "long":
        made.add_new(0x00090010, "LO", "SOMEBODY")
        made.add_new(0x00091001, "OB", bytes(size))
    else:
        item = Dataset()
        item.add_new("PixelData", "OB", bytes(size))
        made.add_new("ReferencedImageSequence", "SQ", Sequence([item]))
        made["ReferencedImageSequence"].is_undefined_length = True
    return written(made)


@pytest.mark.parametrize("element", ["long", "sequence"])
@pytest.mark.parametrize(("size", "steps"), [(100, 1), (100_000, 2), (3_000_000, 3)])
def test_no_more_of_a_file_is_read_than_its_header_takes(
    export: Export, reads: list[tuple[str, int]], size: int, steps: int, element: str
) -> None:
    row = export.put(a=large(size, element) + bytes(1 << 17)).rows()["a"]
    assert row["patient_id"] == "p1"
    assert [length for _, length in reads] == list(scanning.LENGTHS[:steps])


def test_a_header_that_never_ends_is_damaged_and_read_no_further_than_the_limit(
    export: Export, reads: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "LENGTHS", (1000, 2000, 4000))
    row = export.put(a=large(10_000)).rows()["a"]
    assert (row["reason"], row["text"]) == ("damaged", "a DICOM header that does not end within 4,000 bytes")
    assert [length for _, length in reads] == [1000, 2000, 4000]


def test_a_second_look_reads_no_file_and_a_grown_folder_the_new_and_the_changed_only(
    export: Export, reads: list[tuple[str, int]]
) -> None:
    export.put(**{f"f{n}": film(patient=f"p{n}", image=f"1.{n}") for n in range(5)}, note=b"hello")
    first = export.rows()
    assert len(reads) == 6
    reads.clear()
    assert export.rows() == first
    assert reads == []
    export.put(f9=film(patient="p9"), f2=film(patient="another"))
    grown = export.rows()
    assert Counter(name for name, _ in reads) == {"f9": 1, "f2": 1}
    assert grown["f2"]["patient_id"] == "another"
    assert {name: row for name, row in grown.items() if name not in ("f2", "f9")} == {
        name: row for name, row in first.items() if name != "f2"
    }


def test_a_scan_that_ended_early_goes_on_behind_what_was_kept(
    export: Export, reads: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cxr_retrieval.corpus.archive.STRETCH", 2)
    export.put(**{f"f{n}": film(patient=f"p{n}") for n in range(6)})
    real, done = ScannedHere.scan, []

    def killed(self: Headers, files: Any, total: int) -> Any:
        for table in real(self, files, total):  # type: ignore[arg-type]
            if len(done) == 2:
                raise KeyboardInterrupt
            done.append(table)
            yield table

    monkeypatch.setattr(ScannedHere, "scan", killed)
    with pytest.raises(KeyboardInterrupt):
        export.read()
    monkeypatch.setattr(ScannedHere, "scan", real)
    before = {name for name, _ in reads}
    folders = list(Path(export.workspace).rglob("manifest.json"))
    folders[0].unlink()  # one of them was not finished: its files are read again
    reads.clear()
    assert len(export.rows()) == 6
    assert len({name for name, _ in reads} & before) == 2


def test_what_is_planned_and_not_scanned_is_counted_and_nothing_is_read(
    export: Export, reads: list[tuple[str, int]]
) -> None:
    export.put(a=film(), b=film())
    settings = CorpusSettings(archive=str(export.archive), format="dicom")
    planned = Archive(settings, headers=Headers(export.workspace, settings, NOBODY, scans=False))
    assert (planned.unscanned, planned.rows, reads) == (2, 2, [])
    assert Archive(settings).unscanned == 2
    export.read()
    planned = Archive(settings, headers=Headers(export.workspace, settings, NOBODY, scans=False))
    assert planned.unscanned == 0


def test_a_file_that_could_not_be_read_is_tried_again(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    export.put(a=film(), b=film())
    real = storage.read_beginning

    def denied(uri: str, length: int) -> bytes:
        if uri.endswith("/b"):
            raise PermissionError(errno.EACCES, "permission denied")
        return real(uri, length)

    monkeypatch.setattr(storage, "read_beginning", denied)
    assert export.rows()["b"]["reason"] == "unreadable"
    monkeypatch.setattr(storage, "read_beginning", real)
    for _ in range(2):
        assert export.rows()["b"]["reason"] is None


def test_a_header_for_which_memory_does_not_suffice_is_tried_again(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: Any, **__: Any) -> None:
        raise MemoryError

    export.put(a=film())
    with monkeypatch.context() as patched:
        patched.setattr(scanning, "read_facts", short)
        assert export.rows()["a"]["reason"] == "unreadable"
    assert export.rows()["a"]["reason"] is None


@pytest.mark.parametrize("pseudonymise", [False, True])
def test_nothing_is_kept_of_a_removed_patient_once_the_workspace_is_purged(
    export: Export, pseudonymise: bool, monkeypatch: pytest.MonkeyPatch, reads: list[tuple[str, int]]
) -> None:
    monkeypatch.setenv("CXR_PRIVACY_KEY", "0123456789abcdef")
    privacy = PrivacySettings(pseudonymise=pseudonymise)
    export.put(**{f"jane_doe_{n}": film(patient="jane" if n else "other") for n in range(3)})
    export.read()
    remove(export.workspace, "jane", Pseudonyms.of(privacy))
    removed = RemovedPatients.of(export.workspace, privacy)
    hidden = export.rows(removed)
    assert [row["excluded"] for row in hidden.values()].count(REMOVED) == 2
    assert not any("jane" in str(value) for row in hidden.values() if row["excluded"] for value in row.values())
    holdings = workspace_holdings(export.workspace, removed)
    assert any(file.path.endswith(HEADERS_FILE) for file in holdings.files)
    for file in holdings.files:
        os.unlink(file.uri)
    reads.clear()
    assert export.rows(removed) == hidden
    assert len(reads) == 3
    assert not any("jane" in json.dumps(row, default=str) for row in export.kept() if row["path"] != "jane_doe_0")
    assert not workspace_holdings(export.workspace, removed).files
    reads.clear()
    assert export.rows(removed) == hidden
    assert reads == []


def test_four_times_the_headers_hold_no_more_memory(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what Python holds; SQLite's own memory is bounded by its cache."""
    export.put(a=film())
    export.read()
    (kept,) = export.kept()
    peaks = []
    for images in (4000, 16_000):
        listed = (storage.StoredFile(f"{n:06d}", f"/archive/{n:06d}", 10, 0.0) for n in range(images))

        def tables(images: int = images) -> Iterator[pa.Table]:
            for start in range(0, images, 1000):
                rows = [{**kept, "path": f"{n:06d}", "size": 10, "version": 0} for n in range(start, start + 1000)]
                yield pa.Table.from_pylist(rows, schema=HEADERS)

        monkeypatch.setattr(storage, "list_files", lambda *_, listed=listed: listed)
        monkeypatch.setattr(ScannedHere, "kept", lambda _, tables=tables: tables())
        tracemalloc.start()
        read = sum(rows.num_rows for rows in export.read(partition_images=64).partitions())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert read == images
    assert peaks[1] - peaks[0] < 1_000_000, peaks


# ---- findings from a table


def study_table(export: Export, key: str) -> str:
    keys = {"path": "s1/a", "SOPInstanceUID": "1.1.1", "StudyInstanceUID": "1.1"}
    return export.labels(f"{key},Effusion,Mass,Hernia,age", f"{keys[key]},1,-1,,77", "nobody,0,0,0,1")


@pytest.mark.parametrize(("key", "told"), [("path", 1), ("SOPInstanceUID", 1), ("StudyInstanceUID", 2)])
def test_findings_come_from_a_table_by_file_image_or_study(export: Export, key: str, told: int) -> None:
    export.put(s1__a=film(study="1.1", image="1.1.1"), s1__b=film(study="1.1", image="1.1.2"))
    export.put(s2__a=film(study="2.1", image="2.1.1"))
    labels = study_table(export, key)
    found = export.read(labels=labels)
    rows = [row for partition in found.partitions() for row in partition.to_pylist()]
    assert [row["findings"] for row in rows] == [["Effusion"]] * told + [[]] * (3 - told)
    assert rows[0]["unknown"] == [name for name in FINDINGS if name != "Effusion"]
    assert rows[-1]["unknown"] == list(FINDINGS)
    assert (found.label_rows, found.labels_without_image) == (2, 1)
    assert list(found.table_hashes) == [labels]


@pytest.mark.parametrize("key", ["SOPInstanceUID", "StudyInstanceUID"])
def test_a_row_without_a_key_labels_nothing(key: str, export: Export) -> None:
    names = {"study": "none", "image": "none"}  # not in the standard's form: not told
    export.put(a=film(study="1.1", image="1.1"), b=film(patient="p2", **names), c=film(patient="p3", **names))
    found = export.read(labels=export.labels(f"{key},Mass,Effusion", "1.1,0,1", ",1,0", ",1,0"))
    rows = [row for partition in found.partitions() for row in partition.to_pylist()]
    assert [(row["reason"], row["findings"]) for row in rows] == [(None, ["Effusion"]), (None, []), (None, [])]
    assert rows[1]["unknown"] == list(FINDINGS)
    assert (found.label_rows, found.labels_without_image) == (3, 1)


def test_the_label_table_is_opened_as_often_whatever_the_number_of_files(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = storage.open_text

    def counted(uri: str) -> Any:
        opened.append(uri)
        return real(uri)

    labels = export.labels("path,Hernia", *(f"IM{n},1" for n in range(6)))
    monkeypatch.setattr(storage, "open_text", counted)
    counts = []
    for files in (2, 6):
        export.put(**{f"IM{n}": film() for n in range(files)})
        opened.clear()
        assert len(export.rows(labels=labels)) == files
        counts.append(len(opened))
    assert counts[0] == counts[1]


def test_an_image_whose_row_says_0_everywhere_has_no_finding(export: Export) -> None:
    export.put(a=film(image="1.5"))
    labels = export.labels("SOPInstanceUID," + ",".join(FINDINGS), "1.5" + ",0" * len(FINDINGS))
    row = export.rows(labels=labels)["a"]
    assert row["findings"] == row["unknown"] == []


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (
            ["image,Mass", "a,1"],
            "may name an image are path, SOPInstanceUID, StudyInstanceUID, and one",
        ),
        (["path,StudyInstanceUID,Mass", "a,1,1"], "of them has to be there; 2 are"),
        (["path,Gout", "a,1"], "no column is named as a finding"),
    ],
)
def test_a_table_that_cannot_be_understood_is_refused(export: Export, lines: list[str], told: str) -> None:
    export.put(a=film())
    with pytest.raises(UserError, match=told):
        export.read(labels=export.labels(*lines))
    with pytest.raises(UserError, match="there is no such table"):
        export.read(labels=str(export.archive / "none.csv"))


def test_a_column_is_read_by_any_name_of_its_finding_and_others_of_labels_are_kept_in_their_own_words(
    export: Export, capsys: pytest.CaptureFixture[str]
) -> None:
    export.put(a=film(), b=film(patient="p2"))
    header = "path,pleural_effusion,Infiltrate,EDEMA,Support Devices,Fracture,train,age,note"
    lines = ["a,1,0,-1,1,-1,1,61,x", "b,0,1.0,,0,,2,1,"]
    rows = export.rows(labels=export.labels(header, *lines))
    assert [(row["findings"], row["other"]) for row in rows.values()] == [
        (["Effusion"], ["Support Devices"]),
        (["Infiltration"], []),
    ]
    ours = {"Effusion", "Infiltration", "Edema"}
    assert rows["a"]["unknown"] == [name for name in FINDINGS if name not in ours or name == "Edema"]
    assert rows["b"]["unknown"] == [name for name in FINDINGS if name not in ours or name == "Edema"]
    told = capsys.readouterr().err
    assert told.endswith("columns that tell of no finding and are not read: 'train', 'age', 'note'\n")
    assert told.count("\n") == 1


def test_of_two_columns_of_one_finding_the_one_that_says_it_is_there_decides(export: Export) -> None:
    export.put(a=film(), b=film(patient="p2"))
    rows = export.rows(labels=export.labels("path,Effusion,Pleural Effusion", "a,0,1", "b,0,0"))
    assert [row["findings"] for row in rows.values()] == [["Effusion"], []]
    assert "Effusion" not in rows["b"]["unknown"]


def test_no_finding_rules_out_what_has_a_column_and_no_more(export: Export) -> None:
    export.put(a=film(), b=film(patient="p2"))
    rows = export.rows(labels=export.labels("path,no finding,Mass,Edema", "a,1,,-1", "b,0,,0"))
    assert all(row["findings"] == row["other"] == [] for row in rows.values())
    assert [set(FINDINGS) - set(row["unknown"]) for row in rows.values()] == [{"Mass"}, {"Edema"}]


def test_what_is_uncertain_or_blank_in_a_table_of_findings_is_what_the_settings_say(export: Export) -> None:
    export.put(a=film())
    labels = export.labels("path,Mass,Edema", "a,-1,")
    row = export.rows(labels=labels, uncertain="present", unmentioned="absent")["a"]
    assert row["findings"] == ["Mass"]
    assert row["unknown"] == [name for name in FINDINGS if name not in ("Mass", "Edema")]


def test_a_cell_that_is_no_label_quarantines_its_images(export: Export) -> None:
    export.put(a=film())
    row = export.rows(labels=export.labels("path,Mass", "a,maybe"))["a"]
    assert (row["reason"], row["text"]) == ("unknown_label", "Mass is 'maybe': none of 1, 0, -1 and blank")


def test_a_table_in_the_archive_is_no_file_of_another_kind(export: Export) -> None:
    export.put(a=film())
    (export.archive / "labels.csv").write_text("path,Mass\na,1\n")
    found = export.read(labels=str(export.archive / "labels.csv"))
    assert (found.rows, found.ignored) == (1, {})


def test_a_folder_without_an_image_and_a_split_that_it_does_not_have_are_refused(export: Export) -> None:
    export.put(report=without_image(), note=b"hello")
    with pytest.raises(UserError, match="no DICOM image in it; files of other kinds that were left alone: 2") as caught:
        export.read()
    assert "\n" not in str(caught.value)
    export.put(a=film())
    with pytest.raises(UserError, match=r"a folder of DICOM has no split of its own; use corpus.split=hash"):
        export.read(split="official")


def test_deflated_and_implicit_headers_are_read_from_their_beginning(export: Export) -> None:
    for name, syntax in (("deflated", uid.DeflatedExplicitVRLittleEndian), ("implicit", uid.ImplicitVRLittleEndian)):
        made = dataset(ramp(width=900, height=700))
        made.PatientID, made.file_meta.TransferSyntaxUID = name, syntax
        export.put(**{name: written(made)})
    assert {row["patient_id"] for row in export.rows().values()} == {"deflated", "implicit"}
