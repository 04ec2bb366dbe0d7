"""Two train workers on one machine against two independent runs side by side, a core each.

  python -m benchmarks.workers

Every worker and every run repeats a step on one batch in memory, as many images a core: what differs is that workers
add up gradients, batch statistics and centres with each other. A worker has one thread.
"""

import asyncio
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

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

IMAGES, SIDE, ROUNDS, STEPS, ROWS = 600, 128, 3, 30, 32


@ray.remote(num_cpus=0)
class Gate:
    """Lets nobody through before all have come."""

    def __init__(self, parties: int) -> None:
        self._missing = parties
        self._open = asyncio.Event()

    async def pass_through(self) -> None:
        self._missing -= 1
        if self._missing == 0:
            self._open.set()
        await self._open.wait()


def measure(config: dict[str, Any]) -> float:
    """Images a second of this worker, from the moment at which all are ready. Runs in every worker."""
    worker = Worker(config["job"])
    batches = repeat(next(worker._batches()))
    worker._step(batches)  # the first one builds what later ones use
    ray.get(config["gate"].pass_through.remote())
    began = time.perf_counter()
    for _ in range(config["steps"]):
        worker._step(batches)
    return config["steps"] * config["rows"] / (time.perf_counter() - began)


def settings_for(archive: str, workspace: str, workers: int) -> Settings:
    words = [f"corpus.archive={archive}", f"workspace={workspace}", f"corpus.size={SIDE}", "training.crop_from=0"]
    words += [f"training.workers={workers}", f"training.batch_size={ROWS * workers}"]
    return load_settings(words=[*words, "network.whole_side=96", "network.crop_side=64"])


def speed(folder: str, corpus: Corpus, settings: Settings, name: str, gate: Any, beside: int) -> float:
    """Images a second of the slowest worker of a run, times its workers: nobody is done before the last one."""
    workers = settings.training.workers
    trainer = TorchTrainer(
        measure,
        train_loop_config={
            "job": TrainJob(settings, corpus, os.path.join(folder, name, "progress.json"), beside),
            "gate": gate,
            "steps": STEPS,
            "rows": ROWS,
        },
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(name=name, storage_path=folder),
    )
    found: float = trainer.fit().return_value
    return found * workers


def main() -> None:
    start_ray()
    cores = 2
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(cores) as pool:
        archive = phantom_archive(IMAGES, SIDE)
        together, alone = (settings_for(archive, folder, workers) for workers in (cores, 1))
        corpus = Corpus(prepare(alone.corpus, folder)[0])
        pairs = []
        for number in range(ROUNDS):
            gate = Gate.remote(cores)
            ours = speed(folder, corpus, together, f"together-{number}", gate, 0)
            gate = Gate.remote(cores)
            runs = [
                pool.submit(speed, folder, corpus, alone, f"alone-{number}-{core}", gate, cores - 1)
                for core in range(cores)
            ]
            pairs.append((ours, sum(run.result() for run in runs)))
    publish(
        "workers",
        [
            Claim.of(
                f"images/s of two train workers, {SIDE} x {SIDE}, a step on a batch in memory",
                "two independent runs side by side, a core each",
                0.9,
                [ours / theirs for ours, theirs in pairs],
                ours=max(ours for ours, _ in pairs),
                independent=max(theirs for _, theirs in pairs),
            )
        ],
    )


if __name__ == "__main__":
    main()
