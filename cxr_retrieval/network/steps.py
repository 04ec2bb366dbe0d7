"""One progressive step: what a stage of the backbone says about an image.

B images, C findings, D dimensions, K channels of the stage, N channels of the neck, H W map sides.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr_retrieval.network.backbones import Normalisation, new_norm
from cxr_retrieval.network.norm import SyncedStandardise

WHOLE, CROP = 0, 1
# Findings are rare: a classifier that begins at even odds spends its first epochs on nothing but its bias (the prior of
# Lin et al. 2017, focal loss, section 4.1; -2 is 12%, a common finding's share after its weight in the loss).
PRIOR_LOGIT = -2.0
PASSES = 2


class StepOutput(NamedTuple):
    """`z_BD` float32 of unit length; `logits_BC` and `pooled_BN` float32; `map_BNHW` the neck's map."""

    z_BD: Tensor
    logits_BC: Tensor
    pooled_BN: Tensor
    map_BNHW: Tensor


class Step(nn.Module):
    """Neck, pooled embedding and finding logits of one stage (PMG, Du et al. 2020).

    The neck is a 1x1 convolution, a normalisation and a ReLU: the stages already look around with 3x3 convolutions, and
    PMG's second, 3x3 one costs more here than the rest of all necks. Pooled is the average of mean and maximum, so that
    the classifier's weights, applied at each place of the map, are the class activation map (Zhou et al. 2016).

    Weights are shared by both passes. Embedding statistics are not: a crop's embeddings lie elsewhere than those of the
    whole image, and each pass has centres of its own.
    """

    def __init__(
        self, channels: int, dimensions: int, findings: int, normalisation: Normalisation = "group", width: int = 128
    ) -> None:
        super().__init__()
        self.neck = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False), new_norm(width, normalisation), nn.ReLU(inplace=True)
        )
        self.classifier = nn.Linear(width, findings)
        nn.init.constant_(self.classifier.bias, PRIOR_LOGIT)
        self.embed = nn.Linear(width, dimensions, bias=False)  # the standardisation would take a bias out again
        self.standardise = nn.ModuleList(SyncedStandardise(dimensions) for _ in range(PASSES))

    def forward(self, features_BKHW: Tensor, which: int = WHOLE) -> StepOutput:
        """A stage's map [B, K, H, W] of pass `which` (`WHOLE` or `CROP`) -> `StepOutput`."""
        map_BNHW = self.neck(features_BKHW)
        # The heads are cheap and decide distances: float32 under autocast too.
        with torch.autocast(features_BKHW.device.type, enabled=False):
            flat_BNL = map_BNHW.flatten(2).float()
            pooled_BN = 0.5 * (flat_BNL.mean(2) + flat_BNL.amax(2))
            z_BD = F.normalize(self.standardise[which](self.embed(pooled_BN)), dim=1)
            return StepOutput(z_BD, self.classifier(pooled_BN), pooled_BN, map_BNHW)

    def activations(self, map_BNHW: Tensor) -> Tensor:
        """The neck's map -> class activation maps [B, C, H, W], float32, without the bias."""
        with torch.autocast(map_BNHW.device.type, enabled=False):
            return F.conv2d(map_BNHW.float(), self.classifier.weight[:, :, None, None])
