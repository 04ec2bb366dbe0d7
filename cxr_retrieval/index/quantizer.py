"""What all shards share: the lists and the codebooks, trained once on a sample.

FAISS files of shards hold rows by list, but not the lists' centroids: these lie once beside them, and a search looks
its lists up once for all shards. Codes are of the vectors themselves, not of what is left beside a centroid, so that
one table of distances serves every list.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from cxr_retrieval.index.plan import GRAPH_LINKS, ITERATIONS, IndexPlan

QUANTIZER_FILE = "quantizer.faiss"
GRAPH_EFFORT = 64  # nodes of the graph of lists that are looked at for one list

NearestLists = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Trained:
    """FAISS files: the coarse quantizer, and a trained index without rows that lacks it."""

    quantizer: bytes
    empty: bytes


def train(plan: IndexPlan, sample_ND: np.ndarray) -> Trained:
    """Train lists and codes on a sample, on a GPU where FAISS has one, else on every core of this machine."""
    with threads(len(os.sched_getaffinity(0))):
        return _train(plan, np.ascontiguousarray(sample_ND, np.float32))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for what FAISS does in this one. A search takes one: a query is no work for several, and on a
    machine that is busy those that are woken are waited for."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _train(plan: IndexPlan, sample_ND: np.ndarray) -> Trained:
    gpu = faiss.get_num_gpus() > 0
    clustering = faiss.Kmeans(plan.dimensions, plan.lists, seed=0, niter=ITERATIONS, gpu=gpu)
    clustering.train(sample_ND)
    quantizer = _empty_quantizer(plan)
    quantizer.add(np.asarray(clustering.centroids))
    index = _empty_index(plan)
    nothing = index.quantizer
    index.quantizer = quantizer
    index.train(sample_ND)
    index.quantizer = nothing
    return Trained(_file(quantizer), _file(index))


def index_of(plan: IndexPlan, vectors_ND: np.ndarray, trained: Trained | None) -> Any:
    """The FAISS index of one shard's rows, in their order."""
    vectors_ND = np.ascontiguousarray(vectors_ND, np.float32)
    if trained is None:
        exact = faiss.IndexScalarQuantizer(plan.dimensions, faiss.ScalarQuantizer.QT_fp16)
        exact.add(vectors_ND)
        return exact
    index, quantizer = _opened(trained.empty), _opened(trained.quantizer)
    nothing = index.quantizer
    index.quantizer = quantizer
    index.add(vectors_ND)
    index.quantizer = nothing
    return index


def list_sizes(index: Any) -> np.ndarray:
    """Rows of every list [lists] of an IVF index."""
    return np.array([index.invlists.list_size(number) for number in range(index.nlist)], np.int64)


class Lists:
    """The lists of an index, in which a search looks rows up; a flat index has none."""

    def __init__(self, facts: Mapping[str, Any], path: Callable[[str], Path]) -> None:
        self._facts = facts
        self.quantizer = faiss.read_index(str(path(QUANTIZER_FILE))) if facts["lists"] else None

    def nearest(self, query_QD: np.ndarray, passing: float = 1.0, probes: int | None = None) -> NearestLists | None:
        """Those to look into for every query, where this share of all rows passes a filter: once for all shards.

        `probes` is how many, in place of what the proof recorded.
        """
        if query_QD.ndim != 2 or query_QD.shape[1] != self._facts["dimensions"]:
            raise ValueError(f"queries must be [Q, {self._facts['dimensions']}], got {list(query_QD.shape)}")
        if not np.isfinite(query_QD).all():
            raise ValueError("a query vector is not finite")
        if self.quantizer is None:
            return None
        return nearest_lists(self.quantizer, query_QD, probes or self._probes(passing))

    def _probes(self, passing: float) -> int:
        """Between the shares of passing rows that the proof measured, even in logarithms; below them, all lists."""
        measured = [[1.0, self._facts["probes"]], *self._facts["filter_probes"]]
        shares, probes = np.array(sorted(measured)).T
        if passing < shares[0]:
            return int(self._facts["lists"])
        return round(float(np.exp(np.interp(np.log(passing), np.log(shares), np.log(probes)))))


def nearest_lists(quantizer: Any, query_QD: np.ndarray, probes: int) -> NearestLists:
    """Squared distances and numbers [Q, probes] of the lists nearest to every query."""
    graph = isinstance(quantizer, faiss.IndexHNSW)
    effort = faiss.SearchParametersHNSW(efSearch=max(GRAPH_EFFORT, 2 * probes)) if graph else None
    with threads(1):
        distances, lists = quantizer.search(query_QD, probes, params=effort)
    return distances, lists


def parameters_of(nearest: NearestLists | None) -> Any:
    """What FAISS wants to know of a search in given lists, or in an index that has none; `sel` are the rows that may be
    found. Made once for all shards: that takes Python a tenth of searching one."""
    return faiss.SearchParameters() if nearest is None else faiss.SearchParametersIVF(nprobe=nearest[0].shape[1])


def search_lists(
    index: Any, query_QD: np.ndarray, k: int, nearest: NearestLists, parameters: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances and rows [Q, k] that a shard's index finds in given lists; -1 where there are no more."""
    distances_QP, lists_QP = (np.ascontiguousarray(values) for values in nearest)
    query_QD = np.ascontiguousarray(query_QD, np.float32)
    count = len(lists_QP)
    distances, rows = np.empty((count, k), np.float32), np.empty((count, k), np.int64)
    pointer = faiss.swig_ptr
    # Of the two faces of this call only the plain one takes a selector.
    index.search_preassigned_c(
        count,
        pointer(query_QD),
        k,
        pointer(lists_QP),
        pointer(distances_QP),
        pointer(distances),
        pointer(rows),
        False,
        parameters,
        None,
    )
    return distances, rows


def _empty_quantizer(plan: IndexPlan) -> Any:
    if not plan.graph:
        return faiss.IndexFlatL2(plan.dimensions)
    graph = faiss.IndexHNSWFlat(plan.dimensions, GRAPH_LINKS)
    graph.hnsw.efSearch = GRAPH_EFFORT
    return graph


def _empty_index(plan: IndexPlan) -> Any:
    index = faiss.index_factory(plan.dimensions, f"IVF{plan.lists},{plan.code.name}")
    index.by_residual = False
    return index


def _file(index: Any) -> bytes:
    return faiss.serialize_index(index).tobytes()


def _opened(data: bytes) -> Any:
    return faiss.deserialize_index(np.frombuffer(data, np.uint8))
