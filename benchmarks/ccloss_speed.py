"""What the loss of an epoch costs over N embeddings: CCLoss against all pairs, and pairs and triplets in a batch.

  python -m benchmarks.ccloss_speed

Only the arithmetic of the losses, forward and backward to the embeddings, with the update of the centres for CCLoss: no
network runs. D numbers an embedding, batches of B. All N^2 pairs are taken in blocks of rows, each pair once, as one
process without a GPU can hold them. Beyond the largest N that is measured they are extrapolated as N^2: their number is
that, and a fitted exponent, which is shown beside, would add what small N cost for other reasons.

Image passes are another matter, and arithmetic needs no clock for them: an epoch with CCLoss, or with pairs or
triplets inside batches, passes each of N images once; a siamese network that is shown all pairs passes N (N - 1)
images, and one that is shown as many sampled pairs as there are images passes 2 N.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.claim import Claim, publish
from cxr_retrieval.config import LossSettings
from cxr_retrieval.console import show_table
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.losses.ccloss import cc_loss
from cxr_retrieval.losses.centres import Centres
from cxr_retrieval.losses.targets import centre_targets

SIZES = (1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000, 86_524)  # the last: images that NIH's lists train on
MOST_PAIRED = 16_000  # the largest N whose N^2 pairs are measured: 34 times as many at 86,524
DIMENSIONS, BATCH, BLOCK, ROUNDS = 128, 64, 256, 3
MARGIN, TARGET = 1.0, 100.0
LOSS = LossSettings()  # as `jobs.train` has it where nothing else is said


def embeddings(count: int) -> tuple[Tensor, Tensor]:
    """Unit vectors [N, D] and labels [N, C] in {0, 1}, about as rare as NIH's: 0.2% (Hernia) to 18% (Infiltration)."""
    generator = torch.Generator().manual_seed(count)
    z_ND = F.normalize(torch.randn(count, DIMENSIONS, generator=generator), dim=1)
    share_C = torch.logspace(np.log10(0.002), np.log10(0.18), len(FINDINGS))
    return z_ND, (torch.rand(count, len(FINDINGS), generator=generator) < share_C).to(torch.int8)


def ccloss_epoch(z_ND: Tensor, labels_NC: Tensor) -> None:
    targets_NK = centre_targets(labels_NC, LOSS.no_finding)
    centres = Centres(1, targets_NK.shape[1], DIMENSIONS, rate=LOSS.centre_rate)
    for z_BD, targets_BK in zip(z_ND.split(BATCH), targets_NK.split(BATCH), strict=True):
        z_BD = z_BD.clone().requires_grad_()
        cc_loss(
            z_BD, centres.vectors_TCD[0], targets_BK, form=LOSS.form, temperature=LOSS.temperature, margin=LOSS.margin
        ).backward()
        centres.accumulate(0, z_BD.detach(), targets_BK)
        centres.reduce()
        centres.apply()


def contrastive(z_AD: Tensor, labels_AC: Tensor, z_GD: Tensor, labels_GC: Tensor) -> Tensor:
    """Contrastive loss (Hadsell et al. 2006) of each image of A with each of G: alike where they share a finding."""
    squared_AG = torch.addmm((z_AD.square().sum(1)[:, None] + z_GD.square().sum(1)), z_AD, z_GD.T, alpha=-2.0).clamp(
        min=0
    )
    alike_AG = (labels_AC.float() @ labels_GC.float().T) > 0
    hinge_AG = F.relu(MARGIN - (squared_AG + 1e-12).sqrt()).square()
    return torch.where(alike_AG, squared_AG, hinge_AG).sum() / z_AD.shape[0]


def all_pairs_epoch(z_ND: Tensor, labels_NC: Tensor) -> None:
    """Each pair once: a block of rows with itself and with all behind it."""
    for start in range(0, len(z_ND), BLOCK):
        z_AD = z_ND[start : start + BLOCK].clone().requires_grad_()
        z_GD = z_ND[start:].clone().requires_grad_()
        contrastive(z_AD, labels_NC[start : start + BLOCK], z_GD, labels_NC[start:]).backward()


