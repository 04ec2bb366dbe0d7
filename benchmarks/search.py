"""Searches of a published index of a million rows, with and without filters, against the look-up of vectors alone.

  python -m benchmarks.search

Vectors are synthetic, those of benchmarks.index_peers; what is told of the images is drawn at random. A search finds
the image that the query may be, counts what passes, finds the nearest and reads what is known of them; looking at the
picture itself (decoding, network) is not in it. A filter's first search finds out which images pass it, the next ones
know. A query that is an indexed image leaves its patient out, another one each time.

N rows, Q queries, D dimensions.
"""

import datetime
import io
import json
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import cv2
import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks import index_peers
from benchmarks.claim import Claim, publish
from benchmarks.peers import planned
from cxr_retrieval import storage
from cxr_retrieval.artifacts import Artifact, Draft
from cxr_retrieval.config import IndexSettings, NetworkSettings
from cxr_retrieval.console import show_table
from cxr_retrieval.corpus.decoding import Recipe
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.index import versions
from cxr_retrieval.index.build import KIND
from cxr_retrieval.index.files import shard_files
from cxr_retrieval.index.filters import EVERYTHING, Filters
from cxr_retrieval.index.quantizer import QUANTIZER_FILE, index_of, train
from cxr_retrieval.index.search import MODEL_PATH, WEIGHTS_PATH, Query, Retriever
from cxr_retrieval.index.shards import INDEX_FILE, Shards
from cxr_retrieval.index.source import SIDECAR, THUMBNAIL_GROUP
from cxr_retrieval.network.progressive import uncentred
from cxr_retrieval.privacy import row_id
from cxr_retrieval.training.model import KIND as MODEL_KIND
from cxr_retrieval.training.model import MODEL_FILE, WEIGHTS_FILE, build_network, write_model

ROUNDS, K = 5, 8
PROBES = 40  # recall@10 of 0.95 in benchmarks.index_peers
RECIPE = Recipe(64, "letterbox")
EMBEDDING = "step1"
FILTERS = {
    "none": EVERYTHING,
    "view (half pass)": Filters(views=("PA",)),
    "view, sex, ages (1 in 8)": Filters(views=("PA",), sex="F", age_from=40, age_to=89),
    "finding (1 in 14)": Filters(any_of=("Hernia",)),
    "finding, sex, age (1 in 280)": Filters(all_of=("Hernia",), sex="F", age_from=80, age_to=89),
}
INDEXED = "an indexed image, no filter"


