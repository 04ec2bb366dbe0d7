"""Promises of reading archives in other layouts than NIH's: rows say what the tables say, and what they do not say is
unknown."""

import csv
import datetime
import gzip
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.config import CorpusSettings, dump_settings, load_settings, with_values
from cxr_retrieval.corpus.archive import Archive
from cxr_retrieval.corpus.beginning import Beginning
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.corpus.formats.column_map import ColumnMap
from cxr_retrieval.corpus.formats.labels import GIVEN, date, view
from cxr_retrieval.corpus.formats.observations import OBSERVATIONS, Observations
from cxr_retrieval.corpus.formats.vocabulary import CHEXPERT, PADCHEST
from cxr_retrieval.errors import UserError
from cxr_retrieval.storage import StoredFile

NEVER = ["Infiltration", "Emphysema", "Fibrosis", "Hernia"]  # what CheXpert's labeller never labels
PADCHEST_TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
METADATA, STUDIES, OTHERS, SPLIT = (
    f"mimic-cxr-2.0.0-{kind}.csv.gz" for kind in ("metadata", "chexpert", "negbio", "split")
)

Rows = dict[str, dict[str, Any]]


def images(folder: Path, *names: str) -> None:
    """Images are listed and not read, so any bytes will do."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"pixels of " + name.encode())


def table(file: Path, header: str | Sequence[str], *rows: Mapping[str, Any]) -> None:
    """A table with that header; cells that a row does not name are blank."""
    columns = header.split(",") if isinstance(header, str) else header
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    data = text.getvalue().encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)


def read(folder: Path, layout: str, **settings: Any) -> Rows:
    found = Archive(CorpusSettings.model_validate({"archive": str(folder), "format": layout, **settings}))
    return {row["image_id"]: row for rows in found.partitions() for row in rows.to_pylist()}


def refused(folder: Path, layout: str, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, layout, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# CheXpert

CHEXPERT_HEADER = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *OBSERVATIONS]
FRONTAL, LATERAL = "patient00007/study2/view1_frontal.jpg", "patient00007/study2/view2_lateral.jpg"


def person(path: str, **cells: str) -> dict[str, str]:
    sides = {"Frontal/Lateral": "Lateral"} if "lateral" in path else {"Frontal/Lateral": "Frontal", "AP/PA": "AP"}
    return {"Path": f"CheXpert-v1.0-small/{path}", "Sex": "Female", "Age": "68", **sides, **cells}


def chexpert(folder: Path, *rows: Mapping[str, str], root: str = "") -> Path:
    """A small CheXpert: the tables' paths begin with its folder, whether that is a folder of the archive or not."""
    for kind in ("train", "valid"):
        of_kind = [row for row in rows if f"/{kind}/" in row["Path"]]
        table(folder / root / f"{kind}.csv", CHEXPERT_HEADER, *of_kind)
        images(folder / root, *(row["Path"].partition("/")[2] for row in of_kind))
    return folder


def test_a_row_says_what_chexperts_table_says(tmp_path: Path) -> None:
    cells = {"Edema": "1.0", "Pneumonia": "-1.0", "Pneumothorax": "0.0", "Lung Lesion": "1.0", "Fracture": "1.0"}
    row = read(chexpert(tmp_path, person(f"train/{FRONTAL}", **cells)), "chexpert")[FRONTAL]
    expected = {
        "source_uri": str(tmp_path / "train" / FRONTAL),
        "patient_id": "patient00007",
        "study_id": "patient00007_study2",
        "age_years": 68,
        "sex": "F",
        "view": "AP",
        "findings": ["Edema"],
        "unknown": [name for name in FINDINGS if name not in ("Edema", "Pneumothorax")],
        "other": ["Fracture"],
        "reason": None,
    }
    assert {name: row[name] for name in expected} == expected


@pytest.mark.parametrize("root", ["", "CheXpert-v1.0-small", "data/chexpert"])
def test_an_image_of_chexpert_has_one_name_wherever_the_archives_root_lies(root: str, tmp_path: Path) -> None:
    assert list(read(chexpert(tmp_path, person(f"train/{FRONTAL}"), root=root), "chexpert")) == [FRONTAL]


def test_chexperts_download_in_batches_is_read(tmp_path: Path) -> None:
    table(
        tmp_path / "CheXpert-v1.0 batch 1 (validate & csv)" / "train.csv", CHEXPERT_HEADER, person(f"train/{FRONTAL}")
    )
    images(tmp_path, f"CheXpert-v1.0 batch 2 (train 1)/{FRONTAL}")
    assert read(tmp_path, "chexpert")[FRONTAL]["reason"] is None


