"""What every Ray Train worker runs: epochs over its lanes, checkpoints, validation, and the final centring."""

import os
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cxr_retrieval import storage
from cxr_retrieval.config import JIGSAW_PATCHES, Settings
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.corpus.reading import Corpus, labels_of
from cxr_retrieval.corpus.splits import TRAIN
from cxr_retrieval.losses.centres import Centres
from cxr_retrieval.network.progressive import jigsaw
from cxr_retrieval.training.augmentation import augment, by_lane
from cxr_retrieval.training.input import Batch, WorkerInput
from cxr_retrieval.training.model import build_network, normalised
from cxr_retrieval.training.objective import Objective, begin_crop, gather_centres
from cxr_retrieval.training.optimisation import Optimisation, forget_moments
from cxr_retrieval.training.order import Order, group_rows
from cxr_retrieval.training.pretraining import agreement, turn_of, two_views
from cxr_retrieval.training.state import EXPLODED, TAKEN, RunState, checkpoint_of, load_state
from cxr_retrieval.training.telling import Teller
from cxr_retrieval.training.tracking import Nowhere, Tracker, epoch_figures, tracker_of
from cxr_retrieval.training.validation import Validation

CURVE = "curve"  # in what an epoch reports: a point for every epoch so far, also for those before a restart
RESAMPLED = "resampled"  # beside it: the best epoch's mAP in resamples of the validation patients
LABELS_AT_ONCE = 65_536


@dataclass(frozen=True)
class TrainJob:
    """What a worker needs to know; plain values, small, the same for every worker."""

    settings: Settings
    corpus: Corpus
    progress_uri: str
    beside: int = 0
    """Runs of the same size that share each machine's cores with this one."""
    tracking_server: str | None = None


def train_worker(config: dict[str, TrainJob]) -> None:
    """The function that Ray Train runs on every worker."""
    Worker(config["job"]).run()


