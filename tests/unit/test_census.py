"""Promises of the census: every row is counted where it belongs, however rows come, and examples are drawn fairly."""

import pickle
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_retrieval.corpus.census import COLUMNS, EXAMPLES, GROUPS, NOT_KNOWN, Census, age_band
from cxr_retrieval.corpus.decoding import Recipe
from cxr_retrieval.corpus.findings import FINDINGS, NO_FINDING
from cxr_retrieval.corpus.rows import corpus_schema

SCHEMA = pa.schema([corpus_schema(Recipe(32, "stretch")).field(name) for name in COLUMNS])


def drawn(seed: int, count: int, patients: int = 9) -> list[dict[str, Any]]:
    """Rows with every kind of label, and with what an archive leaves out."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        flags = rng.choice(3, len(FINDINGS), p=[0.7, 0.2, 0.1])
        findings = [name for name, flag in zip(FINDINGS, flags, strict=True) if flag == 1]
        boxes = [{"finding": name, "x": 1, "y": 2, "w": 3, "h": 4} for name in findings if rng.random() < 0.3]
        rows.append(
            {
                "patient_id": f"p{rng.integers(patients)}",
                "split": str(rng.choice(["train", "validation", "test"])),
                "view": [None, "PA", "AP"][rng.integers(3)],
                "sex": [None, "F", "M"][rng.integers(3)],
                "age_years": [None, int(rng.integers(121))][rng.integers(2)],
                "findings": findings,
                "unknown": [name for name, flag in zip(FINDINGS, flags, strict=True) if flag == 2],
                "other": ["pacemaker"][: rng.integers(2)],
                "boxes": boxes,
                "pixel_sha256": rng.bytes(32),
                "burned_in": False,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def census(rows: list[dict[str, Any]], batch: int = 1000, part: int = 0) -> Census:
    made = Census()
    for first in range(0, len(rows), batch):
        made.add(table(rows[first : first + batch]), part, first)
    return made


def value_of(row: dict[str, Any], group: str) -> str:
    return (age_band(row["age_years"]) if group == "age" else row[group]) or NOT_KNOWN


@given(seed=st.integers(0, 10**6), count=st.integers(0, 60))
@settings(max_examples=25)
def test_every_row_is_counted_in_each_group_by_its_own_value(seed: int, count: int) -> None:
    rows = drawn(seed, count)
    made = census(rows, batch=17)
    assert made.all.images == count
    for group in GROUPS:
        assert sum(tally.images for tally in made.groups[group].values()) == count
        for value, tally in made.groups[group].items():
            own = [row for row in rows if value_of(row, group) == value]
            assert tally.images == len(own) > 0
            assert tally.without == sum(not row["findings"] and not row["unknown"] for row in own)
            assert tally.without_unknown == sum(not row["findings"] and bool(row["unknown"]) for row in own)
            for name, present, unknown in zip(FINDINGS, tally.present_C, tally.unknown_C, strict=True):
                assert present == sum(name in row["findings"] for row in own)
                assert unknown == sum(name in row["unknown"] for row in own)
    assert made.ages.total() == sum(row["age_years"] is not None for row in rows)
    assert made.other.total() == sum(len(row["other"]) for row in rows)


def test_an_image_of_which_nothing_is_known_is_not_counted_as_one_without_a_finding() -> None:
    nothing_known, healthy = [
        row | {"findings": [], "unknown": unknown}
        for row, unknown in zip(drawn(6, 2), (list(FINDINGS), []), strict=True)
    ]
    made = census([nothing_known])
    assert (made.all.without, made.all.without_unknown, made.examples[NO_FINDING]) == (0, 1, [])
    made = census([nothing_known, healthy])
    assert (made.all.without, made.all.without_unknown) == (1, 1)
    assert [example.place for example in made.examples[NO_FINDING]] == [1]


def test_two_findings_are_together_where_one_image_has_both() -> None:
    rows = drawn(1, 200)
    together_CC = census(rows).together_CC
    for a, first in enumerate(FINDINGS):
        for b, second in enumerate(FINDINGS):
            assert together_CC[a, b] == sum({first, second} <= set(row["findings"]) for row in rows)


@pytest.mark.parametrize("batch", [1, 7, 50])
def test_examples_do_not_depend_on_how_rows_come(batch: int) -> None:
    rows = drawn(2, 150)
    assert census(rows, batch).examples == census(rows).examples


def test_examples_show_the_finding_boxes_first_and_each_another_patient() -> None:
    rows = drawn(3, 400)
    made = census(rows)
    assert list(made.examples) == [*FINDINGS, NO_FINDING]
    for name, examples in made.examples.items():
        chosen = [rows[example.place] for example in examples]
        assert len({row["patient_id"] for row in chosen}) == len(chosen) == EXAMPLES or name == NO_FINDING
        if name == NO_FINDING:
            assert chosen
            assert all(not row["findings"] and not row["unknown"] for row in chosen)
            continue
        assert all(name in row["findings"] for row in chosen)
        boxed = {row["patient_id"] for row in rows if any(box["finding"] == name for box in row["boxes"])}
        with_box = sum(any(box["finding"] == name for box in row["boxes"]) for row in chosen)
        assert with_box == min(len(boxed), EXAMPLES)


def test_an_image_with_burned_in_text_is_an_example_only_where_no_other_patient_has_the_finding() -> None:
    rows = [row | {"burned_in": row["patient_id"] != "p1"} for row in drawn(7, 400)]
    made = census(rows, batch=37)
    for examples in made.examples.values():
        chosen = [rows[example.place] for example in examples]
        assert [example.burned_in for example in examples] == [row["burned_in"] for row in chosen]
        assert sorted(example.burned_in for example in examples) == [example.burned_in for example in examples]
    assert all(not made.examples[name][0].burned_in for name in FINDINGS)


def test_what_is_held_does_not_grow_with_the_rows() -> None:
    sizes = [len(pickle.dumps(census(drawn(4, count, patients=count)))) for count in (1000, 8000)]
    assert sizes[1] < 1.1 * sizes[0]


def test_a_table_without_rows_changes_nothing() -> None:
    made = census(drawn(5, 10))
    before = pickle.dumps(made)
    made.add(table([]), 1, 0)
    assert pickle.dumps(made) == before
