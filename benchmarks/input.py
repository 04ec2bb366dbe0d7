"""A training step with real input against the same step on a batch that is already in memory.

  python -m benchmarks.input

One Ray Train worker trains some epochs of a phantom corpus, from the moment it asks for the first image to the end of
the last step: nothing has been read before, and nothing is read for later. Then it takes as many on its last batch.
"""

import os
import tempfile
import time
from collections.abc import Iterable
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

IMAGES, SIDE, ROUNDS, EPOCHS = 1000, 128, 2, 18


def measure(config: dict[str, Any]) -> list[tuple[float, float, int]]:
    """Seconds with real input, on one batch in memory, and the steps of each. Runs in the worker."""
    worker = Worker(config["job"])

    def seconds(batches: Iterable[Batch]) -> tuple[float, Batch, int]:
        worker.state.step = 0
        began, steps = time.perf_counter(), 0
        for batch in batches:
            worker._step(iter([batch]))
            steps += 1
        return time.perf_counter() - began, batch, steps

    found = []
    for _ in range(config["rounds"]):
        worker.state.step = 0
        real, last, steps = seconds(worker._batches())
        bare, _, _ = seconds(repeat(last, steps))
        found.append((real, bare, steps))
    return found


def settings_for(archive: str, workspace: str) -> Settings:
    words = [f"corpus.archive={archive}", f"workspace={workspace}", f"corpus.size={SIDE}", f"training.epochs={EPOCHS}"]
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
            },
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5}),
            run_config=RunConfig(name="input", storage_path=folder),
        )
        found: list[tuple[float, float, int]] = trainer.fit().return_value
    batch = settings.training.batch_size
    publish(
        "input",
        [
            Claim.of(
                f"training step with real input, {SIDE} x {SIDE}, one worker",
                "the same step on tensors already in memory",
                0.95,
                [bare / real for real, bare, _ in found],
                ours=float(np.median([batch * steps / real for real, _, steps in found])),
                in_memory=float(np.median([batch * steps / bare for _, bare, steps in found])),
            )
        ],
    )


if __name__ == "__main__":
    main()