@pytest.mark.parametrize(
    ("settings", "cells", "findings", "unknown"),
    [
        ({}, {"Edema": "-1.0"}, [], list(FINDINGS)),
        ({"uncertain": "present"}, {"Edema": "-1.0"}, ["Edema"], [name for name in FINDINGS if name != "Edema"]),
        ({"uncertain": "absent"}, {"Edema": "-1.0"}, [], [name for name in FINDINGS if name != "Edema"]),
        ({"uncertain": "absent", "unmentioned": "absent"}, {"Edema": "-1.0"}, [], NEVER),
        ({"unmentioned": "absent"}, {"Edema": "1.0"}, ["Edema"], NEVER),
        ({}, {"No Finding": "1.0"}, [], NEVER),
        ({}, {"No Finding": "0.0"}, [], list(FINDINGS)),
        ({}, {"No Finding": "1.0", "Edema": "-1"}, [], [*NEVER[:1], "Edema", *NEVER[1:]]),
    ],
)
def test_uncertain_and_unmentioned_findings_are_what_the_policy_says(
    settings: dict[str, str], cells: dict[str, str], findings: list[str], unknown: list[str], tmp_path: Path
) -> None:
    row = read(chexpert(tmp_path, person(f"train/{FRONTAL}", **cells)), "chexpert", **settings)[FRONTAL]
    assert (row["findings"], row["unknown"]) == (findings, unknown)


CELLS = st.fixed_dictionaries({}, optional={name: st.sampled_from(["", "0.0", "1.0", "-1.0"]) for name in OBSERVATIONS})
POLICIES = st.fixed_dictionaries(
    {
        "uncertain": st.sampled_from(["unknown", "present", "absent"]),
        "unmentioned": st.sampled_from(["unknown", "absent"]),
    }
)


@given(CELLS, POLICIES)
def test_any_cells_give_what_the_policy_says_and_no_finding_in_two_states(
    cells: dict[str, str], policy: dict[str, str]
) -> None:
    """The policy, said once more and plainly: cell by cell."""
    facts = Observations(CorpusSettings.model_validate(policy)).facts(cells)
    assert not set(facts["findings"]) & set(facts["unknown"])
    assert set(NEVER) <= set(facts["unknown"])
    for name, meaning in CHEXPERT.meanings.items():
        states = {"": policy["unmentioned"], "0.0": "absent", "1.0": "present", "-1.0": policy["uncertain"]}
        cell = cells.get(name, "")
        state = "absent" if not cell and cells.get("No Finding") == "1.0" else states[cell]
        assert (name in facts["other"]) == (state == "present" and not meaning)
        for word in meaning.split():
            finding, sure = word.rstrip("?"), not word.endswith("?")
            assert (finding in facts["findings"]) == (state == "present" and sure)
            assert (finding in facts["unknown"]) == (state == "unknown" or (state == "present" and not sure))


def test_views_and_people_of_chexpert_are_told_in_our_words(tmp_path: Path) -> None:
    odd = "patient00008/study1/view1_frontal.jpg"
    strange = person(f"train/{odd}", **{"AP/PA": "LL", "Sex": "Unknown", "Age": "0"})
    rows = read(chexpert(tmp_path, person(f"train/{FRONTAL}"), person(f"train/{LATERAL}"), strange), "chexpert")
    assert {name: row["view"] for name, row in rows.items()} == {FRONTAL: "AP", LATERAL: "LATERAL", odd: "LL"}
    assert (rows[odd]["sex"], rows[odd]["age_years"]) == (None, None)
    rows = read(tmp_path, "chexpert", views=["PA", "AP"])
    assert [name for name, row in rows.items() if not row["excluded"]] == [FRONTAL]


def test_a_cell_that_is_no_label_quarantines_its_image(tmp_path: Path) -> None:
    row = read(chexpert(tmp_path, person(f"train/{FRONTAL}", Edema="2.0")), "chexpert")[FRONTAL]
    assert (row["reason"], row["text"]) == ("unknown_label", "Edema is '2.0': none of 1, 0, -1 and blank")


def many(kind: str, start: int, count: int) -> list[dict[str, str]]:
    return [person(f"{kind}/patient{n:05d}/study1/view1_frontal.jpg") for n in range(start, start + count)]


def test_what_chexpert_holds_out_is_tested_on_where_it_has_no_test_images(tmp_path: Path) -> None:
    rows = read(chexpert(tmp_path, *many("train", 0, 40), *many("valid", 90, 5)), "chexpert", split="official")
    assert all((row["split"] == "test") == ("/valid/" in row["source_uri"]) for row in rows.values())
    assert {row["split"] for row in rows.values()} == {"train", "validation", "test"}


@pytest.mark.parametrize("name", ["test.csv", "test_labels.csv"])
def test_chexperts_folders_are_its_splits_where_it_has_all_three(name: str, tmp_path: Path) -> None:
    chexpert(tmp_path, *many("train", 0, 40), *many("valid", 90, 5))
    image = "patient64741/study1/view1_frontal.jpg"
    images(tmp_path, f"test/{image}")
    table(tmp_path / name, ["Path", *OBSERVATIONS], {"Path": f"CheXpert-v1.0/test/{image}", "Edema": "1.0"})
    rows = read(tmp_path, "chexpert", split="official")
    splits = {"train": "train", "valid": "validation", "test": "test"}
    assert all(row["split"] == splits[Path(row["source_uri"]).parts[-4]] for row in rows.values())
    assert (rows[image]["findings"], rows[image]["view"], rows[image]["sex"]) == (["Edema"], None, None)


# MIMIC-CXR-JPG

