"""The page of a corpus: every image accounted for, counts by split and group, no name where none may be told."""

import re
from typing import Any

import numpy as np
import pytest

from cxr_retrieval.corpus.decoding import Recipe
from cxr_retrieval.corpus.findings import FINDINGS, NO_FINDING
from cxr_retrieval.privacy import Pseudonyms
from cxr_retrieval.report.corpus import Film, left_out, write_corpus
from cxr_retrieval.report.gallery import Case
from tests.unit.test_census import census, drawn

KEYED, NAMED = Pseudonyms(b"a key for tests, long enough"), Pseudonyms(None)
HOSTILE = "<b>00017_Smith.png</b>"
SPLITS = {name: {"images": 10 * n, "patients": n, "findings": {}} for n, name in enumerate(("test", "train"), 3)}


def manifest(**changes: Any) -> dict[str, Any]:
    recipe = Recipe(64, "letterbox")
    return {
        "input_id": "1a2b",
        "content_id": "3c4d",
        "counts": {"archive": 1234, "prepared": 1200, "quarantined": 20, "excluded": 9, "duplicates": 5},
        "label_rows": 1300,
        "labels_without_image": 66,
        "ignored_files": {".tif": 2},
        "boxes_left_out": {"unknown_finding": 41, "not_in_labels": 0},
        "quarantine_reasons": {"no_label_row": 3, "damaged": 17},
        "exclusion_rules": {"age_unknown": 4, "view": 5},
        "duplicates_across_patients": 2,
        "burned_in": 0,
        "splits": SPLITS | {"validation": {"images": 20, "patients": 2, "findings": {}}},
        "split_equation": "patients 9 = train 4 + validation 2 + test 3",
        "decode_recipe": recipe.to_json(),
        "decode_recipe_id": recipe.id,
        "label_tables": {"Data_Entry_2017.csv": "ab" * 32},
        **changes,
    }


def films(names: bool) -> dict[str, list[Film]]:
    pixels = np.zeros((64, 64), np.uint8)
    case = Case(HOSTILE if names else None, ("Mass", "Edema"), "PA", 50, "F", None, None, pixels, None, 64)
    return {"Mass": [Film(case, [(1.5, 2.0, 30.0, 40.0)])], "Hernia": []}


def page(pseudonyms: Pseudonyms = NAMED, rows: int = 60, **changes: Any) -> str:
    quarantined = [{"image_id": HOSTILE, "reason": "not_an_image", "text": "begins with b'<i>'"}]
    duplicates = [{"image_id": HOSTILE, "kept_image_id": "00001_000.png"}]
    return write_corpus(
        "chest",
        manifest(**changes),
        census(drawn(0, rows)),
        films(names=pseudonyms is NAMED),
        quarantined,
        duplicates,
        pseudonyms,
    )


def cells(html: str) -> list[list[str]]:
    """The rows of all tables, as text."""
    found = re.findall(r"<tr[^>]*>(.*?)</tr>", html, flags=re.S)
    plain = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.S) for row in found]
    return [[re.sub(r"<[^>]*>", " ", cell).strip() for cell in row] for row in plain]


@pytest.mark.parametrize("rows", [60, 0], ids=["rows", "no row"])
def test_the_page_is_offline_escaped_and_says_that_it_is_no_medical_device(rows: int) -> None:
    html = page(rows=rows)
    assert not re.search(r"https?://|@import|url\(|<link|<script", html)
    assert "no medical device" in html
    assert HOSTILE not in html
    assert "<i>'" not in html
    assert "nan" not in html


def test_every_image_is_accounted_for_by_reason_and_rule() -> None:
    told = [
        ("quarantined", "damaged", 17),
        ("quarantined", "no label row", 3),
        ("excluded", "view", 5),
        ("excluded", "age unknown", 4),
        ("duplicate", "of the same patient", 3),
        ("duplicate", "of another patient", 2),
    ]
    assert left_out(manifest()) == told
    assert sum(count for *_, count in told) == 1234 - 1200
    html = page()
    for what, why, count in told:
        assert [what, why, str(count)] in cells(html)
    for number in ("1,234", "1,200", "66 of 1,300 label rows have no image", ".tif 2", "41 boxes"):
        assert number in html


def test_images_that_two_patients_have_are_called_a_leak_and_none_is_not() -> None:
    assert "A leak:" in page()
    assert "A leak:" not in page(duplicates_across_patients=0)


