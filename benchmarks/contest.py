"""One entry of a contest of losses: the same network on the same images with one loss, for a budget of time.

The progressive network, the cross-entropy beside, the schedule, the augmentation and the running average are those of
`jobs.train`; only the contrastive loss of each step and pass is another. Everything is in memory and in one process:
what differs between entries is the loss.

The budget is time of the CPU that the entry's one thread takes (of the clock on a GPU), so that a busy machine makes
an entry slow and not worse. Learning rate and schedule follow the share of the budget that has gone by.

N images, B of a batch, C findings, K classes of the centres, D dimensions, Q queries.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
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
from cxr_retrieval.network.progressive import Output, embeddings, uncentred
from cxr_retrieval.training.augmentation import augment
from cxr_retrieval.training.loop import optimizer_of, rate_share, running_average
from cxr_retrieval.training.model import build_network, normalised
from cxr_retrieval.training.objective import Contrast, Objective, gather_centres

NETWORK = NetworkSettings(normalisation="batch", whole_side=64, crop_side=64)
STEPS, DIMENSIONS = NETWORK.steps, NETWORK.dimensions
TABLES = 2 * STEPS
BATCH, RATE, PROXY_RATE, DECAY = 64, 1.5e-3, 10.0, 0.05  # the proxies' rate is a multiple of the network's
AVERAGING, WARM_UP, SHALLOW, CROP_FROM = 0.996, 0.1, 0.1, 0.6
CURVE_POINTS = 6  # looks at the validation patients while training, outside the budget
CENTRING_IMAGES = 2_000
EVALUATED = ("global", "combined", "profile")
CUTOFFS = (2, 4, 6, 8)


@dataclass(frozen=True)
class Images:
    """Prepared images in memory: `uint8 [N, H, W]`, labels `int8 [N, C]`, the patients' names."""

    pixels: np.ndarray
    labels: Tensor
    patients: np.ndarray


def read_images(corpora: list[Corpus], split: str) -> Images:
    """The images of one split of several archives, which share no patient."""
    pixels, labels, patients = [], [], []
    for number, corpus in enumerate(corpora):
        table = corpus.take(corpus.places(split), ["pixels", "findings", "unknown", "patient_id"])
        pixels.append(pixels_of(table, corpus.recipe.size).copy())
        labels.append(labels_of(table))
        patients += [f"{number}-{patient}" for patient in table["patient_id"].to_pylist()]
    return Images(np.concatenate(pixels), torch.as_tensor(np.concatenate(labels)), np.asarray(patients))


class Rival(nn.Module):
    """A contrastive loss of one table (step and pass) at a time, with whatever it keeps between steps.

    `weight` is its weight beside the cross-entropy; `start` the share of the budget after which it joins;
    `no_finding` what images without a finding are to it.
    """

    def __init__(self, weight: float, no_finding: NoFinding = "negatives_only", start: float = 0.4) -> None:
        super().__init__()
        self.weight, self.no_finding, self.start = weight, no_finding, start

    def contrast(self, objective: Objective) -> Contrast:
        """What the objective adds to the cross-entropy."""
        raise NotImplementedError

    def gather(self, output: Output, targets_BK: Tensor) -> None:
        """Take notice of a batch, before the optimizer's step."""

    def after_step(self) -> None:
        """Follow the optimizer's step."""


