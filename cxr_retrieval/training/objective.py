"""The one sum that training minimises: CCLoss and cross-entropy over steps and passes, weighed by a schedule.

B images, C findings, D dimensions, P passes (whole image, crop), S steps (shallow to deep), T = P * S tables.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cxr_retrieval.config import LossSettings
from cxr_retrieval.losses.ccloss import cc_loss, multi_label_cross_entropy
from cxr_retrieval.losses.centres import Centres
from cxr_retrieval.losses.targets import ABSENT, PRESENT, UNKNOWN, centre_targets, class_weights, positive_weights
from cxr_retrieval.network.progressive import Output
from cxr_retrieval.network.steps import PASSES

Contrast = Callable[[int, Tensor, Tensor], Tensor]  # number of the table, embeddings [B, D], targets [B, K] -> scalar
BY_TABLE = "by_table"
LEAST_WEIGHT = 0.1  # of a step that has not had its turn: every parameter keeps a gradient


def step_weights(progress: float, steps: int, share: float) -> list[float]:
    """Weights of the steps [S] at `progress` in [0, 1]: the first is full at once, all are after `share` of training.

    Shallow steps first, as in PMG (Du et al. 2020): step s = 1 to S - 1 rises while (s - 1) / S to s / S of `share`
    goes by, so that for the last S-th all train together.
    """
    if share == 0:
        return [1.0] * steps
    ramp = [min(1.0, max(0.0, progress / share * steps - (step - 1))) for step in range(steps)]
    return [max(LEAST_WEIGHT, weight) for weight in ramp]


@dataclass(frozen=True)
class Objective:
    """A contrastive loss plus multi-label cross-entropy, of every step and pass and of the joint classifier.

    `learnt_K`: which classes of the centres some training image has, bool. The others are unknown to the contrastive
    loss: taken for absent, they would push all images from centres that nothing moves. `taught_C`: which findings some
    training image is known to have or to lack, and that are none of `training.unseen`: the others are unknown to the
    cross-entropy too, which would teach to deny what must not be seen.
    """

    settings: LossSettings
    steps: int
    learnt_K: Tensor
    taught_C: Tensor
    centre_weights_K: Tensor
    positive_weights_C: Tensor
    shallow_share: float

    @classmethod
    def build(
        cls,
        settings: LossSettings,
        labels_NC: Tensor,
        steps: int,
        shallow_share: float,
        device: torch.device,
        unseen: Sequence[int] = (),
    ) -> "Objective":
        """What is learnt, and the weights of rare findings, come once, from the labels of all training images, int8
        [N, C]; `unseen` are columns of these."""
        counts_K = (centre_targets(labels_NC, settings.no_finding) == PRESENT).sum(0)
        present_C, absent_C = (labels_NC == PRESENT).sum(0), (labels_NC == ABSENT).sum(0)
        learnt_K, taught_C = counts_K > 0, present_C + absent_C > 0
        for known in (learnt_K, taught_C):
            known[list(unseen)] = False
        return cls(
            settings,
            steps,
            learnt_K.to(device),
            taught_C.to(device),
            class_weights(counts_K, settings.class_balance).to(device),
            positive_weights(present_C, absent_C, settings.class_balance).to(device),
            shallow_share,
        )

    def __call__(
        self, output: Output, labels_BC: Tensor, contrast: Contrast, progress: float, *, shallow_only: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum, and its parts without gradient for the log: scalars, and `by_table` [3, T] with CCLoss and
        cross-entropy of every step and pass, unweighted, and 1 where there were any.

        `contrast` is `ccloss`, or a loss to compare it with.

        `shallow_only` is for shuffled images: a crop of them and the deepest step (of several) mean nothing.
        """
        loss = self.settings
        targets_BK, labels_BC = self.targets(labels_BC), labels_BC.masked_fill(~self.taught_C, UNKNOWN)
        contrastive_weight = loss.contrastive_weight * (progress >= loss.contrastive_from)
        weights = step_weights(progress, self.steps, self.shallow_share)
        total = output.z_PSBD.new_zeros(())
        sums = {"ccloss": total.clone(), "cross_entropy": total.clone()}
        by_table = output.z_PSBD.new_zeros(3, PASSES * self.steps)  # sums of both losses, and how often they were taken
        scale = 0.0
        for which in range(len(output.z_PSBD)):
            for step, weight in enumerate(weights):
                if shallow_only and (which > 0 or 0 < step == self.steps - 1):
                    weight = 0.0
                z_BD, logits_BC = output.z_PSBD[which, step], output.logits_PSBC[which, step]
                apart = contrast(which * self.steps + step, z_BD, targets_BK)
                entropy = self._entropy(logits_BC, labels_BC)
                total = total + weight * (contrastive_weight * apart + loss.classification_weight * entropy)
                sums["ccloss"] += weight * apart.detach()
                sums["cross_entropy"] += weight * entropy.detach()
                scale += weight
                if not shallow_only:
                    table = which * self.steps + step
                    by_table[:, table] = torch.stack([apart.detach(), entropy.detach(), torch.ones_like(apart)])
            joint = 0.0 if shallow_only else weights[-1]
            total = total + joint * loss.classification_weight * self._entropy(output.joint_PBC[which], labels_BC)
        parts = {name: value / scale for name, value in sums.items()}
        return total / scale, {"loss": (total / scale).detach(), **parts, BY_TABLE: by_table}

    def targets(self, labels_BC: Tensor) -> Tensor:
        """What the centres aim at, int8 [B, K]: `centre_targets`, where a class that is not learnt is unknown."""
        # In this order: an image is No Finding by the labels of its archive.
        return centre_targets(labels_BC, self.settings.no_finding).masked_fill(~self.learnt_K, UNKNOWN)

    def ccloss(self, centres: Centres) -> Contrast:
        """CCLoss against one table of `centres` at a time, as the settings have it."""
        loss = self.settings

        def contrast(table: int, z_BD: Tensor, targets_BK: Tensor) -> Tensor:
            return cc_loss(
                z_BD,
                centres.vectors_TCD[table],
                targets_BK,
                self.centre_weights_K,
                form=loss.form,
                margin=loss.margin,
                negative_weight=loss.negative_weight,
                temperature=loss.temperature,
            )

        return contrast

    def _entropy(self, logits_BC: Tensor, labels_BC: Tensor) -> Tensor:
        return multi_label_cross_entropy(logits_BC, labels_BC, self.positive_weights_C, self.settings.smoothing)


def begin_crop(centres: Centres) -> None:
    """With the first batch of crops: their centres begin where those of the whole images are by then."""
    steps = len(centres.vectors_TCD) // PASSES
    centres.begin_as(slice(steps, None), slice(0, steps))


def gather_centres(output: Output, targets_BK: Tensor, centres: Centres) -> None:
    """Add a micro-batch to the sums of every table of centres."""
    steps = output.z_PSBD.shape[1]
    for which in range(len(output.z_PSBD)):
        for step in range(steps):
            centres.accumulate(which * steps + step, output.z_PSBD[which, step], targets_BK)