MIMIC_HEADER = (
    "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,StudyTime,"
    "ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,PatientOrientationCodeSequence_CodeMeaning"
)
STUDY_HEADER = ["subject_id", "study_id", *sorted(OBSERVATIONS)]
DICOM, SECOND, THIRD = "02aa804e-bde0afdd-112c0b34-7bc16630-4e384014", "1b2c-3d4e", "5f60-7a8b"


def mimic(folder: Path) -> Path:
    """Two patients: one study of two images, one of one image."""
    films = [
        (DICOM, "10000032", "50414267", "PA"),
        (SECOND, "10000032", "50414267", "LL"),
        (THIRD, "10000764", "7", ""),
    ]
    for name, patient, study, _ in films:
        images(folder, f"files/p{patient[:2]}/p{patient}/s{study}/{name}.jpg")
    metadata = [
        {"dicom_id": name, "subject_id": patient, "study_id": study, "ViewPosition": position, "StudyDate": "21800506"}
        for name, patient, study, position in films
    ]
    table(folder / METADATA, MIMIC_HEADER, *metadata)
    studies = [
        {"subject_id": "10000032", "study_id": "50414267", "Pneumothorax": "1.0", "Support Devices": "1.0"},
        {"subject_id": "10000764", "study_id": "7", "No Finding": "1.0"},
    ]
    table(folder / STUDIES, STUDY_HEADER, *studies)
    splits = [(DICOM, "train"), (SECOND, "train"), (THIRD, "validate")]
    table(folder / SPLIT, "dicom_id,study_id,subject_id,split", *({"dicom_id": n, "split": s} for n, s in splits))
    return folder


def test_an_image_of_mimic_has_its_studys_labels(tmp_path: Path) -> None:
    rows = read(mimic(tmp_path), "mimic")
    first = rows[DICOM]
    assert (first["patient_id"], first["study_id"], str(first["study_date"])) == ("10000032", "50414267", "2180-05-06")
    assert first["findings"] == rows[SECOND]["findings"] == ["Pneumothorax"]
    assert first["other"] == ["Support Devices"]
    assert first["unknown"] == [name for name in FINDINGS if name != "Pneumothorax"]
    assert (rows[THIRD]["findings"], rows[THIRD]["unknown"]) == ([], NEVER)
    assert [rows[name]["view"] for name in (DICOM, SECOND, THIRD)] == ["PA", "LATERAL", None]


def test_mimics_validate_patients_are_the_ones_to_choose_by(tmp_path: Path) -> None:
    rows = read(mimic(tmp_path), "mimic", split="official")
    assert [rows[name]["split"] for name in (DICOM, SECOND, THIRD)] == ["train", "train", "validation"]


def test_a_split_table_that_tears_a_patient_apart_or_has_a_strange_split_is_refused(tmp_path: Path) -> None:
    header = "dicom_id,study_id,subject_id,split"
    mimic(tmp_path)
    table(tmp_path / SPLIT, header, {"dicom_id": DICOM, "split": "train"}, {"dicom_id": SECOND, "split": "validate"})
    assert "puts into more than one split: 1;" in refused(tmp_path, "mimic", split="official")
    table(tmp_path / SPLIT, header, {"dicom_id": DICOM, "split": "dev"})
    assert f"{SPLIT}: split 'dev' is none of train, validate, test" in refused(tmp_path, "mimic", split="official")
    (tmp_path / SPLIT).unlink()
    assert "corpus.split=official needs MIMIC's mimic-cxr-*-split.csv" in refused(tmp_path, "mimic", split="official")


def test_a_study_without_labels_quarantines_its_images_and_one_with_two_rows_is_refused(tmp_path: Path) -> None:
    row = {"subject_id": "10000032", "study_id": "50414267"}
    mimic(tmp_path)
    table(tmp_path / STUDIES, STUDY_HEADER, row)
    rows = read(tmp_path, "mimic")
    assert [rows[name]["reason"] for name in (DICOM, SECOND, THIRD)] == [None, None, "no_label_row"]
    table(tmp_path / STUDIES, STUDY_HEADER, row, row)
    assert f"{STUDIES}: row 3 is its study's second" in refused(tmp_path, "mimic")


def test_negbios_labels_are_read_where_chexperts_are_not_there(tmp_path: Path) -> None:
    mimic(tmp_path)
    table(tmp_path / OTHERS, STUDY_HEADER, {"study_id": "50414267", "Edema": "1"}, {"study_id": "7"})
    assert read(tmp_path, "mimic")[DICOM]["findings"] == ["Pneumothorax"]
    (tmp_path / STUDIES).unlink()
    assert read(tmp_path, "mimic")[DICOM]["findings"] == ["Edema"]
    (tmp_path / OTHERS).unlink()
    assert "no mimic-cxr-*-chexpert.csv or -negbio.csv in this archive" in refused(tmp_path, "mimic")


def test_what_else_mimics_download_holds_is_not_told_as_strange(tmp_path: Path) -> None:
    mimic(tmp_path)
    for name in ("IMAGE_FILENAMES", "LICENSE.txt", "SHA256SUMS.txt", "mimic-cxr-2.1.0-test-set-labeled.csv"):
        (tmp_path / name).write_text("x")
    assert not Archive(CorpusSettings(archive=str(tmp_path), format="mimic")).ignored


# PadChest

