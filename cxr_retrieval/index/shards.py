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
SLACK = 16  # candidates beyond k: float32 distances of FAISS may swap neighbours that the stored rows order rightly
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
        found: list[list[Found]] = [[] for _ in query_QD]
        for number, shard in enumerate(self.shards):
            wanted = min(k + SLACK, len(shard.ids_N))
            parameters = self._parameters(allowed[number] if allowed else None, probes)
            _, places = shard.index.search(query_QD, wanted, params=parameters)
            for query, rows in enumerate(places):
                rows = rows[rows >= 0]
                distances = exact_distances(query_QD[query], shard.rows_ND[rows])
                found[query] += [
                    Found(number, int(row), int(shard.ids_N[row]), float(distance))
                    for row, distance in zip(rows, distances, strict=True)
                ]
        return [sorted(hits, key=lambda hit: (hit.distance, hit.id))[:k] for hits in found]

    def _parameters(self, allowed: np.ndarray | None, probes: int | None) -> Any:
        # The Python constructor keeps the bits alive as long as the selector.
        selector = None if allowed is None else faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        if self.facts["lists"]:
            return faiss.SearchParametersIVF(sel=selector, nprobe=probes or self.facts["probes"])
        return faiss.SearchParameters(sel=selector)

    def exact(self, query_QD: np.ndarray, k: int) -> list[list[Found]]:
        """What `search` approximates: every stored row compared, block by block."""
        best: list[list[Found]] = [[] for _ in query_QD]
        for number, shard in enumerate(self.shards):
            for start in range(0, len(shard.ids_N), BLOCK):
                rows_BD = np.asarray(shard.rows_ND[start : start + BLOCK], np.float32)
                similar_QB = query_QD.astype(np.float32) @ rows_BD.T
                wanted = min(k + SLACK, len(rows_BD))
                nearest = np.argpartition(-similar_QB, wanted - 1, axis=1)[:, :wanted]
                for query, rows in enumerate(nearest):
                    distances = exact_distances(query_QD[query], rows_BD[rows])
                    best[query] += [
                        Found(number, int(start + row), int(shard.ids_N[start + row]), float(distance))
                        for row, distance in zip(rows, distances, strict=True)
                    ]
            best = [sorted(hits, key=lambda hit: (hit.distance, hit.id))[:k] for hits in best]
        return best

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


def exact_distances(query_D: np.ndarray, rows_ND: np.ndarray) -> np.ndarray:
    """Euclidean distances [N] of stored rows to a query, in float64: the same whatever shard a row lies in."""
    difference = rows_ND.astype(np.float64) - query_D.astype(np.float64)
    result: np.ndarray = np.sqrt(np.einsum("nd,nd->n", difference, difference))
    return result
