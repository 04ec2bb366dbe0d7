"""Building and searching an index against autofaiss, LanceDB and one FAISS index, at equal recall.

  python -m benchmarks.index_peers
  python -m benchmarks.index_peers --index URI@alias

All get the same vectors, synthetic ones; with --index also those of a published index, some of them as queries. Each is
built with all cores and asked one query at a time on one core, with the least effort that finds TARGET of the K nearest
rows that exact search finds. autofaiss gets the aims of our plan; LanceDB chooses its lists and codes itself.
Those that are not installed are left out: `pip install cxr-retrieval[peers]`, and for autofaiss see pyproject.toml.

N rows, Q queries, D dimensions.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import faiss
import numpy as np

from benchmarks.claim import Claim, publish
from benchmarks.peers import K, Peer, Setting, peers
from cxr_retrieval.config import IndexSettings
from cxr_retrieval.console import say, show_table
from cxr_retrieval.index.shards import Shards
from cxr_retrieval.index.versions import open_version

ROWS, DIMENSIONS, QUERIES, SHARD_ROWS = 1_000_000, 128, 200, 200_000
CLUSTERS, DIRECTIONS = 60, 24  # a cluster varies in so many directions of its own, and a little in all
APART = 0.25  # clusters overlap: far apart they would be islands that a graph does not find, and easy for lists
BUILDS, ROUNDS = 1, 7  # builds of each take most of the time
LATENCY_MS, MEMORY_GIB = 10, 8  # of a search; comparing all rows takes longer
TARGET = 0.95
PATIENCE, FLAT = 4, 0.001  # so many settings further, a peer whose recall rose by less will not reach the target


def synthetic() -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors in clusters, rounded to float16 as stored embeddings are: rows [N, D] and queries [Q, D]."""
    random = np.random.default_rng(0)
    cluster_N = random.integers(0, CLUSTERS, ROWS + QUERIES)
    vectors_ND = 0.1 * random.standard_normal((ROWS + QUERIES, DIMENSIONS), np.float32)
    for cluster in range(CLUSTERS):
        mine = np.flatnonzero(cluster_N == cluster)
        directions = random.standard_normal((DIRECTIONS, DIMENSIONS), np.float32) / np.sqrt(DIRECTIONS)
        along = random.standard_normal((len(mine), DIRECTIONS), np.float32)
        vectors_ND[mine] += APART * random.standard_normal(DIMENSIONS, np.float32) + along @ directions
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    vectors_ND = vectors_ND.astype(np.float16).astype(np.float32)
    return vectors_ND[QUERIES:], vectors_ND[:QUERIES]


def published(reference: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows [N, D] of a published index, and queries [Q, D], evenly taken out of them."""
    shards = Shards.open(open_version(reference).path).shards
    vectors_ND = np.concatenate([np.asarray(shard.rows_ND, np.float32) for shard in shards])
    chosen = np.linspace(0, len(vectors_ND) - 1, min(QUERIES, len(vectors_ND) // 2)).astype(int)
    return np.delete(vectors_ND, chosen, axis=0), vectors_ND[chosen]


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Every thread of this process on one core, also those that a peer has started."""
    cores, threads = os.sched_getaffinity(0), faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    bind({min(cores)})
    try:
        yield
    finally:
        bind(cores)
        faiss.omp_set_num_threads(threads)


def bind(cores: set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), cores)


@dataclass(frozen=True)
class Searched:
    """Seconds of every query, and the share of the truly nearest that were found."""

    setting: Setting
    recall: float
    seconds: np.ndarray

    @property
    def p50(self) -> float:
        return float(np.median(self.seconds))


def searched(peer: Peer, query_QD: np.ndarray, truth_QK: np.ndarray, setting: Setting) -> Searched:
    found, seconds = [], []
    for row in range(len(query_QD)):
        began = time.perf_counter()
        found.append(peer.search(query_QD[row : row + 1], setting))
        seconds.append(time.perf_counter() - began)
    recall = np.mean([len({*ours} & {*truth}) / K for ours, truth in zip(found, truth_QK.tolist(), strict=True)])
    return Searched(setting, float(recall), np.array(seconds))


def tuned(peer: Peer, query_QD: np.ndarray, truth_QK: np.ndarray) -> Setting:
    """The fastest of the least settings of every ladder that reach the target."""
    best: Searched | None = None
    highest = 0.0
    for ladder in peer.ladders:
        recalls: list[float] = []
        below = 0
        for setting in ladder:
            tried = searched(peer, query_QD, truth_QK, setting)
            recalls.append(tried.recall)
            if best and tried.p50 >= best.p50:
                break
            if tried.recall >= TARGET:
                best = lowered(peer, query_QD, truth_QK, tried, below)
                break
            if len(recalls) > PATIENCE and recalls[-1] < recalls[-1 - PATIENCE] + FLAT:
                break
            below = setting.effort
        highest = max([highest, *recalls])
    if best is None:
        raise RuntimeError(f"{peer.name} reaches recall@{K} {highest:.3f}, not {TARGET:g}")
    return best.setting