class Worker:
    def __init__(self, job: TrainJob) -> None:
        self.job, self.settings, self.corpus = job, job.settings, job.corpus
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.lanes = range(self.settings.training.lanes)[self.rank :: self.workers]
        self.device = ray.train.torch.get_device()
        # Workers of one machine share its cores: more threads than cores spin at every barrier and halve the speed.
        sharing = context.get_local_world_size() * (1 + job.beside)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // sharing))
        torch.manual_seed(self.settings.seed)
        training, steps = self.settings.training, self.settings.network.steps
        self.places = self.corpus.places(TRAIN, training.unseen)
        self.order = Order(
            group_rows(self.places), self.settings.seed, training.batch_size, training.lanes, training.shuffle_images
        )
        self.pretraining_steps = self.order.steps * training.pretraining
        self.total_steps = self.pretraining_steps + self.order.steps * training.epochs
        labels = torch.as_tensor(np.concatenate([*self._labels()]))
        unseen = [FINDINGS.index(name) for name in training.unseen]
        self.objective = Objective.build(
            self.settings.losses, labels, steps, training.shallow_share, self.device, unseen
        )
        self.optimisation = self._optimisation(len(self.objective.learnt_K))
        self.validation = Validation(
            network=self.optimisation.averaged.module,
            corpus=self.corpus,
            unseen=training.unseen,
            autocast=self.optimisation.autocast,
            device=self.device,
            batch_size=training.batch_size,
            rank=self.rank,
            workers=self.workers,
        )
        self.state = RunState()
        if checkpoint := ray.train.get_checkpoint():
            saved = load_state(checkpoint, self.device)
            self.state = RunState(**saved.pop("run"))
            self.optimisation.load_state_dict(saved)
        self.teller = Teller(job.progress_uri)
        self.tracker: Tracker = Nowhere()
        if self.rank == 0:
            run_folder = storage.parent(job.progress_uri)
            self.tracker = tracker_of(self.settings, run_folder, self.state.step, job.tracking_server)

    def _labels(self) -> Iterator[np.ndarray]:
        """Labels of all training rows, int8 [N, C], some at a time: as text they are twenty times as large."""
        for start in range(0, len(self.places), LABELS_AT_ONCE):
            places = self.places[start : start + LABELS_AT_ONCE]
            yield labels_of(self.corpus.take(places, ["findings", "unknown"]))

    def _optimisation(self, classes: int) -> Optimisation:
        """A fresh network with its centres, shared by the workers."""
        network = build_network(self.settings.network, len(FINDINGS))
        network.silence(~self.objective.taught_C.cpu())
        if self.settings.network.normalisation == "batch" and self.device.type == "cuda" and self.workers > 1:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        model = ray.train.torch.prepare_model(network)  # wrapped by DDP where there are several workers
        centres = Centres(
            tables=2 * self.settings.network.steps,
            classes=classes,
            dimensions=self.settings.network.dimensions,
            rate=self.settings.losses.centre_rate,
            seed=self.settings.seed,
            device=self.device,
        )
        training = self.settings.training
        return Optimisation(network, model, centres, training, self.total_steps, self.pretraining_steps)

    def run(self) -> None:
        try:
            self._run()
        except BaseException:
            self.tracker.end(failed=True)
            raise
        self.tracker.end()

    def _run(self) -> None:
        if self.state.final is not None:  # killed after the last report: the checkpoint holds everything
            self._report_final()
            return
        batches = self._batches()
        while self.state.step < self.pretraining_steps:
            self._end_pretraining_epoch(self._epoch(batches, self._pretraining_step))
        while self.state.step < self.total_steps and not self._is_patience_over():
            self._end_epoch(self._epoch(batches, self._step))
        assert self.state.step < self.total_steps or next(batches, None) is None, "more input than the plan has steps"
        batches.close()
        self.teller.end()
        self._finish()

    def _epoch(self, batches: Iterator[Batch], take_step: Callable[[Iterator[Batch]], None]) -> dict[str, Any]:
        """What is left of the running epoch: its number within its phase, its mean losses, its speed."""
        training = self.settings.training
        epochs, start = divmod(self.state.step, self.order.steps)
        epoch = epochs if self.state.step < self.pretraining_steps else epochs - training.pretraining
        began = time.monotonic()
        for index in range(start, self.order.steps):
            take_step(batches)
            self._tell(epoch, index + 1)
            inside = index + 1 < self.order.steps
            if inside and self.state.step % training.checkpoint_steps == 0:
                self._average_sums()
                self._require_no_explosion()
                self._report({"epoch": epoch, "step": self.state.step})
        self._average_sums()
        if not self.state.sums:
            raise self.optimisation.lost("no finite gradient in a whole epoch")
        self._require_no_explosion()
        record = self.state.mean_losses()
        self.state.end_epoch()
        done = self.order.steps - start  # fewer than an epoch's where the run went on from within it
        return record | {"epoch": epoch, "images_per_second": done * training.batch_size / (time.monotonic() - began)}

    def _is_patience_over(self) -> bool:
        patience = self.settings.training.patience
        return patience is not None and self.state.epochs_since_best() >= patience

    def _step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step: all micro-batches forward and backward, then weights, then centres."""
        training, optimisation = self.settings.training, self.optimisation
        optimisation.begin(self.state.step)
        progress = optimisation.progress
        if optimisation.reaches(self.settings.losses.contrastive_from):
            forget_moments(optimisation.optimizer, optimisation.network.embedders())
        if optimisation.reaches(training.crop_from):
            begin_crop(optimisation.centres)
        sums: dict[str, Tensor] = {}
        contrast = self.objective.ccloss(optimisation.centres)
        shuffled = training.jigsaw and progress < training.shallow_share and self.state.step % 2 == 1
        # Means over images become means over the step's: workers average gradients, and may have lanes more or less.
        share = len(self.lanes) * self.workers / training.lanes / training.accumulation
        for micro in range(training.accumulation):
            batch = next(batches)
            images = self._varied(self._images(batch), micro, shuffled)
            labels = torch.as_tensor(batch.labels).to(self.device)
            with optimisation.micro_batch(last=micro == training.accumulation - 1):
                output = optimisation.forward(images, crop=progress >= training.crop_from)
                loss, parts = self.objective(output, labels, contrast, progress, shallow_only=shuffled)
                optimisation.backward(loss * share)
            if not shuffled:
                gather_centres(output, self.objective.targets(labels), optimisation.centres)
            sums = {name: sums.get(name, 0.0) + value * share for name, value in parts.items()}
        if optimisation.end():
            self.state.add(sums)
        self.state.step += 1

    def _pretraining_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step without labels; the centres stay, for no finding is gathered.

        Each micro-batch has its own correlation, so accumulation is not the same as one large batch here.
        """
        training, optimisation = self.settings.training, self.optimisation
        optimisation.begin(self.state.step)
        turn = turn_of(self.state.step, self.settings.network.steps)
        mean = torch.zeros((), device=self.device)
        for micro in range(training.accumulation):
            images = self._images(next(batches))
            with optimisation.micro_batch(last=micro == training.accumulation - 1):
                output = optimisation.forward(two_views(images, turn.patches, self._dice(micro)), crop=False)
                loss = agreement(output, turn.steps) / training.accumulation
                optimisation.backward(loss)
            mean += loss.detach()
        if optimisation.end():
            self.state.add({"loss": mean})
        self.state.step += 1

    def _images(self, batch: Batch) -> Tensor:
        return normalised(batch.pixels.copy(), self.corpus.recipe, self.device)

    def _dice(self, micro: int) -> list[torch.Generator]:
        """A generator for each lane: an image is changed alike however many workers there are."""
        seeds = (_seed(self.settings.seed, self.state.step, micro, lane) for lane in self.lanes)
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def _varied(self, images: Tensor, micro: int, shuffled: bool) -> Tensor:
        """The images of a micro-batch, augmented and, where `shuffled`, cut into patches."""
        augmented = self.settings.training.augment
        if not (augmented or shuffled):
            return images

        def change(piece: Tensor, generator: torch.Generator) -> Tensor:
            piece = augment(piece, generator) if augmented else piece
            return jigsaw(piece, JIGSAW_PATCHES, generator) if shuffled else piece

        return by_lane(images, self._dice(micro), change)

    def _batches(self) -> Generator[Batch]:
        """This worker's micro-batches from the current step to the last epoch's end."""
        training = self.settings.training
        source = WorkerInput(self.corpus, self.places, self.order, self.rank, self.workers, training.accumulation)
        return source.batches(self.state.step, training.pretraining + training.epochs)

    def _average_sums(self) -> None:
        """The mean over workers, which stays what it is if taken again: a checkpoint speaks for all of them."""
        if self.workers > 1:
            for value in self.state.sums.values():
                dist.all_reduce(value)
                value /= self.workers

    def _require_no_explosion(self) -> None:
        """Before a checkpoint is written: it would be a bad one. The same on every worker, as the averaged sums are."""
        if self.state.look_for_explosion():
            raise self.optimisation.lost(f"the loss is over {EXPLODED:g} times what it was, and over that of the start")

    def _share_buffers(self) -> None:
        """Every worker evaluates the network that the first one saves: batch statistics differ after the last step."""
        if self.workers > 1:
            for buffer in (*self.optimisation.network.buffers(), *self.optimisation.averaged.module.buffers()):
                dist.broadcast(buffer, src=0)

    def _end_pretraining_epoch(self, record: dict[str, Any]) -> None:
        self.state.pretraining.append(record)
        self.tracker.log(self.state.step, {"pretraining/loss": record["loss"]})
        self.tracker.send()
        self._tell(record["epoch"], self.order.steps, force=True)
        self._report(record)

    def _end_epoch(self, record: dict[str, Any]) -> None:
        self._share_buffers()
        centres = self.optimisation.centres
        figures = self.validation.figures()
        if figures is None:
            raise self.optimisation.lost("validation embeddings are no numbers")
        record["validation"] = figures
        if self.rank == 0:
            record["crops"] = self.validation.crops()
        geometry = centres.geometry(self.objective.learnt_K)
        record["centre_cosine"] = [table.mean_cosine for table in geometry]
        record["centres_collapsed"] = any(table.collapsed for table in geometry)
        # Before, the crop or CCLoss has not been trained: on few validation patients such an epoch may look best.
        joined = max(self.settings.losses.contrastive_from, self.settings.training.crop_from)
        record["joined"] = self.optimisation.progress >= joined
        self.state.history.append(record)
        if record["joined"]:
            self.state.keep_best(
                self.optimisation.averaged.module.state_dict(), centres.vectors_TCD, self.validation.resampled
            )
        self.tracker.log(self.state.step, epoch_figures(record))
        self.tracker.send()
        self._tell(record["epoch"], self.order.steps, force=True)
        self._report(record | self._curve())

    def _finish(self) -> None:
        """With the best weights: the training mean of every embedding, then the choice on validation patients."""
        self.validation.network.load_state_dict(self.state.best_network)
        centring, images = self.validation.training_means(self.places)
        figures = self.validation.figures(centring)
        if figures is None:
            raise self.optimisation.lost("centred validation embeddings are no numbers")
        self.state.final = {
            "centring": {name: value.cpu() for name, value in centring.items()},
            "validation": figures,
            "chosen": max(figures, key=lambda name: figures[name]["map"]),
            "learnt": self.objective.learnt_K.tolist(),
            "centring_images": images,
        }
        self._report_final()

    def _report_final(self) -> None:
        """The whole curve once more: who listens may not have heard of the last epoch before he was killed."""
        assert self.state.final is not None
        final = {name: self.state.final[name] for name in ("chosen", "validation")}
        self._report(final | {"epoch": self.settings.training.epochs} | self._curve())

    def _curve(self) -> dict[str, Any]:
        return {CURVE: self.state.curve(), RESAMPLED: self.state.best_resampled}

    def _report(self, metrics: dict[str, Any]) -> None:
        """A barrier: every worker calls it equally often; the first one writes the checkpoint."""
        if self.rank != 0:
            ray.train.report(metrics)
            return
        with checkpoint_of(self.optimisation.state_dict(), self.state) as checkpoint:
            ray.train.report(metrics, checkpoint=checkpoint)

    def _tell(self, epoch: int, step: int, *, force: bool = False) -> None:
        """Say how far the run is."""
        if self.rank != 0 or not (force or self.teller.is_due()):
            return
        training, pretraining = self.settings.training, self.state.step <= self.pretraining_steps  # after the step
        if "loss" in self.state.sums:
            mean = float(self.state.sums["loss"]) / float(self.state.sums[TAKEN])
            self.tracker.log(self.state.step, {f"{'pretraining' if pretraining else 'train'}/loss": mean})
        past = self.state.pretraining if pretraining else self.state.history
        last = past[-1] if past else {}
        self.teller.tell(
            {
                "images": self.state.step * training.batch_size,
                "phase": "pretraining epoch" if pretraining else "epoch",
                "epoch": epoch + 1,
                "epochs": training.pretraining if pretraining else training.epochs,
                "step": step,
                "retries": max(self.validation.retries, storage.retries()),
                "last_epoch": {name: last[name] for name in ("loss", "validation") if name in last},
            }
        )


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
