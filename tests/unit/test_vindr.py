"""Promises of reading VinDr-CXR: what its readers agree on, whose boxes are one, and what is held out."""

import gzip
from pathlib import Path
from typing import Any

import pytest

from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.corpus.formats.vindr import MOST_BOXES, VinDr, _Drawn, merged, overlap
from cxr_retrieval.errors import UserError
from tests.dicoms import dataset, ramp, written
from tests.exports import Export

COLUMNS = [  # of image_labels_train.csv behind `image_id` and `rad_id`
    *("Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture", "Consolidation"),
    *("Edema", "Emphysema", "Enlarged PA", "ILD", "Infiltration", "Lung Opacity", "Lung cavity", "Lung cyst"),
    *("Mediastinal shift", "Nodule/Mass", "Pleural effusion", "Pleural thickening", "Pneumothorax"),
    *("Pulmonary fibrosis", "Rib fracture", "Other lesion", "COPD", "Lung tumor", "Pneumonia", "Tuberculosis"),
    *("Other diseases", "No finding"),
]
LETTERS = {
    "A": "Atelectasis",
    "N": "Nodule/Mass",
    "P": "Pleural effusion",
    "L": "Lung Opacity",
    "T": "Tuberculosis",
    "R": "Rib fracture",
    "-": "No finding",
}


class VinDrFolder(Export):
    """An archive in VinDr-CXR's layout. What a reader says is written by LETTERS."""

    format = "vindr"

    def image(self, name: str, folder: str = "train", **elements: Any) -> "VinDrFolder":
        path = self.archive / folder / f"{name}.dicom"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(written(dataset(ramp(), **elements)))
        return self

    def say(self, kind: str, **said: list[str]) -> "VinDrFolder":
        reader = ["rad_ID"] if kind == "train" else []
        lines = [",".join(["image_id", *reader, *COLUMNS])]
        for image, readers in said.items():
            for n, letters in enumerate(readers):
                seen = {LETTERS[letter] for letter in letters}
                cells = ["1" if name in seen else "0" for name in COLUMNS]
                lines.append(",".join([image, *([f"R{n}"] if reader else []), *cells]))
        return self._table(f"image_labels_{kind}", lines)

    def draw(self, kind: str, *rows: str) -> "VinDrFolder":
        reader = "rad_id," if kind == "train" else ""
        return self._table(f"annotations_{kind}", [f"image_id,{reader}class_name,x_min,y_min,x_max,y_max", *rows])

    def _table(self, name: str, lines: list[str]) -> "VinDrFolder":
        path = self.archive / "annotations" / f"{name}.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
        return self


@pytest.fixture
def vindr(tmp_path: Path) -> VinDrFolder:
    return VinDrFolder(tmp_path)


def test_two_of_three_readers_make_a_finding_and_one_alone_an_uncertain_one(vindr: VinDrFolder) -> None:
    vindr.image("a").image("b").image("c")
    vindr.say("train", a=["APR", "AR", "A"], b=["-", "-", "-"], c=["AL", "LR", "PT"])
    rows = vindr.rows()
    assert rows["a"]["findings"] == ["Atelectasis"]
    assert (rows["a"]["other"], rows["c"]["other"]) == (["Rib fracture"], [])
    assert rows["a"]["unknown"] == ["Effusion", "Hernia"]
    assert (rows["b"]["findings"], rows["b"]["unknown"]) == ([], ["Hernia"])  # nobody was asked for a hernia
    assert rows["c"]["findings"] == []
    may_be = {"Infiltration", "Mass", "Nodule", "Pneumonia", "Consolidation"}  # what opacity and tuberculosis stand for
    assert set(rows["c"]["unknown"]) == {"Atelectasis", "Effusion", "Hernia", *may_be}


def test_an_image_that_one_reader_has_two_rows_for_is_quarantined_and_the_others_stay(vindr: VinDrFolder) -> None:
    vindr.image("a").image("b").say("train", a=["A", "-", "-"], b=["A", "A", "-"])
    table = vindr.archive / "annotations" / "image_labels_train.csv"
    lines = table.read_text().splitlines()
    vindr._table("image_labels_train", [*lines, lines[1]])
    rows = vindr.rows()
    assert (rows["a"]["reason"], rows["a"]["text"]) == (
        "labels_twice",
        "the label table has two rows of one reader for this image",
    )
    assert (rows["b"]["reason"], rows["b"]["findings"]) == (None, ["Atelectasis"])


