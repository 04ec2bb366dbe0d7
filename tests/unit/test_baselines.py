"""The losses that CCLoss is compared with: as published where an image has one class, and right where it has several.

B images, C classes, D dimensions.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import losses as published
from pytorch_metric_learning import miners
from torch import Tensor

from cxr_retrieval.losses import baselines

B, C, D = 12, 5, 8
PAIRWISE = [
    baselines.pair_contrast,
    baselines.semi_hard_triplets,
    baselines.multi_similarity,
    baselines.supervised_contrast,
]
PROXIES = [baselines.ProxyAnchor, baselines.MultiLabelProxies]


def unit(seed: int, count: int = B) -> Tensor:
    return F.normalize(torch.randn(count, D, generator=torch.Generator().manual_seed(seed)), dim=1)


def one_class(seed: int) -> tuple[Tensor, Tensor]:
    """A class each: as numbers [B], and as targets [B, C]."""
    numbers_B = torch.randint(0, C, (B,), generator=torch.Generator().manual_seed(seed))
    return numbers_B, F.one_hot(numbers_B, C).to(torch.int8)


def several(seed: int) -> Tensor:
    return torch.randint(-1, 2, (B, C), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def pairs_of(targets_BC: Tensor) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Alike and unlike pairs, one by one."""
    alike, unlike = set(), set()
    for i, one in enumerate(targets_BC.tolist()):
        for j, other in enumerate(targets_BC.tolist()):
            both = list(zip(one, other, strict=True))
            if i == j:
                continue
            if (1, 1) in both:
                alike.add((i, j))
            elif not {(1, -1), (-1, 1)} & set(both):
                unlike.add((i, j))
    return alike, unlike


@settings(max_examples=30)
@given(st.integers(0, 10**6))
def test_pairs_that_an_unknown_finding_leaves_open_take_no_part(seed):
    targets_BC = several(seed)
    alike_BB, unlike_BB = baselines.alike_and_unlike(targets_BC)
    found = [{(i, j) for i, j in kind.nonzero().tolist()} for kind in (alike_BB, unlike_BB)]
    assert tuple(found) == pairs_of(targets_BC)


# With one class an image: the published losses, as another library has them


@pytest.mark.parametrize("seed", range(3))
def test_with_one_class_an_image_pairs_contrast_as_published(seed):
    numbers_B, targets_BC = one_class(seed)
    z_BD = unit(seed)
    distances_BB = torch.cdist(z_BD, z_BD)
    alike, unlike = pairs_of(targets_BC)
    pulled = sum(float(distances_BB[i, j]) ** 2 for i, j in alike) / len(alike)
    pushed = sum(max(0.0, 1.0 - float(distances_BB[i, j])) ** 2 for i, j in unlike) / len(unlike)
    assert float(baselines.pair_contrast(z_BD, targets_BC)) == pytest.approx(pulled + pushed, abs=1e-4)
    assert {(i, j) for i, j in alike} == {
        (i, j) for i in range(B) for j in range(B) if i != j and numbers_B[i] == numbers_B[j]
    }


