"""The progressive network: several depths of a backbone, looking at the whole image and at a crop of it.

B images, C findings, D dimensions, P passes (whole image, crop), S steps (shallow to deep), H W map or image sides.
"""

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr_retrieval.network.attention import Screen, crop_and_resize, crop_boxes, heat_map, sum_activations
from cxr_retrieval.network.backbones import Normalisation, build_backbone
from cxr_retrieval.network.norm import UsualMaps
from cxr_retrieval.network.steps import CROP, PRIOR_LOGIT, WHOLE, Step, StepOutput


class Output(NamedTuple):
    """What one forward gives; float32, and plain tensors, so that DDP finds them.

    Attributes:
        z_PSBD: embeddings of unit length.
        logits_PSBC: finding logits of each step.
        joint_PBC: finding logits of all steps together (PMG's classifier over the concatenated features).
        heat_BHW: where pass 1 looked, in [0, 1], 32 places a side; no gradient.
        boxes_B4: what pass 2 saw: x, y, width, height in pixels of the images given, int64.
    """

    z_PSBD: Tensor
    logits_PSBC: Tensor
    joint_PBC: Tensor
    heat_BHW: Tensor
    boxes_B4: Tensor


class _Pass(NamedTuple):
    z_SBD: Tensor
    logits_SBC: Tensor
    joint_BC: Tensor
    neck_maps: list[Tensor]


ARCHITECTURE = 2  # raise it with every change that gives the same settings or weights another output
HEAT_SIDE = 32
# Least places a side of a map that says where a finding is. On phantoms of 64 pixels the maps of 4 x 4 and 2 x 2 places
# name the findings best and point away from them: their places see all of the image, padding included.
_FINE = 8