def test_burned_in_text_is_told_with_what_to_do_about_it() -> None:
    assert "Burned-in text" not in page(KEYED)
    told = page(KEYED, burned_in=3)
    assert "3 images say in the header that text is burned in" in told
    assert "This page shows none of these films." in told
    assert "corpus.burned_in=exclude" in told
    assert "This page shows none" not in page(NAMED, burned_in=3)


def test_findings_are_counted_under_their_own_split() -> None:
    rows, table = drawn(0, 60), cells(page())
    assert ["Finding", "", "Images", "Percent", "train", "validation", "test", "Unknown"] in table
    for name in FINDINGS:
        own = [row for row in rows if name in row["findings"]]
        (found,) = [row for row in table if row[0] == name.replace("_", " ") and len(row) == 8]
        assert found[2] == str(len(own))
        for cell, split in zip(found[4:7], ("train", "validation", "test"), strict=True):
            assert cell.split()[0] == str(sum(row["split"] == split for row in own))
            unknown = sum(name in row["unknown"] for row in rows if row["split"] == split)
            assert cell.split()[1:] == ([f"?{unknown}"] if unknown else [])
        assert found[7] == str(sum(name in row["unknown"] for row in rows))


def test_splits_stand_in_their_order_with_the_proof_that_no_patient_is_in_two() -> None:
    html = page()
    assert "patients 9 = train 4 + validation 2 + test 3" in html
    table = cells(html)
    at = table.index(["Split", "Patients", "Images"])
    assert table[at + 1 : at + 4] == [["train", "4", "40"], ["validation", "2", "20"], ["test", "3", "30"]]


def test_a_cell_says_how_many_of_a_rows_images_have_the_columns_finding() -> None:
    rows, html = drawn(0, 60), page()
    mass = [row for row in rows if "Mass" in row["findings"]]
    share = sum("Edema" in row["findings"] for row in mass) / len(mass)
    assert f"<title>Mass, Edema: {share:.1%}</title>" in html
    assert "<title>Mass, Mass" not in html
    assert html.count("<title>") > 14 * 13


def test_an_example_is_shown_with_its_box_and_what_else_it_has() -> None:
    html = page()
    assert '<rect x="1.5" y="2.0" width="30.0" height="40.0"/>' in html
    assert "PA, 50 years, female; also Edema" in html
    assert "<h3>Hernia</h3>" not in html


def test_names_are_told_only_where_they_may_be() -> None:
    told, hidden = page(), page(KEYED)
    for text in ("00017_Smith.png", "00001_000.png", "begins with"):
        assert text in told
        assert text not in hidden
    assert "quarantine.parquet" in hidden


def test_quarantined_images_and_duplicates_have_pseudonyms_where_names_are_not_told() -> None:
    html = page(KEYED)
    own, kept = (KEYED.name("image", name) for name in (HOSTILE, "00001_000.png"))
    assert [own, "not an image"] in cells(html)
    assert [own, kept] in cells(html)
    assert str(KEYED.key_id) in html  # another key gives other ones
    assert [own, "not an image"] not in cells(page(Pseudonyms(b"another key for tests, long enough")))


def test_no_finding_is_known_only_where_all_findings_are_absent() -> None:
    rows = drawn(0, 60)
    clear = [row for row in rows if not row["findings"] and not row["unknown"]]
    unsure = [row for row in rows if not row["findings"] and row["unknown"]]
    assert unsure
    table = cells(page())
    (found,) = [row for row in table if row[0] == NO_FINDING and len(row) == 8]
    assert (found[2], found[7]) == (str(len(clear)), str(len(unsure)))
    for cell, split in zip(found[4:7], ("train", "validation", "test"), strict=True):
        maybe = sum(row["split"] == split for row in unsure)
        assert cell.split() == [str(sum(row["split"] == split for row in clear)), *([f"?{maybe}"] if maybe else [])]
    for group in [row for row in table if row[0] == NO_FINDING and len(row) != 8]:
        assert sum(int(cell.partition("?")[2] or 0) for cell in group[1:]) == len(unsure)


def test_the_page_tells_what_it_was_made_from() -> None:
    html = page()
    assert ["Data_Entry_2017.csv", "ab" * 32] in cells(html)
    assert ["fit", "letterbox"] in cells(html)
    assert Recipe(64, "letterbox").id in html


def test_findings_in_the_archives_own_words_are_counted_where_there_are_any() -> None:
    assert any(row[0] == "pacemaker" for row in cells(page()))
    assert "own words" not in page(rows=0)
