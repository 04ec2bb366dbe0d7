"""The losses that CCLoss is compared with, for images with several findings. They exist for the comparison only.

Two images are *alike* where they share a class that is present in both; *unlike* where they share none and no class
that is present in one is unknown in the other; other pairs take no part. An image is never its own partner. With
exactly one class an image each loss is the published one, as `pytorch-metric-learning` has it (tested against it).

Pairs inside a batch cost B^2 D; proxies, which are learnt by gradient, cost B C D as centres do.

Shapes: B images, C classes, D dimensions. `z_BD` are embeddings of unit length, `targets_BC` integers in {-1, 0, 1}
from `centre_targets`. Every loss is a scalar in float32 and 0, with a gradient of 0, where no pair takes part.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr_retrieval.losses.targets import ABSENT, PRESENT, UNKNOWN


def alike_and_unlike(targets_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Which pairs of a batch are alike and which unlike: two `bool [B, B]`, false on the diagonal."""
    present_BC, unknown_BC = (targets_BC == PRESENT).float(), (targets_BC == UNKNOWN).float()
    shared_BB = present_BC @ present_BC.T > 0
    possible_BB = present_BC @ unknown_BC.T > 0
    other_BB = ~torch.eye(len(targets_BC), dtype=torch.bool, device=targets_BC.device)
    return shared_BB & other_BB, ~(shared_BB | possible_BB | possible_BB.T) & other_BB


def pair_contrast(z_BD: Tensor, targets_BC: Tensor, margin: float = 1.0) -> Tensor:
    """Contrastive loss of all pairs of a batch (Hadsell et al. 2006, eq. 4): alike pairs by their squared distance,
    unlike ones by max(0, margin - distance)^2, each kind averaged over its pairs."""
    alike_BB, unlike_BB = alike_and_unlike(targets_BC)
    squared_BB = (2.0 - 2.0 * _cosines(z_BD)).clamp(min=0)
    hinge_BB = F.relu(margin - (squared_BB + 1e-12).sqrt()).square()
    return _pair_mean(squared_BB, alike_BB) + _pair_mean(hinge_BB, unlike_BB)


def semi_hard_triplets(z_BD: Tensor, targets_BC: Tensor, margin: float = 0.2) -> Tensor:
    """Triplet loss with semi-hard mining (Schroff et al. 2015, eqs. 1 and 4): the mean of
    d(a, p) - d(a, n) + margin over the triplets of a batch with d(a, p) < d(a, n) < d(a, p) + margin."""
    alike_BB, unlike_BB = alike_and_unlike(targets_BC)
    distance_BB = ((2.0 - 2.0 * _cosines(z_BD)).clamp(min=0) + 1e-12).sqrt()
    gap_BBB = distance_BB[:, None, :] - distance_BB[:, :, None]
    mined_BBB = alike_BB[:, :, None] & unlike_BB[:, None, :] & (gap_BBB > 0) & (gap_BBB < margin)
    return _pair_mean(margin - gap_BBB, mined_BBB)


def multi_similarity(
    z_BD: Tensor, targets_BC: Tensor, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5, mining: float = 0.1
) -> Tensor:
    """Multi-similarity loss with its mining (Wang et al. 2019, eqs. 11 to 13).

    An alike pair is mined where it is less similar than the most similar unlike one of its anchor plus `mining`, an
    unlike one where it is more similar than the least similar alike one minus `mining`.
    """
    alike_BB, unlike_BB = alike_and_unlike(targets_BC)
    cosine_BB = _cosines(z_BD)
    nearest_unlike_B1 = cosine_BB.detach().masked_fill(~unlike_BB, -torch.inf).amax(1, keepdim=True)
    farthest_alike_B1 = cosine_BB.detach().masked_fill(~alike_BB, torch.inf).amin(1, keepdim=True)
    pulled_BB = alike_BB & (cosine_BB < nearest_unlike_B1 + mining)
    pushed_BB = unlike_BB & (cosine_BB > farthest_alike_B1 - mining)
    pull_B = _log1p_sum_exp(-alpha * (cosine_BB - base), pulled_BB) / alpha
    push_B = _log1p_sum_exp(beta * (cosine_BB - base), pushed_BB) / beta
    return (pull_B + push_B).mean()