class ProgressiveNetwork(nn.Module):
    """Steps as in PMG (Du et al. 2020), a crop as in AG-CNN (Guan et al. 2018) and WS-DAN (Hu et al. 2019).

    Pass 1 sees the whole image. Its maps are screened by attention; what those with at least 8 places a side (else the
    finest one) show of the findings, beyond what they show on average, is the heat. The heat gives the box, and pass 2
    sees the box enlarged to the image's size, with the same weights. Both passes are one forward, because DDP allows
    one forward before a backward.

    Under DDP with `find_unused_parameters=False` every output with a gradient must enter the loss: weigh what is not
    wanted by 0 instead of leaving it out.

    Args:
        backbone: one of `backbones.BACKBONES`.
        findings: C, at least 1.
        steps: S, 1 to 4: the last S stages of the backbone.
        dimensions: D of each step's embedding.
        crop_threshold: share of the heat's maximum that counts as hot, above 0 and below 1.
        crop_minimum: least side of the crop as a share of the image's, above 0 and at most 1; 1 is no crop.
        whole_side: side in pixels that pass 1 sees the image at; None is the image's own.
        crop_side: side in pixels that pass 2 sees the crop at, cut from the image as it is given; None is the image's
            own. A coarse look at the whole and a fine one at the part cost less than two fine ones.
        normalisation: see `build_backbone`; the layers that are new here have group norm under `frozen_batch`.
        weights: state dict for the backbone, see `build_backbone`.

    Raises:
        ValueError: an argument out of its range, or weights of another network.
    """

    def __init__(
        self,
        backbone: str,
        findings: int,
        steps: int = 3,
        dimensions: int = 128,
        crop_threshold: float = 0.5,
        crop_minimum: float = 0.4,
        whole_side: int | None = None,
        crop_side: int | None = None,
        normalisation: Normalisation = "group",
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if findings < 1 or dimensions < 1:
            raise ValueError(f"findings and dimensions must be at least 1, got {findings} and {dimensions}")
        if not 0 < crop_threshold < 1:
            raise ValueError(f"crop_threshold must lie between 0 and 1, got {crop_threshold}")
        if not 0 < crop_minimum <= 1:
            raise ValueError(f"crop_minimum must be above 0 and at most 1, got {crop_minimum}")
        self.crop_threshold = crop_threshold
        self.crop_minimum = crop_minimum
        self.whole_side = whole_side
        self.crop_side = crop_side
        self.backbone = build_backbone(backbone, steps, weights, normalisation)
        self.screens = nn.ModuleList(Screen(channels) for channels in self.backbone.channels)
        stages = [Step(channels, dimensions, findings, normalisation) for channels in self.backbone.channels]
        self.steps = nn.ModuleList(stages)
        self.joint = nn.Linear(sum(step.classifier.in_features for step in stages), findings)
        nn.init.constant_(self.joint.bias, PRIOR_LOGIT)
        self.usual = UsualMaps(findings, HEAT_SIDE)

    def embedders(self) -> list[Tensor]:
        """The parameters that only the embeddings depend on: no cross-entropy teaches them."""
        return [cast(Step, step).embed.weight for step in self.steps]

    def silence(self, silent_C: Tensor) -> None:
        """Take away what the classifiers make of some findings, bool [C], before training that teaches nothing of them:
        they stay so. Random weights would count for as much in scores, profile and heat as what is learnt."""
        with torch.no_grad():
            for layer in (self.joint, *(cast(Step, step).classifier for step in self.steps)):
                layer.weight[silent_C] = 0.0

    def _pass(self, images_B1HW: Tensor, which: int) -> _Pass:
        maps = [screen(stage) for screen, stage in zip(self.screens, self.backbone(images_B1HW), strict=True)]
        outputs: list[StepOutput] = [step(stage, which) for step, stage in zip(self.steps, maps, strict=True)]
        with torch.autocast(images_B1HW.device.type, enabled=False):
            joint_BC = self.joint(torch.cat([output.pooled_BN for output in outputs], dim=1))
        return _Pass(
            torch.stack([output.z_BD for output in outputs]),
            torch.stack([output.logits_BC for output in outputs]),
            joint_BC,
            [output.map_BNHW for output in outputs],
        )

    def forward(self, images_B1HW: Tensor, boxes_B4: Tensor | None = None, *, crop: bool = True) -> Output:
        """Images [B, 1, H, W], float, as the decode recipe normalises them -> `Output` of both passes.

        `boxes_B4` (x, y, width, height in pixels, inside the image) replaces the network's own crop, for a search by
        region. Without `crop` there is no second pass, P is 1: for the part of training in which a crop means nothing.
        """
        whole_B1HW = images_B1HW
        if self.whole_side:
            side = (self.whole_side, self.whole_side)
            whole_B1HW = F.interpolate(images_B1HW, side, mode="bilinear", align_corners=False, antialias=True)
        whole = self._pass(whole_B1HW, WHOLE)
        image_size = (images_B1HW.shape[2], images_B1HW.shape[3])
        with torch.no_grad():
            fine = [step for step, map_BNHW in enumerate(whole.neck_maps) if min(map_BNHW.shape[2:]) >= _FINE] or [0]
            activations = [cast(Step, self.steps[step]).activations(whole.neck_maps[step]) for step in fine]
            heat_BHW = heat_map(self.usual(sum_activations(activations, HEAT_SIDE)), whole.joint_BC)
            if boxes_B4 is None:
                boxes_B4 = crop_boxes(heat_BHW, self.crop_threshold, image_size, self.crop_minimum)
        passes = [whole]
        if crop:
            crop_size = (self.crop_side, self.crop_side) if self.crop_side else image_size
            passes.append(self._pass(crop_and_resize(images_B1HW, boxes_B4, crop_size), CROP))
        return Output(
            torch.stack([each.z_SBD for each in passes]),
            torch.stack([each.logits_SBC for each in passes]),
            torch.stack([each.joint_BC for each in passes]),
            heat_BHW,
            boxes_B4,
        )


def embedding_sizes(steps: int, dimensions: int, findings: int) -> dict[str, int]:
    """Numbers of each embedding of a network, by its name, in the order in which they are reported."""
    joined = steps * dimensions
    sizes = {f"step{number}": dimensions for number in range(1, steps + 1)}
    sizes |= {"global": joined, "local": joined, "combined": 2 * joined, "profile": findings}
    return sizes | {"global_profile": joined + findings}


def embedding_names(steps: int) -> tuple[str, ...]:
    """Names of the embeddings of a network with so many steps, in the order in which they are reported."""
    return tuple(embedding_sizes(steps, 1, 1))


def uncentred(output: Output) -> dict[str, Tensor]:
    """The vectors [B, ...] whose means over the training set are the `centring` of `embeddings`, by name.

    The last embedding is made of two others and has no vector of its own.

    They have unit length, all but the profile: its scores keep their scale, because an image's distance from the mean
    score (how abnormal it is) would be lost if each were brought to unit length before the mean is subtracted.
    """
    P, S, B, D = output.z_PSBD.shape
    z_PBSD = output.z_PSBD.detach().float().transpose(1, 2)
    joined_PBE = F.normalize(z_PBSD.reshape(P, B, S * D), dim=2)
    vectors = [z_PBSD[WHOLE, :, step] for step in range(S)]
    vectors += [joined_PBE[WHOLE], joined_PBE[CROP], F.normalize(torch.cat(list(joined_PBE), dim=1), dim=1)]
    vectors += [output.joint_PBC.detach().float().mean(0)]
    return dict(zip(embedding_names(S)[:-1], vectors, strict=True))


def embeddings(output: Output, centring: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Named embeddings of unit length, float32 and without gradient, in the order of `embedding_names`.

      - `step1` to `stepS` [B, D]: each step, whole image.
      - `global`, `local` [B, S * D]: all steps of the whole image, of the crop.
      - `combined` [B, 2 * S * D]: both.
      - `profile` [B, C]: finding scores, the mean of both passes' joint logits (an average of two views of which each
        sees what the other misses; logits, because probabilities of rare findings all lie near 0).
      - `global_profile` [B, S * D + C]: `global` and `profile` side by side, of equal weight: how an image looks, and
        what it seems to show.

    Args:
        centring: the mean of each vector of `uncentred` over the training set, subtracted before unit length.

    Raises:
        ValueError: `centring` lacks a name.
    """
    vectors = uncentred(output)
    return centred(vectors, dict.fromkeys(vectors, torch.zeros(())) if centring is None else centring)


def centred(vectors: Mapping[str, Tensor], centring: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`embeddings` from the vectors of `uncentred`."""
    if missing := [name for name in vectors if name not in centring]:
        raise ValueError(f"centring lacks {', '.join(missing)}")
    named = {name: F.normalize(vector - centring[name].to(vector), dim=1) for name, vector in vectors.items()}
    return named | {"global_profile": F.normalize(torch.cat([named["global"], named["profile"]], dim=1), dim=1)}


def jigsaw(images_B1HW: Tensor, patches: int, generator: torch.Generator | None = None) -> Tensor:
    """Cut each image into `patches` x `patches` and shuffle them, each image in its own order (PMG, Du et al. 2020).

    It makes shallow steps learn from parts. A crop of a shuffled image means nothing: weigh pass 2 and the deeper steps
    by 0 in such a batch. `generator` lives on the CPU, so that every device shuffles alike.

    Raises:
        ValueError: a side is no multiple of `patches`.
    """
    B, C, H, W = images_B1HW.shape
    n = patches
    if n < 1 or H % n or W % n:
        raise ValueError(f"images of {H} x {W} do not divide into {n} x {n} patches")
    order_BL = torch.rand(B, n * n, generator=generator).argsort(1).to(images_B1HW.device)
    parts_BLChw = images_B1HW.view(B, C, n, H // n, n, W // n).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    parts_BLChw = parts_BLChw[torch.arange(B, device=images_B1HW.device)[:, None], order_BL]
    return parts_BLChw.unflatten(1, (n, n)).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)
