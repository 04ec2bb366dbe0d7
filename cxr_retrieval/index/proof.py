"""Proof that an index finds what exact search finds, how long that takes, and what distance is far for it.

Queries are held-out rows of the index itself (images of their own patient do not count, as in a search); without
held-out rows, any rows. Exact search compares the stored rows, shard by shard in tasks of their own; the index is
searched here, one query at a time, as a machine that serves it does.

Filters pass some rows by their ids, which have nothing to do with the images, or those of a view or a sex: the nearest
to a query that pass may then lie in other lists than the query's, and a search must look into more.

Q queries, D dimensions.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from cxr_retrieval import storage
from cxr_retrieval.config import IndexSettings
from cxr_retrieval.console import say
from cxr_retrieval.errors import UserError
from cxr_retrieval.index import cache
from cxr_retrieval.index.files import Located, shard_files
from cxr_retrieval.index.filters import EVERYTHING, Filters, among
from cxr_retrieval.index.plan import plan_probes
from cxr_retrieval.index.shards import EXACT_BELOW, Found, Passing, Shards, exact_in_shard, first

K = 10
FARTHEST = 2.0  # between unit vectors
FAR_QUANTILE = 0.999
BEYOND = 2  # settings that are measured beyond the one that is chosen, to show what more would give
# So many settings on, four times the lists are searched. Where that adds less recall than this, only codes lose hits.
FOURFOLD, FLAT = 4, 0.001
BY_ID, FEWER_BY_ID = (1, 10, 100), (1000, 10_000)  # one row of so many passes; the latter where lists are looked up
# Values of columns that are proven too: so many at most, the commonest, of so many rows and such shares of all.
VALUES, LEAST_ROWS, SHARES = 5, 100, (0.01, 0.6)


@dataclass(frozen=True)
class Setting:
    """Recall@10 of one number of probes against exact search, and the latency of one query in milliseconds.

    `passing` is the share of rows that passed a filter; `filter` is what it asked for, where that was not an id.
    """

    probes: int
    recall: float
    p50_ms: float
    p95_ms: float
    passing: float = 1.0
    filter: str | None = None


@dataclass(frozen=True)
class Proof:
    """The settings that were tried, and the fewest probes that reach the target: these are what a search uses.

    `filtered` are the fewest that do where fewer rows pass; all lists where none do and a search never looks lists up
    for so few. `far_distance`: nearest distances of held-out queries to other patients lie below it in 999 of 1,000
    cases.
    """

    queries: int
    target: float
    probes: int
    recall: float
    curve: list[Setting]
    filtered: list[Setting]
    far_distance: float

    @property
    def filter_probes(self) -> list[list[float]]:
        """Shares of passing rows and the probes that they need: fewer rows never fewer than more rows do."""
        most, found = self.probes, dict[float, int]()
        for setting in sorted(self.filtered, key=lambda setting: -setting.passing):
            found[setting.passing] = most = max(most, setting.probes)
        return [[share, probes] for share, probes in found.items()]


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
    few = [one for one in FEWER_BY_ID if shards.rows // one > EXACT_BELOW]
    filters = [*(_Filter(1 / one, one) for one in (*BY_ID, *few)), *_by_values(shards)]
    exact = _exact(path, facts["shards"], query_QD, queries, filters)
    trials = [
        _Trial(shards, query_QD, queries, exact.own, asked, nearest)
        for asked, nearest in zip(filters, exact.nearest, strict=True)
    ]
    if not any(trials[0].nearest):
        raise UserError("all images are of one patient, so there is nothing to find: index those of several patients")
    curve: list[Setting] = []
    chosen = None
    for probes in plan_probes(facts["lists"]):
        curve.append(trials[0].measured(probes))
        if chosen is None and curve[-1].recall >= settings.recall_target:
            chosen = curve[-1]
        if chosen and len(curve) > curve.index(chosen) + BEYOND:
            break
        if not chosen and len(curve) > FOURFOLD and curve[-1].recall < curve[-1 - FOURFOLD].recall + FLAT:
            break
    if chosen is None:
        raise UserError(trials[0].remedy(max(curve, key=lambda setting: setting.recall), settings.recall_target))
    if chosen.p95_ms > settings.latency_ms:
        say(
            f"warning: 95 of 100 searches take up to {chosen.p95_ms:.1f} ms here, over"
            f" index.latency_ms={settings.latency_ms:g}: more cores, or a lower index.recall_target, make it faster"
        )
    filtered: list[Setting] = []
    for trial in trials[1:]:
        if not any(trial.nearest):
            continue  # nothing of other patients passes: as of any filter below those proven, all lists are read
        for probes in (number for number in plan_probes(facts["lists"]) if number >= chosen.probes):
            setting = trial.measured(probes)
            if setting.recall >= settings.recall_target:
                break
        if setting.recall < settings.recall_target and trial.passing > EXACT_BELOW:
            raise UserError(trial.remedy(setting, settings.recall_target))
        filtered.append(setting)
    far = float(np.quantile([hits[0].distance for hits in exact.nearest[0] if hits], FAR_QUANTILE))
    return Proof(len(queries), settings.recall_target, chosen.probes, chosen.recall, curve, filtered, far)


@dataclass(frozen=True)
class _Filter:
    """Of the rows that `asked` for, one of `one` by their ids; `passing` is the share of all rows that do."""

    passing: float
    one: int = 1
    asked: Filters = EVERYTHING
    name: str | None = None

    def mask(self, table: pa.Table) -> np.ndarray:
        """Which rows of a sidecar pass, bool [N]."""
        passing: np.ndarray = (table["id"].to_numpy() % self.one == 0) & self.asked.mask(table)
        return passing


COLUMNS = ["id", "view", "sex"]  # what these filters ask of a sidecar


def _by_values(shards: Shards) -> list[_Filter]:
    """Filters by the views and sexes that a filter has reason to ask for, those of most rows first."""
    counts: Counter[tuple[str, str]] = Counter()
    for number in shards.numbers:
        table = shards.sidecar(number, COLUMNS)
        for column in ("view", "sex"):
            for found in pc.value_counts(table[column]).to_pylist():
                counts[column, found["values"]] += found["counts"]
    filters = []
    for (column, value), count in counts.most_common():
        share = count / shards.rows
        if value is not None and count >= LEAST_ROWS and SHARES[0] <= share <= SHARES[1]:
            asked = Filters(views=(value,)) if column == "view" else Filters(sex=value)
            filters.append(_Filter(share, asked=asked, name=f"{column} {value}"))
    return filters[:VALUES]


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


Own = dict[str, dict[int, np.ndarray]]  # rows of the queries' patients, by the patient and the shard


@dataclass(frozen=True)
class _Exact:
    """What exact search finds: the K nearest images of other patients for every query, by filter."""

    nearest: list[list[list[Found]]]
    own: Own


def _exact(
    path: _Files, shards: int, query_QD: np.ndarray, queries: Sequence[_Query], filters: list[_Filter]
) -> _Exact:
    """Merged from the shards, whose rows are read in tasks of their own: none but k hits of a query leave them."""
    task = ray.remote(max_retries=3)(_exact_in_shard)
    patients = [query.patient for query in queries]
    shared = ray.put(path), ray.put(query_QD), ray.put(patients), ray.put(filters)
    waiting = [task.remote(number, *shared) for number in range(shards)]
    nearest: list[list[list[Found]]] = [[[] for _ in queries] for _ in filters]
    own: Own = {query.patient: {} for query in queries}
    while waiting:
        (ready,), waiting = ray.wait(waiting, num_returns=1)
        number, found, theirs, retries = ray.get(ready)
        storage.add_retries(retries)
        for patient, rows in theirs.items():
            own[patient][number] = rows
        for best, mine in zip(nearest, found, strict=True):
            for query, hits in enumerate(mine):
                best[query] = first(best[query] + hits, K)
    return _Exact(nearest, own)


def _exact_in_shard(
    number: int, path: _Files, query_QD: np.ndarray, patients: list[str], filters: list[_Filter]
) -> tuple[int, list[list[list[Found]]], dict[str, np.ndarray], int]:
    """The nearest rows of one shard that are of other patients than the query, under every filter; and the rows of the
    queries' `patients`. Runs in a Ray task."""
    before, files = storage.retries(), shard_files(number)
    rows_ND = np.load(path(files["rows"]), mmap_mode="r", allow_pickle=False)
    table = pq.read_table(path(files["sidecar"]), columns=[*COLUMNS, "patient"])
    ids_N = table["id"].to_numpy()
    rows = np.flatnonzero(among(table["patient"], sorted({*patients})))
    names = np.array(table["patient"].take(pa.array(rows)).to_pylist(), object)
    own = {str(name): rows[names == name] for name in {*names.tolist()}}
    wanted = K + max(map(len, own.values()), default=0)
    found = []
    for asked in filters:
        every = exact_in_shard(number, rows_ND, ids_N, query_QD, wanted, np.flatnonzero(asked.mask(table)))
        theirs = [{*own.get(patient, ())} for patient in patients]
        pairs = zip(every, theirs, strict=True)
        found.append([[hit for hit in hits if hit.row not in left_out][:K] for hits, left_out in pairs])
    return number, found, own, storage.retries() - before