PADCHEST_HEADER = (
    ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,ViewPosition_DICOM,Projection,"
    "MethodProjection,Pediatric,Modality_DICOM,ReportID,Report,MethodLabel,Labels,Localizations,"
    "LabelsLocalizationsBySentence,labelCUIS,LocalizationsCUIS"
)


def padchest(folder: Path, *words: str, **cells: str) -> Path:
    """One image for each list of words: 0.png, 1.png and so on."""
    common = {"StudyDate_DICOM": "20140915", "StudyID": "s1", "PatientID": "p1", "PatientBirth": "1930.0"}
    facts = {**common, "PatientSex_DICOM": "F", "Projection": "PA", "Localizations": "['loc basal']", **cells}
    table(
        folder / PADCHEST_TABLE,
        PADCHEST_HEADER,
        *({**facts, "ImageID": f"{n}.png", "Labels": text} for n, text in enumerate(words)),
    )
    images(folder, *(f"{n % 54}/{n}.png" for n in range(len(words))))
    return folder


def test_a_row_says_what_padchests_table_says(tmp_path: Path) -> None:
    row = read(padchest(tmp_path, "['nodule', 'scoliosis', 'kerley lines', ' pleural effusion']"), "padchest")["0.png"]
    expected = {
        "patient_id": "p1",
        "study_id": "s1",
        "age_years": 84,
        "sex": "F",
        "view": "PA",
        "findings": ["Effusion", "Nodule"],
        "unknown": ["Edema"],
        "other": ["scoliosis"],
        "boxes": [],
        "reason": None,
    }
    assert {name: row[name] for name in expected} == expected
    assert str(row["study_date"]) == "2014-09-15"


@pytest.mark.parametrize("words", ["nan", "", "['']", "[]", "['exclude']", "['unchanged']", "['normal', 'unchanged']"])
def test_a_list_that_tells_nothing_leaves_all_findings_unknown(words: str, tmp_path: Path) -> None:
    row = read(padchest(tmp_path, words), "padchest")["0.png"]
    assert (row["findings"], row["unknown"], row["other"]) == ([], list(FINDINGS), [])
    assert row["reason"] is None


def test_a_list_that_is_not_the_whole_tells_what_it_has(tmp_path: Path) -> None:
    row = read(padchest(tmp_path, "['unchanged', 'cardiomegaly']"), "padchest")["0.png"]
    assert (row["findings"], len(row["unknown"])) == (["Cardiomegaly"], 13)


def test_a_normal_image_of_padchest_has_no_finding(tmp_path: Path) -> None:
    row = read(padchest(tmp_path, "['normal']"), "padchest")["0.png"]
    assert (row["findings"], row["unknown"], row["other"]) == ([], [], [])


@pytest.mark.parametrize("words", ["nodule", "['nodule' or so]", "['nodule"])
def test_labels_that_are_no_list_quarantine_their_image(words: str, tmp_path: Path) -> None:
    assert read(padchest(tmp_path, words), "padchest")["0.png"]["reason"] == "unknown_label"


@pytest.mark.parametrize(
    ("projection", "ours"),
    [("L", "LATERAL"), ("AP_horizontal", "AP"), ("COSTAL", "COSTAL"), ("UNK", "UNK"), ("", None)],
)
def test_a_projection_is_one_of_three_views_where_that_is_sure(projection: str, ours: str, tmp_path: Path) -> None:
    assert read(padchest(tmp_path, "['normal']", Projection=projection), "padchest")["0.png"]["view"] == ours


@pytest.mark.parametrize("words", ["['normal']", "nan", "no list"])
def test_what_padchest_says_to_exclude_is_excluded_and_not_quarantined(words: str, tmp_path: Path) -> None:
    row = read(padchest(tmp_path, words, Projection="EXCLUDE"), "padchest")["0.png"]
    assert (row["excluded"], row["reason"]) == ("by_archive", None)


@pytest.mark.parametrize("cells", [{"PatientBirth": ""}, {"StudyDate_DICOM": ""}, {"PatientBirth": "2031.0"}])
def test_an_age_that_cannot_be_told_is_unknown(cells: dict[str, str], tmp_path: Path) -> None:
    assert read(padchest(tmp_path, "['normal']", **cells), "padchest")["0.png"]["age_years"] is None


# Any table, by a map of its columns

COLUMNS = {"image": "file", "patient": "pid", "findings": "seen"}


