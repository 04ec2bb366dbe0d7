"""A training step with real input against the same step on a batch that is already in memory.

  python -m benchmarks.input

One Ray Train worker trains a few epochs of a phantom corpus; then the same worker repeats its last batch.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from itertools import repeat
from typing import Any

import numpy as np
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from benchmarks.archive import phantom_archive
from benchmarks.claim import Claim, publish
from cxr_retrieval.config import Settings, load_settings
from cxr_retrieval.corpus.preparation import prepare
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.runtime import start_ray
from cxr_retrieval.training.input import Batch
from cxr_retrieval.training.loop import TrainJob, Worker

IMAGES, SIDE, ROUNDS, STEPS = 2000, 128, 3, 20


def measure(config: dict[str, Any]) -> list[tuple[float, float]]:
    """Pairs of seconds for some steps: with real input, and on one batch in memory. Runs in the worker."""
    worker = Worker(config["job"])
    source = worker._batches()
    worker._step(source)

    def seconds(batches: Iterator[Batch]) -> float:
        began = time.perf_counter()
        for _ in range(config["steps"]):
            worker._step(batches)
        return time.perf_counter() - began

    kept = next(source)
    return [(seconds(source), seconds(repeat(kept))) for _ in range(config["rounds"])]


def settings_for(archive: str, workspace: str) -> Settings:
    words = [f"corpus.archive={archive}", f"workspace={workspace}", f"corpus.size={SIDE}", "training.epochs=8"]
    return load_settings(words=[*words, "network.whole_side=96", "network.crop_side=64", "training.crop_from=0"])


def main() -> None:
    start_ray()
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_for(phantom_archive(IMAGES, SIDE), folder)
        corpus = Corpus(prepare(settings.corpus, folder)[0])
        trainer = TorchTrainer(
            measure,
            train_loop_config={
                "job": TrainJob(settings, corpus, os.path.join(folder, "progress.json")),
                "rounds": ROUNDS,
                "steps": STEPS,
            },
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5}),
            run_config=RunConfig(name="input", storage_path=folder),
        )
        pairs: list[tuple[float, float]] = trainer.fit().return_value
    images = STEPS * settings.training.batch_size
    publish(
        "input",
        [
            Claim.of(
                f"training step with real input, {SIDE} x {SIDE}, one worker",
                "the same step on tensors already in memory",
                0.95,
                [bare / real for real, bare in pairs],
                ours=images / float(np.median([real for real, _ in pairs])),
                in_memory=images / float(np.median([bare for _, bare in pairs])),
            )
        ],
    )


if __name__ == "__main__":
    main()