def supervised_contrast(z_BD: Tensor, targets_BC: Tensor, temperature: float = 0.1) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, eq. 2), alike images weighed by the number of classes shared.

    L = -1/A sum_a sum_p s_ap / (sum_p s_ap) log( e^{z_a.z_p/t} / sum_{k alike or unlike} e^{z_a.z_k/t} ), over the A
    anchors with an alike image; s is the number of classes shared.
    """
    alike_BB, unlike_BB = alike_and_unlike(targets_BC)
    present_BC = (targets_BC == PRESENT).float()
    shared_BB = (present_BC @ present_BC.T) * alike_BB
    logits_BB = (_cosines(z_BD) / temperature).masked_fill(~(alike_BB | unlike_BB), -torch.inf)
    surprise_BB = logits_BB.logsumexp(1, keepdim=True) - logits_BB
    anchors_B = alike_BB.any(1)
    weighed_B = (surprise_BB.where(alike_BB, 0.0) * shared_BB).sum(1) / shared_BB.sum(1).clamp(min=1)
    return weighed_B.sum() / anchors_B.sum().clamp(min=1)


class ProxyAnchor(nn.Module):
    """Proxy-anchor loss (Kim et al. 2020, eq. 4): each proxy is an anchor that pulls the images of its class and pushes
    those without it, the hard ones most. One table of proxies, `[C, D]`."""

    def __init__(self, classes: int, dimensions: int, alpha: float = 32.0, margin: float = 0.1) -> None:
        super().__init__()
        self.alpha, self.margin = alpha, margin
        self.proxies_CD = _new_proxies(classes, dimensions)

    def forward(self, z_BD: Tensor, targets_BC: Tensor) -> Tensor:
        cosine_CB = F.normalize(self.proxies_CD, dim=1) @ z_BD.float().T
        present_CB, absent_CB = (targets_BC == PRESENT).T, (targets_BC == ABSENT).T
        pull_C = _log1p_sum_exp(-self.alpha * (cosine_CB - self.margin), present_CB)
        push_C = _log1p_sum_exp(self.alpha * (cosine_CB + self.margin), absent_CB)
        return pull_C.sum() / present_CB.any(1).sum().clamp(min=1) + push_C.mean()


class MultiLabelProxies(nn.Module):
    """A multi-label proxy loss in the manner of Xing et al. 2022 (arXiv 2211.12185): an image is assigned to the
    proxies of all its classes at once. Reconstructed from its abstract, on Proxy-NCA++ (Teh et al. 2020, eq. 6):

    L = -1/A sum_i 1/|P_i| sum_{j in P_i} log( e^{z_i.p_j/t} / sum_{k in P_i or N_i} e^{z_i.p_k/t} ),

    over the A images with a class. One table of proxies, `[C, D]`.
    """

    def __init__(self, classes: int, dimensions: int, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = temperature
        self.proxies_CD = _new_proxies(classes, dimensions)

    def forward(self, z_BD: Tensor, targets_BC: Tensor) -> Tensor:
        cosine_BC = z_BD.float() @ F.normalize(self.proxies_CD, dim=1).T
        present_BC = targets_BC == PRESENT
        logits_BC = (cosine_BC / self.temperature).masked_fill(targets_BC == UNKNOWN, -torch.inf)
        surprise_BC = (logits_BC.logsumexp(1, keepdim=True) - logits_BC).where(present_BC, 0.0)
        loss_B = surprise_BC.sum(1) / present_BC.sum(1).clamp(min=1)
        return loss_B.sum() / present_BC.any(1).sum().clamp(min=1)


def _new_proxies(classes: int, dimensions: int) -> nn.Parameter:
    return nn.Parameter(F.normalize(torch.randn(classes, dimensions), dim=1))


def _cosines(z_BD: Tensor) -> Tensor:
    return z_BD.float() @ z_BD.float().T


def _pair_mean(values: Tensor, members: Tensor) -> Tensor:
    return values.where(members, 0.0).sum() / members.sum().clamp(min=1)


def _log1p_sum_exp(exponents: Tensor, members: Tensor) -> Tensor:
    """log(1 + sum of e^exponent over each row's members): 0 for a row without any."""
    exponents = exponents.masked_fill(~members, -torch.inf)
    return torch.cat([exponents.new_zeros(len(exponents), 1), exponents], dim=1).logsumexp(1)
