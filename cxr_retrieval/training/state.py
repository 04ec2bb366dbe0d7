"""Where a run stands, and the checkpoint that keeps it.

T tables of centres: a step of the network and a pass each.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ray.train import Checkpoint
from torch import Tensor

from cxr_retrieval.training.objective import BY_TABLE

STATE_FILE = "state.pt"
TAKEN = "taken"  # optimizer steps of an epoch that were not skipped
EXPLODED = 10.0  # times the loss at its best: such a run does not come back


@dataclass
class RunState:
    """Where the run stands. All of it is in a checkpoint, beside what the next optimizer step depends on."""

    step: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)  # of the losses of the running epoch's steps
    looked: tuple[float, float] = (0.0, 0.0)  # at the last look for an explosion: sum of the loss, and steps
    stretches: dict[str, tuple[float, float]] = field(default_factory=dict)  # by loss: means of the first, of the best
    best_map: float = -1.0
    best_epoch: int = -1
    best_network: dict[str, Tensor] = field(default_factory=dict)
    best_centres: Tensor | None = None
    best_resampled: list[float] = field(default_factory=list)
    pretraining: list[dict[str, Any]] = field(default_factory=list)  # a record of every epoch without labels
    history: list[dict[str, Any]] = field(default_factory=list)
    final: dict[str, Any] | None = None

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Sum up what the objective says of a step that was taken."""
        for name, value in {**parts, TAKEN: torch.ones_like(parts["loss"])}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def mean_losses(self) -> dict[str, Any]:
        """The means over the epoch's steps, with labels those of every step and pass too; None for a pass that was not
        seen."""
        taken = float(self.sums[TAKEN])
        record: dict[str, Any] = {
            name: float(value) / taken for name, value in self.sums.items() if name not in (BY_TABLE, TAKEN)
        }
        if BY_TABLE not in self.sums:
            return record
        ccloss_T, entropy_T, seen_T = self.sums[BY_TABLE].tolist()
        for name, values in (("ccloss", ccloss_T), ("cross_entropy", entropy_T)):
            means = [value / seen if seen else None for value, seen in zip(values, seen_T, strict=True)]
            record[f"{name}_by_table"] = means
        return record

    def look_for_explosion(self) -> bool:
        """Whether the mean loss since the last look, which this is the next, is over EXPLODED times that of the best
        stretch between two looks, and over that of the phase's first one.

        With labels it is the cross-entropy that is compared: CCLoss joins amid a run, and is of unit vectors, which
        cannot explode. A first stretch has none to compare with.
        """
        if not self.sums:
            return False
        name = "cross_entropy" if BY_TABLE in self.sums else "loss"
        total, taken = float(self.sums[name]), float(self.sums[TAKEN])
        before, before_taken = self.looked
        if taken == before_taken:
            return False
        mean = (total - before) / (taken - before_taken)
        self.looked = (total, taken)
        first, best = self.stretches.get(name, (mean, mean))
        self.stretches[name] = (first, min(best, mean))
        return mean > max(EXPLODED * best, first)

    def end_epoch(self) -> None:
        """The next step is of another epoch."""
        self.sums, self.looked = {}, (0.0, 0.0)

    def keep_best(self, network: Mapping[str, Tensor], centres_TCD: Tensor, resampled: list[float]) -> None:
        """Keep weights and centres, and `Validation.resampled`, where the last epoch's best embedding is ahead of those
        of all epochs that were kept before."""
        value = curve_point(self.history[-1])["value"]
        if value > self.best_map:
            self.best_map, self.best_epoch = value, self.history[-1]["epoch"]
            self.best_network = {name: tensor.detach().cpu().clone() for name, tensor in network.items()}
            self.best_centres = centres_TCD.cpu().clone()
            self.best_resampled = resampled

    def epochs_since_best(self) -> int:
        """How many of the last epochs were no better than the best one before them; 0 while none is kept."""
        return len(self.history) - 1 - self.best_epoch if self.best_epoch >= 0 else 0

    def curve(self) -> list[dict[str, Any]]:
        """A point for every epoch so far, also for those before a restart."""
        return [curve_point(past) for past in self.history]


def curve_point(record: Mapping[str, Any]) -> dict[str, Any]:
    """An epoch's place in the learning curve: epochs from 1; validation mAP of its best embedding, and of chance;
    whether crop and CCLoss had `joined`, without which no epoch is kept."""
    return {
        "epoch": record["epoch"] + 1,
        "joined": record["joined"],
        "value": max(figures["map"] for figures in record["validation"].values()),
        "loss": record["loss"],
        "centre_cosine": sum(record["centre_cosine"]) / len(record["centre_cosine"]),
        "chance": max(figures["chance_map"] for figures in record["validation"].values()),
    }


@contextmanager
def checkpoint_of(optimisation: Mapping[str, Any], state: RunState) -> Iterator[Checkpoint]:
    """A checkpoint in a folder that is there for as long as the block."""
    with tempfile.TemporaryDirectory(prefix="cxr-checkpoint-") as folder:
        torch.save({**optimisation, "run": vars(state)}, Path(folder) / STATE_FILE)
        yield Checkpoint.from_directory(folder)


def load_state(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `checkpoint_of` saved, with tensors and plain values only."""
    with checkpoint.as_directory() as folder:
        saved: dict[str, Any] = torch.load(Path(folder) / STATE_FILE, map_location=device, weights_only=True)
    return saved
