"""The shards of one index, opened from local files: fan-out search with filters, and exact search.

FAISS finds candidates; their distances are then computed anew from the stored float16 rows and sorted by distance and
id, so the answer does not depend on how rows are spread over shards. Distances are Euclidean between unit vectors:
0 for the same direction, sqrt(2) for none in common, at most 2.

Q queries, D dimensions, k hits.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq

from cxr_retrieval.errors import UserError

INDEX_FILE = "index.json"
SLACK = 16  # candidates beyond k that are asked for at first
# Squared float32 distances of FAISS are wrong by less than this: nearer neighbours than that it may swap.
NEAR = 1e-5
BLOCK = 65536


def shard_files(number: int) -> dict[str, str]:
    """Paths of one shard's files in the index."""
    return {
        kind: f"shards/{number:05d}.{ending}"
        for kind, ending in {
            "faiss": "faiss",
            "rows": "rows.npy",
            "sidecar": "parquet",
            "thumbnails": "thumbnails.parquet",
        }.items()
    }


@dataclass(frozen=True)
class Found:
    """One hit: its shard, its row there, its stable id and its distance."""

    shard: int
    row: int
    id: int
    distance: float


@dataclass(frozen=True)
class Shard:
    index: Any
    rows_ND: np.ndarray
    ids_N: np.ndarray


class Shards:
    """All shards of one index. `allowed` masks are boolean arrays, one a shard, over its rows."""

    def __init__(self, facts: Mapping[str, Any], path: Callable[[str], Path]) -> None:
        """Open the shards whose files `path` finds, memory-mapped. Their hashes must have been verified before."""
        self.facts, self._path = facts, path
        self.shards = [self._open(number) for number in range(facts["shards"])]

    @classmethod
    def open(cls, path: Callable[[str], Path]) -> "Shards":
        """Open a finished index by its own `index.json`."""
        return cls(json.loads(path(INDEX_FILE).read_text()), path)

    @property
    def rows(self) -> int:
        return sum(len(shard.ids_N) for shard in self.shards)

    def _open(self, number: int) -> Shard:
        files = shard_files(number)
        index = faiss.read_index(str(self._path(files["faiss"])), faiss.IO_FLAG_MMAP_IFC)
        rows_ND = np.load(self._path(files["rows"]), mmap_mode="r", allow_pickle=False)
        ids_N = pq.read_table(self._path(files["sidecar"]), columns=["id"])["id"].to_numpy()
        if not index.ntotal == len(rows_ND) == len(ids_N):
            raise UserError(f"shard {number}: index, rows and sidecar differ in length; build the index again")
        return Shard(index, rows_ND, ids_N)

    def search(
        self, query_QD: np.ndarray, k: int, allowed: Sequence[np.ndarray] | None = None, probes: int | None = None
    ) -> list[list[Found]]:
        """The k nearest rows of every query over all shards, nearest first, ties by id; fewer where fewer pass.

        `probes` overrides the setting that the proof recorded (IVF only).
        """
        query_QD = np.ascontiguousarray(query_QD, np.float32)
        if query_QD.ndim != 2 or query_QD.shape[1] != self.facts["dimensions"]:
            raise ValueError(f"queries must be [Q, {self.facts['dimensions']}], got {list(query_QD.shape)}")
        if not np.isfinite(query_QD).all():
            raise ValueError("a query vector is not finite")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        found: list[list[Found]] = [[] for _ in query_QD]
        for number, shard in enumerate(self.shards):
            parameters = self._parameters(allowed[number] if allowed else None, probes)
            for query, rows in enumerate(_candidates(shard.index, query_QD, k, parameters)):
                found[query] += self._nearest(number, query_QD[query], rows, k)
        return [_first(hits, k) for hits in found]

    def _parameters(self, allowed: np.ndarray | None, probes: int | None) -> Any:
        # The Python constructor keeps the bits alive as long as the selector.
        selector = None if allowed is None else faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        if self.facts["lists"]:
            return faiss.SearchParametersIVF(sel=selector, nprobe=probes or self.facts["probes"])
        return faiss.SearchParameters(sel=selector)

    def exact(self, query_QD: np.ndarray, k: int) -> list[list[Found]]:
        """What `search` approximates: every stored row compared, block by block."""
        query_QD = query_QD.astype(np.float32)
        best: list[list[Found]] = [[] for _ in query_QD]
        for number, shard in enumerate(self.shards):
            for start in range(0, len(shard.ids_N), BLOCK):
                rows_BD = np.asarray(shard.rows_ND[start : start + BLOCK], np.float32)
                # Squared distances but for the query's own length. Stored rows have unit length but for their rounding.
                far_QB = np.einsum("bd,bd->b", rows_BD, rows_BD) - 2.0 * (query_QD @ rows_BD.T)
                last = min(k, len(rows_BD)) - 1
                limits_Q = np.partition(far_QB, last, axis=1)[:, last] + NEAR
                for query, limit in enumerate(limits_Q):
                    rows = start + np.flatnonzero(far_QB[query] <= limit)
                    best[query] += self._nearest(number, query_QD[query], rows, k)
            best = [_first(hits, k) for hits in best]
        return best

    def _nearest(self, number: int, query_D: np.ndarray, rows: np.ndarray, k: int) -> list[Found]:
        """The k nearest of some rows of a shard, by the distances of the stored rows."""
        shard = self.shards[number]
        distances, ids = exact_distances(query_D, shard.rows_ND[rows]), shard.ids_N[rows]
        order = np.lexsort((ids, distances))[:k]
        return [Found(number, int(rows[n]), int(ids[n]), float(distances[n])) for n in order]

    def sidecar(self, number: int, columns: Sequence[str] | None = None) -> Any:
        """What is known of a shard's rows, as an Arrow table in the order of the rows."""
        return pq.read_table(self._path(shard_files(number)["sidecar"]), columns=columns)

    def thumbnail(self, number: int, row: int) -> bytes:
        """JPEG of one row's image; only the row group that holds it is read."""
        file = pq.ParquetFile(self._path(shard_files(number)["thumbnails"]))
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if row < size:
                data: bytes = file.read_row_group(group)["jpeg"][row].as_py()
                return data
            row -= size
        raise IndexError(f"shard {number} has no row {row}")