def test_readers_without_names_are_each_another(vindr: VinDrFolder) -> None:
    vindr.image("a")._table("image_labels_train", ["image_id,Cardiomegaly", "a,1", "a,1", "a,0"])
    row = vindr.rows()["a"]
    assert (row["reason"], row["findings"]) == (None, ["Cardiomegaly"])


def test_findings_that_a_table_has_no_column_for_are_unknown(vindr: VinDrFolder) -> None:
    vindr.image("a").image("b")
    vindr._table("image_labels_train", ["image_id,rad_id,Cardiomegaly,No finding", "a,R1,0,1", "a,R2,0,1", "b,R1,1,0"])
    rows = vindr.rows()
    never = [name for name in FINDINGS if name != "Cardiomegaly"]
    assert [(rows[name]["findings"], rows[name]["unknown"]) for name in "ab"] == [
        ([], never),
        (["Cardiomegaly"], never),
    ]


def test_a_nodule_or_mass_is_one_of_both_and_not_known_which(vindr: VinDrFolder) -> None:
    vindr.image("a").image("b").say("train", a=["N", "N", "N"], b=["N", "-", "-"])
    rows = vindr.rows()
    assert rows["a"]["findings"] == rows["b"]["findings"] == []
    assert rows["a"]["unknown"] == rows["b"]["unknown"] == ["Mass", "Nodule", "Hernia"]


def test_a_test_image_has_one_row_which_all_readers_agreed_on(vindr: VinDrFolder) -> None:
    vindr.image("a").image("t", "test").say("train", a=["-"] * 3).say("test", t=["P"])
    rows = vindr.rows(split="official")
    assert rows["t"]["findings"] == ["Effusion"]
    assert rows["t"]["split"] == "test"
    assert rows["a"]["split"] in ("train", "validation")


def test_an_image_is_a_patient_of_its_own_whose_header_tells_sex_age_and_view(vindr: VinDrFolder) -> None:
    vindr.image("a", PatientSex="F", PatientAge="040Y", ViewPosition="PA", StudyDate="20200101").say("train", a=["-"])
    row = vindr.rows()["a"]
    assert (row["patient_id"], row["study_id"], row["image_id"]) == ("a", "a", "a")
    assert (row["sex"], row["age_years"], row["view"], row["study_date"]) == ("F", 40, "PA", None)
    assert "4711" not in repr(vindr.kept())  # the file's own patient


def test_boxes_of_present_findings_are_kept_in_the_pixels_of_the_image(vindr: VinDrFolder) -> None:
    vindr.image("a").say("train", a=["AP", "AP", "A"]).image("t", "test").say("test", t=["P"])
    vindr.draw(
        "train",
        "a,R0,Atelectasis,10,20,30,60",
        "a,R1,Atelectasis,12,22,32,62",
        "a,R2,Atelectasis,300,300,340,350",
        "a,R0,Pleural effusion,1,2,3,5",
        "a,R0,Lung Opacity,1,2,3,5",
        "a,R0,Cardiomegaly,1,2,3,5",
        "a,R2,No finding,,,,",
        "elsewhere,R2,Atelectasis,1,1,2,2",
    )
    vindr.draw("test", "t,Pleural effusion,5,5,10,15", "t,Atelectasis,5,5,10,15")
    found = vindr.read()
    rows = [row for partition in found.partitions() for row in partition.to_pylist()]
    boxes = {row["image_id"]: [tuple(box.values()) for box in row["boxes"]] for row in rows}
    # An opacity may be several findings, and is none; one reader's effusion and the test image's atelectasis are none.
    assert found.boxes_left_out == {"unknown_finding": 1, "not_in_labels": 2}
    assert boxes["a"] == [
        ("Atelectasis", 11, 21, 20, 40),
        ("Atelectasis", 300, 300, 40, 50),
        ("Effusion", 1, 2, 2, 3),
    ]
    assert boxes["t"] == [("Effusion", 5, 5, 5, 10)]
    assert VinDr.frame is None


