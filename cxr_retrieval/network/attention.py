"""Where the network looks, and the crop that follows from it.

B images, C findings, K channels, H W map or image sides, G sides of the grid on which components are found, h w output.

The crop has no gradient through its box, as in AG-CNN (Guan et al. 2018) and WS-DAN (Hu et al. 2019).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Screen(nn.Module):
    """Attention over channels, then over places (CBAM, Woo et al. 2018): it screens what the crop is drawn from.

    It learns although the crop gives it no gradient: the screened maps are what the steps embed and classify.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(8, channels // reduction)
        self.channel = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, features_BKHW: Tensor) -> Tensor:
        """Maps [B, K, H, W] -> the same, each value times a weight in (0, 1)."""
        summary_2BK = torch.stack([features_BKHW.mean((2, 3)), features_BKHW.amax((2, 3))])
        features_BKHW = features_BKHW * self.channel(summary_2BK).sum(0).sigmoid()[:, :, None, None]
        summary_B2HW = torch.cat([features_BKHW.mean(1, keepdim=True), features_BKHW.amax(1, keepdim=True)], dim=1)
        return features_BKHW * self.spatial(summary_B2HW).sigmoid()


def sum_activations(activations: list[Tensor], side: int) -> Tensor:
    """Class activation maps [B, C, H, W] of several steps -> their sum [B, C, side, side].

    They add up as they are: each is a share of its step's logit.
    """
    size = (side, side)
    return torch.stack(
        [F.interpolate(maps, size, mode="bilinear", align_corners=False, antialias=True) for maps in activations]
    ).sum(0)


def heat_map(activations_BCHW: Tensor, logits_BC: Tensor) -> Tensor:
    """Maps of every finding, weighted by the probability of that finding -> heat [B, H, W] in [0, 1], float32.

    Each image's heat has minimum 0 and maximum 1; a constant map gives zeros, which `crop_boxes` reads as the whole
    image.
    """
    # Not an einsum: autocast would make that bfloat16.
    heat_BHW = (activations_BCHW.float() * logits_BC.float().sigmoid()[:, :, None, None]).sum(1)
    rounding_B11 = 1e-6 * heat_BHW.abs().amax((1, 2), keepdim=True)  # a constant map may differ in its last bit
    heat_BHW = heat_BHW - heat_BHW.amin((1, 2), keepdim=True)
    top_B11 = heat_BHW.amax((1, 2), keepdim=True)
    return (heat_BHW / top_B11.where(top_B11 > 0, 1.0)).where(top_B11 > rounding_B11, 0.0)


def largest_component(mask_BHW: Tensor) -> Tensor:
    """The largest 8-connected component of each mask, as a mask of the same shape; an empty mask stays empty.

    Of equally large ones, it is the one whose last pixel in reading order comes first.

    A pixel's label names a pixel of its own component. Each round looks for a larger label around every pixel, hands it
    to the pixel that the old label names, and follows labels two steps on, until nothing changes: about six rounds,
    also for a snake that winds through the whole map.
    """
    B, H, W = mask_BHW.shape
    mask_BHW = mask_BHW.bool()
    # Labels are positions from 1 on, exact in float32 up to 4096 x 4096; 0 is the background.
    position_HW = torch.arange(1, H * W + 1, device=mask_BHW.device, dtype=torch.float32).view(H, W)
    labels_BHW = position_HW * mask_BHW
    while True:
        labels_BL = labels_BHW.flatten(1).long()
        found_BHW = F.max_pool2d(labels_BHW[:, None], 3, stride=1, padding=1)[:, 0] * mask_BHW
        if torch.equal(found_BHW, labels_BHW):
            break
        found_BL = found_BHW.flatten(1)
        table_BL = F.pad(found_BL, (1, 0)).scatter_reduce(1, labels_BL, found_BL, "amax")
        for _ in range(2):
            table_BL = table_BL.gather(1, table_BL.long())
        labels_BHW = table_BL[:, 1:].view(B, H, W)
    sizes_BL = torch.zeros(B, H * W + 1, device=mask_BHW.device, dtype=torch.long)
    sizes_BL.scatter_add_(1, labels_BL, (labels_BL > 0).long())
    return mask_BHW & (labels_BL == sizes_BL.argmax(1, keepdim=True)).view(B, H, W)


