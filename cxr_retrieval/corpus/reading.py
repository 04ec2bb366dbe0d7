"""Reading a prepared corpus: rows by split, by place, without what was excluded after it was prepared."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cxr_retrieval import artifacts, storage
from cxr_retrieval.artifacts import Artifact
from cxr_retrieval.corpus.census import COLUMNS, Census
from cxr_retrieval.corpus.decoding import Recipe
from cxr_retrieval.corpus.exclusions import EXCLUSIONS_FILE, Exclusions
from cxr_retrieval.corpus.findings import label_vector
from cxr_retrieval.corpus.parts import QUARANTINE_FILE, ROWS_FILE
from cxr_retrieval.corpus.preparation import KIND
from cxr_retrieval.errors import UserError

CENSUS_ROWS = 4096  # that are counted at a time
# A row's place: its part, the row group in the part's file, the row in the file. 12 bytes a row.
PLACE = np.dtype([("part", np.int32), ("group", np.int32), ("row", np.int32)])


@dataclass(frozen=True)
class Corpus:
    """A finished corpus that is read in place, locally or on object storage. Small enough to send to a worker."""

    artifact: Artifact

    @classmethod
    def open(cls, uri: str) -> "Corpus":
        return cls(artifacts.load(uri, KIND))

    @property
    def recipe(self) -> Recipe:
        return Recipe.from_json(self.artifact.manifest["decode_recipe"])

    @property
    def rows(self) -> int:
        return self.artifact.counts["prepared"]

    @property
    def label_tables(self) -> list[str]:
        """SHA-256 of the archive's tables, sorted: they tell whether two corpora speak of the same labels."""
        return sorted(self.artifact.manifest["label_tables"].values())

    @cached_property
    def files(self) -> list[str]:
        return [storage.join(uri, ROWS_FILE) for uri in self.artifact.part_uris]

    @cached_property
    def _exclusions(self) -> Exclusions:
        return Exclusions.read(storage.join(self.artifact.uri, EXCLUSIONS_FILE))

    def left_out(self, part: int) -> np.ndarray:
        """The rows of a part that no reader sees: `int32 [N]`, ascending."""
        return self._exclusions.of(part)

    def places(self, split: str, without: Sequence[str] = ()) -> np.ndarray:
        """Where the rows of a split are, left out those that have, or may have, one of the findings `without`: an array
        of PLACE in the order of the corpus."""
        found = []
        for part, uri in enumerate(self.files):
            with storage.arrow_reader(uri) as file:
                parquet = pq.ParquetFile(file)
                place = _places(part, parquet)
                facts = parquet.read(["split", "findings", "unknown"] if without else ["split"])
            splits = np.asarray(facts["split"].to_pylist(), dtype=object)
            keep = splits == split
            keep[self.left_out(part)] = False
            if without:
                both = zip(facts["findings"].to_pylist(), facts["unknown"].to_pylist(), strict=True)
                keep &= [set(without).isdisjoint([*findings, *unknown]) for findings, unknown in both]
            found.append(place[keep])
        places = np.concatenate(found)
        if len(places) == 0:
            raise UserError(
                f"{self.artifact.uri} has no image in its {split} split: the archive is too small for the shares"
            )
        return places

    def places_of(self, part: int, numbers: Sequence[int]) -> np.ndarray:
        """Where rows of a part are by their numbers among those that `batches` gives: an array of PLACE."""
        with storage.arrow_reader(self.files[part]) as file:
            place = _places(part, pq.ParquetFile(file))
        seen = np.delete(place, self.left_out(part))
        return seen[list(numbers)]

    def take(self, places: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """The rows at `places` (an array of PLACE), in that order; only the row groups that hold them are read."""
        tables, origin = [], np.empty(len(places), np.int64)
        offset = 0
        for part in np.unique(places["part"]):
            in_part = places["part"] == part
            with storage.arrow_reader(self.files[part]) as file:
                parquet = pq.ParquetFile(file)
                starts = np.cumsum(
                    [0] + [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)]
                )
                groups = np.unique(places["group"][in_part])
                tables.append(parquet.read_row_groups(groups.tolist(), columns=list(columns)))
            lengths = starts[groups + 1] - starts[groups]
            base = offset + np.cumsum(lengths) - lengths  # where each group read begins in the joined table
            which = np.searchsorted(groups, places["group"][in_part])
            origin[in_part] = base[which] + places["row"][in_part] - starts[groups[which]]
            offset += int(lengths.sum())
        return pa.concat_tables(tables).take(pa.array(origin))

    def batches(self, part: int, batch_size: int, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The rows of one part in order, excluded ones left out, at most `batch_size` at a time."""
        left_out, row = self.left_out(part), 0
        with storage.arrow_reader(self.files[part]) as file:
            for batch in pq.ParquetFile(file).iter_batches(batch_size, columns=list(columns)):
                keep = np.setdiff1d(np.arange(row, row + batch.num_rows), left_out, assume_unique=True) - row
                row += batch.num_rows
                if len(keep):
                    table = pa.Table.from_batches([batch])
                    yield table if len(keep) == batch.num_rows else table.take(pa.array(keep))

    def census(self) -> Census:
        """Counts of all rows; pixels are not read. Of a part that does not tell which of its images have text burned
        in, each may have it, if any image of the corpus has."""
        census, any_has = Census(), pa.scalar(self.artifact.manifest["burned_in"] > 0)

        def tables(part: int) -> list[pa.Table]:
            return list(self.batches(part, CENSUS_ROWS, COLUMNS))

        for part, read in enumerate(storage.read_ahead(tables, range(len(self.files)))):
            first = 0
            for table in read:
                if "burned_in" not in table.column_names:
                    table = table.append_column("burned_in", pa.repeat(any_has, table.num_rows))
                census.add(table, part, first)
                first += table.num_rows
        return census

    def quarantined(self, most: int) -> list[dict[str, Any]]:
        """The first images in quarantine for each reason, at most so many: `image_id`, `reason`, `text`."""
        found: list[dict[str, Any]] = []
        kept: Counter[str] = Counter()
        parts = zip(self.artifact.part_uris, self.artifact.manifest["parts"], strict=True)
        bad = (storage.join(uri, QUARANTINE_FILE) for uri, part in parts if part["counts"]["quarantined"])
        for rows in storage.read_ahead(_quarantine_read, bad):
            for row in rows:
                kept[row["reason"]] += 1
                if kept[row["reason"]] <= most:
                    found.append(row)
        return sorted(found, key=lambda row: str(row["reason"]))

    def across_patients(self, most: int) -> list[dict[str, Any]]:
        """The first images that are left out for an image of another patient: `image_id`, `kept_image_id`."""
        with storage.arrow_reader(storage.join(self.artifact.uri, EXCLUSIONS_FILE)) as file:
            found: list[dict[str, Any]] = []
            for batch in pq.ParquetFile(file).iter_batches(columns=["image_id", "kept_image_id", "same_patient"]):
                found += (
                    batch.filter(pc.invert(batch["same_patient"])).select(["image_id", "kept_image_id"]).to_pylist()
                )
                if len(found) >= most:
                    break
        return found[:most]


def _quarantine_read(uri: str) -> list[dict[str, Any]]:
    with storage.arrow_reader(uri) as file:
        rows: list[dict[str, Any]] = pq.read_table(file, columns=["image_id", "reason", "text"]).to_pylist()
    return rows


def _places(part: int, parquet: pq.ParquetFile) -> np.ndarray:
    """The place of every row of a part, those that no reader sees too: an array of PLACE."""
    sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    place = np.zeros(sum(sizes), PLACE)
    place["part"], place["row"] = part, np.arange(len(place))
    place["group"] = np.repeat(np.arange(len(sizes)), sizes)
    return place


def pixels_of(table: pa.Table, size: int) -> np.ndarray:
    """Pixels of the rows of a table: `uint8 [B, size, size]`, not copied where Arrow holds them in one piece."""
    column = table["pixels"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    data = np.frombuffer(column.buffers()[1], np.uint8)
    start = column.offset * size * size
    return data[start : start + len(column) * size * size].reshape(len(column), size, size)


def labels_of(table: pa.Table) -> np.ndarray:
    """Labels of the rows of a table with `findings` and `unknown`: `int8 [B, C]`."""
    pairs = zip(table["findings"].to_pylist(), table["unknown"].to_pylist(), strict=True)
    return np.stack([label_vector(findings, unknown) for findings, unknown in pairs])
