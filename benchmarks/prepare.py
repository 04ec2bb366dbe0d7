"""Preparing images against a plain loop that reads, hashes, decodes, resizes and writes the same Parquet.

  python -m benchmarks.prepare

The peer is as many processes as there are cores, without Ray, each with its share of the same images.
"""

import hashlib
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.archive import phantom_archive
from benchmarks.claim import Claim, publish
from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.corpus.preparation import prepare
from cxr_retrieval.runtime import start_ray

IMAGES, SIDE, SIZE, ROUNDS = 400, 1024, 256, 3


def plain_loop(paths: list[Path], out: Path) -> None:
    """The work itself."""
    cv2.setNumThreads(1)
    rows = []
    for path in paths:
        data = path.read_bytes()
        with Image.open(path) as image:
            grey = np.asarray(image)
        pixels = cv2.resize(grey, (SIZE, SIZE), interpolation=cv2.INTER_AREA).tobytes()
        rows.append((path.name, pixels, hashlib.sha256(data).digest(), hashlib.sha256(pixels).digest()))
    names, pixels, hashes, pixel_hashes = zip(*rows, strict=True)
    table = pa.table(
        {
            "image_id": pa.array(names),
            "pixels": pa.array(pixels, pa.binary(SIZE * SIZE)),
            "source_sha256": pa.array(hashes, pa.binary(32)),
            "pixel_sha256": pa.array(pixel_hashes, pa.binary(32)),
        }
    )
    pq.write_table(table, out, compression="zstd", compression_level=1, use_dictionary=False, row_group_size=128)


def plain_loops(processes: ProcessPoolExecutor, folder: Path, to: Path) -> float:
    """Images per second of the plain loop on all cores."""
    paths = sorted(folder.glob("*.png"))
    cores = os.cpu_count() or 1
    shares = [paths[core::cores] for core in range(cores)]
    began = time.perf_counter()
    list(processes.map(plain_loop, shares, [to / f"{core}.parquet" for core in range(cores)]))
    return len(paths) / (time.perf_counter() - began)


def ours(archive: str, workspace: str) -> float:
    """Images per second of prepare."""
    settings = CorpusSettings(archive=archive, size=SIZE, partition_images=IMAGES // (6 * (os.cpu_count() or 1)))
    began = time.perf_counter()
    corpus, _ = prepare(settings, workspace)
    return corpus.counts["prepared"] / (time.perf_counter() - began)


def main() -> None:
    start_ray()
    archive = phantom_archive(IMAGES, SIDE)
    cores = os.cpu_count() or 1
    samples, peers, rates = [], [], []
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(cores, get_context("spawn")) as processes:
        ours(archive, f"{folder}/warm")
        plain_loops(processes, Path(archive) / "images", Path(folder))
        for turn in range(ROUNDS):
            peers.append(plain_loops(processes, Path(archive) / "images", Path(folder)))
            rates.append(ours(archive, f"{folder}/{turn}"))
            samples.append(rates[-1] / peers[-1])
    publish(
        "prepare",
        [
            Claim.of(
                f"images/s of prepare, {SIDE} x {SIDE} PNG to {SIZE}",
                "the same work in a plain loop, same cores",
                0.9,
                samples,
                ours=float(np.median(rates)),
                plain_loop=float(np.median(peers)),
            )
        ],
    )


if __name__ == "__main__":
    main()
