"""Embedding a corpus against the bare model loop over tensors in memory, on the same cores.

  python -m benchmarks.embed

The peer is as many processes as there are cores, one thread each, running the model on prepared pixels in memory.
"""

import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch

from benchmarks.archive import phantom_archive
from benchmarks.claim import Claim, publish
from benchmarks.prepare import steady_rate
from cxr_retrieval import storage
from cxr_retrieval.artifacts import Draft
from cxr_retrieval.config import CorpusSettings, EmbeddingSettings, NetworkSettings
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.corpus.preparation import prepare
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.embedding.stream import embed
from cxr_retrieval.network.progressive import Output, uncentred
from cxr_retrieval.runtime import start_ray
from cxr_retrieval.training.model import KIND, Model, build_network, write_model

PART, SIDE, BATCH, ROUNDS = 256, 128, 64, 3
IMAGES = 8 * PART * (os.cpu_count() or 1)  # parts for every actor after its first
NETWORK = NetworkSettings(whole_side=96, crop_side=64)


def fresh_model(workspace: str, corpus: Corpus) -> str:
    """URI of an untrained model: its speed is that of a trained one."""
    torch.manual_seed(0)
    network = build_network(NETWORK, len(FINDINGS)).eval()
    with torch.inference_mode():
        means = {
            name: value.mean(0) for name, value in uncentred(Output(*network(torch.randn(8, 1, SIDE, SIDE)))).items()
        }
    facts = {
        "network": NETWORK.model_dump(),
        "findings": list(FINDINGS),
        "chosen": "combined",
        "decode_recipe": corpus.recipe.to_json(),
    }
    draft = Draft(storage.join(workspace, "models", "fresh"), KIND, {}, ())
    return write_model(draft.begin(), facts, network.state_dict(), means, torch.zeros(1, 1, 1), {}).uri


def bare_loop(model_uri: str) -> float:
    """Images per second of one process with one thread."""
    torch.set_num_threads(1)
    model = Model.open(model_uri)
    pixels = np.random.default_rng(0).integers(0, 255, (BATCH, SIDE, SIDE), dtype=np.uint8)
    model.forward(pixels)
    count = IMAGES // (os.cpu_count() or 1) // BATCH
    began = time.perf_counter()
    for _ in range(count):
        model.forward(pixels)
    return count * BATCH / (time.perf_counter() - began)


def main() -> None:
    start_ray()
    cores = os.cpu_count() or 1
    peers, rates, steady = [], [], []
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(cores, get_context("spawn")) as processes:
        settings = CorpusSettings(archive=phantom_archive(IMAGES, SIDE), size=SIDE, partition_images=PART)
        corpus = Corpus(prepare(settings, folder)[0])
        uri = fresh_model(folder, corpus)
        for turn in range(ROUNDS):
            peers.append(sum(processes.map(bare_loop, [uri] * cores)))
            began = time.perf_counter()
            # An artifact is never made twice: each round embeds into a folder of its own.
            embedded, _ = embed(EmbeddingSettings(batch_size=BATCH), f"{folder}/{turn}", uri, corpus)
            rates.append(embedded.counts["embedded"] / (time.perf_counter() - began))
            steady.append(steady_rate(embedded, PART, cores))
    publish(
        "embed",
        [
            Claim.of(
                f"images/s of embed, {SIDE} x {SIDE}, both passes, {what}",
                "the bare model loop over tensors in memory, same cores",
                0.9,
                [ours / peer for ours, peer in zip(found, peers, strict=True)],
                ours=float(np.median(found)),
                bare_loop=float(np.median(peers)),
            )
            for what, found in (
                ("once every actor runs", steady),
                (f"{IMAGES:,} images, start of the actors included", rates),
            )
        ],
    )


if __name__ == "__main__":
    main()
