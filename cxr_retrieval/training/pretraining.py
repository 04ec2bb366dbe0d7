"""Pretraining without labels, by jigsaw puzzles: what a step says of a shuffled image is what it says of the image.

In the manner of FG-SSL (Park and Ryu 2024, arXiv 2308.05770): puzzles from fine to coarse, each the task of one
progressive step, the finest that of the shallowest; then whole images, the task of all steps side by side. Agreement is
that of Barlow Twins over the batch, so no image is pushed from another.

FG-SSL takes all these turns with every batch, an optimizer step each. Here they go round from one optimizer step to the
next: an epoch has as many steps as one with labels, and costs two passes an image, as a step with a crop does.

B images, E dimensions of the steps side by side, S steps, H W sides in pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cxr_retrieval.losses.correlation import barlow_twins
from cxr_retrieval.network.progressive import Output, jigsaw
from cxr_retrieval.network.steps import WHOLE
from cxr_retrieval.training.augmentation import augment, by_lane


class Turn(NamedTuple):
    """`patches` a side of the puzzle (1 is the whole image), and the `steps` of the network whose task it is."""

    patches: int
    steps: slice


def turn_of(number: int, steps: int) -> Turn:
    """The turn of optimizer step `number`, from 0, of a network with so many steps: 2^S patches a side for the first
    step, down to 2 for the last one, then whole images for all of them."""
    place = number % (steps + 1)
    return Turn(2 ** (steps - place), slice(place, place + 1) if place < steps else slice(steps))


def two_views(images_B1HW: Tensor, patches: int, dice: Sequence[torch.Generator]) -> Tensor:
    """Images augmented once, then the same images augmented anew and shuffled: [2B, 1, H, W], channels last.

    `dice` are those of the lanes: an image is changed alike however many workers there are.
    """
    whole = by_lane(images_B1HW, dice, augment)
    shuffled = by_lane(images_B1HW, dice, lambda piece, die: jigsaw(augment(piece, die), patches, die))
    return torch.cat([whole, shuffled]).contiguous(memory_format=torch.channels_last)


def agreement(output: Output, steps: slice) -> Tensor:
    """The loss of a turn, a scalar, from what the network says of `two_views`: that of the whole batch on every worker.

    Both views are one forward, because DDP allows one before a backward.
    """
    z_2BE = output.z_PSBD[WHOLE, steps].transpose(0, 1).flatten(1)
    # Every output with a gradient enters the loss, or DDP waits for it.
    idle = output.z_PSBD.sum() + output.logits_PSBC.sum() + output.joint_PBC.sum()
    one_BE, other_BE = z_2BE.chunk(2)
    return barlow_twins(one_BE, other_BE) + 0.0 * idle