class Centred(Rival):
    """CCLoss: one centre per finding. Images without a finding would only be pulled together: it leaves them out."""

    def __init__(self, weight: float, classes: int, seed: int, rate: float, device: torch.device) -> None:
        super().__init__(weight, "ignore")
        self.centres = Centres(TABLES, classes, DIMENSIONS, rate, seed=seed, device=device)

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

    def __init__(self, weight: float, table: Callable[[int, int], nn.Module], classes: int) -> None:
        super().__init__(weight)
        self.tables = nn.ModuleList(table(classes, DIMENSIONS) for _ in range(TABLES))

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
    """What one run found. `figures` has, for each embedding and each set of queries, a row per query that counts."""

    steps: int
    images: int
    seconds: float
    curve: list[dict[str, float]] = field(default_factory=list)
    figures: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """Time that training may take, in seconds: of the CPU, or of the clock on a GPU."""

    seconds: float
    device: torch.device

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def run(
    make: Callable[[int, torch.device], Rival],
    settings: LossSettings,
    seed: int,
    minutes: float,
    train: Images,
    judged: Mapping[str, Images],
    recipe: Recipe,
) -> Entry:
    """Train with one loss, then judge the average of its weights on every set of images in `judged`.

    `judged["validation"]` is also looked at while training. Every set is a gallery to its own queries (*all*).
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    network = build_network(NETWORK, len(FINDINGS)).to(device)
    rival = make(len(FINDINGS), device).to(device)
    targets_NK = centre_targets(train.labels, rival.no_finding)
    weighed = settings.model_copy(
        update={
            "contrastive_weight": rival.weight,
            "contrastive_from": rival.start,
            "no_finding": rival.no_finding,
        }
    )
    objective = Objective.build(weighed, train.labels, STEPS, SHALLOW, device)
    contrast = rival.contrast(objective)
    averaged = AveragedModel(network, multi_avg_fn=running_average(AVERAGING), use_buffers=True)
    optimizer = optimizer_of(network, RATE, DECAY)
    if proxies := list(rival.parameters()):
        optimizer.add_param_group({"params": proxies, "weight_decay": 0.0, "faster": PROXY_RATE})
    generator = torch.Generator().manual_seed(seed)
    batches = _batches(len(train.labels), generator)
    budget = Budget(60.0 * minutes, device)
    entry, spent = Entry(0, 0, 0.0), 0.0
    while spent < budget.seconds:
        began, share = budget.clock(), spent / budget.seconds
        network.train()
        for group in optimizer.param_groups:
            group["lr"] = RATE * group.get("faster", 1.0) * rate_share(spent, budget.seconds, WARM_UP)
        rows = next(batches)
        images = augment(normalised(train.pixels[rows], recipe, device), generator)
        labels_BC, targets_BK = train.labels[rows].to(device), targets_NK[rows].to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            output = Output(*network(images.contiguous(memory_format=torch.channels_last), crop=share >= CROP_FROM))
        loss, _ = objective(output, labels_BC, contrast, share)
        loss.backward()
        rival.gather(output, targets_BK)
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        averaged.update_parameters(network)
        rival.after_step()
        entry.steps, entry.images = entry.steps + 1, entry.images + len(rows)
        spent += budget.clock() - began
        if len(entry.curve) < int(CURVE_POINTS * spent / budget.seconds):
            look = _judge(averaged.module, judged["validation"], recipe, None, device)
            point = {"seconds": round(spent, 1)} | {name: _mean_ap(found) for name, found in look.items()}
            due = int(CURVE_POINTS * spent / budget.seconds)  # several after a step that took long
            entry.curve += [point] * (min(due, CURVE_POINTS) - len(entry.curve))
    entry.seconds = round(spent, 1)
    means = _centring(averaged.module, train, recipe, device)
    for where, images_there in judged.items():
        found = _judge(averaged.module, images_there, recipe, means, device)
        entry.figures[where] = {name: _rows(figures, images_there) for name, figures in found.items()}
    return entry


def _batches(count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of one batch after the other, every image once an epoch."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count // BATCH * BATCH].view(-1, BATCH)


def _outputs(network: nn.Module, pixels: np.ndarray, recipe: Recipe, device: torch.device) -> Output:
    """What the network says of all images; heat and boxes are left out."""
    network.eval()
    z, joint = [], []
    with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16):
        for start in range(0, len(pixels), 2 * BATCH):
            output = Output(*network(normalised(pixels[start : start + 2 * BATCH], recipe, device)))
            z.append(output.z_PSBD.float().cpu())
            joint.append(output.joint_PBC.float().cpu())
    empty = z[0].new_zeros(0)
    return Output(torch.cat(z, 2), empty, torch.cat(joint, 1), empty, empty)


def _centring(network: nn.Module, train: Images, recipe: Recipe, device: torch.device) -> dict[str, Tensor]:
    """Means of the embeddings over an even part of the training images."""
    pixels = train.pixels[:: max(1, len(train.pixels) // CENTRING_IMAGES)]
    return {name: value.mean(0) for name, value in uncentred(_outputs(network, pixels, recipe, device)).items()}


def _judge(
    network: nn.Module, images: Images, recipe: Recipe, centring: Mapping[str, Tensor] | None, device: torch.device
) -> dict[str, QueryFigures]:
    """Figures of every embedding; without `centring` the mean of these images themselves is taken out."""
    outputs = _outputs(network, images.pixels, recipe, device)
    if centring is None:
        centring = {name: value.mean(0) for name, value in uncentred(outputs).items()}
    named = embeddings(outputs, centring)
    asked = (images.labels == 1).any(1)
    patients = torch.as_tensor(np.unique(images.patients, return_inverse=True)[1])
    return {
        name: retrieve(
            *(named[name][asked], named[name], images.labels[asked], images.labels, patients[asked], patients),
            cutoffs=CUTOFFS,
        )
        for name in EVALUATED
    }


def _mean_ap(figures: QueryFigures) -> float:
    return round(float(figures.ap.mean()), 5)


def _rows(figures: QueryFigures, images: Images) -> dict[str, Any]:
    """The figures of every query in few digits, and what cannot be taken from them."""
    asked = (images.labels == 1).any(1)
    kept = figures.kept_Q
    macro = per_finding(figures, images.labels[asked])
    return {
        "patients": images.patients[asked.numpy()][kept.numpy()].tolist(),
        "recall": ["".join(str(int(hit)) for hit in row) for row in figures.recall.tolist()],
        "hits_of_8": [round(8 * value) for value in figures.precision[:, -1].tolist()],
        "ap": [round(value, 4) for value in figures.ap.tolist()],
        "ndcg_at_8": [round(value, 4) for value in figures.ndcg[:, -1].tolist()],
        "macro_recall_at_8": round(float(macro.macro_recall[-1]), 5),
        "macro_map": round(float(macro.macro_ap), 5),
    }
