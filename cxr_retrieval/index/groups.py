"""A group of an index's shards, and all that a search wants to know of them.

Groups hold consecutive shards, and answer of their own ones only: what passes a filter, the candidates of a query, what
is known of a row. Who searches asks every group and joins the answers, which do not depend on how shards are grouped.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from cxr_retrieval.errors import UserError
from cxr_retrieval.index import likeness
from cxr_retrieval.index.files import shard_files
from cxr_retrieval.index.filters import TELLING, Filters, Vocabulary
from cxr_retrieval.index.likeness import Sample
from cxr_retrieval.index.quantizer import NearestLists
from cxr_retrieval.index.shards import INDEX_FILE, Candidates, Found, Passing, Shards, read_facts
from cxr_retrieval.index.versions import Version, open_files
from cxr_retrieval.privacy import row_id
from cxr_retrieval.tombstones import NO_TOMBSTONES, Tombstones

FILTERS = 16  # what passes the last ones is kept, a bit a row: a search asks how many do, then for the nearest of them

P = ParamSpec("P")
T = TypeVar("T")
Facts = Mapping[str, Any]  # a row's sidecar, and its place: `shard` and `row`


class ShardGroup:
    """Shards of a published version, opened, without the patients who were removed by then. Threads may share it."""

    def __init__(self, version: Version, numbers: range) -> None:
        """Fetch and verify the files of these shards only, before one is read."""
        names = [name for number in numbers for name in shard_files(number).values()]
        opened = open_files(version, [INDEX_FILE, *names])
        self.shards = Shards(read_facts(opened.path), opened.path, numbers)
        self._thumbnails = [opened.path(shard_files(number)["thumbnails"]) for number in numbers]
        # In one piece: a row of many pieces would have to be looked for.
        self._columns = [_in_one_piece(self.shards.sidecar(number)) for number in numbers]
        self._sidecars = [pa.table(columns) for columns in self._columns]
        patients = [columns["patient"] for columns in self._columns]
        self._ids = _Hashed.of([shard.ids_N for shard in self.shards.shards])
        self._pixels = _Hashed.of([_beginnings(columns["pixel_sha256"]) for columns in self._columns])
        self._rows_of = lru_cache(FILTERS)(partial(_rows_of, patients, _Hashed.of([*map(_hashes, patients)])))
        self._removed: Tombstones | None = None
        self.honour(Tombstones.at(version.to))

    def honour(self, tombstones: Tombstones) -> None:
        """From now on, nothing of these patients is found or told, nor of those who were removed before."""
        removed = tombstones | (self._removed or NO_TOMBSTONES)
        if removed != self._removed:
            self._there = [~removed.mask(table["patient"]) for table in self._sidecars]
            self._passing = lru_cache(FILTERS)(partial(_passing, self._sidecars, self._there))
            self._removed = removed

    def images(self) -> int:
        """How many there are, of patients who were not removed."""
        return sum(int(np.count_nonzero(there)) for there in self._there)

    def rows(self) -> int:
        return self.shards.rows

    def vocabulary(self) -> Vocabulary:
        return Vocabulary.of(
            [
                table if there.all() else table.select(TELLING).filter(pa.array(there))
                for table, there in zip(self._sidecars, self._there, strict=True)
            ]
        )

    def has_patient(self, patient: str) -> bool:
        return any(bool(self._there[place][rows].any()) for place, rows in self._rows_of(patient))

    def passing(self, filters: Filters, left_out: tuple[str, ...]) -> int:
        """How many images pass, those of the patients who are left out not among them."""
        return sum(passing.count for passing in self._allowed(filters, left_out))

    def candidates(
        self,
        vector_D: np.ndarray,
        wanted: int,
        nearest: NearestLists | None,
        asked: tuple[Filters, tuple[str, ...]] | None,
    ) -> Candidates:
        """Of the images that pass (all for None) those whose codes are among the nearest `wanted`, in given lists."""
        allowed = self._allowed(*asked) if asked else None
        return self.shards.candidates(vector_D[None], wanted, nearest, allowed)[0]

    def exact(self, vector_D: np.ndarray, k: int, asked: tuple[Filters, tuple[str, ...]]) -> list[Found]:
        """The k nearest of the images that pass: all of them compared."""
        return self.shards.exact(vector_D[None], k, self._allowed(*asked))[0]

    def find(self, image_id: str) -> Facts | None:
        """The image with this id."""
        for place, rows in self._ids.rows(row_id(image_id)):
            for facts in self._facts(self.shards.numbers[place], rows[self._there[place][rows]]):
                if facts["image_id"] == image_id:
                    return facts
        return None

    def find_pixels(self, pixel_sha256: bytes) -> Facts | None:
        """The image whose prepared pixels have this hash."""
        for place, rows in self._pixels.rows(_beginning(pixel_sha256)):
            for facts in self._facts(self.shards.numbers[place], rows[self._there[place][rows]]):
                if facts["pixel_sha256"] == pixel_sha256:
                    return facts
        return None

    def facts(self, places: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Facts]:
        """What is known of the rows (shard, row) among these that are the group's own, of nobody who was removed."""
        rows: dict[int, list[int]] = {}
        for shard, row in places:
            if shard in self.shards.numbers and self._there[shard - self.shards.numbers.start][row]:
                rows.setdefault(shard, []).append(row)
        return {(shard, facts["row"]): facts for shard in rows for facts in self._facts(shard, rows[shard])}

    def vector(self, shard: int, row: int) -> np.ndarray:
        """The stored vector of one row, float32 [D]."""
        return np.asarray(self.shards.shards[shard - self.shards.numbers.start].rows_ND[row], np.float32)

    def thumbnail(self, shard: int, row: int) -> bytes:
        """Raises ShardsAway where the files of an open version are deleted under its readers, as a purge does."""
        try:
            return self.shards.thumbnail(shard, row)
        except FileNotFoundError as error:
            raise ShardsAway("the files of this version are gone: open the one that the alias names now") from error

    def thumbnail_groups(self) -> list[int]:
        """How many row groups the thumbnails of every shard lie in."""
        return [likeness.row_groups(path) for path in self._thumbnails]

    def samples(self, places: Sequence[tuple[int, int]]) -> list[Sample]:
        """An even part of the sample of an index, from the row groups (shard, group) that are the group's own."""
        first, most = self.shards.numbers.start, likeness.SAMPLE // len(places)
        return [
            likeness.sample(self._thumbnails[shard - first], self._sidecars[shard - first]["patient"], group, most)
            for shard, group in places
            if shard in self.shards.numbers
        ]

    def _allowed(self, filters: Filters, left_out: tuple[str, ...]) -> list[Passing]:
        """What passes, of every shard: kept for a filter, and the few rows of those left out taken from a copy."""
        allowed = list(self._passing(filters))
        for patient in left_out:
            for place, rows in self._rows_of(patient):
                allowed[place] = allowed[place].without(rows)
        return allowed

    def _facts(self, number: int, rows: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        # Value by value: taking the few rows out as a table first takes twice as long.
        columns = self._columns[number - self.shards.numbers.start].items()
        return [
            {name: column[row].as_py() for name, column in columns} | {"shard": number, "row": row}
            for row in map(int, rows)
        ]


@dataclass(frozen=True)
class _Hashed:
    """An id or a hash of 8 bytes of every row of some shards, sorted, and the rows in that order, numbered through all
    shards: 12 bytes a row. `edges` are where the shards begin, and the end."""

    sorted_N: np.ndarray
    rows_N: np.ndarray
    edges: np.ndarray

    @classmethod
    def of(cls, hashes: Sequence[np.ndarray]) -> "_Hashed":
        every = np.concatenate(hashes)
        order = np.argsort(every, kind="stable").astype(np.uint32)
        return cls(every[order], order, np.cumsum([0, *map(len, hashes)]))

    def rows(self, wanted: int) -> Iterator[tuple[int, np.ndarray]]:
        """Rows with this hash, ascending, by the place of their shard; what they are of may be another thing."""
        value = self.sorted_N.dtype.type(wanted)
        first, last = (np.searchsorted(self.sorted_N, value, side) for side in ("left", "right"))
        rows = self.rows_N[first:last].astype(np.int64)
        cuts = np.searchsorted(rows, self.edges)
        for place in np.flatnonzero(np.diff(cuts)).tolist():
            yield place, rows[cuts[place] : cuts[place + 1]] - self.edges[place]


def _rows_of(names: Sequence[pa.Array], hashed: _Hashed, patient: str) -> list[tuple[int, np.ndarray]]:
    """A patient's rows, those of a removed one too, by the place of their shard."""
    found = []
    for place, rows in hashed.rows(hash(patient)):
        theirs = rows[[names[place][row].as_py() == patient for row in rows.tolist()]]
        if len(theirs):
            found.append((place, theirs))
    return found


def _in_one_piece(table: pa.Table) -> dict[str, pa.Array]:
    return {name: column.combine_chunks() for name, column in zip(table.column_names, table.columns, strict=True)}


def _beginning(value: bytes) -> int:
    return int.from_bytes(value[:8], "big")


def _beginnings(column: pa.Array) -> np.ndarray:
    """`_beginning` of every hash of 32 bytes, [N]."""
    fixed = column.cast(pa.binary(32))
    values_N32 = np.frombuffer(fixed.buffers()[1], np.uint8)[32 * fixed.offset :][: 32 * len(fixed)].reshape(-1, 32)
    return np.ascontiguousarray(values_N32[:, :8]).view(">u8")[:, 0].astype(np.uint64)


def _hashes(names: pa.Array) -> np.ndarray:
    """Hashes [N] that hold as long as this process: of every name once."""
    encoded = names.dictionary_encode("encode")
    return np.fromiter(map(hash, encoded.dictionary.to_pylist()), np.int64)[encoded.indices.to_numpy()]


class ShardsAway(UserError):
    """Shards that cannot be searched at present, and may be soon."""


class Holders(Protocol):
    """Who holds the groups of an index, and asks them by a method of theirs. Raises ShardsAway where one is away."""

    lost: bool
    """Whether somebody has ended what held them: they have to be opened again."""

    def each(self, method: Callable[Concatenate[ShardGroup, P], T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        """What every group answers, in the order of their shards."""

    def of(
        self, shard: int, /, method: Callable[Concatenate[ShardGroup, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What the group answers that holds a shard."""

    def honour(self, tombstones: Tombstones) -> None:
        """`ShardGroup.honour` of every group."""


class InProcess:
    """All shards in this process, as one group."""

    lost = False

    def __init__(self, version: Version, shards: int) -> None:
        self.group = ShardGroup(version, range(shards))

    def honour(self, tombstones: Tombstones) -> None:
        self.group.honour(tombstones)

    def each(self, method: Callable[Concatenate[ShardGroup, P], T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        return [method(self.group, *args, **kwargs)]

    def of(self, _: int, /, method: Callable[Concatenate[ShardGroup, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        return method(self.group, *args, **kwargs)


def _passing(sidecars: Sequence[pa.Table], there: Sequence[np.ndarray], filters: Filters) -> list[Passing]:
    return [Passing.of(filters.mask(table) & mask) for table, mask in zip(sidecars, there, strict=True)]