def sidecar(numbers: np.ndarray) -> pa.Table:
    """What is told of images of these numbers, three to a patient."""
    random = np.random.default_rng(int(numbers[0]))
    names = [f"{number:08d}.png" for number in numbers.tolist()]
    found = random.integers(0, len(FINDINGS), len(numbers))
    columns = {
        "id": [row_id(name) for name in names],
        "image_id": names,
        "patient": [str(number // 3) for number in numbers.tolist()],
        "study_date": [datetime.date(2020, 1, 1)] * len(numbers),
        "view": np.where(random.random(len(numbers)) < 0.5, "PA", "AP").tolist(),
        "sex": np.where(random.random(len(numbers)) < 0.5, "F", "M").tolist(),
        "age_years": random.integers(0, 100, len(numbers)),
        "findings": [[FINDINGS[number]] for number in found.tolist()],
        "unknown": [[]] * len(numbers),
        "crop": [[0, 0, RECIPE.size, RECIPE.size]] * len(numbers),
        "source": names,
        "pixel_sha256": [random.bytes(32) for _ in names],
        "held_out": np.zeros(len(numbers), bool),
    }
    return pa.table([pa.array(columns[field.name], field.type) for field in SIDECAR], schema=SIDECAR)


def fresh_model(folder: str, dimensions: int) -> Artifact:
    """A model whose embedding has so many dimensions."""
    settings = NetworkSettings(dimensions=dimensions)
    network = build_network(settings, len(FINDINGS)).eval()
    with torch.inference_mode():
        means = {name: value.mean(0) for name, value in uncentred(network(torch.randn(4, 1, 64, 64))).items()}
    facts = {
        "network": settings.model_dump(),
        "findings": list(FINDINGS),
        "chosen": EMBEDDING,
        "decode_recipe": RECIPE.to_json(),
    }
    draft = Draft(storage.join(folder, "model"), MODEL_KIND, {}, ()).begin()
    return write_model(draft, facts, network.state_dict(), means, torch.zeros(1, 1, 1), {})


def published_index(folder: str, vectors_ND: np.ndarray) -> str:
    """The reference of an index of these vectors."""
    plan, sample_ND = planned(vectors_ND, IndexSettings(latency_ms=index_peers.LATENCY_MS))
    trained = train(plan, sample_ND)
    model = fresh_model(folder, plan.dimensions)
    draft = Draft.under(storage.join(folder, "builds"), KIND, {}, ()).begin()
    files = [
        draft.write(QUANTIZER_FILE, trained.quantizer),
        draft.write(MODEL_PATH, model.read(MODEL_FILE)),
        draft.write(WEIGHTS_PATH, model.read(WEIGHTS_FILE)),
    ]
    grey = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    picture = cv2.imencode(".jpg", grey)[1].tobytes()
    for number, start in enumerate(range(0, len(vectors_ND), plan.shard_rows)):
        rows_ND, names = vectors_ND[start : start + plan.shard_rows].astype(np.float16), shard_files(number)
        array = io.BytesIO()
        np.save(array, rows_ND)
        files.append(draft.write(names["rows"], array.getvalue()))
        with draft.staged(names["faiss"]) as (local, entry):
            faiss.write_index(index_of(plan, rows_ND, trained), str(local))
        files.append(entry.value)
        tables = {
            "sidecar": (sidecar(np.arange(start, start + len(rows_ND))), None),
            "thumbnails": (pa.table({"jpeg": [picture] * len(rows_ND)}), THUMBNAIL_GROUP),
        }
        for kind, (table, group) in tables.items():
            with draft.staged(names[kind]) as (local, entry):
                pq.write_table(table, local, compression="zstd", row_group_size=group)
            files.append(entry.value)
    facts = {
        "embedding": EMBEDDING,
        "dimensions": plan.dimensions,
        "rows": len(vectors_ND),
        "shards": plan.shards,
        "factory": plan.factory,
        "lists": plan.lists,
        "probes": min(PROBES, plan.lists),
        "filter_probes": [[0.1, min(2 * PROBES, plan.lists)], [0.01, min(8 * PROBES, plan.lists)]],
        "candidates": plan.code.candidates,
        "findings": list(FINDINGS),
        "decode_recipe": RECIPE.to_json(),
        "decode_recipe_id": RECIPE.id,
        "pseudonymised": False,
        "proof": {"far_distance": 2.0},
    }
    files.append(draft.write(INDEX_FILE, json.dumps(facts).encode()))
    to = storage.join(folder, "published")
    versions.publish(draft.finish(files, {"indexed": len(vectors_ND)}), to, "latest")
    return to + "@latest"


def milliseconds(retriever: Retriever, queries: Sequence[Query], filters: Filters) -> np.ndarray:
    """Of every search."""
    found = []
    for query in queries:
        began = time.perf_counter()
        retriever.search(query, K, filters)
        found.append(1000 * (time.perf_counter() - began))
    return np.array(found)


def look_ups(shards: Shards, query_QD: np.ndarray) -> np.ndarray:
    """Milliseconds of finding the nearest vectors of every query, and no more."""
    found = []
    for query_D in query_QD:
        began = time.perf_counter()
        shards.search(query_D[None], K)
        found.append(1000 * (time.perf_counter() - began))
    return np.array(found)


def anonymous_memory() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


class Times(NamedTuple):
    """Seconds and bytes of opening; milliseconds of searches: of the first of every case, and by rounds those of every
    case and of the nearest vectors alone. A case is a filter, or queries that are indexed images."""

    opening: float
    memory: int
    first: dict[str, float]
    searches: dict[str, list[np.ndarray]]
    alone: list[np.ndarray]


def measured(reference: str, query_QD: np.ndarray) -> Times:
    """Open and search. Runs in a process of its own, whose memory is that of searching."""
    random = np.random.default_rng(1)
    picture = random.integers(0, 255, (RECIPE.size, RECIPE.size), dtype=np.uint8)
    queries = [Query(picture, vector_D, (0, 0, 64, 64), {}, random.bytes(32), (64, 64)) for vector_D in query_QD]
    before, began = anonymous_memory(), time.perf_counter()
    retriever = Retriever.open(reference)
    opening = time.perf_counter() - began
    numbers = np.linspace(0, retriever.images - 1, len(queries)).astype(int).tolist()
    indexed = [retriever.query_of(f"{number:08d}.png") for number in numbers]
    cases = {name: (queries, filters) for name, filters in FILTERS.items()} | {INDEXED: (indexed, EVERYTHING)}
    first = {name: float(milliseconds(retriever, asked[:1], filters)[0]) for name, (asked, filters) in cases.items()}
    memory = anonymous_memory() - before
    shards = Shards.open(versions.open_version(reference).path)
    look_ups(shards, query_QD)
    alone: list[np.ndarray] = []
    searches: dict[str, list[np.ndarray]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        alone.append(look_ups(shards, query_QD))
        for name, (asked, filters) in cases.items():
            searches[name].append(milliseconds(retriever, asked, filters))
    return Times(opening, memory, first, searches, alone)


def main() -> None:
    vectors_ND, query_QD = index_peers.synthetic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CXR_CACHE"] = storage.join(folder, "cache")
        reference = published_index(folder, vectors_ND)
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            times = process.submit(measured, reference, query_QD).result()
    rows = len(vectors_ND)
    quantiles = {
        name: [float(np.quantile(np.concatenate(found), q)) for q in (0.5, 0.95)]
        for name, found in times.searches.items()
    }
    show_table(
        f"Searches of {rows:,} rows, k = {K}: milliseconds",
        ["filter", "first", "p50", "p95"],
        [[name, times.first[name], *quantiles[name]] for name in times.searches],
    )
    publish(
        "search",
        [
            Claim.of(
                f"p50 of a search of {rows:,} rows, {_told(name)}",
                "the nearest vectors alone, no filter",
                0.5,
                [
                    float(np.median(peer) / np.median(ours))
                    for peer, ours in zip(times.alone, times.searches[name], strict=True)
                ],
                milliseconds_p50=quantiles[name][0],
                milliseconds_p95=quantiles[name][1],
                milliseconds_first=times.first[name],
                milliseconds_alone=float(np.median(times.alone)),
                seconds_opening=times.opening,
                memory_mb=times.memory / 1e6,
            )
            for name in times.searches
        ],
    )


def _told(name: str) -> str:
    if name == INDEXED:
        return name
    return "no filter" if name == "none" else f"filter: {name}"


if __name__ == "__main__":
    main()
