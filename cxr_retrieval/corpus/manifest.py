"""The manifest of an archive: a row for every image by schema ARCHIVE, cut into the partitions of its corpus.

An Arrow file with a batch for every partition, compressed. Its index has 24 bytes a partition, where Parquet's has
20 KB, which the driver would hold to the end and every task read whole to find its own partition.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

import pyarrow as pa

from cxr_retrieval import storage
from cxr_retrieval.corpus.rows import ARCHIVE

MANIFEST_FILE = "archive.arrow"


class ManifestWriter:
    """Writes partitions, one after the other."""

    def __init__(self, writer: pa.RecordBatchFileWriter) -> None:
        self._writer = writer

    @classmethod
    @contextmanager
    def to(cls, file: IO[bytes]) -> "Iterator[ManifestWriter]":
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(file, ARCHIVE, options=options) as writer:
            yield cls(writer)

    def write(self, rows: pa.Table) -> None:
        """The next partition: rows by schema ARCHIVE, at least one."""
        (batch,) = rows.combine_chunks().to_batches()
        self._writer.write_batch(batch)


def read_partition(uri: str, number: int) -> pa.Table:
    """The rows of one partition."""
    with storage.arrow_reader(uri) as file:
        return pa.Table.from_batches([pa.ipc.open_file(file).get_batch(number)])


def read_partitions(
    file: IO[bytes] | pa.NativeFile, columns: Sequence[str] = tuple(ARCHIVE.names)
) -> Iterator[pa.Table]:
    """Some columns of all partitions, one after the other."""
    options = pa.ipc.IpcReadOptions(included_fields=[ARCHIVE.get_field_index(name) for name in columns])
    reader = pa.ipc.open_file(file, options=options)
    for number in range(reader.num_record_batches):
        yield pa.Table.from_batches([reader.get_batch(number)]).select(columns)