def lowered(peer: Peer, query_QD: np.ndarray, truth_QK: np.ndarray, reached: Searched, below: int) -> Searched:
    """Less effort that reaches the target too, by halves of the way down to an effort that does not."""
    while reached.setting.effort - below > max(1, below // 16):
        middle = (reached.setting.effort + below) // 2
        tried = searched(peer, query_QD, truth_QK, Setting(middle, reached.setting.candidates))
        if tried.recall >= TARGET:
            reached = tried
        else:
            below = middle
    return reached


@dataclass
class Measured:
    """What was measured of one peer: what it built, its bytes on disk, seconds of every build, rounds of searches."""

    peer: Peer
    what: str = ""
    bytes: int = 0
    builds: list[float] = field(default_factory=list)
    setting: Setting = field(init=False)
    rounds: list[Searched] = field(default_factory=list)

    def build(self, vectors_ND: np.ndarray, folder: Path) -> None:
        folder.mkdir(parents=True)
        began = time.perf_counter()
        self.what = self.peer.build(vectors_ND, folder)
        self.builds.append(time.perf_counter() - began)
        self.bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        say(f"index_peers: {self.peer.name}: {self.what}, built in {self.builds[-1]:,.0f} s")

    def microseconds(self, quantile: float) -> list[float]:
        """Of one query, in every round."""
        return [1e6 * float(np.quantile(each.seconds, quantile)) for each in self.rounds]


def compared(title: str, vectors_ND: np.ndarray, query_QD: np.ndarray, folder: Path) -> list[Claim]:
    """Build and search with every peer in turn, show all figures, and claim ours against each."""
    settings = IndexSettings(latency_ms=LATENCY_MS, memory_gib=MEMORY_GIB, shard_rows=SHARD_ROWS, recall_target=TARGET)
    measured = [Measured(peer) for peer in peers(settings)]
    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    for turn in range(BUILDS):
        for each in measured:
            each.build(vectors_ND, folder / f"{each.peer.name}-{turn}")
    truth_QK = faiss.knn(query_QD, vectors_ND, K)[1]
    with one_core():
        for each in measured:
            each.setting = tuned(each.peer, query_QD, truth_QK)
        for _ in range(ROUNDS):
            for each in measured:
                each.rounds.append(searched(each.peer, query_QD, truth_QK, each.setting))
    show(title, measured)
    return [claim for other in measured[1:] for claim in claims(title, measured[0], other)]


def show(title: str, measured: Sequence[Measured]) -> None:
    show_table(
        f"{title}, one query at a time on one core",
        ["index", "what", "build s", "MB", "effort", "candidates", f"recall@{K}", "p50 us", "p95 us"],
        [
            [
                each.peer.name,
                each.what,
                float(np.median(each.builds)),
                each.bytes / 1e6,
                each.setting.effort,
                each.setting.candidates,
                f"{each.rounds[0].recall:.3f}",
                float(np.median(each.microseconds(0.5))),
                float(np.median(each.microseconds(0.95))),
            ]
            for each in measured
        ],
    )


def claims(title: str, ours: Measured, other: Measured) -> list[Claim]:
    p50, other_p50 = ours.microseconds(0.5), other.microseconds(0.5)
    against, target = f"{other.peer.name}, {other.what}", other.peer.target
    return [
        Claim.of(
            f"p50 of one query at recall@{K} of {TARGET:g}, {title}",
            against,
            target,
            [theirs / mine for theirs, mine in zip(other_p50, p50, strict=True)],
            ours_microseconds=float(np.median(p50)),
            other_microseconds=float(np.median(other_p50)),
            ours_microseconds_p95=float(np.median(ours.microseconds(0.95))),
            other_microseconds_p95=float(np.median(other.microseconds(0.95))),
            ours_recall_percent=100 * ours.rounds[0].recall,
            other_recall_percent=100 * other.rounds[0].recall,
        ),
        Claim.of(
            f"build, {title}",
            against,
            target,
            [theirs / mine for theirs, mine in zip(other.builds, ours.builds, strict=True)],
            ours_seconds=float(np.median(ours.builds)),
            other_seconds=float(np.median(other.builds)),
            ours_megabytes=ours.bytes / 1e6,
            other_megabytes=other.bytes / 1e6,
        ),
    ]


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", help="URI@alias of a published index whose vectors are compared too")
    options = parser.parse_args(arguments)
    sources = {"synthetic": synthetic}
    if options.index:
        sources["published"] = lambda: published(options.index)
    found: list[Claim] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, source in sources.items():
            vectors_ND, query_QD = source()
            rows, dimensions = vectors_ND.shape
            found += compared(f"{rows:,} x {dimensions} {kind} vectors", vectors_ND, query_QD, Path(folder, kind))
    publish("index_peers", found)


if __name__ == "__main__":
    main(sys.argv[1:])
