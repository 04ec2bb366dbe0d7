"""The shards of one index, opened from local files: fan-out search with filters, and exact search.

FAISS finds candidates; of all shards together the first ones are kept, by the distances of their codes. Their distances
are then computed anew from the stored float16 rows and sorted by distance and id, so the answer does not depend on how
rows are spread over shards. Distances are Euclidean between unit vectors: 0 for the same direction, sqrt(2) for none in
common, at most 2.

Q queries, D dimensions, k hits.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import pyarrow.parquet as pq
import torch

from cxr_retrieval.errors import UserError
from cxr_retrieval.index.files import shard_files
from cxr_retrieval.index.quantizer import Lists, NearestLists, parameters_of, search_lists, threads

INDEX_FILE = "index.json"
SLACK = 16  # candidates beyond k that are asked for at first
# Squared float32 distances of FAISS are wrong by less than this: nearer neighbours than that it may swap.
NEAR = 1e-5
BLOCK = 65536
PIECE = 16384  # numbers
# Up to so many rows that pass a filter are compared themselves: the lists that hold them may be any of an IVF index.
EXACT_BELOW = 20_000
# Rows and codes stay in the files until a search reads them. A table for every list would be larger than the codes.
READING = faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE


@dataclass(frozen=True)
class Found:
    """One hit: its shard, its row there, its stable id and its distance."""

    shard: int
    row: int
    id: int
    distance: float


@dataclass(frozen=True, eq=False)
class Passing:
    """Rows of a shard that may be found: a bit for each of its rows, packed as FAISS reads them, and how many."""

    bits: np.ndarray
    count: int

    @classmethod
    def of(cls, mask_N: np.ndarray) -> "Passing":
        return cls(np.packbits(mask_N, bitorder="little"), int(np.count_nonzero(mask_N)))

    def without(self, rows: np.ndarray) -> "Passing":
        """Some rows less, no two of them the same."""
        passing = rows[self.bits[rows >> 3] >> (rows & 7) & 1 == 1]
        if not len(passing):
            return self
        bits = self.bits.copy()
        np.bitwise_xor.at(bits, passing >> 3, (1 << (passing & 7)).astype(np.uint8))
        return Passing(bits, self.count - len(passing))

    @cached_property
    def rows(self) -> np.ndarray:
        """Their numbers, ascending."""
        some = np.flatnonzero(self.bits)  # of a narrow filter few bytes hold any
        ones = np.flatnonzero(np.unpackbits(self.bits[some], bitorder="little"))
        rows: np.ndarray = 8 * some[ones >> 3] + (ones & 7)
        return rows

    @property
    def selector(self) -> Any:
        # Made anew for every search, in 2 us: FAISS changes its owner while it is handed over, and threads share what
        # passes. The Python constructor keeps the bits alive as long as the selector.
        return faiss.IDSelectorBitmap(self.bits)


@dataclass(frozen=True)
class Shard:
    index: Any
    rows_ND: np.ndarray
    ids_N: np.ndarray


class Candidates(NamedTuple):
    """Rows that may be among the nearest of one query: their shards, rows there and stable ids, the squared distances
    of their codes, and the distances of what is stored of them; an array each."""

    shards: np.ndarray
    rows: np.ndarray
    ids: np.ndarray
    codes: np.ndarray
    distances: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence["Candidates"]) -> "Candidates":
        return cls(*map(np.concatenate, zip(*parts, strict=True)))

    def first(self, wanted: int, k: int) -> list[Found]:
        """Of the first `wanted` by their codes the k nearest, ties by id."""
        kept = np.flatnonzero(self.codes <= _limit(self.codes, wanted))
        order = kept[np.lexsort((self.ids[kept], self.distances[kept]))[:k]]
        columns = (values[order].tolist() for values in (self.shards, self.rows, self.ids, self.distances))
        return [Found(*hit) for hit in zip(*columns, strict=True)]


def read_facts(path: Callable[[str], Path]) -> dict[str, Any]:
    """What an index tells of itself, its `index.json`."""
    facts: dict[str, Any] = json.loads(path(INDEX_FILE).read_text())
    if "candidates" not in facts:
        raise UserError("the index is of an earlier release: build and publish it again")
    return facts


class Shards:
    """All shards of one index, or those with the `numbers` of a range. `allowed` are the rows that may be found, of
    each."""

    def __init__(self, facts: Mapping[str, Any], path: Callable[[str], Path], numbers: range | None = None) -> None:
        """Open the shards whose files `path` finds, memory-mapped. Their hashes must have been verified before."""
        self.facts, self._path = facts, path
        self.numbers = range(facts["shards"]) if numbers is None else numbers
        self.shards = [self._open(number) for number in self.numbers]
        self._thumbnail_groups = cache(_thumbnail_groups)

    @classmethod
    def open(cls, path: Callable[[str], Path]) -> "Shards":
        """Open a finished index by its own `index.json`."""
        return cls(read_facts(path), path)

    @property
    def rows(self) -> int:
        return sum(len(shard.ids_N) for shard in self.shards)

    @cached_property
    def lists(self) -> Lists:
        return Lists(self.facts, self._path)

    def _open(self, number: int) -> Shard:
        files = shard_files(number)
        index = faiss.read_index(str(self._path(files["faiss"])), READING)
        # A plain array over the mapped file: a memmap's own indexing takes longer than the few rows of a search.
        rows_ND = np.load(self._path(files["rows"]), mmap_mode="r", allow_pickle=False).view(np.ndarray)
        ids_N = pq.read_table(self._path(files["sidecar"]), columns=["id"])["id"].to_numpy()
        if not index.ntotal == len(rows_ND) == len(ids_N):
            raise UserError(f"shard {number}: index, rows and sidecar differ in length; build the index again")
        return Shard(index, rows_ND, ids_N)

    def search(
        self,
        query_QD: np.ndarray,
        k: int,
        allowed: Sequence[Passing] | None = None,
        probes: int | None = None,
        candidates: int | None = None,
    ) -> list[list[Found]]:
        """The k nearest rows of every query over all shards, nearest first, ties by id; fewer where fewer pass.

        `probes` overrides what the proof recorded for the share of rows that pass (IVF only), `candidates` the plan's:
        so many for each hit are compared by the stored rows.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        query_QD = np.ascontiguousarray(query_QD, np.float32)
        passing = sum(mine.count for mine in allowed) / self.rows if allowed else 1.0
        nearest = self.lists.nearest(query_QD, passing, probes)
        wanted = k * (candidates or self.facts["candidates"])
        return [found.first(wanted, k) for found in self.candidates(query_QD, wanted, nearest, allowed)]

    def candidates(
        self,
        query_QD: np.ndarray,
        wanted: int,
        nearest: NearestLists | None,
        allowed: Sequence[Passing] | None = None,
    ) -> list[Candidates]:
        """Of every query the rows that are among the first `wanted` of these shards by their codes, compared by what is
        stored of them: those of several groups of shards, joined, hold what one group of them all would find."""
        found = []
        parameters = parameters_of(nearest)
        with threads(1):
            for place, shard in enumerate(self.shards):
                if allowed:
                    parameters.sel = allowed[place].selector
                found.append(_coded(shard.index, query_QD, wanted, nearest, parameters))
        codes_QM = np.concatenate([codes_QW for codes_QW, _ in found], axis=1)
        rows_QM = np.concatenate([rows_QW for _, rows_QW in found], axis=1)
        places_M = np.repeat(np.arange(len(found)), [rows_QW.shape[1] for _, rows_QW in found])
        return [self._compared(*each, places_M, wanted) for each in zip(query_QD, codes_QM, rows_QM, strict=True)]

    def _compared(
        self, query_D: np.ndarray, codes_M: np.ndarray, rows_M: np.ndarray, places_M: np.ndarray, wanted: int
    ) -> Candidates:
        near = np.flatnonzero((codes_M <= _limit(codes_M, wanted)) & (rows_M >= 0))
        rows, places = rows_M[near], places_M[near]
        stored = np.empty((len(near), len(query_D)), np.float16)
        ids = np.empty(len(near), np.int64)
        edges = np.searchsorted(places, np.arange(len(self.shards) + 1))
        for shard, first, last in zip(self.shards, edges, edges[1:], strict=False):
            if first < last:
                stored[first:last] = shard.rows_ND[rows[first:last]]
                ids[first:last] = shard.ids_N[rows[first:last]]
        return Candidates(self.numbers.start + places, rows, ids, codes_M[near], exact_distances(query_D, stored))

    def exact(self, query_QD: np.ndarray, k: int, allowed: Sequence[Passing] | None = None) -> list[list[Found]]:
        """What `search` approximates: every stored row that is allowed compared, block by block."""
        best: list[list[Found]] = [[] for _ in query_QD]
        for place, (number, shard) in enumerate(zip(self.numbers, self.shards, strict=True)):
            rows = allowed[place].rows if allowed else None
            found = exact_in_shard(number, shard.rows_ND, shard.ids_N, query_QD, k, rows)
            best = [first(before + hits, k) for before, hits in zip(best, found, strict=True)]
        return best

    def sidecar(self, number: int, columns: Sequence[str] | None = None) -> Any:
        """What is known of a shard's rows, as an Arrow table in the order of the rows."""
        return pq.read_table(self._path(shard_files(number)["sidecar"]), columns=columns)

    def thumbnail(self, number: int, row: int) -> bytes:
        """JPEG of one row's image; only the row group that holds it is read."""
        path = self._path(shard_files(number)["thumbnails"])
        edges, metadata = self._thumbnail_groups(path)
        if row >= edges[-1]:
            raise IndexError(f"shard {number} has no row {row}")
        group = int(np.searchsorted(edges, row, "right")) - 1
        # Its footer, which takes longer than the group, is not read again. Threads do not share a reader.
        pictures = pq.ParquetFile(path, metadata=metadata).read_row_group(group)["jpeg"]
        data: bytes = pictures[row - int(edges[group])].as_py()
        return data