def batch_pairs_epoch(z_ND: Tensor, labels_NC: Tensor) -> None:
    for z_BD, labels_BC in zip(z_ND.split(BATCH), labels_NC.split(BATCH), strict=True):
        z_BD = z_BD.clone().requires_grad_()
        contrastive(z_BD, labels_BC, z_BD, labels_BC).backward()


def batch_triplets_epoch(z_ND: Tensor, labels_NC: Tensor) -> None:
    """All triplets of a batch (Schroff et al. 2015): an anchor, one that shares a finding, one that does not."""
    for z_BD, labels_BC in zip(z_ND.split(BATCH), labels_NC.split(BATCH), strict=True):
        z_BD = z_BD.clone().requires_grad_()
        squared_BB = (2.0 - 2.0 * z_BD @ z_BD.T).clamp(min=0)
        alike_BB = (labels_BC.float() @ labels_BC.float().T) > 0
        alike_BB = alike_BB & ~torch.eye(len(z_BD), dtype=torch.bool)
        valid_BBB = alike_BB[:, :, None] & ~alike_BB[:, None, :]
        over_BBB = F.relu(squared_BB[:, :, None] - squared_BB[:, None, :] + MARGIN)
        (over_BBB * valid_BBB).sum().div(len(z_BD)).backward()


EPOCHS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "CCLoss": ccloss_epoch,
    "pairs in a batch": batch_pairs_epoch,
    "triplets in a batch": batch_triplets_epoch,
    "all pairs": all_pairs_epoch,
}


def seconds(epoch: Callable[[Tensor, Tensor], None], z_ND: Tensor, labels_NC: Tensor) -> float:
    began = time.perf_counter()
    epoch(z_ND, labels_NC)
    return time.perf_counter() - began


def quadratic(measured: float, size: int) -> float:
    """Seconds of all pairs of so many embeddings, from those of the largest N that is measured."""
    return measured * (size / MOST_PAIRED) ** 2


def fitted(found: dict[int, float]) -> tuple[float, float]:
    """Exponent and factor of seconds = factor x N^exponent, by least squares of the logarithms."""
    exponent, intercept = np.polyfit(np.log(list(found)), np.log(list(found.values())), 1)
    return float(exponent), float(np.exp(intercept))


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, dict[int, list[float]]] = {name: {} for name in EPOCHS}
    ratios = []
    for _ in range(ROUNDS):
        for size in SIZES:
            z_ND, labels_NC = embeddings(size)
            for name, epoch in EPOCHS.items():
                if name != "all pairs" or size <= MOST_PAIRED:
                    found[name].setdefault(size, []).append(seconds(epoch, z_ND, labels_NC))
        ratios.append(quadratic(found["all pairs"][MOST_PAIRED][-1], SIZES[-1]) / found["CCLoss"][SIZES[-1]][-1])
    medians = {name: {size: float(np.median(s)) for size, s in by_size.items()} for name, by_size in found.items()}
    exponents = {name: fitted(by_size) for name, by_size in medians.items()}
    _show(medians, exponents)
    claim = Claim.of(
        f"loss arithmetic of an epoch of CCLoss, N = {SIZES[-1]:,}, D = {DIMENSIONS}, batches of {BATCH}",
        f"all N^2 pairs, extrapolated from N = {max(medians['all pairs']):,}",
        TARGET,
        ratios,
        **{f"exponent of {name}": exponent for name, (exponent, _) in exponents.items()},
        **{f"seconds of {name}": by_size[SIZES[-1]] for name, by_size in medians.items() if SIZES[-1] in by_size},
    )
    publish("ccloss_speed", [replace(claim, details={"seconds by N": medians})])


def _show(medians: dict[str, dict[int, float]], exponents: dict[str, tuple[float, float]]) -> None:
    rows: list[list[object]] = []
    for size in SIZES:
        cells: list[object] = [f"{size:,}"]
        for by_size in medians.values():
            told = f"{by_size[size]:.3f}" if size in by_size else f"{quadratic(by_size[MOST_PAIRED], size):,.0f} (N^2)"
            cells.append(told)
        rows.append(cells)
    rows.append(["exponent", *(f"{exponents[name][0]:.2f}" for name in medians)])
    show_table("Seconds of an epoch's loss, one thread", ["N", *medians], rows)


if __name__ == "__main__":
    main()
