"""Proof that an index finds what exact search finds, how long that takes, and what distance is far for it.

Queries are held-out rows of the index itself (their own row and their own patient's do not count); without held-out
rows, any rows. Exact search compares the stored rows, shard by shard in tasks of their own; the index is searched here,
one query at a time, as a machine that serves it does.

Q queries, D dimensions.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray

from cxr_retrieval import storage
from cxr_retrieval.config import IndexSettings
from cxr_retrieval.console import say
from cxr_retrieval.errors import UserError
from cxr_retrieval.index import cache
from cxr_retrieval.index.files import Located, shard_files
from cxr_retrieval.index.plan import plan_probes
from cxr_retrieval.index.shards import EXACT_BELOW, Found, Shards, exact_in_shard, first

K = 10
FARTHEST = 2.0  # between unit vectors
FAR_QUANTILE = 0.999
BEYOND = 2  # settings that are measured beyond the one that is chosen, to show what more would give
# So many settings on, four times the lists are searched. Where that adds less recall than this, only codes lose hits.
FOURFOLD, FLAT = 4, 0.001
FILTERS = (1, 10, 100)  # one row of so many passes


@dataclass(frozen=True)
class Setting:
    """Recall@10 of one number of probes against exact search, and the latency of one query in milliseconds.

    `passing` is the share of rows that passed a filter.
    """

    probes: int
    recall: float
    p50_ms: float
    p95_ms: float
    passing: float = 1.0


@dataclass(frozen=True)
class Proof:
    """The settings that were tried, and the fewest probes that reach the target: these are what a search uses.

    `filtered` are the fewest that do where fewer rows pass; all lists where none do and a search never looks lists up
    for so few. `far_distance`: nearest distances of held-out
    queries to other patients lie below it in 999 of 1,000 cases.
    """

    queries: int
    target: float
    probes: int
    recall: float
    curve: list[Setting]
    filtered: list[Setting]
    far_distance: float


@dataclass(frozen=True)
class _Query:
    """Where a query lies in the index, and whose it is."""

    shard: int
    row: int
    patient: str


class _Files:
    """The files of a build, fetched where they are needed and verified before they are read."""

    def __init__(self, files: Mapping[str, Located]) -> None:
        self._files = files

    def __call__(self, name: str) -> Path:
        file = self._files[name]
        return cache.verified(file.uri, file.entry, cache.cache_folder(), "build the index again")


def prove(files: Mapping[str, Located], facts: Mapping[str, Any], settings: IndexSettings) -> Proof:
    """Search the built shards and compare.

    Raises UserError when no setting reaches the recall target, of all rows or of those that pass a filter; but not
    where a search compares all that pass, and so finds the nearest.
    """
    path = _Files(files)
    shards = Shards(facts, path)
    query_QD, queries = _queries(shards, settings.proof_queries)
    exact = _exact(path, facts["shards"], query_QD, queries)
    curve: list[Setting] = []
    chosen = None
    for probes in plan_probes(facts["lists"]):
        curve.append(_measure(shards, query_QD, queries, exact.nearest[1], probes, 1))
        if chosen is None and curve[-1].recall >= settings.recall_target:
            chosen = curve[-1]
        if chosen and len(curve) > curve.index(chosen) + BEYOND:
            break
        if not chosen and len(curve) > FOURFOLD and curve[-1].recall < curve[-1 - FOURFOLD].recall + FLAT:
            break
    if chosen is None:
        best = max(curve, key=lambda setting: setting.recall)
        raise UserError(_remedy(best, shards, query_QD, queries, exact.nearest[1], 1, settings))
    if chosen.p95_ms > settings.latency_ms:
        say(
            f"warning: 95 of 100 searches take up to {chosen.p95_ms:.1f} ms here, over"
            f" index.latency_ms={settings.latency_ms:g}: more cores, or a lower index.recall_target, make it faster"
        )
    filtered: list[Setting] = []
    for one in FILTERS[1:]:  # a narrower filter never needs fewer
        for probes in (number for number in plan_probes(facts["lists"]) if number >= chosen.probes):
            setting = _measure(shards, query_QD, queries, exact.nearest[one], probes, one)
            if setting.recall >= settings.recall_target:
                break
        if setting.recall < settings.recall_target and shards.rows > one * EXACT_BELOW:
            raise UserError(_remedy(setting, shards, query_QD, queries, exact.nearest[one], one, settings))
        filtered.append(setting)
    far = float(np.quantile(exact.other_patients, FAR_QUANTILE)) if exact.other_patients else FARTHEST
    return Proof(len(queries), settings.recall_target, chosen.probes, chosen.recall, curve, filtered, far)


def _queries(shards: Shards, count: int) -> tuple[np.ndarray, list[_Query]]:
    """Up to `count` vectors [Q, D], evenly spread over the held-out rows."""
    held_out = [shards.sidecar(number, ["held_out"])["held_out"].to_numpy() for number in range(len(shards.shards))]
    if not any(mask.any() for mask in held_out):
        held_out = [np.ones_like(mask) for mask in held_out]
    ends = np.cumsum([mask.sum() for mask in held_out])
    places = np.linspace(0, ends[-1] - 1, min(count, ends[-1])).astype(int)
    chosen: list[_Query] = []
    for shard in np.unique(np.searchsorted(ends, places, side="right")):
        rows = np.flatnonzero(held_out[shard])
        patients = shards.sidecar(shard, ["patient"])["patient"]
        first = ends[shard] - len(rows)
        mine = rows[places[(places >= first) & (places < ends[shard])] - first]
        chosen += [_Query(int(shard), int(row), patients[row].as_py()) for row in mine]
    vectors = np.stack([shards.shards[query.shard].rows_ND[query.row] for query in chosen]).astype(np.float32)
    return vectors, chosen


@dataclass(frozen=True)
class _Exact:
    """What exact search finds: ids of the K nearest of every query, by how many rows one passes a filter of; and each
    query's distance to its nearest image of another patient, where the nearest images hold one."""

    nearest: dict[int, list[list[int]]]
    other_patients: list[float]