@torch.no_grad()
def crop_boxes(
    heat_BHW: Tensor, threshold: float, image_size: tuple[int, int], minimum: float, grid: int = 32
) -> Tensor:
    """The box of each image's largest hot region.

    The heat is interpolated to `grid` places a side (more if it has more); hot is what reaches `threshold` (0 to 1)
    times its maximum there. The largest component's bounding box is widened around its middle to `minimum` (0 to 1)
    of each side of the image and moved inside it. Where nothing is hot (all zeros, or not a number), it is the whole
    image.

    The largest component need not hold the hottest place: a wide warm region wins over a small hot one.

    Returns:
        boxes [B, 4], int64: x, y, width, height in pixels of an image of `image_size` (height, width).
    """
    side = max(grid, *heat_BHW.shape[1:])
    heat_BGG = F.interpolate(heat_BHW[:, None].float(), size=(side, side), mode="bilinear", align_corners=False)[:, 0]
    top_B11 = heat_BGG.amax((1, 2), keepdim=True)
    component_BGG = largest_component((heat_BGG >= threshold * top_B11) & (top_B11 > 0))
    height, width = image_size
    y_B, h_B = _extent(component_BGG.any(2), height, minimum)
    x_B, w_B = _extent(component_BGG.any(1), width, minimum)
    boxes_B4 = torch.stack([x_B, y_B, w_B, h_B], dim=1)
    return torch.where(component_BGG.any((1, 2))[:, None], boxes_B4, boxes_B4.new_tensor([0, 0, width, height]))


def _extent(hit_BG: Tensor, length: int, minimum: float) -> tuple[Tensor, Tensor]:
    """First pixel and number of pixels along one side, from the places hit on the grid."""
    places = hit_BG.shape[1]
    first_B = hit_BG.int().argmax(1)
    last_B = places - hit_BG.flip(1).int().argmax(1)
    start_B = first_B * length // places
    extent_B = (last_B * length + places - 1) // places - start_B
    wide_B = extent_B.clamp(min=min(length, math.ceil(minimum * length)))
    start_B = start_B - (wide_B - extent_B) // 2
    return torch.minimum(start_B.clamp(min=0), length - wide_B), wide_B


def crop_and_resize(images_B1HW: Tensor, boxes_B4: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut boxes (x, y, width, height in pixels, inside the image) and resize them bilinearly to `size` (height, width).

    Pixels are areas (`align_corners=False`). The box of a whole image at its own size gives back the very same values.
    There is no low-pass filter: a box that is made smaller is sampled, so a crop side below the usual box's is too low.

    Returns:
        images [B, 1, h, w], of the images' float type.
    """
    height, width = images_B1HW.shape[-2:]
    x_B1, y_B1, w_B1, h_B1 = boxes_B4.float().split(1, dim=1)
    y_Bh = _sample_places(y_B1, h_B1, size[0], height)
    x_Bw = _sample_places(x_B1, w_B1, size[1], width)
    grid_Bhw2 = torch.stack(torch.broadcast_tensors(x_Bw[:, None, :], y_Bh[:, :, None]), dim=-1)
    with torch.autocast(images_B1HW.device.type, enabled=False):
        crops_B1hw = F.grid_sample(
            images_B1HW.float(), grid_Bhw2, mode="bilinear", padding_mode="border", align_corners=False
        ).to(images_B1HW.dtype)
    if size != (height, width):
        return crops_B1hw
    # Rounding of the coordinates would blur a whole image by 1e-6 where its side is not a power of two.
    whole_B = (boxes_B4 == boxes_B4.new_tensor([0, 0, width, height])).all(1)
    return torch.where(whole_B[:, None, None, None], images_B1HW, crops_B1hw)


def _sample_places(start_B1: Tensor, extent_B1: Tensor, number: int, length: int) -> Tensor:
    """Middle of each output pixel, [B, number], in grid_sample's coordinates (-1 and 1 are the image's edges)."""
    middle_n = (torch.arange(number, device=start_B1.device, dtype=torch.float32) + 0.5) / number
    return (start_B1 + middle_n * extent_B1) * (2 / length) - 1
