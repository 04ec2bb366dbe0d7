"""What benchmarks.index_peers measures: ours, FAISS alone, autofaiss and LanceDB, each built and asked its own way.

N rows, D dimensions.
"""

import importlib.util
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cxr_retrieval.config import IndexSettings
from cxr_retrieval.console import say
from cxr_retrieval.index.files import shard_files
from cxr_retrieval.index.plan import IndexPlan, plan_index, plan_probes
from cxr_retrieval.index.quantizer import QUANTIZER_FILE, index_of, train
from cxr_retrieval.index.shards import Shards

K = 10
MOST_EFFORT = 4096
EVERY_ROW, EVERY_GIB = 100_000_000, 1_000  # in one shard


@dataclass(frozen=True)
class Setting:
    """How hard a search tries: lists that are read or rows of a graph that are looked at, and how many candidates for
    each hit are compared by the rows themselves."""

    effort: int
    candidates: int = 1


Ladders = Sequence[Sequence[Setting]]


class Peer(Protocol):
    """`target` is of the ratio of ours to it; `ladders` are settings to try, each ascending in effort."""

    name: str
    target: float
    ladders: Ladders

    def build(self, vectors_ND: np.ndarray, folder: Path) -> str:
        """Build on disk and open; returns what was built."""

    def search(self, query_1D: np.ndarray, setting: Setting) -> Sequence[int]:
        """Row numbers of the K nearest."""


def planned(vectors_ND: np.ndarray, settings: IndexSettings) -> tuple[IndexPlan, np.ndarray]:
    """Our plan for these vectors, and the even sample that it trains on."""
    rows, dimensions = vectors_ND.shape
    plan = plan_index(rows, dimensions, settings)
    return plan, vectors_ND[:: max(1, rows // max(1, plan.training_rows))]


@dataclass
class Ours:
    """With all rows in one shard, `name` tells so: what sharding costs a search on one core."""

    settings: IndexSettings
    name: str = "ours"
    target = 0.5
    ladders: Ladders = ()

    def build(self, vectors_ND: np.ndarray, folder: Path) -> str:
        plan, sample_ND = planned(vectors_ND, self.settings)
        trained = train(plan, sample_ND) if plan.lists else None
        if trained:
            (folder / QUANTIZER_FILE).write_bytes(trained.quantizer)
        (folder / "shards").mkdir()
        for number, start in enumerate(range(0, len(vectors_ND), plan.shard_rows)):
            rows_ND = vectors_ND[start : start + plan.shard_rows].astype(np.float16)
            files = {kind: folder / name for kind, name in shard_files(number).items()}
            faiss.write_index(index_of(plan, rows_ND, trained), str(files["faiss"]))
            np.save(files["rows"], rows_ND)
            pq.write_table(pa.table({"id": np.arange(start, start + len(rows_ND))}), files["sidecar"])
        facts = {
            "dimensions": plan.dimensions,
            "lists": plan.lists,
            "shards": plan.shards,
            "candidates": plan.code.candidates,
        }
        self.shards = Shards(facts, lambda name: folder / name)
        self.ladders = [[Setting(probes, plan.code.candidates) for probes in plan_probes(plan.lists)]]
        return f"{plan.shards} shards of {plan.factory}"

    def search(self, query_1D: np.ndarray, setting: Setting) -> Sequence[int]:
        hits = self.shards.search(query_1D, K, probes=setting.effort, candidates=setting.candidates)[0]
        return [hit.id for hit in hits]


@dataclass
class Raw:
    """FAISS alone: the same factory and sample, all rows in one index, without the stored rows."""

    settings: IndexSettings
    name, target = "one FAISS index", 0.83
    ladders: Ladders = ()

    def build(self, vectors_ND: np.ndarray, folder: Path) -> str:
        plan, sample_ND = planned(vectors_ND, self.settings)
        index = faiss.index_factory(plan.dimensions, plan.factory)
        index.train(sample_ND)
        index.add(vectors_ND)
        self.index = written(index, folder)
        self.ladders = [[Setting(probes) for probes in plan_probes(plan.lists)]]
        return plan.factory

    def search(self, query_1D: np.ndarray, setting: Setting) -> Sequence[int]:
        lists = isinstance(self.index, faiss.IndexIVF)
        parameters = faiss.SearchParametersIVF(nprobe=setting.effort) if lists else None
        found: list[int] = self.index.search(query_1D, K, params=parameters)[1][0].tolist()
        return found


@dataclass
class Autofaiss:
    """Told the same aims, it takes a graph of all rows wherever that fits the memory."""

    settings: IndexSettings
    name, target = "autofaiss", 1.0
    ladders: Ladders = (tuple(Setting(effort) for effort in plan_probes(MOST_EFFORT)),)

    def build(self, vectors_ND: np.ndarray, folder: Path) -> str:
        from autofaiss import build_index

        index, facts = build_index(
            vectors_ND,
            save_on_disk=False,  # with NumPy 2 it cannot write the facts beside the index
            index_param="efSearch=16",  # else it looks for one by its own queries; here every search says its own
            metric_type="l2",
            max_index_query_time_ms=self.settings.latency_ms,
            max_index_memory_usage=f"{self.settings.memory_gib:g}G",
            current_memory_available=f"{2 * self.settings.memory_gib:g}G",
            nb_cores=len(os.sched_getaffinity(0)),
            verbose=logging.ERROR,
        )
        self.index = written(index, folder)
        return str(facts["index_key"])

    def search(self, query_1D: np.ndarray, setting: Setting) -> Sequence[int]:
        parameters = faiss.SearchParametersHNSW(efSearch=setting.effort)
        found: list[int] = self.index.search(query_1D, K, params=parameters)[1][0].tolist()
        return found


class LanceDB:
    name, target = "lancedb", 1.0
    ladders: Ladders = tuple(tuple(Setting(n, more) for n in plan_probes(MOST_EFFORT)) for more in (1, 4, 16, 64, 256))

    def build(self, vectors_ND: np.ndarray, folder: Path) -> str:
        import lancedb
        from lancedb.index import IvfPq

        vectors = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.ravel()), vectors_ND.shape[1])
        rows = pa.table({"id": np.arange(len(vectors_ND)), "vector": vectors})
        self.table = lancedb.connect(str(folder)).create_table("vectors", rows)
        self.table.create_index("vector", config=IvfPq(distance_type="l2"))
        return "IVF_PQ"

    def search(self, query_1D: np.ndarray, setting: Setting) -> Sequence[int]:
        search = self.table.search(query_1D[0]).nprobes(setting.effort).refine_factor(setting.candidates)
        found: list[int] = search.limit(K).select(["id", "_distance"]).to_arrow()["id"].to_pylist()
        return found


def written(index: Any, folder: Path) -> Any:
    """A FAISS index as it is opened from its file."""
    faiss.write_index(index, str(folder / "index.faiss"))
    return faiss.read_index(str(folder / "index.faiss"))


def peers(settings: IndexSettings) -> list[Peer]:
    """Ours, and what it is measured against of what is installed."""
    whole = settings.model_copy(update={"shard_rows": EVERY_ROW, "memory_gib": EVERY_GIB})
    found: list[Peer] = [Ours(settings), Ours(whole, "ours, one shard"), Raw(settings)]
    others: list[Peer] = [Autofaiss(settings), LanceDB()]
    for peer in others:
        if importlib.util.find_spec(peer.name):
            found.append(peer)
        else:
            say(f"index_peers: {peer.name} is not installed and left out")
    return found
