"""What every Ray Train worker runs: epochs over its lanes, centres, checkpoints, validation, and the final centring.

S steps, P passes, B images, C findings, D dimensions.
"""

import contextlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import Checkpoint
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from cxr_retrieval import storage
from cxr_retrieval.config import JIGSAW_PATCHES, Settings
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.corpus.reading import Corpus, labels_of, pixels_of
from cxr_retrieval.corpus.splits import TRAIN, VALIDATION
from cxr_retrieval.errors import UserError
from cxr_retrieval.evaluation.intervals import resampled_means
from cxr_retrieval.evaluation.retrieval import QueryFigures, retrieve
from cxr_retrieval.evaluation.tables import chance_levels
from cxr_retrieval.losses.centres import Centres
from cxr_retrieval.losses.targets import centre_targets
from cxr_retrieval.network.progressive import Output, centred, jigsaw, uncentred
from cxr_retrieval.training.augmentation import augment
from cxr_retrieval.training.examples import example_places
from cxr_retrieval.training.input import Batch, WorkerInput
from cxr_retrieval.training.model import build_network, normalised
from cxr_retrieval.training.objective import BY_TABLE, Objective, gather_centres
from cxr_retrieval.training.order import Order, group_rows
from cxr_retrieval.training.tracking import Nowhere, Tracker, epoch_figures, tracker_of

STATE_FILE, PROGRESS_FILE = "state.pt", "progress.json"
TAKEN = "taken"  # optimizer steps of an epoch that were not skipped
CURVE = "curve"  # in what an epoch reports: a point for every epoch so far, also for those before a restart
RESAMPLED = "resampled"  # beside it: the best epoch's mAP in resamples of the validation patients
logger = logging.getLogger(__name__)
LABELS_AT_ONCE = 65_536
VALIDATION_IMAGES = 20_000  # at most, evenly drawn, that epochs are compared by
RESAMPLES = 400  # the standard error of a figure is then known to 4%
CENTRING_IMAGES = 20_000  # the training mean is taken over at most so many images
PROGRESS_EVERY_S = 2.0
SKIPPED_LIMIT = 20  # optimizer steps in a row without a finite gradient that end the run
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TrainJob:
    """What a worker needs to know; plain values, small, the same for every worker."""

    settings: Settings
    corpus: Corpus
    progress_uri: str
    beside: int = 0
    """Runs of the same size that share each machine's cores with this one."""
    tracking_server: str | None = None


@dataclass
class RunState:
    """Where the run stands. All of it is in a checkpoint, and nothing else is needed to go on from one."""

    step: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)  # of the losses of the running epoch's steps
    best_map: float = -1.0
    best_epoch: int = -1
    best_network: dict[str, Tensor] = field(default_factory=dict)
    best_centres: Tensor | None = None
    best_resampled: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    final: dict[str, Any] | None = None


def train_worker(config: dict[str, TrainJob]) -> None:
    """The function that Ray Train runs on every worker."""
    Worker(config["job"]).run()


