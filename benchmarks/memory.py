"""Peak memory of preparing an archive, of embedding and indexing it, and of evaluating, and of eight times the rows.

  python -m benchmarks.memory

Proportional set size of the job's driver and workers together, sampled; Ray's own processes are left out. The smaller
archive has several partitions for every core already: what grows with the rows is all that is new in the larger one.
Two claims of each: the peaks' ratio, and 5% of an image's stored bytes against what an image more adds to the peak.
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
WITH_MODEL: dict[str, tuple[str, str, list[str]]] = {  # the job, its split, and more words
    "embed and index": ("index", "hash", [f"index.shard_rows={2 * PART}"]),
    "embed and evaluate": ("evaluate", "all_test", []),
}


def words(archive: str, folder: str) -> list[str]:
    settings = [f"workspace={folder}", f"corpus.archive={archive}", f"corpus.size={SIDE}", PUBLIC]
    return [*settings, f"corpus.partition_images={PART}"]


def prepare_peak(archive: str) -> float:
    """MiB."""
    with tempfile.TemporaryDirectory() as folder:
        return run_job("prepare", *words(archive, folder))[1]


def peak_with_model(job: str, split: Any, more: list[str]) -> Callable[[str], float]:
    """A function that gives the MiB of a job that takes a prepared corpus and a model."""

    def peak(archive: str) -> float:
        with tempfile.TemporaryDirectory() as folder:
            settings = CorpusSettings(archive=archive, size=SIDE, partition_images=PART, split=split)
            corpus = Corpus(prepare(settings, folder, PrivacySettings(pseudonymise=False))[0])
            model = [f"model={fresh_model(folder, corpus)}", f"corpus.split={split}"]
            return run_job(job, *words(archive, folder), *model, *more)[1]

    return peak


def claims(what: str, peak: Callable[[str], float], **films: Any) -> list[Claim]:
    """The peak of an archive against that of one of TIMES the films, and what a film more adds to it."""
    archives = [large_archive(images, SIDE, **films) for images in (IMAGES, TIMES * IMAGES)]
    peaks = [[peak(archive) for archive in archives] for _ in range(ROUNDS)]
    once, more = np.median(peaks, axis=0)
    added = [max(1.0, (most - less) * 2**20 / ((TIMES - 1) * IMAGES)) for less, most in peaks]  # less is no growth
    title = f"peak memory of {what}, {IMAGES:,} images of {SIDE} x {SIDE}"
    return [
        Claim.of(
            title,
            f"of {TIMES} times as many",
            0.9,
            [less / most for less, most in peaks],
            MiB=float(once),
            MiB_of_more=float(more),
        ),
        Claim.of(
            f"5% of an image's bytes, {SIDE} x {SIDE}",
            f"what one more adds to the {title}",
            1.0,
            [0.05 * SIDE**2 / each for each in added],
            bytes_more=float(np.median(added)),
        ),
    ]


def main() -> None:
    start_ray()
    made = [each for what, films in KINDS.items() for each in claims(f"prepare{what}", prepare_peak, **films)]
    made += [each for what, how in WITH_MODEL.items() for each in claims(what, peak_with_model(*how))]
    publish("memory", made)


if __name__ == "__main__":
    main()