def test_a_plain_table_is_read_by_its_map(tmp_path: Path) -> None:
    columns = {
        **COLUMNS,
        "unknown": "doubt",
        "date": "day",
        "age": "years",
        "sex": "sex",
        "view": "view",
        "study": "exam",
    }
    table(
        tmp_path / "list.csv",
        "file,pid,seen,doubt,day,years,sex,view,exam,more",
        {"file": "a/1.png", "pid": "x", "seen": "mass; pleural thickening;Gout", "doubt": "EDEMA", "day": "2014-09-15",
         "years": "61.5", "sex": "male", "view": "posteroanterior", "exam": "e1"},
        {"file": "a\\2.png", "pid": "y", "seen": "no finding"},
        {"file": "./a/3.png", "pid": "y"},
    )  # fmt: skip
    images(tmp_path, "a/1.png", "a/2.png", "a/3.png")
    rows = read(tmp_path, "csv", columns=columns, separator=";")
    named = ["Mass", "Edema", "Pleural_Thickening"]
    never = [name for name in FINDINGS if name not in named]
    first = rows["a/1.png"]
    assert (first["findings"], first["other"]) == (["Mass", "Pleural_Thickening"], ["Gout"])
    assert first["unknown"] == [name for name in FINDINGS if name in never or name == "Edema"]
    assert (first["study_id"], str(first["study_date"]), first["age_years"]) == ("e1", "2014-09-15", 61)
    assert (first["sex"], first["view"], first["patient_id"]) == ("M", "PA", "x")
    assert (rows["a/2.png"]["findings"], rows["a/2.png"]["unknown"]) == ([], never)
    assert rows["a/3.png"]["unknown"] == list(FINDINGS), "a blank cell tells nothing"
    rows = read(tmp_path, "csv", columns=columns, separator=";", unmentioned="absent")
    assert rows["a/3.png"]["unknown"] == never


@pytest.mark.parametrize(
    ("cells", "findings", "absent"),
    [
        ({"seen": "Cardiomegaly"}, ["Cardiomegaly"], ["Effusion", "Mass"]),
        ({"seen": "Cardiomegaly|Efusion"}, ["Cardiomegaly"], []),
        ({"seen": "Cardiomegaly", "doubt": "Efusion"}, ["Cardiomegaly"], []),
        ({"seen": "no finding|Efusion"}, [], []),
        ({"seen": "pleural_effusion|Cardiomegaly"}, ["Cardiomegaly", "Effusion"], ["Mass"]),
        ({"seen": "No finding"}, [], ["Cardiomegaly", "Effusion", "Mass"]),
        ({"seen": "Normal"}, [], ["Cardiomegaly", "Effusion", "Mass"]),
    ],
)
def test_a_word_that_is_none_of_the_findings_leaves_those_unknown_that_are_not_named(
    cells: dict[str, str], findings: list[str], absent: list[str], tmp_path: Path
) -> None:
    """It may be another name, or a misspelt one, of what would be taken for absent."""
    table(tmp_path / "list.csv", "file,pid,seen,doubt", {"file": "1.png", "pid": "x", **cells})
    images(tmp_path, "1.png")
    settings = {"columns": {**COLUMNS, "unknown": "doubt"}, "labelled": ["Cardiomegaly", "Effusion", "Mass"]}
    row = read(tmp_path, "csv", **settings)["1.png"]
    assert row["findings"] == findings
    assert [name for name in FINDINGS if name not in (*row["findings"], *row["unknown"])] == absent
    assert row["other"] == [word for word in cells["seen"].split("|") if word == "Efusion"]
    row = read(tmp_path, "csv", unmentioned="absent", **settings)["1.png"]
    assert not {"Cardiomegaly", "Effusion", "Mass"} & set(row["unknown"])


def test_findings_that_a_table_is_said_to_tell_of_stay_the_same_when_it_grows(tmp_path: Path) -> None:
    def told(**settings: Any) -> dict[str, Any]:
        return read(tmp_path, "csv", columns=COLUMNS, **settings)["1.png"]

    images(tmp_path, "1.png", "2.png")
    rows = [{"file": "1.png", "pid": "x", "seen": "Mass"}]
    table(tmp_path / "list.csv", "file,pid,seen", *rows)
    first, said = told(), told(labelled=["Mass", "Edema"])
    assert said["unknown"] == [name for name in FINDINGS if name not in ("Mass", "Edema")]
    table(tmp_path / "list.csv", "file,pid,seen", *rows, {"file": "2.png", "pid": "y", "seen": "Hernia"})
    assert told() != first
    assert told(labelled=["Mass", "Edema"]) == said
    other = read(tmp_path, "csv", columns=COLUMNS, labelled=["Mass", "Edema"])["2.png"]
    assert other["findings"] == ["Hernia"]
    assert "Hernia" not in other["unknown"]


def test_a_labelled_finding_that_is_none_of_ours_is_refused_by_its_name(tmp_path: Path) -> None:
    table(tmp_path / "list.csv", "file,pid,seen", {"file": "1.png", "pid": "x"})
    images(tmp_path, "1.png")
    with pytest.raises(UserError, match=r"^corpus.labelled: 'Gout' is no finding; they are Atelectasis, "):
        read(tmp_path, "csv", columns=COLUMNS, labelled=["Mass", "Gout"])


def test_a_table_may_name_files_without_their_folders(tmp_path: Path) -> None:
    table(
        tmp_path / "list.csv",
        "file,pid,seen",
        {"file": "1.png", "pid": "x", "seen": "Mass"},
        {"file": "b/2.png", "pid": "y"},
    )
    images(tmp_path, "a/1.png", "b/2.png", "c/2.png")
    rows = read(tmp_path, "csv", columns=COLUMNS)
    assert rows["1.png"]["source_uri"] == str(tmp_path / "a/1.png")
    assert [rows[name]["reason"] for name in ("1.png", "b/2.png", "c/2.png")] == [None, None, "no_label_row"]
    images(tmp_path, "1.png")
    assert read(tmp_path, "csv", columns=COLUMNS)["1.png"]["source_uri"] == str(tmp_path / "1.png"), "the path wins"
    (tmp_path / "1.png").unlink()
    images(tmp_path, "d/1.png")
    assert read(tmp_path, "csv", columns=COLUMNS)["1.png"]["reason"] == "name_twice"