def _thumbnail_groups(path: Path) -> tuple[np.ndarray, Any]:
    """Where the row groups of a shard's thumbnails begin, and the end; and what the file tells of them."""
    metadata = pq.read_metadata(path)
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return np.cumsum([0, *sizes]), metadata


def exact_in_shard(
    number: int,
    rows_ND: np.ndarray,
    ids_N: np.ndarray,
    query_QD: np.ndarray,
    k: int,
    rows: np.ndarray | None = None,
) -> list[list[Found]]:
    """The k nearest rows of one shard to every query, nearest first, ties by id: all of them, or those with the numbers
    `rows`, compared block by block."""
    query_QD = query_QD.astype(np.float32)
    rows = np.arange(len(ids_N)) if rows is None else rows
    best: list[list[Found]] = [[] for _ in query_QD]
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        rows_BD = _floats(rows_ND[block])
        # Squared distances but for the query's own length. Stored rows have unit length but for their rounding.
        # One query is no work for the threads of a matrix product.
        along_QB = query_QD @ rows_BD.T if len(query_QD) > 1 else np.einsum("qd,bd->qb", query_QD, rows_BD)
        far_QB = np.einsum("bd,bd->b", rows_BD, rows_BD) - 2.0 * along_QB
        last = min(k, len(rows_BD)) - 1
        limits_Q = np.partition(far_QB, last, axis=1)[:, last] + NEAR
        for query, limit in enumerate(limits_Q):
            near = block[far_QB[query] <= limit]
            hits = _nearest(number, rows_ND, ids_N, query_QD[query], near, k)
            best[query] = first(best[query] + hits, k)
    return best


