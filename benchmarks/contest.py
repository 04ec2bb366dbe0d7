"""One entry of a contest of losses: the same network on the same images with one loss, for the same number of steps.

The progressive network, the cross-entropy beside, the schedule, the augmentation and the running average are those of
`jobs.train`; only the contrastive loss of each step and pass is another. Everything is in memory and in one process:
what differs between entries is the loss. It joins at `START` of the steps; up to there all entries of a seed are the
same to the last bit, so this *trunk* is trained once a seed.

N images, B of a batch, C findings, K classes of the centres, D dimensions, Q queries.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from cxr_retrieval.config import LossSettings, NetworkSettings
from cxr_retrieval.corpus.decoding import Recipe
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.corpus.reading import Corpus, labels_of, pixels_of
from cxr_retrieval.evaluation.retrieval import QueryFigures, retrieve
from cxr_retrieval.evaluation.tables import per_finding
from cxr_retrieval.losses.centres import Centres
from cxr_retrieval.losses.targets import NoFinding, centre_targets
from cxr_retrieval.network.progressive import Output, centred, uncentred
from cxr_retrieval.training.augmentation import augment
from cxr_retrieval.training.model import build_network, normalised
from cxr_retrieval.training.objective import Contrast, Objective, begin_crop, gather_centres
from cxr_retrieval.training.optimisation import (
    autocast_of,
    forget_moments,
    optimizer_of,
    rate_share,
    reaches,
    running_average,
)

BATCH, PROXY_RATE, DECAY = 64, 10.0, 0.2  # the proxies' rate is a multiple of the network's
AVERAGING, WARM_UP, SHALLOW, CROP_FROM = 0.996, 0.1, 0.1, 0.6
START = 0.4  # of the steps, after which the contrastive loss joins
CURVE_POINTS = 12  # looks at the validation patients while training, which are not counted as its time
CENTRING_IMAGES = 2_000
EVALUATED = ("global", "combined", "profile", "global_profile")
CUTOFFS = (2, 4, 6, 8)


@dataclass(frozen=True)
class Learner:
    """A network that entries train, and the learning rate that suits it."""

    network: NetworkSettings
    rate: float


LEARNERS = {
    "resnet18_half": Learner(NetworkSettings(normalisation="batch", whole_side=64, crop_side=64), 7.5e-4),
    "efficientnet_lite0": Learner(
        NetworkSettings(
            backbone="efficientnet_lite0", weights="imagenet", normalisation="batch", whole_side=96, crop_side=96
        ),
        3e-4,
    ),
}
SMALL = "resnet18_half"
STEPS, DIMENSIONS = LEARNERS[SMALL].network.steps, LEARNERS[SMALL].network.dimensions  # of all of them
TABLES = 2 * STEPS


@dataclass(frozen=True)
class Images:
    """Prepared images in memory: `uint8 [N, H, W]`, labels `int8 [N, C]`, the patients' names."""

    pixels: np.ndarray
    labels: Tensor
    patients: np.ndarray

    @cached_property
    def patient_codes(self) -> Tensor:
        """A number for each patient, [N]."""
        return torch.as_tensor(np.unique(self.patients, return_inverse=True)[1])


def read_images(corpora: list[Corpus], split: str) -> Images:
    """The images of one split of several archives, which share no patient."""
    pixels, labels, patients = [], [], []
    for number, corpus in enumerate(corpora):
        table = corpus.take(corpus.places(split), ["pixels", "findings", "unknown", "patient_id"])
        pixels.append(pixels_of(table, corpus.recipe.size).copy())
        labels.append(labels_of(table))
        patients += [f"{number}-{patient}" for patient in table["patient_id"].to_pylist()]
    return Images(np.concatenate(pixels), torch.as_tensor(np.concatenate(labels)), np.asarray(patients))


class Rival(nn.Module, ABC):
    """A contrastive loss of one table (step and pass) at a time, with whatever it keeps between steps.

    `weight` is its weight beside the cross-entropy; `no_finding` what images without a finding are to it.
    """

    def __init__(self, weight: float, no_finding: NoFinding = "negatives_only") -> None:
        super().__init__()
        self.weight, self.no_finding = weight, no_finding

    @abstractmethod
    def contrast(self, objective: Objective) -> Contrast:
        """What the objective adds to the cross-entropy."""

    def gather(self, output: Output, targets_BK: Tensor) -> None:
        """Take notice of a batch, before the optimizer's step."""

    def after_step(self) -> None:
        """Follow the optimizer's step."""


class Centred(Rival):
    """CCLoss: one centre per finding. Images without a finding would only be pulled together: it leaves them out."""

    def __init__(self, weight: float, settings: LossSettings, seed: int, device: torch.device) -> None:
        super().__init__(weight, "ignore")
        self.centres = Centres(TABLES, len(FINDINGS), DIMENSIONS, settings.centre_rate, seed=seed, device=device)

    def contrast(self, objective: Objective) -> Contrast:
        return objective.ccloss(self.centres)

    def gather(self, output: Output, targets_BK: Tensor) -> None:
        gather_centres(output, targets_BK, self.centres)

    def after_step(self) -> None:
        self.centres.reduce()
        self.centres.apply()


