"""Peak memory of preparing an archive, and of one of eight times the rows.

  python -m benchmarks.memory

Proportional set size of the job's driver and workers together, sampled; Ray's own processes are left out. The smaller
archive has several partitions for every core already: what grows with the rows is all that is new in the larger one.
Once with no two films alike, and once with every film there twice.
"""

import os
import tempfile
from typing import Any

import numpy as np

from benchmarks.archive import large_archive
from benchmarks.claim import Claim, publish
from benchmarks.job import PUBLIC, run_job
from cxr_retrieval.runtime import start_ray

PART, SIDE, TIMES, ROUNDS = 256, 256, 8, 3
KINDS: dict[str, dict[str, Any]] = {"": {}, ", half of them duplicates": {"name": "films-alike", "alike": 2}}
IMAGES = 4 * PART * (os.cpu_count() or 1)


def peak(archive: str) -> float:
    """MiB."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"workspace={folder}", f"corpus.archive={archive}", f"corpus.size={SIDE}", PUBLIC]
        return run_job("prepare", *words, f"corpus.partition_images={PART}")[1]


def claim(what: str, **films: Any) -> Claim:
    """The peak of an archive against that of one of TIMES the films."""
    archives = [large_archive(images, SIDE, **films) for images in (IMAGES, TIMES * IMAGES)]
    peaks = [[peak(archive) for archive in archives] for _ in range(ROUNDS)]
    once, more = np.median(peaks, axis=0)
    return Claim.of(
        f"peak memory of prepare, {IMAGES:,} images of {SIDE} x {SIDE}{what}",
        f"of {TIMES} times as many",
        0.9,
        [less / most for less, most in peaks],
        MiB=float(once),
        MiB_of_more=float(more),
        extra_bytes_an_image=float(more - once) * 2**20 / ((TIMES - 1) * IMAGES),
    )


def main() -> None:
    start_ray()
    publish("memory", [claim(what, **films) for what, films in KINDS.items()])


if __name__ == "__main__":
    main()