@pytest.mark.parametrize("seed", range(3))
def test_with_one_class_an_image_triplets_are_mined_and_weighed_as_published(seed):
    numbers_B, targets_BC = one_class(seed)
    z_BD = unit(seed)
    mined = miners.TripletMarginMiner(margin=0.2, type_of_triplets="semihard")(z_BD, numbers_B)
    expected = published.TripletMarginLoss(margin=0.2)(z_BD, numbers_B, mined)
    torch.testing.assert_close(baselines.semi_hard_triplets(z_BD, targets_BC), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_with_one_class_an_image_multi_similarity_is_as_published(seed):
    numbers_B, targets_BC = one_class(seed)
    z_BD = unit(seed)
    mined = miners.MultiSimilarityMiner(epsilon=0.1)(z_BD, numbers_B)
    expected = published.MultiSimilarityLoss(alpha=2, beta=50, base=0.5)(z_BD, numbers_B, mined)
    torch.testing.assert_close(baselines.multi_similarity(z_BD, targets_BC), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_with_one_class_an_image_supervised_contrast_is_as_published(seed):
    numbers_B, targets_BC = one_class(seed)
    z_BD = unit(seed)
    expected = published.SupConLoss(temperature=0.1)(z_BD, numbers_B)
    torch.testing.assert_close(baselines.supervised_contrast(z_BD, targets_BC), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_with_one_class_an_image_proxy_anchor_is_as_published(seed):
    numbers_B, targets_BC = one_class(seed)
    z_BD, ours = unit(seed), baselines.ProxyAnchor(C, D)
    theirs = published.ProxyAnchorLoss(C, D, margin=0.1, alpha=32)
    theirs.proxies.data.copy_(ours.proxies_CD.data.T if theirs.proxies.shape[0] == D else ours.proxies_CD.data)
    torch.testing.assert_close(ours(z_BD, targets_BC), theirs(z_BD, numbers_B), atol=1e-4, rtol=1e-4)


def test_proxies_of_all_classes_of_an_image_are_pulled_at_once():
    targets_BC = torch.tensor([[1, 1, 0, -1, 0], [0, 0, 0, 0, 0]], dtype=torch.int8)
    z_BD, loss = unit(1, 2), baselines.MultiLabelProxies(C, D, temperature=0.5)
    cosines = (z_BD[0] @ F.normalize(loss.proxies_CD, dim=1).T / 0.5).tolist()
    total = sum(math.exp(cosines[j]) for j in (0, 1, 2, 4))  # the fourth is unknown
    expected = -(math.log(math.exp(cosines[0]) / total) + math.log(math.exp(cosines[1]) / total)) / 2
    assert float(loss(z_BD, targets_BC).detach()) == pytest.approx(expected, rel=1e-4)  # the second image has no class


def test_images_that_share_more_findings_pull_more():
    targets_BC = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.int8)
    z_BD = unit(3, 4)
    scores = (z_BD[0] @ z_BD.T / 0.1).tolist()
    total = sum(math.exp(score) for score in scores[1:])
    of_first = (2 * math.log(total / math.exp(scores[1])) + math.log(total / math.exp(scores[2]))) / 3
    others = [baselines.supervised_contrast(z_BD, targets_BC)]
    z_BD = z_BD.clone().requires_grad_()
    loss = baselines.supervised_contrast(z_BD, targets_BC)
    loss.backward()
    assert torch.isfinite(z_BD.grad).all()
    by_hand = [of_first]
    for anchor, weights in ((1, {0: 2, 2: 1}), (2, {0: 1, 1: 1})):
        scores = (z_BD[anchor] @ z_BD.T / 0.1).tolist()
        total = sum(math.exp(score) for place, score in enumerate(scores) if place != anchor)
        surprise = sum(weight * math.log(total / math.exp(scores[place])) for place, weight in weights.items())
        by_hand.append(surprise / sum(weights.values()))
    assert float(others[0].detach()) == pytest.approx(sum(by_hand) / 3, rel=1e-3)


# All of them


@pytest.mark.parametrize(
    "loss",
    [*PAIRWISE, *(kind(C, D) for kind in PROXIES)],
    ids=lambda each: getattr(each, "__name__", type(each).__name__),
)
@pytest.mark.parametrize("targets", ["several", "no class", "one image", "all the same"])
def test_value_and_gradient_are_finite_whatever_the_batch(loss, targets):
    count = 1 if targets == "one image" else B
    targets_BC = several(4)[:count] if targets in ("several", "one image") else torch.zeros(B, C, dtype=torch.int8)
    if targets == "all the same":
        targets_BC[:, 0] = 1
    z_BD = unit(5, count).requires_grad_()
    value = loss(z_BD, targets_BC)
    value.backward()
    assert torch.isfinite(value)
    assert value >= 0
    assert torch.isfinite(z_BD.grad).all()


@pytest.mark.parametrize("loss", PAIRWISE, ids=lambda each: each.__name__)
def test_a_step_against_the_gradient_brings_alike_images_nearer_than_unlike_ones(loss):
    torch.manual_seed(0)
    targets_BC = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1], [1, 1, 0]], dtype=torch.int8)
    x_BD = torch.randn(6, D, requires_grad=True)
    optimizer = torch.optim.Adam([x_BD], 0.05)
    alike_BB, unlike_BB = baselines.alike_and_unlike(targets_BC)

    def gap() -> float:
        cosines_BB = (F.normalize(x_BD, dim=1) @ F.normalize(x_BD, dim=1).T).detach()
        return float(cosines_BB[alike_BB].mean() - cosines_BB[unlike_BB].mean())

    before = gap()
    for _ in range(60):
        optimizer.zero_grad()
        loss(F.normalize(x_BD, dim=1), targets_BC).backward()
        optimizer.step()
    assert gap() > before + 0.2