class Paired(Rival):
    """A loss over the pairs or triplets of a batch."""

    def __init__(self, weight: float, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(weight)
        self._loss = loss

    def contrast(self, objective: Objective) -> Contrast:
        return lambda _, z_BD, targets_BK: self._loss(z_BD, targets_BK)


class Proxied(Rival):
    """A loss against proxies that are learnt by gradient: one table of them per step and pass."""

    def __init__(self, weight: float, table: Callable[[int, int], nn.Module]) -> None:
        super().__init__(weight)
        self.tables = nn.ModuleList(table(len(FINDINGS), DIMENSIONS) for _ in range(TABLES))

    def contrast(self, objective: Objective) -> Contrast:
        def loss(table: int, z_BD: Tensor, targets_BK: Tensor) -> Tensor:
            found: Tensor = self.tables[table](z_BD, targets_BK)
            return found

        return loss


class Nothing(Rival):
    """Cross-entropy only."""

    def __init__(self) -> None:
        super().__init__(0.0)

    def contrast(self, objective: Objective) -> Contrast:
        return lambda _, z_BD, __: z_BD.new_zeros(())


@dataclass
class Entry:
    """What one run found. `figures` has, for each embedding and each set of queries, a row per query that counts.

    `seconds` are of the CPU (of the clock on a GPU) and of training only, those of the trunk included; they depend on
    what else the machine does, and no figure depends on them.
    """

    steps: int
    images: int
    seconds: float
    curve: list[dict[str, float]] = field(default_factory=list)
    figures: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)


