"""Two train workers on one machine against two independent runs side by side, a core each.

  python -m benchmarks.workers

Every worker and every run repeats a step on one batch in memory, as many images a core: what differs is that workers
add their gradients up after each.
"""

import asyncio
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

import numpy as np
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from benchmarks.archive import phantom_archive
from benchmarks.claim import Claim, publish
from cxr_retrieval.config import Settings, load_settings
from cxr_retrieval.corpus.preparation import prepare
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.runtime import start_ray
from cxr_retrieval.training.loop import TrainJob, Worker

IMAGES, SIDE, ROUNDS, STEPS, ROWS = 600, 128, 3, 10, 32
CPUS = 0.25  # of a worker: all of them are there at once, and those whose turn it is not wait
PATIENCE_S = 300.0  # for one that does not come to the gate: it has failed


@ray.remote(num_cpus=0)
class Gate:
    """Lets nobody through before all have come, time and again."""

    def __init__(self, parties: int) -> None:
        self._parties, self._waiting = parties, 0
        self._open = asyncio.Event()

    async def pass_through(self) -> None:
        opened = self._open
        self._waiting += 1
        if self._waiting == self._parties:
            self._waiting, self._open = 0, asyncio.Event()
            opened.set()
        await opened.wait()


def measure(config: dict[str, Any]) -> list[float]:
    """Images a second of this worker in every round, in its turn. Runs in every worker."""
    worker = Worker(config["job"])
    batches = repeat(next(worker._batches()))
    worker._step(batches)  # the first one builds what later ones use
    found = []
    for turn in range(2 * config["rounds"]):
        ray.get(config["gate"].pass_through.remote(), timeout=PATIENCE_S)
        if turn % 2 == config["turn"]:
            began = time.perf_counter()
            for _ in range(config["steps"]):
                worker._step(batches)
            found.append(config["steps"] * config["rows"] / (time.perf_counter() - began))
    return found


def settings_for(archive: str, workspace: str, workers: int) -> Settings:
    words = [f"corpus.archive={archive}", f"workspace={workspace}", f"corpus.size={SIDE}", "training.crop_from=0"]
    words += ["training.epochs=1"]  # what is read ahead is no part of it
    words += [f"training.workers={workers}", f"training.batch_size={ROWS * workers}"]
    return load_settings(words=[*words, "network.whole_side=96", "network.crop_side=64"])


def speeds(folder: str, corpus: Corpus, settings: Settings, name: str, gate: Any, turn: int, beside: int) -> np.ndarray:
    """Images a second of a run in every round: its first worker's times its workers, for they wait for each other."""
    workers = settings.training.workers
    trainer = TorchTrainer(
        measure,
        train_loop_config={
            "job": TrainJob(settings, corpus, os.path.join(folder, name, "progress.json"), beside),
            "gate": gate,
            "turn": turn,
            "rounds": ROUNDS,
            "steps": STEPS,
            "rows": ROWS,
        },
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": CPUS}),
        run_config=RunConfig(name=name, storage_path=folder),
    )
    return np.asarray(trainer.fit().return_value) * workers


def main() -> None:
    start_ray()
    cores = 2
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1 + cores) as pool:
        archive = phantom_archive(IMAGES, SIDE)
        together, alone = (settings_for(archive, folder, workers) for workers in (cores, 1))
        corpus = Corpus(prepare(alone.corpus, folder)[0])
        gate = Gate.remote(2 * cores)
        ours = pool.submit(speeds, folder, corpus, together, "together", gate, 0, 0)
        theirs = [
            pool.submit(speeds, folder, corpus, alone, f"alone-{core}", gate, 1, cores - 1) for core in range(cores)
        ]
        pairs = list(zip(ours.result(), sum(run.result() for run in theirs), strict=True))
    publish(
        "workers",
        [
            Claim.of(
                f"images/s of two train workers, {SIDE} x {SIDE}, a step on a batch in memory",
                "two independent runs side by side, a core each",
                0.9,
                [float(ours / theirs) for ours, theirs in pairs],
                ours=float(max(ours for ours, _ in pairs)),
                independent=float(max(theirs for _, theirs in pairs)),
            )
        ],
    )


if __name__ == "__main__":
    main()