class Worker:
    def __init__(self, job: TrainJob) -> None:
        self.skipped = 0
        self.retries = 0  # requests to storage that all workers have sent again, as of the last epoch's end
        self._told = 0.0
        self._teller = ThreadPoolExecutor(1, thread_name_prefix="progress")  # no step waits for storage
        self._telling: Future[None] | None = None
        self.job, self.settings, self.corpus = job, job.settings, job.corpus
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        # Workers of one machine share its cores: more threads than cores spin at every barrier and halve the speed.
        sharing = context.get_local_world_size() * (1 + job.beside)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // sharing))
        self.recipe = self.corpus.recipe
        self.autocast = autocast_of(self.settings.training.precision, self.device)
        torch.manual_seed(self.settings.seed)
        training = self.settings.training
        self.places = self.corpus.places(TRAIN, training.unseen)
        self.order = Order(
            group_rows(self.places), self.settings.seed, training.batch_size, training.lanes, training.shuffle_images
        )
        self.total_steps = self.order.steps * training.epochs
        network = build_network(self.settings.network, len(FINDINGS))
        if self.settings.network.normalisation == "batch" and self.device.type == "cuda" and self.workers > 1:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.model: nn.Module = ray.train.torch.prepare_model(network)  # wrapped by DDP where there are several workers
        self.network = network
        self.averaged = AveragedModel(network, multi_avg_fn=running_average(training.averaging), use_buffers=True)
        self.optimizer = optimizer_of(self.model, training.learning_rate, training.weight_decay)
        labels = torch.as_tensor(np.concatenate([*self._labels()]))
        steps = self.settings.network.steps
        self.objective = Objective.build(self.settings.losses, labels, steps, training.shallow_share, self.device)
        self.centres = Centres(
            tables=2 * steps,
            classes=centre_targets(labels[:1], self.settings.losses.no_finding).shape[1],
            dimensions=self.settings.network.dimensions,
            rate=self.settings.losses.centre_rate,
            seed=self.settings.seed,
            device=self.device,
        )
        self.state = RunState()
        self._restore()
        self.tracker: Tracker = Nowhere()
        if self.rank == 0:
            run_folder = storage.parent(job.progress_uri)
            self.tracker = tracker_of(self.settings, run_folder, self.state.step, job.tracking_server)

    def _labels(self) -> Iterator[np.ndarray]:
        """Labels of all training rows, int8 [N, C], some at a time: as text they are twenty times as large."""
        for start in range(0, len(self.places), LABELS_AT_ONCE):
            places = self.places[start : start + LABELS_AT_ONCE]
            yield labels_of(self.corpus.take(places, ["findings", "unknown"]))

    def run(self) -> None:
        if self.state.final is not None:  # killed after the last report: the checkpoint holds everything
            self._report_final()
            return
        training = self.settings.training
        batches = self._batches()
        while self.state.step < self.total_steps:
            epoch, start = divmod(self.state.step, self.order.steps)
            began = time.monotonic()
            for index in range(start, self.order.steps):
                if parts := self._step(batches):
                    self.state.sums = {name: self.state.sums.get(name, 0.0) + value for name, value in parts.items()}
                self._tell(epoch, index + 1)
                inside = index + 1 < self.order.steps
                if inside and self.state.step % training.checkpoint_steps == 0:
                    self._average_sums()
                    self._report({"epoch": epoch, "step": self.state.step})
            self._average_sums()
            if not self.state.sums:
                raise self._not_finite("no finite gradient in a whole epoch")
            by_table, taken = self.state.sums.pop(BY_TABLE), float(self.state.sums.pop(TAKEN))
            record: dict[str, Any] = {name: float(value) / taken for name, value in self.state.sums.items()}
            record |= _by_table(by_table)
            self.state.sums = {}
            done = self.order.steps - start  # fewer than an epoch's where the run went on from within it
            record["images_per_second"] = done * training.batch_size / (time.monotonic() - began)
            self._end_epoch(epoch, record)
        assert next(batches, None) is None, "the input holds more steps than the plan"
        self._teller.shutdown()
        self._finish()

    def _step(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """One optimizer step: all micro-batches forward and backward, then weights, then centres.

        Returns what to sum up over an epoch; nothing of a step that was skipped.
        """
        training = self.settings.training
        self.model.train()
        progress = self.state.step / self.total_steps
        for group in self.optimizer.param_groups:
            group["lr"] = training.learning_rate * rate_share(self.state.step, self.total_steps, training.warmup_share)
        sums: dict[str, Tensor] = {}
        contrast = self.objective.ccloss(self.centres)
        crop = progress >= training.crop_from
        shuffled = training.jigsaw and progress < training.shallow_share and self.state.step % 2 == 1
        for micro in range(training.accumulation):
            batch = next(batches)
            generator = torch.Generator().manual_seed(_seed(self.settings.seed, self.state.step, micro, self.rank))
            images = normalised(batch.pixels.copy(), self.recipe, self.device)
            labels = torch.as_tensor(batch.labels).to(self.device)
            if training.augment:
                images = augment(images, generator).contiguous(memory_format=torch.channels_last)
            if shuffled:
                images = jigsaw(images, JIGSAW_PATCHES, generator)
            last = micro == training.accumulation - 1
            with contextlib.nullcontext() if last or self.workers == 1 else self._ddp().no_sync():
                with self.autocast():
                    output = Output(*self.model(images, crop=crop))
                loss, parts = self.objective(output, labels, contrast, progress, shallow_only=shuffled)
                (loss / training.accumulation).backward()
            if not shuffled:
                gather_centres(output, centre_targets(labels, self.settings.losses.no_finding), self.centres)
            sums = {name: sums.get(name, 0.0) + value / training.accumulation for name, value in parts.items()}
        self.centres.reduce()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        if torch.isfinite(norm):
            self.optimizer.step()
            self.averaged.update_parameters(self.network)
            self.centres.apply()
            self.skipped = 0
        else:  # the same on every worker, because gradients are averaged before they are measured
            self.centres.drop()
            self.skipped += 1
            if self.skipped > SKIPPED_LIMIT:
                raise self._not_finite(f"no finite gradient in {self.skipped} steps in a row")
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        return sums | {TAKEN: torch.ones((), device=self.device)} if self.skipped == 0 else {}

    def _not_finite(self, what: str) -> UserError:
        return UserError(
            f"{what}, at step {self.state.step:,} of {self.total_steps:,}: lower training.learning_rate, or look at"
            " network.weights; run again, it goes on from the last good checkpoint"
        )

    def _batches(self) -> Iterator[Batch]:
        """This worker's micro-batches from the current step to the last epoch's end."""
        training = self.settings.training
        source = WorkerInput(self.corpus, self.places, self.order, self.rank, self.workers)
        rows = training.batch_size // self.workers // training.accumulation
        return source.batches(self.state.step, training.epochs, rows)

    def _average_sums(self) -> None:
        """The mean over workers, which stays what it is if taken again: a checkpoint speaks for all of them."""
        if self.workers > 1:
            for value in self.state.sums.values():
                dist.all_reduce(value)
                value /= self.workers

    def _ddp(self) -> nn.parallel.DistributedDataParallel:
        assert isinstance(self.model, nn.parallel.DistributedDataParallel)
        return self.model

    def _share_buffers(self) -> None:
        """Every worker evaluates the network that the first one saves: batch statistics differ after the last step."""
        if self.workers > 1:
            for buffer in (*self.network.buffers(), *self.averaged.module.buffers()):
                dist.broadcast(buffer, src=0)

    def _end_epoch(self, epoch: int, record: dict[str, Any]) -> None:
        self._share_buffers()
        vectors, labels, patients = self._validation_vectors(None)
        if not all(value.isfinite().all() for value in vectors.values()):
            raise self._not_finite("validation embeddings are no numbers")
        figures = _figures(vectors, labels, patients)
        record |= {"epoch": epoch, "validation": {name: _headline(figure) for name, figure in figures.items()}}
        if self.rank == 0:
            record["crops"] = self._example_crops()
        record["centre_cosine"] = [table.mean_cosine for table in self.centres.geometry()]
        record["centres_collapsed"] = any(self.centres.collapsed())
        self.state.history.append(record)
        best = max(headline["map"] for headline in record["validation"].values())
        if best > self.state.best_map:
            self.state.best_map, self.state.best_epoch = best, epoch
            self.state.best_network = {
                name: value.detach().cpu().clone() for name, value in self.averaged.module.state_dict().items()
            }
            self.state.best_centres = self.centres.vectors_TCD.cpu().clone()
            name = max(figures, key=lambda name: record["validation"][name]["map"])
            self.state.best_resampled = _resampled(figures[name], patients[(labels == 1).any(1)])
        self.tracker.log(self.state.step, epoch_figures(record))
        self.tracker.send()
        self._tell(epoch, self.order.steps, force=True)
        self._report(record | self._curve())

    @cached_property
    def _examples(self) -> np.ndarray | None:
        """Pixels of the images that are followed, found once a run; None where no validation image has a finding."""
        places = example_places(self.corpus, self.settings.training.unseen)
        return pixels_of(self.corpus.take(places, ["pixels"]), self.recipe.size).copy() if len(places) else None

    def _example_crops(self) -> list[list[int]]:
        """Where the network looks in the images that are followed: x, y, width, height of each."""
        if self._examples is None:
            return []
        self.averaged.eval()
        images = normalised(self._examples, self.recipe, self.device)
        with torch.inference_mode(), self.autocast():
            boxes: list[list[int]] = Output(*self.averaged.module(images)).boxes_B4.tolist()
        return boxes

    def _finish(self) -> None:
        """With the best weights: the training mean of every embedding, then the choice on validation patients."""
        self.averaged.module.load_state_dict(self.state.best_network)
        sums: dict[str, Tensor] = {}
        count = torch.zeros(1, dtype=torch.float64, device=self.device)
        stride = max(1, len(self.places) // CENTRING_IMAGES)
        for output, _ in self._embed(self.places[::stride]):
            for name, vector in uncentred(output).items():
                sums[name] = sums.get(name, 0.0) + vector.double().sum(0)
            count += output.z_PSBD.shape[2]
        for value in (*sums.values(), count):
            if self.workers > 1:
                dist.all_reduce(value)
        centring = {name: (value / count).float() for name, value in sums.items()}
        vectors, labels, patients = self._validation_vectors(centring)
        figures = {name: _headline(figure) for name, figure in _figures(vectors, labels, patients).items()}
        chosen = max(figures, key=lambda name: figures[name]["map"])
        self.state.final = {
            "centring": {name: value.cpu() for name, value in centring.items()},
            "validation": figures,
            "chosen": chosen,
            "centring_images": int(count.item()),
        }
        self.tracker.end()
        self._report_final()

    def _report_final(self) -> None:
        """The whole curve once more: who listens may not have heard of the last epoch before he was killed."""
        assert self.state.final is not None
        final = {name: self.state.final[name] for name in ("chosen", "validation")}
        self._report(final | {"epoch": self.settings.training.epochs} | self._curve())

    def _curve(self) -> dict[str, Any]:
        return {CURVE: [curve_point(past) for past in self.state.history], RESAMPLED: self.state.best_resampled}

    def _validation_vectors(self, centring: Mapping[str, Tensor] | None) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Named embeddings [V, ...], labels [V, C] and patient codes [V] of all validation images, on every worker.

        Without `centring` the mean of the validation vectors themselves is subtracted: good enough to compare epochs.
        """
        places = self.corpus.places(VALIDATION, self.settings.training.unseen)
        places = places[:: math.ceil(len(places) / VALIDATION_IMAGES)]  # every worker holds and ranks all of them
        found: dict[str, list[Tensor]] = {}
        seen: list[tuple[list[str], np.ndarray]] = []
        for output, table in self._embed(places):
            for name, vector in uncentred(output).items():
                found.setdefault(name, []).append(vector.cpu())
            seen.append((table["patient_id"].to_pylist(), labels_of(table)))
        mine = ({name: torch.cat(value).numpy() for name, value in found.items()}, seen, storage.retries())
        shares = [mine]
        if self.workers > 1:
            shares = [mine] * self.workers
            dist.all_gather_object(shares, mine)
        self.retries = sum(share[2] for share in shares)
        names = list(next(share[0] for share in shares if share[0]))
        vectors = {name: torch.as_tensor(np.concatenate([s[0][name] for s in shares if s[0]])) for name in names}
        vectors = centred(vectors, centring or {name: value.mean(0) for name, value in vectors.items()})
        patient_ids = [patient for share in shares for ids, _ in share[1] for patient in ids]
        labels = np.concatenate([labels for share in shares for _, labels in share[1]])
        assert len(patient_ids) == len(places), "validation rows were lost between workers"
        return vectors, torch.as_tensor(labels), torch.as_tensor(np.unique(patient_ids, return_inverse=True)[1])

    def _embed(self, places: np.ndarray) -> Iterator[tuple[Output, Any]]:
        """This worker's contiguous share of `places` through the averaged network in evaluation mode."""
        self.averaged.eval()
        size = 2 * self.settings.training.batch_size
        share = np.array_split(places, self.workers)[self.rank]
        for start in range(0, len(share), size):
            table = self.corpus.take(share[start : start + size], ["pixels", "patient_id", "findings", "unknown"])
            with torch.inference_mode(), self.autocast():
                images = normalised(pixels_of(table, self.recipe.size).copy(), self.recipe, self.device)
                yield Output(*self.averaged.module(images)), table

    def _report(self, metrics: dict[str, Any]) -> None:
        """A barrier: every worker calls it equally often; the first one writes the checkpoint."""
        if self.rank != 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory(prefix="cxr-checkpoint-") as folder:
            saved = {
                "network": self.network.state_dict(),
                "averaged": self.averaged.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "centres": self.centres.state_dict(),
                "run": vars(self.state),
            }
            torch.save(saved, Path(folder) / STATE_FILE)
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))

    def _restore(self) -> None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        saved = load_state(checkpoint, self.device)
        self.network.load_state_dict(saved["network"])
        self.averaged.load_state_dict(saved["averaged"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.centres.load_state_dict(saved["centres"])
        self.centres.to(self.device)
        self.state = RunState(**saved["run"])

    def _tell(self, epoch: int, step: int, *, force: bool = False) -> None:
        """Say how far the run is, where the driver and another terminal can read it."""
        now = time.monotonic()
        if self.rank != 0 or (now - self._told < PROGRESS_EVERY_S and not force):
            return
        if self._telling and not self._telling.done() and not force:
            return
        self._told = now
        if "loss" in self.state.sums:
            mean = float(self.state.sums["loss"]) / float(self.state.sums[TAKEN])
            self.tracker.log(self.state.step, {"train/loss": mean})
        last = self.state.history[-1] if self.state.history else {}
        facts = {
            "images": self.state.step * self.settings.training.batch_size,
            "epoch": epoch + 1,
            "epochs": self.settings.training.epochs,
            "step": step,
            "retries": max(self.retries, storage.retries()),
            "last_epoch": {name: last[name] for name in ("loss", "validation") if name in last},
        }
        self._telling = self._teller.submit(_write_told, self.job.progress_uri, json.dumps(facts).encode())


def _write_told(uri: str, facts: bytes) -> None:
    try:
        storage.write_bytes(uri, facts)
    except UserError as error:  # for a person to look at: no reason to end a run
        logger.warning("progress is not told: %s", error)


def curve_point(record: Mapping[str, Any]) -> dict[str, float]:
    """An epoch's place in the learning curve: epochs from 1; validation mAP of its best embedding, and of chance."""
    return {
        "epoch": record["epoch"] + 1,
        "value": max(figures["map"] for figures in record["validation"].values()),
        "loss": record["loss"],
        "centre_cosine": sum(record["centre_cosine"]) / len(record["centre_cosine"]),
        "chance": max(figures["chance_map"] for figures in record["validation"].values()),
    }


def _by_table(sums_3T: Tensor) -> dict[str, list[float | None]]:
    """Mean losses of every step and pass over an epoch; None for a pass that was not seen in it."""
    ccloss_T, entropy_T, seen_T = sums_3T.tolist()
    return {
        f"{name}_by_table": [value / seen if seen else None for value, seen in zip(values, seen_T, strict=True)]
        for name, values in (("ccloss", ccloss_T), ("cross_entropy", entropy_T))
    }


def load_state(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `Worker` saved, with tensors and plain values only."""
    with checkpoint.as_directory() as folder:
        saved: dict[str, Any] = torch.load(Path(folder) / STATE_FILE, map_location=device, weights_only=True)
    return saved


Tensors = tuple[Tensor, ...] | list[Tensor]


def running_average(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """How an average of weights follows them: by 1 - `decay` a step, and faster in the first steps, whose weights are
    not worth keeping. Whole numbers (counts of batches) are taken over as they are.
    """

    def follow(averages: Tensors, weights: Tensors, steps: Tensor | int) -> None:
        share = 1.0 - min(decay, (1.0 + float(steps)) / (10.0 + float(steps)))
        for average, weight in zip(averages, weights, strict=True):
            if average.is_floating_point():
                average.lerp_(weight, share)
            else:
                average.copy_(weight)

    return follow


def optimizer_of(model: nn.Module, rate: float, decay: float) -> torch.optim.Optimizer:
    """AdamW; vectors (norms, biases) are not decayed."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    kept = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": decay}, {"params": kept, "weight_decay": 0.0}], lr=rate, fused=True
    )


