"""Augmentation that respects anatomy: a chest is never mirrored, because the heart's side is a sign.

B images, H W sides in pixels.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TURN_DEGREES, SHIFT, SCALE = 7.0, 0.06, 0.10  # shift as a share of the side, scale as a share of the size
CONTRAST, BRIGHTNESS = 0.20, 0.20  # in units of the normalised image's standard deviation


def by_lane(
    images_B1HW: Tensor, dice: Sequence[torch.Generator], change: Callable[[Tensor, torch.Generator], Tensor]
) -> Tensor:
    """Change the images of each lane, an equal share of the batch each, with the dice of that lane.

    An image is then changed alike however the lanes are dealt to workers.
    """
    changed = [change(piece, die) for piece, die in zip(images_B1HW.chunk(len(dice)), dice, strict=True)]
    return torch.cat(changed).contiguous(memory_format=torch.channels_last)


def augment(images_B1HW: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, shift, scale and re-expose each normalised image [B, 1, H, W] at random; beyond the border is the edge."""

    def draw(spread: float) -> Tensor:
        return (torch.rand(len(images_B1HW), generator=generator) * 2 - 1) * spread

    angle_B, scale_B = draw(math.radians(TURN_DEGREES)), 1.0 + draw(SCALE)
    cos_B, sin_B = torch.cos(angle_B) * scale_B, torch.sin(angle_B) * scale_B
    shift_B2 = torch.stack([draw(2 * SHIFT), draw(2 * SHIFT)], dim=1)
    affine_B23 = torch.cat(
        [torch.stack([torch.stack([cos_B, -sin_B], 1), torch.stack([sin_B, cos_B], 1)], 1), shift_B2[:, :, None]], dim=2
    )
    contrast_B, brightness_B = 1.0 + draw(CONTRAST), draw(BRIGHTNESS)
    device, shape = images_B1HW.device, list(images_B1HW.shape)
    grid_BHW2 = F.affine_grid(affine_B23.to(device), shape, align_corners=False)
    moved = F.grid_sample(images_B1HW, grid_BHW2, mode="bilinear", padding_mode="border", align_corners=False)
    return moved * contrast_B.to(device)[:, None, None, None] + brightness_B.to(device)[:, None, None, None]