@pytest.mark.parametrize("path", ["{archive}/a/1.png", "file://{archive}/a/1.png", "./a/1.png", "././a/1.png", "1.png"])
def test_a_table_may_name_an_image_by_any_path_that_leads_to_it(path: str, tmp_path: Path) -> None:
    table(tmp_path / "list.csv", "file,pid,seen", {"file": path.format(archive=tmp_path), "pid": "x", "seen": "Mass"})
    images(tmp_path, "a/1.png")
    (row,) = read(tmp_path, "csv", columns=COLUMNS).values()
    assert (row["reason"], row["findings"]) == (None, ["Mass"])


def test_a_table_may_name_images_of_a_bucket_by_their_uris(tmp_path: Path) -> None:
    table(
        tmp_path / "list.csv",
        "file,pid",
        {"file": "s3://films/chest/a/1.png", "pid": "x"},
        {"file": "s3://other/1.png"},
    )
    settings = CorpusSettings.model_validate(
        {"archive": "s3://films/chest/", "format": "csv", "columns": {"image": "file", "patient": "pid"}}
    )
    labels = ColumnMap(settings).labels({GIVEN: StoredFile("list.csv", str(tmp_path / "list.csv"), 0, 0.0)})
    assert [label.image for label in labels] == ["a/1.png", "s3://other/1.png"]


@pytest.mark.parametrize("path", ["/data/films/Smith/1.png", "s3://other/1.png", "C:\\films\\1.png", "../a/1.png", "9"])
def test_a_table_that_names_no_image_of_the_archive_is_refused_and_no_name_is_told(path: str, tmp_path: Path) -> None:
    table(tmp_path / "list.csv", "file,pid,seen", {"file": path, "pid": "x"}, {"file": f"{path}.png", "pid": "x"})
    images(tmp_path, "a/1.png", "a/2.png")
    told = refused(tmp_path, "csv", columns=COLUMNS)
    assert told == (
        f"{tmp_path}: none of the 2 label rows is of an image in it; corpus.format=csv knows an image by its path below"
        " the archive or its file's name: mend the tables, or give those of these images"
    )


@pytest.mark.parametrize("nothing", ["", " ", "nan", "NaN", "None", "NULL", "NA", "n/a", "<NA>"])
def test_a_cell_that_a_program_left_empty_is_no_patient_and_no_finding(nothing: str, tmp_path: Path) -> None:
    table(
        tmp_path / "list.csv",
        "file,pid,seen",
        {"file": "1.png", "pid": nothing, "seen": "Mass"},
        {"file": "2.png", "pid": nothing, "seen": "Mass"},
        {"file": "3.png", "pid": "x", "seen": nothing},
    )
    images(tmp_path, "1.png", "2.png", "3.png")
    rows = read(tmp_path, "csv", columns=COLUMNS)
    assert [rows[name]["reason"] for name in ("1.png", "2.png", "3.png")] == ["no_patient", "no_patient", None]
    assert rows["1.png"]["text"] == "the label row names no patient"
    assert (rows["3.png"]["unknown"], rows["3.png"]["other"]) == (list(FINDINGS), [])


def test_a_plain_table_may_have_a_column_for_each_finding(tmp_path: Path) -> None:
    table(
        tmp_path / "list.csv",
        "file,pid,mass_01,eff,none,more",
        {"file": "1.png", "pid": "x", "mass_01": "1", "eff": "-1.0"},
        {"file": "2.png", "pid": "y", "mass_01": "0", "eff": "nan", "more": "9"},
        {"file": "3.png", "pid": "z", "none": "1"},
        {"file": "4.png", "pid": "z", "mass_01": "maybe", "none": "0"},
    )
    images(tmp_path, "1.png", "2.png", "3.png", "4.png")
    each = {"Mass": "mass_01", "pleural effusion": "eff", "No Finding": "none"}
    columns = {"image": "file", "patient": "pid", "findings": each}
    rows = read(tmp_path, "csv", columns=columns)
    told = [(row["findings"], set(FINDINGS) - set(row["unknown"])) for row in list(rows.values())[:3]]
    assert told == [(["Mass"], {"Mass"}), ([], {"Mass"}), ([], {"Mass", "Effusion"})]
    assert (rows["4.png"]["reason"], rows["4.png"]["text"]) == (
        "unknown_label",
        "Mass is 'maybe': none of 1, 0, -1 and blank",
    )
    rows = read(tmp_path, "csv", columns=columns, uncertain="present", unmentioned="absent")
    assert [row["findings"] for row in list(rows.values())[:3]] == [["Effusion", "Mass"], [], []]
    assert "Effusion" not in rows["2.png"]["unknown"]


def test_a_column_for_what_is_no_finding_is_refused_by_its_name(tmp_path: Path) -> None:
    table(tmp_path / "list.csv", "file,pid,seen", {"file": "1.png", "pid": "x"})
    images(tmp_path, "1.png")
    with pytest.raises(UserError, match=r"^corpus.columns.findings: 'Efusion' is no finding; they are Atelectasis, "):
        read(tmp_path, "csv", columns={**COLUMNS, "findings": {"Efusion": "seen"}})


