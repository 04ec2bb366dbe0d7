"""Promises of an archive's manifest: a partition is read alone, and its index stays small however many there are."""

import tempfile
from pathlib import Path

import pyarrow as pa

from cxr_retrieval.corpus.manifest import MANIFEST_FILE, ManifestWriter, read_partition, read_partitions
from cxr_retrieval.corpus.rows import ARCHIVE, rows_digest


def partition(number: int, rows: int = 3) -> pa.Table:
    box = {"finding": "Mass", "x": 1.0, "y": 2.0, "w": 3.0, "h": 4.0}
    found = [
        {"image_id": f"{number}-{row}", "patient_id": str(number), "findings": ["Mass"], "boxes": [box] * row}
        for row in range(rows)
    ]
    return pa.Table.from_pylist(found, schema=ARCHIVE)


def test_every_partition_is_read_alone_and_as_it_was_written(tmp_path: Path) -> None:
    written = [partition(number, number + 1) for number in range(5)]
    with (tmp_path / MANIFEST_FILE).open("wb") as file, ManifestWriter.to(file) as writer:
        for rows in written:
            writer.write(rows)
    for number, rows in enumerate(written):
        found = read_partition(str(tmp_path / MANIFEST_FILE), number)
        assert found.equals(rows)
        assert rows_digest(found) == rows_digest(rows)


def test_columns_are_read_partition_by_partition_of_a_file_that_stays_open() -> None:
    with tempfile.TemporaryFile() as file:
        with ManifestWriter.to(file) as writer:
            for number in range(4):
                writer.write(pa.concat_tables([partition(number), partition(number)]))
        for _ in range(2):
            found = [rows.to_pydict() for rows in read_partitions(file, ["split", "patient_id"])]
            assert found == [{"split": [None] * 6, "patient_id": [str(number)] * 6} for number in range(4)]
        assert next(read_partitions(file)).schema.equals(ARCHIVE)
        file.seek(0)
        assert file.read(6) == b"ARROW1"


def test_what_is_held_of_a_partition_that_was_written_is_a_few_bytes() -> None:
    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))

    rows = partition(0)
    with tempfile.TemporaryFile() as file, ManifestWriter.to(file) as writer:
        for _ in range(100):
            writer.write(rows)
        before = anonymous()
        for _ in range(2000):
            writer.write(rows)
        assert anonymous() - before < 2000 * 2048