class Contest:
    """One seed's network on its way: the trunk first, then one loss."""

    def __init__(
        self,
        settings: LossSettings,
        seed: int,
        steps: int,
        train: Images,
        judged: Mapping[str, Images],
        recipe: Recipe,
        learner: Learner = LEARNERS[SMALL],
    ) -> None:
        self.settings, self.seed, self.steps, self.rate = settings, seed, steps, learner.rate
        self.train_images, self.judged, self.recipe = train, judged, recipe
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.autocast = autocast_of("auto", self.device)
        torch.manual_seed(seed)
        self.network = build_network(learner.network, len(FINDINGS)).to(self.device)
        self.averaged = AveragedModel(self.network, multi_avg_fn=running_average(AVERAGING), use_buffers=True)
        self.optimizer = optimizer_of(self.network, self.rate, DECAY)
        self.trunk_rival = Centred(0.0, settings, seed, self.device)
        self.step, self.seconds = 0, 0.0
        self.curve: list[dict[str, float]] = []

    @property
    def trunk_steps(self) -> int:
        return round(START * self.steps)

    def grow_trunk(self, file: Path) -> None:
        """Cross-entropy only, while the centres of CCLoss follow the embeddings, as they do in `jobs.train`."""
        self.advance(self.trunk_rival, self.trunk_steps)
        names = ("network", "averaged", "optimizer")
        state = {name: getattr(self, name).state_dict() for name in names}
        state |= {"centres": self.trunk_rival.centres.state_dict(), "seconds": self.seconds, "curve": self.curve}
        waiting = file.with_suffix(".part")
        torch.save(state, waiting)
        waiting.replace(file)

    def run(self, make: Callable[[torch.device], Rival], trunk: Path) -> Entry:
        """Go on from the trunk with one loss, then judge the average of the weights on every set of images.

        `judged["validation"]` is also looked at while training. Every set is a gallery to its own queries (*all*).
        """
        state = torch.load(trunk, map_location=self.device, weights_only=True)
        for name in ("network", "averaged", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.seconds, self.curve = self.trunk_steps, state["seconds"], state["curve"]
        rival = make(self.device).to(self.device)
        if isinstance(rival, Centred):
            rival.centres.load_state_dict(state["centres"])
        forget_moments(self.optimizer, self.network.embedders())
        if proxies := list(rival.parameters()):
            self.optimizer.add_param_group({"params": proxies, "weight_decay": 0.0, "faster": PROXY_RATE})
        self.advance(rival, self.steps)
        entry = Entry(self.steps, self.steps * BATCH, round(self.seconds, 1), self.curve)
        pixels = self.train_images.pixels[:: max(1, len(self.train_images.pixels) // CENTRING_IMAGES)]
        means = {name: value.mean(0) for name, value in uncentred(self.outputs(pixels)).items()}
        for where, images in self.judged.items():
            if where == "validation":
                continue
            entry.figures[where] = {name: _rows(found, images) for name, found in self._judge(images, means).items()}
        return entry

    def seconds_a_step(self, crop: bool, count: int = 12) -> float:
        """What a step of cross-entropy only takes on this machine, with or without the second pass: the median."""
        train_step, found = self._stepper(Nothing()), []
        for _ in range(count):
            began = self._clock()
            train_step(CROP_FROM if crop else 0.0)
            found.append(self._clock() - began)
        return float(np.median(found))

    def advance(self, rival: Rival, until: int) -> None:
        """Take steps with `rival` until so many are taken."""
        train_step = self._stepper(rival)
        while self.step < until:
            began = self._clock()
            if isinstance(rival, Centred) and reaches(self.step, self.steps, CROP_FROM):
                begin_crop(rival.centres)
            train_step(self.step / self.steps)
            self.step += 1
            self.seconds += self._clock() - began
            if self.step * CURVE_POINTS // self.steps > len(self.curve):
                look = self._judge(self.judged["validation"], None)
                found = {name: round(float(figures.ap.mean()), 5) for name, figures in look.items()}
                at = {"share": round(self.step / self.steps, 3), "seconds": round(self.seconds, 1)}
                self.curve.append(at | found)

    def _stepper(self, rival: Rival) -> Callable[[float], None]:
        """A function that takes the next optimizer step, given the share of the steps that have gone by."""
        targets_NK = centre_targets(self.train_images.labels, rival.no_finding)
        weights = {"contrastive_weight": rival.weight, "contrastive_from": 0.0, "no_finding": rival.no_finding}
        settings = self.settings.model_copy(update=weights)
        objective = Objective.build(settings, self.train_images.labels, STEPS, SHALLOW, self.device)
        return partial(self._train_step, rival, objective, rival.contrast(objective), targets_NK)

    def _train_step(
        self, rival: Rival, objective: Objective, contrast: Contrast, targets_NK: Tensor, share: float
    ) -> None:
        self.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * group.get("faster", 1.0) * rate_share(self.step, self.steps, WARM_UP)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        rows = self._rows_of(self.step)
        images = augment(normalised(self.train_images.pixels[rows], self.recipe, self.device), generator)
        labels_BC, targets_BK = self.train_images.labels[rows].to(self.device), targets_NK[rows].to(self.device)
        with self.autocast():
            crop = share >= CROP_FROM
            output = Output(*self.network(images.contiguous(memory_format=torch.channels_last), crop=crop))
        loss, _ = objective(output, labels_BC, contrast, share)
        loss.backward()
        rival.gather(output, targets_BK)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"no finite gradient at step {self.step} of seed {self.seed}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.averaged.update_parameters(self.network)
        rival.after_step()

    def _rows_of(self, step: int) -> Tensor:
        """The rows of a step's batch: every image once an epoch, but for those that fill no batch."""
        count = len(self.train_images.labels)
        epoch, place = divmod(step, count // BATCH)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
        return order[place * BATCH : (place + 1) * BATCH]

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def outputs(self, pixels: np.ndarray) -> Output:
        """What the average of the weights says of all images; heat and boxes are left out."""
        self.averaged.eval()
        z, joint = [], []
        with torch.inference_mode(), self.autocast():
            for start in range(0, len(pixels), 2 * BATCH):
                batch = normalised(pixels[start : start + 2 * BATCH], self.recipe, self.device)
                output = Output(*self.averaged.module(batch))
                z.append(output.z_PSBD.float().cpu())
                joint.append(output.joint_PBC.float().cpu())
        empty = z[0].new_zeros(0)
        return Output(torch.cat(z, 2), empty, torch.cat(joint, 1), empty, empty)

    def _judge(self, images: Images, centring: Mapping[str, Tensor] | None) -> dict[str, QueryFigures]:
        """Figures of every embedding; without `centring` the mean of these images themselves is taken out."""
        vectors = uncentred(self.outputs(images.pixels))
        named = centred(vectors, centring or {name: value.mean(0) for name, value in vectors.items()})
        asked, labels, patients = (
            column.to(self.device) for column in (_asked(images), images.labels, images.patient_codes)
        )
        found = {}
        for name in EVALUATED:
            gallery = named[name].to(self.device)
            found[name] = retrieve(
                *(gallery[asked], gallery, labels[asked], labels, patients[asked], patients), cutoffs=CUTOFFS
            )
        return found


def _asked(images: Images) -> Tensor:
    """Which images are queries, bool [N]: those with a finding."""
    return (images.labels == 1).any(1)


def _rows(figures: QueryFigures, images: Images) -> dict[str, Any]:
    """The figures of every query in few digits, and what cannot be taken from them."""
    asked = _asked(images)
    kept = figures.kept_Q
    macro = per_finding(figures, images.labels[asked])
    return {
        "patients": images.patient_codes[asked][kept].tolist(),
        "recall": ["".join(str(int(hit)) for hit in row) for row in figures.recall.tolist()],
        "hits_of_8": [round(8 * value) for value in figures.precision[:, -1].tolist()],
        "ap": [round(value, 4) for value in figures.ap.tolist()],
        "ndcg_at_8": [round(value, 3) for value in figures.ndcg[:, -1].tolist()],
        "macro_recall_at_8": round(float(macro.macro_recall[-1]), 5),
        "macro_map": round(float(macro.macro_ap), 5),
    }
