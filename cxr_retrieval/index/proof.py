"""Proof that an index finds what exact search finds, and what distance is far for it.

Queries are held-out rows of the index itself (their own row and their own patient's do not count); without held-out
rows, any rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cxr_retrieval import storage
from cxr_retrieval.artifacts import FileEntry
from cxr_retrieval.config import IndexSettings
from cxr_retrieval.errors import UserError
from cxr_retrieval.index import cache
from cxr_retrieval.index.plan import plan_probes
from cxr_retrieval.index.shards import Found, Shards

K = 10
FARTHEST = 2.0  # between unit vectors
FAR_QUANTILE = 0.999


@dataclass(frozen=True)
class Proof:
    """Recall@10 against exact search of every setting that was tried, and the smallest that reaches the target.

    `far_distance`: nearest distances of held-out queries to other patients lie below it in 999 of 1,000 cases.
    """

    queries: int
    target: float
    probes: int
    recall: float
    curve: list[dict[str, float]]
    far_distance: float


def prove(build_uri: str, facts: Mapping[str, Any], files: Sequence[FileEntry], settings: IndexSettings) -> Proof:
    """Search the built shards and compare. Raises UserError when no setting reaches the recall target."""
    entries, folder = {entry.path: entry for entry in files}, cache.cache_folder()
    shards = Shards(
        facts,
        lambda name: cache.verified(storage.join(build_uri, name), entries[name], folder, "build the index again"),
    )
    query_QD, places = _queries(shards, settings.proof_queries)
    nearest = shards.exact(query_QD, K + 1)
    exact, others = _without_own(nearest, places), _nearest_others(shards, nearest, places)
    curve: list[dict[str, float]] = []
    for probes in plan_probes(facts["lists"]):
        found = _without_own(shards.search(query_QD, K + 1, probes=probes), places)
        recall = float(np.mean([len(set(a) & set(b)) / max(1, len(b)) for a, b in zip(found, exact, strict=True)]))
        curve.append({"probes": probes, "recall": recall})
        if recall >= settings.recall_target:
            far = float(np.quantile(others, FAR_QUANTILE)) if others else FARTHEST
            return Proof(len(query_QD), settings.recall_target, probes, recall, curve, far)
    best = max(entry["recall"] for entry in curve)
    raise UserError(
        f"the index reaches recall@{K} {best:.3f} of exact search, below"
        f" index.recall_target={settings.recall_target:g}: raise index.exact_rows for an exact index, or lower it"
    )


def _queries(shards: Shards, count: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Up to `count` vectors [Q, D], evenly spread over the held-out rows, and the place (shard, row) of each."""
    held_out = [shards.sidecar(number, ["held_out"])["held_out"].to_numpy() for number in range(len(shards.shards))]
    if not any(mask.any() for mask in held_out):
        held_out = [np.ones_like(mask) for mask in held_out]
    ends = np.cumsum([mask.sum() for mask in held_out])
    chosen: list[tuple[int, int]] = []
    for place in np.linspace(0, ends[-1] - 1, min(count, ends[-1])).astype(int):
        shard = int(np.searchsorted(ends, place, side="right"))
        rows = np.flatnonzero(held_out[shard])
        chosen.append((shard, int(rows[place - (ends[shard] - len(rows))])))
    vectors = np.stack([shards.shards[number].rows_ND[row] for number, row in chosen]).astype(np.float32)
    return vectors, chosen


def _without_own(found: list[list[Found]], places: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Ids of the K nearest of each query, its own row left out."""
    return [
        [hit.id for hit in hits if (hit.shard, hit.row) != place][:K] for hits, place in zip(found, places, strict=True)
    ]


def _nearest_others(shards: Shards, found: list[list[Found]], places: Sequence[tuple[int, int]]) -> list[float]:
    """Distance of each query's nearest image of another patient, where the nearest images hold one."""
    wanted: dict[int, set[int]] = {}
    for shard, row in [*places, *((hit.shard, hit.row) for hits in found for hit in hits)]:
        wanted.setdefault(shard, set()).add(row)
    patients: dict[tuple[int, int], str] = {}
    for shard, rows in wanted.items():
        column = shards.sidecar(shard, ["patient"])["patient"]
        patients |= {(shard, row): column[row].as_py() for row in rows}
    nearest = []
    for hits, place in zip(found, places, strict=True):
        others = (hit.distance for hit in hits if patients[hit.shard, hit.row] != patients[place])
        first = next(others, None)
        if first is not None:
            nearest.append(first)
    return nearest
