"""Agreement of two views of the same images, without labels and without negatives (Zbontar et al. 2021, Barlow Twins).

C is the cross-correlation of the two views' embeddings over the batch, dimension by dimension. It shall be the
identity: the same dimension says the same of both views (1 on the diagonal), and no two dimensions say the same twice
(0 off it), which is what keeps all images from one point:

    C_ij = cov(a_i, b_j) / (std(a_i) std(b_j)),    L = 1/D [ sum_i (1 - C_ii)^2 + l sum_{i != j} C_ij^2 ]

Shapes: B images, D dimensions.
"""

import torch
from torch import Tensor

from cxr_retrieval.network.collective import sum_over_workers


def barlow_twins(one_BD: Tensor, other_BD: Tensor, redundancy: float = 0.005) -> Tensor:
    """The loss L above of the *global* batch, a scalar >= 0 in float32: 0 where C is the identity, near 1 where the
    views have nothing in common. Divided by D, it keeps its size whatever the number of dimensions.

    Rows of the two are views of the same image. `redundancy` l >= 0 is the published one.

    It takes its sums over the images of all workers, in one collective call, so every worker gets the same value and
    calls it equally often; averaged over workers, as DDP does, the gradient is that of one worker with all images.
    Micro-batches have no such sums: each has its own C. Raises ValueError where the shapes differ.
    """
    if one_BD.shape != other_BD.shape or one_BD.dim() != 2:
        raise ValueError(f"two views must have one shape [B, D], got {list(one_BD.shape)} and {list(other_BD.shape)}")
    correlation_DD = _cross_correlation(one_BD, other_BD)
    diagonal_D = correlation_DD.diagonal()
    agreement = (1.0 - diagonal_D).square().sum()
    repetition = correlation_DD.square().sum() - diagonal_D.square().sum()
    return ((agreement + redundancy * repetition) / len(diagonal_D)).float()


def _cross_correlation(one_BD: Tensor, other_BD: Tensor) -> Tensor:
    """C over the images of all workers, float64 [D, D]; 0 for a dimension with one value throughout.

    In float64, plain sums of products keep their digits, and how images are dealt to workers is lost in the rounding.
    """
    with torch.autocast(one_BD.device.type, enabled=False):
        one_BD, other_BD = one_BD.double(), other_BD.double()
        dimensions = one_BD.shape[1]
        products_DD = one_BD.T @ other_BD
        rows_4D = [one_BD.sum(0), other_BD.sum(0), one_BD.square().sum(0), other_BD.square().sum(0)]
        count_1D = one_BD.new_full((1, dimensions), len(one_BD))
        means = sum_over_workers(torch.cat([products_DD, torch.stack(rows_4D), count_1D]))
        means = means[:-1] / means[-1].detach()
        mean_product_DD, (one_D, other_D, one_square_D, other_square_D) = means[:dimensions], means[dimensions:]
        covariance_DD = mean_product_DD - one_D[:, None] * other_D
        scale_D, other_scale_D = (
            # Without the small number the gradient of a dimension without variance is infinite.
            ((square_D - mean_D.square()).clamp(min=0) + 1e-8).rsqrt()
            for square_D, mean_D in ((one_square_D, one_D), (other_square_D, other_D))
        )
        return covariance_DD * scale_D[:, None] * other_scale_D