def _first(hits: list[Found], k: int) -> list[Found]:
    return sorted(hits, key=lambda hit: (hit.distance, hit.id))[:k]


def _candidates(index: Any, query_QD: np.ndarray, k: int, parameters: Any) -> list[np.ndarray]:
    """Rows of every query among which its k nearest surely are: as many more than k as are too near to tell apart."""
    wanted = min(k + SLACK, index.ntotal)
    found: list[np.ndarray] = [np.zeros(0, np.int64)] * len(query_QD)
    open_Q = np.arange(len(query_QD))
    while len(open_Q) and wanted:
        distances, places = index.search(query_QD[open_Q], wanted, params=parameters)
        for query, rows in zip(open_Q, places, strict=True):
            found[query] = rows[rows >= 0]
        last = min(k, wanted) - 1
        # Where rows run out, FAISS gives -1 and the largest float: nothing is left to ask for.
        unclear = (places[:, -1] >= 0) & (distances[:, -1] <= distances[:, last] + 2 * NEAR)
        if wanted == index.ntotal:
            break
        open_Q, wanted = open_Q[unclear], min(4 * wanted, index.ntotal)
    return found


def exact_distances(query_D: np.ndarray, rows_ND: np.ndarray) -> np.ndarray:
    """Euclidean distances [N] of stored rows to a query, in float64: the same whatever shard a row lies in."""
    difference = rows_ND.astype(np.float64) - query_D.astype(np.float64)
    result: np.ndarray = np.sqrt(np.einsum("nd,nd->n", difference, difference))
    return result
