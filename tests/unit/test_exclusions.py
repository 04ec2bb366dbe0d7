"""Promises of duplicates: found whole and in order, whatever the memory of the machine."""

import hashlib
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_retrieval.corpus.exclusions import Exclusions, find_duplicates
from cxr_retrieval.corpus.rows import EXCLUSIONS


def shard(path: Path, names: list[str], looks: list[int], patients: list[str] | None = None) -> str:
    """A shard of rows with these names, each with the pixels of its look."""
    hashes = pa.array([hashlib.sha256(str(look).encode()).digest() for look in looks], pa.binary(32))
    table = {"image_id": pa.array(names, pa.string()), "patient_id": pa.array(patients or names, pa.string())}
    pq.write_table(pa.table(table | {"pixel_sha256": hashes}), path)
    return str(path)


@given(parts=st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), max_size=12), min_size=1, max_size=4))
@settings(max_examples=40)
def test_the_lowest_name_of_equal_pixels_stays_and_all_others_are_told_in_order(
    parts: list[list[tuple[int, int]]], tmp_path_factory: object
) -> None:
    """Rows of a part are a look and a patient."""
    folder = tmp_path_factory.mktemp("shards")  # type: ignore[attr-defined]
    rng = np.random.default_rng(sum(map(len, parts)))
    order = rng.permutation(sum(map(len, parts))).tolist()
    rows = [[(f"{order.pop():03d}", look, str(patient)) for look, patient in part] for part in parts]
    files = [
        shard(folder / f"{number}", [row[0] for row in part], [row[1] for row in part], [row[2] for row in part])
        for number, part in enumerate(rows)
    ]
    kept = {look: min(row for part in rows for row in part if row[1] == look) for part in rows for _, look, _ in part}
    expected = [
        {
            "part": number,
            "row": place,
            "image_id": name,
            "rule": "duplicate",
            "kept_image_id": kept[look][0],
            "same_patient": patient == kept[look][2],
        }
        for number, part in enumerate(rows)
        for place, (name, look, patient) in enumerate(part)
        if name != kept[look][0]
    ]
    told = [row for table in find_duplicates(files) for row in table.to_pylist()]
    assert told == expected
    assert all(table.schema == EXCLUSIONS for table in find_duplicates(files))


def test_rows_that_are_left_out_are_told_by_part(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"part": part, "row": row} for part, row in ((1, 2), (1, 5), (3, 0))], EXCLUSIONS)
    pq.write_table(table, tmp_path / "exclusions.parquet")
    exclusions = Exclusions.read(str(tmp_path / "exclusions.parquet"))
    assert [exclusions.of(part).tolist() for part in range(5)] == [[], [2, 5], [], [0], []]


def test_a_row_costs_at_most_32_bytes_though_half_of_all_are_duplicates(tmp_path: Path) -> None:
    """Of what Python and numpy hold; SQLite's own memory is bounded by its cache."""
    peaks = []
    for parts in (20, 100):
        files = [
            shard(tmp_path / f"{part}", [f"images/{part:04d}_{n:04d}.png" for n in range(2000)], list(range(2000)))
            if part < 20
            else str(tmp_path / f"{part % 20}")
            for part in range(parts)
        ]
        tracemalloc.start()
        told = sum(table.num_rows for table in find_duplicates(files))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert told == 2000 * (parts - 1)
    assert (peaks[1] - peaks[0]) / (2000 * 80) < 32