def test_boxes_of_one_reader_stay_two_and_those_of_several_that_overlap_are_their_mean() -> None:
    one, near, far = (0.0, 0.0, 10.0, 10.0), (1.0, 0.0, 11.0, 10.0), (5.0, 0.0, 15.0, 10.0)
    assert overlap(one, near) == pytest.approx(90 / 110)
    assert overlap(one, far) == pytest.approx(50 / 150)
    assert overlap(one, (20.0, 20.0, 30.0, 30.0)) == 0
    assert merged([_Drawn("R1", one), _Drawn("R1", near)]) == [one, near]
    assert merged([_Drawn("R1", one), _Drawn("R2", near)]) == [(0.5, 0.0, 10.5, 10.0)]
    assert merged([_Drawn("R1", one), _Drawn("R2", far)]) == [one, far]
    three = [_Drawn("R1", one), _Drawn("R2", near), _Drawn("R3", near)]
    assert merged(three) == [pytest.approx((2 / 3, 0, 32 / 3, 10))]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("a,R0,Atelectasis,30,20,10,60", "row 2 is no box"),
        ("a,R0,Atelectasis,1,x,2,2", "row 2 is no box"),
        ("a,R0,Atelectasis,0,0,1e-200,1e-200", "row 2 is no box"),
    ],
)
def test_a_row_that_is_no_box_is_refused(vindr: VinDrFolder, row: str, told: str) -> None:
    vindr.image("a").say("train", a=["A"] * 3).draw("train", row)
    with pytest.raises(UserError, match=told):
        vindr.read()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("annotations/image_labels_train.csv", "image_labels_train"),
        ("annotations/annotations_test.csv.gz", "annotations_test"),
        ("image_labels_test.csv", "image_labels_test"),
        ("annotations/image_labels_train", None),
        ("annotations/image_labels_train.csv.bz2", None),
        ("annotations/image_labels_train.v2.csv", None),
    ],
)
def test_a_table_is_a_csv_file_plain_or_packed_by_gzip(name: str, kind: str | None) -> None:
    assert VinDr.table_kind(name) == kind


def test_a_packed_table_is_read_as_a_plain_one(vindr: VinDrFolder) -> None:
    vindr.image("a").say("train", a=["A"] * 3)
    table = vindr.archive / "annotations" / "image_labels_train.csv"
    table.with_suffix(".csv.gz").write_bytes(gzip.compress(table.read_bytes()))
    table.unlink()
    assert vindr.rows()["a"]["findings"] == ["Atelectasis"]


def test_more_boxes_of_a_finding_on_an_image_than_readers_draw_are_refused(vindr: VinDrFolder) -> None:
    vindr.image("a").say("train", a=["A"] * 3)
    rows = [f"a,R{n},Atelectasis,{2 * n},0,{2 * n + 1},1" for n in range(MOST_BOXES + 1)]
    vindr.draw("train", *rows[1:])
    assert len(vindr.rows()["a"]["boxes"]) == MOST_BOXES
    vindr.draw("train", *rows)
    with pytest.raises(UserError, match=r"annotations_train.csv: more than 200 boxes of Atelectasis on one image"):
        vindr.read()


def test_a_vote_that_is_none_and_a_missing_table_are_refused(vindr: VinDrFolder) -> None:
    vindr.image("a")
    with pytest.raises(UserError, match=r"no label table annotations/image_labels_train.csv in it"):
        vindr.read()
    vindr.say("train", a=["A"])
    with pytest.raises(UserError, match=r"corpus.split=official needs annotations/image_labels_test.csv"):
        vindr.read(split="official")
    table = vindr.archive / "annotations" / "image_labels_train.csv"
    whole = table.read_text()
    table.write_text(whole.replace("R0,0,1", "R0,0,"))  # nobody's vote is no vote against
    with pytest.raises(UserError, match=r"column 'Atelectasis' holds '', which is neither 0 nor 1"):
        vindr.read()
    table.write_text(whole.replace("R0,0,1", "R0,0,7"))
    with pytest.raises(UserError, match=r"column 'Atelectasis' holds '7', which is neither 0 nor 1"):
        vindr.read()