class _Trial:
    """Searches with every query alone under one filter, each without its own patient; `nearest` is what exact search
    finds, and `passing` how many rows pass."""

    def __init__(
        self,
        shards: Shards,
        query_QD: np.ndarray,
        queries: Sequence[_Query],
        own: Own,
        asked: _Filter,
        nearest: list[list[Found]],
    ) -> None:
        self.nearest, self._asked, self._shards = nearest, asked, shards
        self._queries = list(zip(query_QD, (own[query.patient] for query in queries), nearest, strict=True))
        self._allowed = [Passing.of(asked.mask(shards.sidecar(number, COLUMNS))) for number in shards.numbers]
        self.passing = sum(allowed.count for allowed in self._allowed)

    def measured(self, probes: int, candidates: int | None = None) -> Setting:
        """Recall is the mean of the queries for which there is anything to find."""
        recalls, seconds = [], []
        for query_D, own, nearest in self._queries:
            if not nearest:
                continue
            allowed = list(self._allowed)
            for shard, rows in own.items():
                allowed[shard] = allowed[shard].without(rows)
            start = time.perf_counter()
            (found,) = self._shards.search(query_D[None], K, allowed, probes, candidates)
            seconds.append(time.perf_counter() - start)
            recalls.append(len({hit.id for hit in found} & {hit.id for hit in nearest}) / len(nearest))
        p50, p95 = (round(1000 * float(value), 3) for value in np.quantile(seconds, (0.5, 0.95)))
        return Setting(probes, float(np.mean(recalls)), p50, p95, self._asked.passing, self._asked.name)

    def remedy(self, best: Setting, target: float) -> str:
        """What would reach the target. More probes add nothing any more, so the codes are too short: that is
        measured."""
        facts, one = self._shards.facts, self._asked.one
        with_more = self.measured(best.probes, 8 * facts["candidates"]).recall
        where = f" where one image of {one} passes a filter" if one > 1 else ""
        where = f" among images of {self._asked.name}" if self._asked.name else where
        return (
            f"{facts['factory']} reaches recall@{K} {best.recall:.3f} of exact search with {best.probes} probes"
            f"{where}, below index.recall_target={target:g}; more add nothing, its codes are too short"
            f" (comparing eight times the candidates gives {with_more:.3f}): raise index.memory_gib for longer codes,"
            " or index.latency_ms for an exact index, or lower the target"
        )
