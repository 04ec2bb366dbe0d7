"""Peak memory of preparing an archive, and of embedding and indexing it, and of one of eight times the rows.

  python -m benchmarks.memory

Proportional set size of the job's driver and workers together, sampled; Ray's own processes are left out. The smaller
archive has several partitions for every core already: what grows with the rows is all that is new in the larger one.
Prepare once with no two films alike, and once with every film there twice.
"""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.archive import large_archive
from benchmarks.claim import Claim, publish
from benchmarks.embed import fresh_model
from benchmarks.job import PUBLIC, run_job
from cxr_retrieval.config import CorpusSettings, PrivacySettings
from cxr_retrieval.corpus.preparation import prepare
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.runtime import start_ray

PART, SIDE, TIMES, ROUNDS = 256, 256, 8, 3
KINDS: dict[str, dict[str, Any]] = {"": {}, ", half of them duplicates": {"name": "films-alike", "alike": 2}}
IMAGES = 4 * PART * (os.cpu_count() or 1)


def words(archive: str, folder: str) -> list[str]:
    settings = [f"workspace={folder}", f"corpus.archive={archive}", f"corpus.size={SIDE}", PUBLIC]
    return [*settings, f"corpus.partition_images={PART}"]


def prepare_peak(archive: str) -> float:
    """MiB."""
    with tempfile.TemporaryDirectory() as folder:
        return run_job("prepare", *words(archive, folder))[1]


def index_peak(archive: str) -> float:
    """MiB, of the job that embeds a prepared corpus, builds shards of two partitions each, and proves them."""
    with tempfile.TemporaryDirectory() as folder:
        settings = CorpusSettings(archive=archive, size=SIDE, partition_images=PART)
        corpus = Corpus(prepare(settings, folder, PrivacySettings(pseudonymise=False))[0])
        model = [f"model={fresh_model(folder, corpus)}", "corpus.split=hash"]
        return run_job("index", *words(archive, folder), *model, f"index.shard_rows={2 * PART}")[1]


def claim(what: str, peak: Callable[[str], float], **films: Any) -> Claim:
    """The peak of an archive against that of one of TIMES the films."""
    archives = [large_archive(images, SIDE, **films) for images in (IMAGES, TIMES * IMAGES)]
    peaks = [[peak(archive) for archive in archives] for _ in range(ROUNDS)]
    once, more = np.median(peaks, axis=0)
    return Claim.of(
        f"peak memory of {what}, {IMAGES:,} images of {SIDE} x {SIDE}",
        f"of {TIMES} times as many",
        0.9,
        [less / most for less, most in peaks],
        MiB=float(once),
        MiB_of_more=float(more),
        extra_bytes_an_image=float(more - once) * 2**20 / ((TIMES - 1) * IMAGES),
    )


def main() -> None:
    start_ray()
    prepared = [claim(f"prepare{what}", prepare_peak, **films) for what, films in KINDS.items()]
    publish("memory", [*prepared, claim("embed and index", index_peak)])


if __name__ == "__main__":
    main()
