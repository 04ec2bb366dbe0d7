"""A group of an index's shards, and all that a search wants to know of them.

Groups hold consecutive shards, and answer of their own ones only: what passes a filter, the candidates of a query, what
is known of a row. Who searches asks every group and joins the answers, which do not depend on how shards are grouped.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from cxr_retrieval.errors import UserError
from cxr_retrieval.index import likeness
from cxr_retrieval.index.files import shard_files
from cxr_retrieval.index.filters import Filters, Vocabulary, among
from cxr_retrieval.index.likeness import Sample
from cxr_retrieval.index.quantizer import NearestLists
from cxr_retrieval.index.shards import INDEX_FILE, Candidates, Found, Shards, read_facts
from cxr_retrieval.index.versions import Version, open_files
from cxr_retrieval.privacy import row_id
from cxr_retrieval.tombstones import Tombstones

MASKS = 4  # the last ones are kept: a search first asks how many images pass, then for the nearest of them

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
        # In one piece: taking a few rows of many pieces would copy them all.
        self._sidecars = [self.shards.sidecar(number).combine_chunks() for number in numbers]
        self._pixels = [_Hashes.of(table["pixel_sha256"]) for table in self._sidecars]
        self._removed: Tombstones | None = None
        self.honour(Tombstones.at(version.to))

    def honour(self, tombstones: Tombstones) -> int:
        """From now on, nothing of the patients who were removed is found or told; how many images are left."""
        if tombstones != self._removed:
            self._there = [~tombstones.mask(table["patient"]) for table in self._sidecars]
            self._masks = lru_cache(MASKS)(partial(_masks, self._sidecars, self._there))
            self._removed = tombstones
        return sum(int(there.sum()) for there in self._there)

    def rows(self) -> int:
        return self.shards.rows

    def vocabulary(self) -> Vocabulary:
        return Vocabulary.of(self._sidecars)

    def has_patient(self, patient: str) -> bool:
        return any(
            bool((among(table["patient"], [patient]) & there).any())
            for table, there in zip(self._sidecars, self._there, strict=True)
        )

    def passing(self, filters: Filters, left_out: tuple[str, ...]) -> int:
        """How many images pass, those of the patients who are left out not among them."""
        return sum(int(mask.sum()) for mask in self._masks(filters, left_out))

    def candidates(
        self,
        vector_D: np.ndarray,
        wanted: int,
        nearest: NearestLists | None,
        asked: tuple[Filters, tuple[str, ...]] | None,
    ) -> Candidates:
        """Of the images that pass (all for None) those whose codes are among the nearest `wanted`, in given lists."""
        masks = self._masks(*asked) if asked else None
        return self.shards.candidates(vector_D[None], wanted, nearest, masks)[0]

    def exact(self, vector_D: np.ndarray, k: int, asked: tuple[Filters, tuple[str, ...]]) -> list[Found]:
        """The k nearest of the images that pass: all of them compared."""
        return self.shards.exact(vector_D[None], k, self._masks(*asked))[0]

    def find(self, image_id: str) -> Facts | None:
        """The image with this id."""
        wanted = row_id(image_id)
        for number, shard, there in zip(self.shards.numbers, self.shards.shards, self._there, strict=True):
            for facts in self._facts(number, np.flatnonzero((shard.ids_N == wanted) & there)):
                if facts["image_id"] == image_id:
                    return facts
        return None

    def find_pixels(self, pixel_sha256: bytes) -> Facts | None:
        """The image whose prepared pixels have this hash."""
        for number, hashes, there in zip(self.shards.numbers, self._pixels, self._there, strict=True):
            rows = hashes.rows(pixel_sha256)
            for facts in self._facts(number, rows[there[rows]]):
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
        return self.shards.thumbnail(shard, row)

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

    def _facts(self, number: int, rows: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        if len(rows) == 0:
            return []
        table = self._sidecars[number - self.shards.numbers.start]
        found: list[dict[str, Any]] = table.take(pa.array(rows, pa.int64())).to_pylist()
        return [facts | {"shard": number, "row": int(row)} for facts, row in zip(found, rows, strict=True)]


@dataclass(frozen=True)
class _Hashes:
    """The first 8 bytes of the hash of every row, sorted, and the rows in that order: 12 bytes a row."""

    sorted_N: np.ndarray
    rows_N: np.ndarray

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> "_Hashes":
        beginnings = np.fromiter((_beginning(value) for value in column.to_pylist()), np.uint64, len(column))
        order = np.argsort(beginnings, kind="stable")
        return cls(beginnings[order], order.astype(np.int32))

    def rows(self, value: bytes) -> np.ndarray:
        """Rows whose hash begins like this one, ascending."""
        wanted = np.uint64(_beginning(value))
        first, last = np.searchsorted(self.sorted_N, wanted), np.searchsorted(self.sorted_N, wanted, side="right")
        return self.rows_N[first:last]


def _beginning(value: bytes) -> int:
    return int.from_bytes(value[:8], "big")


class ShardsAway(UserError):
    """Shards that cannot be searched at present, and may be soon."""


class Holders(Protocol):
    """Who holds the groups of an index, and asks them by a method of theirs. Raises ShardsAway where one is away."""

    def each(self, method: Callable[Concatenate[ShardGroup, P], T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        """What every group answers, in the order of their shards."""

    def of(
        self, shard: int, /, method: Callable[Concatenate[ShardGroup, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What the group answers that holds a shard."""


class InProcess:
    """All shards in this process, as one group."""

    def __init__(self, version: Version, shards: int) -> None:
        self.group = ShardGroup(version, range(shards))

    def each(self, method: Callable[Concatenate[ShardGroup, P], T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        return [method(self.group, *args, **kwargs)]

    def of(self, _: int, /, method: Callable[Concatenate[ShardGroup, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        return method(self.group, *args, **kwargs)


def _masks(
    sidecars: Sequence[pa.Table], there: Sequence[np.ndarray], filters: Filters, left_out: tuple[str, ...]
) -> list[np.ndarray]:
    return [
        filters.mask(table) & ~among(table["patient"], left_out) & mask
        for table, mask in zip(sidecars, there, strict=True)
    ]
