"""What is taken out of embeddings and maps because all images share it, with the statistics of the global batch.

B images, C findings, D dimensions, G sides of a map, N images of all workers.
"""

import torch
from torch import Tensor, nn

from cxr_retrieval.network.collective import sum_over_workers


class SyncedStandardise(nn.Module):
    """Normalisation over the batch without an affine part: mean 0 and variance 1 in every dimension.

    Embeddings trained against overlapping class centres share one large direction, and centres collapse onto it;
    taking the mean out of every dimension before unit length removes that cone.

    In training the statistics are those of the *global* batch: 1 and N workers agree in values and gradients, whatever
    the sizes of the workers' batches. It is a collective call then: every worker makes it, equally often.
    In evaluation they are the running ones, and a row does not depend on its companions. Always float32.

    A dimension with one value throughout the batch comes out as 0: a global batch of one image is all zeros.
    """

    running_mean: Tensor
    running_var: Tensor
    updates: Tensor

    def __init__(self, dimensions: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(dimensions))
        self.register_buffer("running_var", torch.ones(dimensions))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def forward(self, x_BD: Tensor) -> Tensor:
        """Embeddings [B, D] of any float type -> standardised [B, D] float32."""
        x_BD = x_BD.float()
        if not self.training:
            return (x_BD - self.running_mean) * torch.rsqrt(self.running_var + self.eps)
        # One collective instead of two: sums about a point all workers share, near enough to the mean to keep digits.
        shift_D = self.running_mean.clone()
        shifted_BD = x_BD - shift_D
        count = x_BD.new_full((1,), x_BD.shape[0])
        sums = sum_over_workers(torch.cat([shifted_BD.sum(0), shifted_BD.square().sum(0), count]))
        dimensions = x_BD.shape[1]
        count = sums[-1].detach()
        mean_D = sums[:dimensions] / count
        var_D = (sums[dimensions:-1] / count - mean_D.square()).clamp(min=0)
        self._update(mean_D.detach() + shift_D, var_D.detach() * count / (count - 1).clamp(min=1))
        return (shifted_BD - mean_D) * torch.rsqrt(var_D + self.eps)

    @torch.no_grad()
    def _update(self, mean_D: Tensor, unbiased_var_D: Tensor) -> None:
        self.updates += 1
        # A plain average at first: the initial 0 and 1 say nothing about the data and leave no trace.
        weight = (1.0 / self.updates).clamp(min=self.momentum)
        self.running_mean.lerp_(mean_D, weight)
        self.running_var.lerp_(unbiased_var_D, weight)


class UsualMaps(nn.Module):
    """The maps of every finding minus what they show on average: where this image differs from the others.

    Without it a class activation map speaks mostly of where a finding is in general, the heart for all of them.

    The mean runs over training, a plain one at first and of about the last ten batches later, over the images of all
    workers: a collective call in training, which every worker makes equally often. No gradient.
    """

    mean: Tensor
    updates: Tensor

    def __init__(self, findings: int, side: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(findings, side, side))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def forward(self, maps_BCGG: Tensor) -> Tensor:
        """Maps [B, C, G, G] -> the same minus the running mean, float32. In training it takes these in first."""
        maps_BCGG = maps_BCGG.float()
        if self.training:
            sums = sum_over_workers(torch.cat([maps_BCGG.sum(0).flatten(), maps_BCGG.new_full((1,), len(maps_BCGG))]))
            self.updates += 1
            weight = (1.0 / self.updates).clamp(min=self.momentum)
            self.mean.lerp_((sums[:-1] / sums[-1]).view_as(self.mean), weight)
        return maps_BCGG - self.mean