@pytest.mark.parametrize("partition_images", [8, 1024])
@pytest.mark.parametrize("place", ["labels.csv", "tables/labels.csv.gz", "../labels.csv"])
def test_a_plain_table_may_be_named_whatever_others_lie_in_the_archive(
    place: str, partition_images: int, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    names = [f"{n}.png" for n in range(9)]
    images(archive, *names)
    for other in ("list.csv", "old.csv"):
        table(archive / other, "file,pid,seen", {"file": "0.png", "pid": "x", "seen": "Hernia"})
    table(archive / place, "file,pid,seen", *({"file": name, "pid": "x", "seen": "Mass"} for name in names))
    settings = {"columns": COLUMNS, "labels": str(archive / place), "partition_images": partition_images}
    rows = read(archive, "csv", **settings)
    assert {name: row["findings"] for name, row in rows.items()} == {name: ["Mass"] for name in names}
    corpus = CorpusSettings.model_validate({"archive": str(archive), "format": "csv", **settings})
    assert Archive(corpus).ignored == {".csv": 2}
    if partition_images == 8:
        (begun,) = Beginning(corpus).partitions()
        assert begun.to_pylist() == list(rows.values())[:8]
    (archive / place).unlink()
    assert "there is no such table" in refused(archive, "csv", **settings)


def test_two_plain_tables_are_refused_until_one_is_named(tmp_path: Path) -> None:
    for name in ("list.csv", "old.csv"):
        table(tmp_path / name, "file,pid,seen", {"file": "1.png", "pid": "x", "seen": "Mass"})
    images(tmp_path, "1.png")
    told = refused(tmp_path, "csv", columns=COLUMNS)
    assert told.endswith("two tables of one kind, list.csv and old.csv: keep one, or name it by corpus.labels")


@pytest.mark.parametrize("layout", ["mimic", "padchest"])
def test_a_patient_that_a_program_left_empty_is_none_in_any_format(layout: str, tmp_path: Path) -> None:
    if layout == "mimic":
        mimic(tmp_path)
        file = tmp_path / METADATA
        file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()).replace(b",10000764,", b",nan,")))
        name = THIRD
    else:
        padchest(tmp_path, "['normal']", PatientID="nan")
        name = "0.png"
    assert read(tmp_path, layout)[name]["reason"] == "no_patient"


def test_a_table_without_findings_leaves_all_unknown(tmp_path: Path) -> None:
    table(tmp_path / "list.csv", "file,pid", {"file": "1.png", "pid": "x"})
    images(tmp_path, "1.png")
    assert read(tmp_path, "csv", columns={"image": "file", "patient": "pid"})["1.png"]["unknown"] == list(FINDINGS)


@pytest.mark.parametrize("column", ["findings", "view"])
def test_a_column_of_text_is_refused_and_none_of_it_is_told(column: str, tmp_path: Path) -> None:
    columns = {"image": "file", "patient": "pid", column: "report"}
    reports = {"long": ["Mrs Doe " * 26], "many": [f"Doe {number}" for number in range(1001)]}
    for kind, texts in reports.items():
        rows = [{"file": f"{number}.png", "pid": "x", "report": text} for number, text in enumerate(texts)]
        table(tmp_path / "list.csv", "file,pid,report", *rows)
        images(tmp_path, "0.png")
        told = refused(tmp_path, "csv", columns=columns)
        assert f"the labels' {column.removesuffix('s')}s look like text" in told
        assert {"long": "one has more than 200 characters", "many": "more than 1,000 differ"}[kind] in told
        assert "Doe" not in told


def test_as_many_names_as_are_allowed_are_read_and_long_ones_cut(tmp_path: Path) -> None:
    rows = [{"file": f"{number}.png", "pid": "x", "seen": f"{number:04d}" + "o" * 196} for number in range(1000)]
    table(tmp_path / "list.csv", "file,pid,seen", *rows)
    images(tmp_path, "7.png")
    assert read(tmp_path, "csv", columns=COLUMNS)["7.png"]["other"] == ["0007" + "o" * 60]


@pytest.mark.parametrize(
    ("cell", "day"),
    [
        ("2014-09-15", "2014-09-15"),
        ("20140915", "2014-09-15"),
        ("2014-09-15T12:00:00", "2014-09-15"),
        ("20140915 120000", "2014-09-15"),
        ("20140915120000.000", "2014-09-15"),
        ("20141315", None),
        ("2014-09", None),
        ("9/15/2014", None),
    ],
)
def test_a_date_is_read_whatever_time_follows_it(cell: str, day: str | None) -> None:
    assert date(cell) == (day and datetime.date.fromisoformat(day))


def test_a_column_that_the_table_lacks_is_named(tmp_path: Path) -> None:
    table(tmp_path / "list.csv", "file,pid", {"file": "1.png", "pid": "x"})
    images(tmp_path, "1.png")
    assert "list.csv: column 'seen' is missing" in refused(tmp_path, "csv", columns=COLUMNS)


