"""Which image every worker sees at every step: a pure function of seed, epoch and the corpus.

Row groups are dealt in random order to a fixed number of *lanes*, and each lane shuffles its rows inside windows, so
that reading stays sequential inside a window. One optimizer step takes the same number of rows from every lane, and so
does every micro-batch of it. A worker reads the lanes whose number is congruent to its rank, so the images of a step
and of a micro-batch do not depend on the number of workers, no row group is read by every worker, and workers agree on
the number of steps before an epoch begins. Where workers do not divide the lanes, some read one lane more than others.

What it gives up: rows that do not fill the last step of an epoch (fewer than one batch) wait for another epoch, and
an image is mixed among about `window / lanes` of its lane, not among all.
"""

from dataclasses import dataclass

import numpy as np

from cxr_retrieval.errors import UserError


@dataclass(frozen=True)
class Order:
    """The order of an epoch's images.

    `group_rows`: rows of the training split in each row group, in the order of the corpus, int64 [G].
    """

    group_rows: np.ndarray
    seed: int
    batch_size: int
    lanes: int
    window: int

    def __post_init__(self) -> None:
        if self.batch_size % self.lanes:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of lanes {self.lanes}")
        if self.steps == 0:
            raise UserError(
                f"the training split has {int(self.group_rows.sum())} images, fewer than"
                f" training.batch_size={self.batch_size}"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return int(self.group_rows.sum()) // self.batch_size

    @property
    def window_steps(self) -> int:
        """Steps that one window of every lane fills."""
        return max(1, min(self.window // self.batch_size, self.steps))

    def epoch(self, epoch: int) -> np.ndarray:
        """Rows of the training split (their numbers in corpus order): int64 [steps, lanes, batch_size / lanes]."""
        generator = np.random.default_rng([self.seed, epoch])
        starts = np.cumsum(self.group_rows) - self.group_rows
        shuffled = generator.permutation(len(self.group_rows))
        rows = np.concatenate([np.arange(starts[g], starts[g] + self.group_rows[g]) for g in shuffled])
        lane_batch = self.batch_size // self.lanes
        by_lane = rows[: self.steps * self.batch_size].reshape(self.lanes, self.steps * lane_batch)
        for lane in by_lane:
            for start in range(0, len(lane), self.window_steps * lane_batch):
                generator.shuffle(lane[start : start + self.window_steps * lane_batch])
        return by_lane.reshape(self.lanes, self.steps, lane_batch).transpose(1, 0, 2)

    def micro_batch_rows(self, rank: int, workers: int, micro_batches: int) -> int:
        """Rows of a worker in one micro-batch. Raises ValueError for more workers than lanes."""
        if workers > self.lanes:
            raise ValueError(f"lanes {self.lanes} are fewer than workers {workers}")
        return len(range(rank, self.lanes, workers)) * (self.batch_size // self.lanes // micro_batches)

    def worker_rows(
        self, epoch: int, first: int, last: int, rank: int, workers: int, micro_batches: int = 1
    ) -> np.ndarray:
        """Rows of a worker for steps `first` to `last` (exclusive): int64 [steps, micro-batches, rows]."""
        rows = self.micro_batch_rows(rank, workers, micro_batches)
        mine = self.epoch(epoch)[first:last, rank::workers]  # [steps, lanes, rows of a lane]
        by_part = mine.reshape(len(mine), mine.shape[1], micro_batches, -1).transpose(0, 2, 1, 3)
        return by_part.reshape(len(mine), micro_batches, rows)

    def windows(self, first_step: int, epochs: int) -> list[tuple[int, int, int]]:
        """(epoch, first, last) of every window from global step `first_step` to the end of `epochs`."""
        found = []
        for epoch in range(first_step // self.steps, epochs):
            for first in range(0, self.steps, self.window_steps):
                last = min(first + self.window_steps, self.steps)
                done = first_step - epoch * self.steps
                if last > done:
                    found.append((epoch, max(first, done), last))
        return found


def group_rows(places: np.ndarray) -> np.ndarray:
    """Rows in each row group of an array of PLACE (corpus order): int64 [G]."""
    change = np.flatnonzero((np.diff(places["part"]) != 0) | (np.diff(places["group"]) != 0)) + 1
    return np.diff(np.concatenate([[0], change, [len(places)]]))