def _floats(rows_BD: np.ndarray) -> np.ndarray:
    """Stored rows as float32. torch does it by the processor's own instruction, numpy takes 15 times as long; in pieces
    that torch does not share out, as those that it would wake on a busy machine are waited for."""
    floats_BD = np.empty(rows_BD.shape, np.float32)
    pieces = (torch.from_numpy(values).split(max(1, PIECE // values.shape[1])) for values in (floats_BD, rows_BD))
    for floats, stored in zip(*pieces, strict=True):
        floats.copy_(stored)
    return floats_BD


def _nearest(
    number: int, rows_ND: np.ndarray, ids_N: np.ndarray, query_D: np.ndarray, rows: np.ndarray, k: int
) -> list[Found]:
    """The k nearest of some rows of a shard, by the distances of the stored rows."""
    distances, ids = exact_distances(query_D, rows_ND[rows]), ids_N[rows]
    order = np.lexsort((ids, distances))[:k]
    return [Found(number, int(rows[n]), int(ids[n]), float(distances[n])) for n in order]


def first(hits: list[Found], k: int) -> list[Found]:
    """The k nearest of some hits, ties by id."""
    return sorted(hits, key=lambda hit: (hit.distance, hit.id))[:k]


def _limit(codes: np.ndarray, wanted: int) -> float:
    """The distance of the first `wanted` of some candidates, and with them of all that are too near to tell apart."""
    return float(np.partition(codes, wanted - 1)[wanted - 1] + 2 * NEAR) if len(codes) > wanted else np.inf


def _coded(
    index: Any, query_QD: np.ndarray, k: int, nearest: NearestLists | None, parameters: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances of codes and rows [Q, W] of the k candidates of every query in one shard, ascending, and with
    them all that are too near to tell apart. Where rows run out, FAISS gives -1 and the largest float.

    `nearest` are the lists to search, for an index that has any.
    """
    wanted = min(k + SLACK, index.ntotal)
    while True:
        if nearest is None:
            codes, rows = index.search(query_QD, wanted, params=parameters)
        else:
            codes, rows = search_lists(index, query_QD, wanted, nearest, parameters)
        if wanted == index.ntotal:
            return codes, rows
        unclear = (rows[:, -1] >= 0) & (codes[:, -1] <= codes[:, min(k, wanted) - 1] + 2 * NEAR)
        if not unclear.any():
            return codes, rows
        wanted = min(4 * wanted, index.ntotal)


def exact_distances(query_D: np.ndarray, rows_ND: np.ndarray) -> np.ndarray:
    """Euclidean distances [N] of stored rows to a query, in float64: the same whatever shard a row lies in."""
    difference = rows_ND.astype(np.float64) - query_D.astype(np.float64)
    result: np.ndarray = np.sqrt(np.einsum("nd,nd->n", difference, difference))
    return result