def _exact(path: _Files, shards: int, query_QD: np.ndarray, queries: Sequence[_Query]) -> _Exact:
    """Merged from the shards, whose rows are read in tasks of their own: none but k hits of a query leave them."""
    task = ray.remote(max_retries=3)(_exact_in_shard)
    shared = ray.put(path), ray.put(query_QD)
    waiting = [task.remote(number, *shared) for number in range(shards)]
    best: dict[int, list[list[Found]]] = {one: [[] for _ in queries] for one in FILTERS}
    patients: dict[tuple[int, int], str] = {}
    while waiting:
        (ready,), waiting = ray.wait(waiting, num_returns=1)
        found, names, retries = ray.get(ready)
        storage.add_retries(retries)
        patients |= names
        for one in FILTERS:
            for query, hits in enumerate(found[one]):
                best[one][query] = first(best[one][query] + hits, K + 1)
    others = (
        next((hit.distance for hit in hits if patients[hit.shard, hit.row] != query.patient), None)
        for hits, query in zip(best[1], queries, strict=True)
    )
    nearest = {one: _without_own(best[one], queries) for one in FILTERS}
    return _Exact(nearest, [distance for distance in others if distance is not None])


def _exact_in_shard(
    number: int, path: _Files, query_QD: np.ndarray
) -> tuple[dict[int, list[list[Found]]], dict[tuple[int, int], str], int]:
    """The nearest rows of one shard under every filter, and the patients of those found without. Runs in a Ray task."""
    before, files = storage.retries(), shard_files(number)
    rows_ND = np.load(path(files["rows"]), mmap_mode="r", allow_pickle=False)
    table = pq.read_table(path(files["sidecar"]), columns=["id", "patient"])
    ids_N = table["id"].to_numpy()
    found = {
        one: exact_in_shard(number, rows_ND, ids_N, query_QD, K + 1, np.flatnonzero(_passes(ids_N, one)))
        for one in FILTERS
    }
    names = {(number, hit.row): table["patient"][hit.row].as_py() for hits in found[1] for hit in hits}
    return found, names, storage.retries() - before


def _passes(ids_N: np.ndarray, one: int) -> np.ndarray:
    """Which rows pass a filter that has nothing to do with their images: ids are hashes."""
    passing: np.ndarray = ids_N % one == 0
    return passing


def _measure(
    shards: Shards,
    query_QD: np.ndarray,
    queries: Sequence[_Query],
    exact: list[list[int]],
    probes: int,
    one: int,
    candidates: int | None = None,
) -> Setting:
    """Search with every query alone."""
    allowed = [_passes(shard.ids_N, one) for shard in shards.shards] if one > 1 else None
    found, seconds = [], []
    for query_D in query_QD:
        start = time.perf_counter()
        found += shards.search(query_D[None], K + 1, allowed, probes, candidates)
        seconds.append(time.perf_counter() - start)
    pairs = zip(_without_own(found, queries), exact, strict=True)
    recall = float(np.mean([len(set(ours) & set(truth)) / len(truth) if truth else 1.0 for ours, truth in pairs]))
    p50, p95 = (round(1000 * float(value), 3) for value in np.quantile(seconds, (0.5, 0.95)))
    return Setting(probes, recall, p50, p95, 1 / one)


def _without_own(found: list[list[Found]], queries: Sequence[_Query]) -> list[list[int]]:
    """Ids of the K nearest of each query, its own row left out."""
    return [
        [hit.id for hit in hits if (hit.shard, hit.row) != (query.shard, query.row)][:K]
        for hits, query in zip(found, queries, strict=True)
    ]


def _remedy(
    best: Setting,
    shards: Shards,
    query_QD: np.ndarray,
    queries: Sequence[_Query],
    exact: list[list[int]],
    one: int,
    settings: IndexSettings,
) -> str:
    """What would reach the target. More probes add nothing any more, so the codes are too short: that is measured."""
    more = 8 * shards.facts["candidates"]
    with_more = _measure(shards, query_QD, queries, exact, best.probes, one, more).recall
    where = f" where one image of {one} passes a filter" if one > 1 else ""
    return (
        f"{shards.facts['factory']} reaches recall@{K} {best.recall:.3f} of exact search with {best.probes} probes"
        f"{where}, below index.recall_target={settings.recall_target:g}; more add nothing, its codes are too short"
        f" (comparing eight times the candidates gives {with_more:.3f}): raise index.memory_gib for longer codes, or"
        " index.latency_ms for an exact index, or lower the target"
    )
