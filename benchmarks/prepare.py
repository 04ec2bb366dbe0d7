"""Preparing images against a plain loop that reads, hashes, decodes, resizes and writes the same Parquet.

  python -m benchmarks.prepare

The peer is one process without Ray on one core; prepare runs the same images on all cores, and is divided by them.
"""

import hashlib
import os
import tempfile
import time
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


def plain_loop(folder: Path, out: Path) -> float:
    """Images per second of the work itself."""
    began = time.perf_counter()
    rows = []
    for path in sorted(folder.glob("*.png")):
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
    return len(rows) / (time.perf_counter() - began)


def ours(archive: str, workspace: str) -> float:
    """Images per second of prepare."""
    settings = CorpusSettings(archive=archive, size=SIZE, partition_images=IMAGES // (2 * (os.cpu_count() or 1)))
    began = time.perf_counter()
    corpus, _ = prepare(settings, workspace)
    return corpus.counts["prepared"] / (time.perf_counter() - began)


def main() -> None:
    start_ray()
    cv2.setNumThreads(1)
    archive = phantom_archive(IMAGES, SIDE)
    cores = os.cpu_count() or 1
    samples, peers, rates = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        ours(archive, f"{folder}/warm")
        for turn in range(ROUNDS):
            peers.append(plain_loop(Path(archive) / "images", Path(folder) / f"peer-{turn}.parquet"))
            rates.append(ours(archive, f"{folder}/{turn}") / cores)
            samples.append(rates[-1] / peers[-1])
    publish(
        "prepare",
        [
            Claim.of(
                f"images/s per core of prepare, {SIDE} x {SIDE} PNG to {SIZE}",
                "the same work in a plain loop",
                0.9,
                samples,
                ours_per_core=float(np.median(rates)),
                plain_loop=float(np.median(peers)),
            )
        ],
    )


if __name__ == "__main__":
    main()
