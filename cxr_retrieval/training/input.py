"""The images of a worker in the order of the plan, read and decoded ahead by Ray Data.

A *stretch* of a few windows is materialised in the object store while the one before it is trained on. An executor
that streams for the whole run would do the same with less code, but while it waits for a slow consumer it spins, inside
the training process (Ray 2.60; measured: more than half of the time of a core that trains).
"""

from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from cxr_retrieval import storage
from cxr_retrieval.corpus.reading import Corpus, labels_of, pixels_of
from cxr_retrieval.training.order import Order

WINDOWS_AT_ONCE = 4
READ_CPUS = 0.25  # logical CPUs of a task that reads: small, so that it fits beside a worker on a node of one core
COLUMNS = ["pixels", "findings", "unknown"]
RETRIES = b"storage retries"  # of the task that read a table, in its schema: the task's own count stays in its process


@dataclass(frozen=True)
class Batch:
    """Pixels `uint8 [B, H, W]` (read-only: they lie in shared memory) and labels `int8 [B, C]`."""

    pixels: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class WorkerInput:
    """What one worker reads: its lanes' share of every step of the plan, in micro-batches."""

    corpus: Corpus
    places: np.ndarray
    order: Order
    rank: int
    workers: int
    micro_batches: int

    def batches(self, first_step: int, epochs: int) -> Generator[Batch]:
        """Micro-batches from global step `first_step` to the end of `epochs`."""
        windows = self.order.windows(first_step, epochs)
        if not windows:
            return  # a run that goes on after its last epoch
        stretches = [windows[start : start + WINDOWS_AT_ONCE] for start in range(0, len(windows), WINDOWS_AT_ONCE)]
        # Places are 12 bytes a row of the corpus: once into the object store, not with every stretch to every task.
        read = _Reader(self.corpus, ray.put(self.places), self.order, self.rank, self.workers, self.micro_batches)
        rows = self.order.micro_batch_rows(self.rank, self.workers, self.micro_batches)
        with ThreadPoolExecutor(1, thread_name_prefix="input") as ahead:
            waiting: list[Future[list[Any]]] = [ahead.submit(_materialise, stretch, read) for stretch in stretches[:1]]
            for following in [*stretches[1:], None]:
                blocks = waiting.pop().result()
                if following:
                    waiting.append(ahead.submit(_materialise, following, read))
                while blocks:  # each block is let go as soon as it has been used
                    table = ray.get(blocks.pop(0))
                    storage.add_retries(int((table.schema.metadata or {}).get(RETRIES, 0)))
                    pixels, labels = pixels_of(table, self.corpus.recipe.size), labels_of(table)
                    assert len(labels) % rows == 0, "a block holds whole steps"
                    for start in range(0, len(labels), rows):
                        yield Batch(pixels[start : start + rows], labels[start : start + rows])


@dataclass(frozen=True)
class _Reader:
    """Reads the rows of one worker in one window. Runs in Ray Data tasks."""

    corpus: Corpus
    places: Any
    """Reference to the places of all rows."""
    order: Order
    rank: int
    workers: int
    micro_batches: int

    def __call__(self, item: dict[str, np.ndarray]) -> pa.Table:
        epoch, first, last = (int(item[name][0]) for name in ("epoch", "first", "last"))
        rows = self.order.worker_rows(epoch, first, last, self.rank, self.workers, self.micro_batches).reshape(-1)
        before = storage.retries()
        table = self.corpus.take(ray.get(self.places)[rows], COLUMNS)
        return table.replace_schema_metadata({RETRIES: str(storage.retries() - before)})


def _materialise(windows: list[tuple[int, int, int]], read: _Reader) -> list[Any]:
    """References to the tables of some windows, in order."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = None  # Ray would cut a large block between the images of a step
    items = [{"epoch": epoch, "first": first, "last": last} for epoch, first, last in windows]
    with ray.data.DataContext.current(context):
        reading: Any = read  # Ray's types do not know that a table may come out
        blocks = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            reading,
            batch_size=1,
            batch_format="numpy",
            zero_copy_batch=True,
            num_cpus=READ_CPUS,
        )
        references: list[Any] = blocks.materialize().to_arrow_refs()
    return references
