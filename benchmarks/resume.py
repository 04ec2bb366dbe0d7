"""Preparing an archive whole against preparing it again when nine tenths of its partitions are there.

  python -m benchmarks.resume

Both are the job as a person runs it, start of Python and Ray and listing included. The state that a killed job leaves
is made from the finished corpus: without its manifest, and without those of the partitions that were finished last. The
films are many enough for a full run of some minutes on two cores: on fewer, a rerun is nothing but its fixed costs.
They take 17 GB of disk.
"""

import os
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.archive import large_archive
from benchmarks.claim import Claim, publish
from benchmarks.job import PUBLIC, run_job
from cxr_retrieval.artifacts import MANIFEST
from cxr_retrieval.corpus.preparation import LATEST
from cxr_retrieval.runtime import start_ray

IMAGES, SIDE, SIZE, PARTS, ROUNDS = 48_000, 1024, 256, 80, 1
LEFT = 0.1  # of the partitions


def lose(corpora: Path) -> dict[Path, int]:
    """Make a finished corpus unfinished; the manifests of the partitions that stay, and when they were written."""
    parts = sorted(corpora.glob(f"parts/*/{MANIFEST}"), key=os.path.getmtime)
    lost = parts[len(parts) - round(LEFT * len(parts)) :]
    for path in (*corpora.glob(f"*/{MANIFEST}"), *corpora.glob(f"{LATEST}/*"), *lost):
        path.unlink()
    return {path: path.stat().st_mtime_ns for path in parts if path not in lost}


def main() -> None:
    start_ray()
    words = [f"corpus.archive={large_archive(IMAGES, SIDE)}", PUBLIC]
    words += [f"corpus.size={SIZE}", f"corpus.partition_images={IMAGES // PARTS}"]
    full, again = [], []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            full.append(run_job("prepare", f"workspace={folder}", *words)[0])
            kept = lose(Path(folder) / "corpora" / "chest")
            again.append(run_job("prepare", f"workspace={folder}", *words)[0])
            assert all(path.stat().st_mtime_ns == written for path, written in kept.items()), "prepared only once"
    publish(
        "resume",
        [
            Claim.of(
                f"preparing {IMAGES:,} images of {SIDE} x {SIDE}",
                f"the rest, where all but {LEFT:.0%} is there",
                6.7,
                [whole / rest for whole, rest in zip(full, again, strict=True)],
                seconds_full=float(np.median(full)),
                seconds_again=float(np.median(again)),
            )
        ],
    )


if __name__ == "__main__":
    main()