def rate_share(step: float, total: float, warmup_share: float) -> float:
    """Learning rate as a share of its peak: linear warm-up, then a cosine to a hundredth."""
    warmup = warmup_share * total
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, total - warmup)))


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def autocast_of(setting: str, device: torch.device) -> Any:
    """A factory of autocast contexts. `auto` is bfloat16 only where the hardware computes in it."""
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    dtype = PRECISIONS["bfloat16" if fast else "float32"] if setting == "auto" else PRECISIONS[setting]
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16)


def _figures(vectors: Mapping[str, Tensor], labels: Tensor, patients: Tensor) -> dict[str, QueryFigures]:
    """Retrieval among the given images (gallery *all*) for every named embedding."""
    query = (labels == 1).any(1)
    return {
        name: retrieve(value[query], value, labels[query], labels, patients[query], patients)
        for name, value in vectors.items()
    }


def _headline(figures: QueryFigures) -> dict[str, float]:
    """The figures that a log line and the choice need, in 0 to 1; 0 where no query counts."""
    if len(figures.ap) == 0:
        return {"map": 0.0, "recall_at_8": 0.0, "precision_at_8": 0.0, "chance_map": 0.0}
    return {
        "map": float(figures.ap.mean()),
        "recall_at_8": float(figures.recall[:, -1].mean()),
        "precision_at_8": float(figures.precision[:, -1].mean()),
        "chance_map": float(chance_levels(figures).ap.mean()),
    }


def _resampled(figures: QueryFigures, patients: Tensor) -> list[float]:
    """mAP in resamples of the patients, given as a code for each query; none where fewer than two patients count.

    They are the same resamples in every run that is judged on the same images: differences of runs are paired.
    """
    if len(figures.ap) == 0:
        return []
    means: list[float] = resampled_means(figures.ap, patients[figures.kept_Q], draws=RESAMPLES).tolist()
    return [round(mean, 6) for mean in means]
