"""Preparing and embedding with archive and workspace on object storage, beside the same on local disk.

  python -m benchmarks.object_storage

The S3 server (SeaweedFS) runs on this machine and takes its share of the same cores.
"""

import os
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.archive import phantom_archive
from benchmarks.claim import Claim, publish
from benchmarks.embed import fresh_model
from cluster.object_store import BUCKET, ObjectStore, running
from cxr_retrieval import storage
from cxr_retrieval.config import CorpusSettings, EmbeddingSettings
from cxr_retrieval.corpus.preparation import prepare
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.embedding.stream import embed
from cxr_retrieval.runtime import start_ray

IMAGES, SIDE, SIZE, PART, ROUNDS = 1024, 512, 128, 128, 3
TARGET = 0.7


def copy(folder: str, uri: str) -> str:
    """Upload a folder; its URI."""
    for file in storage.list_files(folder):
        storage.write_bytes(storage.join(uri, file.path), storage.read_bytes(file.uri))
    return uri


def rates(archive: str, workspace: str) -> tuple[float, float]:
    """Images per second of prepare and of embed, start of the actors included."""
    settings = CorpusSettings(archive=archive, size=SIZE, partition_images=PART)
    began = time.perf_counter()
    corpus = Corpus(prepare(settings, workspace)[0])
    prepared = time.perf_counter()
    model = fresh_model(workspace, corpus)
    loaded = time.perf_counter()
    embed(EmbeddingSettings(), workspace, model, corpus)
    return IMAGES / (prepared - began), IMAGES / (time.perf_counter() - loaded)


def main() -> None:
    found: dict[str, list[tuple[float, float]]] = {"local": [], "s3": []}
    with tempfile.TemporaryDirectory() as folder, running(ObjectStore(Path(folder) / "s3")) as store:
        os.environ.update(store.variables)  # before Ray starts, whose workers inherit them
        storage.forget_clients()
        start_ray()
        archive = phantom_archive(IMAGES, SIDE)
        there = copy(archive, f"s3://{BUCKET}/archive")
        rates(archive, f"{folder}/warm")
        for turn in range(ROUNDS):
            found["local"].append(rates(archive, f"{folder}/{turn}"))
            found["s3"].append(rates(there, f"s3://{BUCKET}/{turn}"))
    claims = []
    for place, what in enumerate((f"prepare, {SIDE} x {SIDE} PNG to {SIZE}", f"embed, {SIZE} x {SIZE}")):
        ours, local = ([pair[place] for pair in found[where]] for where in ("s3", "local"))
        claims.append(
            Claim.of(
                f"images/s of {what}, archive and workspace on S3",
                "the same on local disk",
                TARGET,
                [a / b for a, b in zip(ours, local, strict=True)],
                s3=float(np.median(ours)),
                local=float(np.median(local)),
            )
        )
    publish("object_storage", claims)


if __name__ == "__main__":
    main()