@pytest.mark.parametrize("missing", ["image", "patient"])
def test_a_map_without_image_or_patient_is_refused_by_name(missing: str) -> None:
    words = [f"corpus.columns.{key}={key}" for key in ("image", "patient") if key != missing]
    with pytest.raises(UserError, match=rf"^corpus.format=csv needs corpus.columns.{missing}: the name of that column"):
        load_settings([], ["corpus.format=csv", *words])


def test_a_map_for_a_format_that_knows_its_columns_is_refused() -> None:
    with pytest.raises(UserError, match=r"^corpus.columns needs corpus.format=csv: mimic knows the columns"):
        load_settings([], ["corpus.format=mimic", "corpus.columns.image=file"])


def test_a_map_is_read_from_a_file_and_from_one_word(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("corpus:\n  format: csv\n  columns:\n    image: file\n    patient: pid\n")
    word = load_settings([], ["corpus.format=csv", "corpus.columns={image: file, patient: pid}"])
    assert load_settings([str(file)]) == word
    with pytest.raises(UserError, match=r"unknown setting 'corpus.columns.sight' in the command line: did you mean"):
        load_settings([], ["corpus.columns={sight: file}"])


EACH = "corpus.columns.findings={Mass: mass_01, Edema: edema}"
MAPPED = ["corpus.format=csv", "corpus.columns={image: file, patient: pid}"]


def test_a_column_for_each_finding_is_set_in_a_file_and_by_one_word_and_replaced_as_a_whole(tmp_path: Path) -> None:
    word = load_settings([], [*MAPPED, EACH])
    assert word.corpus.columns.findings == {"Mass": "mass_01", "Edema": "edema"}
    file = tmp_path / "my.yaml"
    file.write_text(dump_settings(word))
    assert load_settings([str(file)]) == word
    assert load_settings([str(file)], ["corpus.columns.findings={Mass: m}"]).corpus.columns.findings == {"Mass": "m"}
    assert load_settings([str(file)], ["corpus.columns.findings=seen"]).corpus.columns.findings == "seen"
    assert with_values(word, {"corpus.size": 64}, "a test").corpus.columns == word.corpus.columns


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([*MAPPED, "corpus.columns.findings=[a]"], "setting corpus.columns.findings=['a'] in the command line: input"),
        ([*MAPPED, "corpus.columns.findings={Mass: 3}"], "setting corpus.columns.findings={'Mass': 3} in the command"),
        ([*MAPPED, EACH, "corpus.columns.unknown=doubt"], "corpus.columns.unknown is for one column of all findings:"),
        ([*MAPPED, EACH, "corpus.labelled=[Mass]"], "corpus.labelled is for one column of all findings: where "),
        (["corpus.labels=a.csv"], "corpus.labels is for corpus.format=dicom and csv: corpus.format=nih has tables of"),
    ],
)
def test_columns_and_tables_that_do_not_fit_are_refused_by_name(words: list[str], told: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(told)}"):
        load_settings([], words)


# All of them


@pytest.mark.parametrize("layout", ["padchest", "csv"])
def test_an_archive_without_a_split_of_its_own_says_so(layout: str, tmp_path: Path) -> None:
    padchest(tmp_path, "['normal']")
    columns = {"columns": {"image": "ImageID", "patient": "PatientID"}} if layout == "csv" else {}
    told = refused(tmp_path, layout, split="official", **columns)
    assert told.endswith("has no split of its own; use corpus.split=hash")


@pytest.mark.parametrize(
    ("layout", "lacks", "other"),
    [
        ("nih", "label table Data_Entry_2017*.csv", "chexpert"),
        ("chexpert", "label table train.csv", "padchest"),
        ("mimic", "table mimic-cxr-*-metadata.csv", "chexpert"),
        ("padchest", "label table PADCHEST_chest_x_ray_images_labels_160K*.csv", "mimic"),
    ],
)
def test_a_wrong_format_is_refused_with_what_is_missing_and_the_format_that_is_there(
    layout: str, lacks: str, other: str, tmp_path: Path
) -> None:
    write = {
        "chexpert": lambda: chexpert(tmp_path, person(f"train/{FRONTAL}")),
        "padchest": lambda: padchest(tmp_path, "['normal']"),
        "mimic": lambda: mimic(tmp_path),
    }
    write[other]()
    told = refused(tmp_path, layout)
    assert f"no {lacks} in it, which corpus.format={layout} needs; " in told
    assert told.endswith(f" is a table of corpus.format={other}")


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        ("PA", "PA"),
        ("ap", "AP"),
        ("LL", "LATERAL"),
        ("lateral", "LATERAL"),
        ("AP LLD", "AP LLD"),
        ("LPO", "LPO"),
        ("", None),
    ],
)
def test_a_view_is_normalised_where_it_is_sure_and_else_kept(text: str, ours: str | None) -> None:
    assert view(text) == ours


def test_every_word_of_padchests_vocabulary_is_read_from_a_list(tmp_path: Path) -> None:
    rows = read(padchest(tmp_path, *(f"['{name}']" for name in PADCHEST.meanings)), "padchest")
    for n, meaning in enumerate(PADCHEST.meanings.values()):
        row = rows[f"{n}.png"]
        assert set(meaning.split()) == {*row["findings"], *(f"{name}?" for name in row["unknown"])}
