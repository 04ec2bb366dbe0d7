"""Rows of a prepared corpus that no reader sees, because another row has the same pixels: found, and told by place.

A corpus of a hundred million rows may be half duplicates. What is held of a row is numbers, at most 17 bytes while
duplicates are looked for and 8 for each that is left out; names are compared on disk, in the temporary folder (TMPDIR).
"""

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cxr_retrieval import storage
from cxr_retrieval.corpus.rows import EXCLUSIONS

EXCLUSIONS_FILE = "exclusions.parquet"
ROWS = 1 << 14  # of exclusions that are told at a time
TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA cache_size = -16384;  -- 16 MiB, of each sort too; the rest is on disk
CREATE TABLE suspects (hash BLOB, image TEXT, part INTEGER, row INTEGER, patient TEXT);
"""
LEFT_OUT = """
SELECT part, row, image, kept, patient = kept_patient FROM (
    SELECT part, row, image, patient, row_number() OVER same AS place,
        first_value(image) OVER same AS kept, first_value(patient) OVER same AS kept_patient
    FROM suspects WINDOW same AS (PARTITION BY hash ORDER BY image, part, row)
) WHERE place > 1 ORDER BY part, row
"""


class Exclusions:
    """The rows of a corpus that are left out, by part."""

    def __init__(self, parts: np.ndarray, rows: np.ndarray) -> None:
        """A part and a row in it for each that is left out, `int32 [N]`, ascending."""
        self._parts, self._rows = parts, rows

    @classmethod
    def read(cls, uri: str) -> "Exclusions":
        with storage.arrow_reader(uri) as file:
            table = pq.read_table(file, columns=["part", "row"])
        return cls(table["part"].to_numpy(), table["row"].to_numpy())

    def of(self, part: int) -> np.ndarray:
        """The rows of a part that are left out: `int32 [N]`, ascending."""
        begin, end = np.searchsorted(self._parts, [part, part + 1])
        return self._rows[begin:end]


def find_duplicates(files: Sequence[str]) -> Iterator[pa.Table]:
    """Rows whose pixels another row has too, over all shards, by schema EXCLUSIONS and in the order of their places:
    the lowest image id stays, the others are told."""
    suspects = _twice(files)
    if len(suspects) == 0:
        return
    with contextlib.closing(sqlite3.connect("")) as database:  # a file that has no name
        database.executescript(TABLES)
        for part, found in enumerate(storage.read_ahead(partial(_suspected, suspects), files)):
            rows = ((*row, part) for row in found)
            database.executemany("INSERT INTO suspects (hash, image, patient, row, part) VALUES (?, ?, ?, ?, ?)", rows)
        left_out = database.execute(LEFT_OUT)
        while chunk := left_out.fetchmany(ROWS):
            parts, numbers, images, kept, same = zip(*chunk, strict=True)
            columns = [parts, numbers, images, ["duplicate"] * len(chunk), kept, list(map(bool, same))]
            yield pa.table(
                [pa.array(values, field.type) for values, field in zip(columns, EXCLUSIONS, strict=True)],
                schema=EXCLUSIONS,
            )


def _suspected(suspects: np.ndarray, uri: str) -> list[tuple[bytes, str, str, int]]:
    """Rows of a part whose hashes begin as one of the `suspects`: hash, image, its patient, number of the row."""
    beginnings = _hash_beginnings(uri)
    nearest = suspects[np.minimum(np.searchsorted(suspects, beginnings), len(suspects) - 1)]
    rows = np.flatnonzero(nearest == beginnings)
    if len(rows) == 0:
        return []
    with storage.arrow_reader(uri) as file:
        table = pq.read_table(file, columns=["pixel_sha256", "image_id", "patient_id"]).take(pa.array(rows))
    return list(zip(*(column.to_pylist() for column in table.columns), rows.tolist(), strict=True))


def _twice(files: Sequence[str]) -> np.ndarray:
    """Beginnings of hashes that two rows have, `uint64 [N]`, ascending: those of equal pixels, and now and then of
    others."""
    every = np.concatenate(list(storage.read_ahead(_hash_beginnings, files)))
    every.sort()
    again = every[1:][every[1:] == every[:-1]]
    return again[np.append(True, again[1:] != again[:-1])] if len(again) else again


def _hash_beginnings(uri: str) -> np.ndarray:
    """The first 8 bytes of each row's pixel hash: `uint64 [rows]`."""
    with storage.arrow_reader(uri) as file:
        hashes = pq.read_table(file, columns=["pixel_sha256"])["pixel_sha256"].combine_chunks()
    whole = np.frombuffer(hashes.buffers()[1], np.uint64) if len(hashes) else np.empty(0, np.uint64)
    return whole.reshape(-1, 4)[hashes.offset : hashes.offset + len(hashes), 0].copy()
