"""Promises of the parts together: network, objective and centres learn what they are told, on images never seen."""

import torch
from torch import Tensor

from cxr_retrieval.config import LossSettings
from cxr_retrieval.evaluation.retrieval import retrieve
from cxr_retrieval.losses.centres import Centres
from cxr_retrieval.losses.targets import centre_targets
from cxr_retrieval.network.progressive import ProgressiveNetwork, uncentred
from cxr_retrieval.training.objective import Objective, gather_centres
from cxr_retrieval.training.optimisation import running_average

FINDINGS, SIDE, STEPS, BATCH = 3, 64, 60, 16
CORNERS = ((8, 8), (8, 40), (40, 8))


def radiographs(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise, and for each finding present a bright square in a corner of its own; labels int8 [count, FINDINGS]."""
    labels = (torch.rand(count, FINDINGS, generator=generator) < 0.4).to(torch.int8)
    images = torch.randn(count, 1, SIDE, SIDE, generator=generator)
    for row, present in enumerate(labels):
        for finding in present.nonzero().flatten().tolist():
            top, left = CORNERS[finding]
            images[row, 0, top : top + 16, left : left + 16] += 2.5
    return images, labels


def precision_at_1(network: ProgressiveNetwork, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of the queries whose nearest other image shares a finding, by embedding, centred."""
    network.eval()
    with torch.inference_mode():
        vectors = uncentred(network(images))
    query = (labels == 1).any(1)
    own = torch.arange(len(labels))
    return {
        name: float(retrieve(v[query], v, labels[query], labels, own[query], own, cutoffs=(1,)).precision[:, 0].mean())
        for name, value in vectors.items()
        for v in [torch.nn.functional.normalize(value - value.mean(0), dim=1)]
    }


def test_training_brings_images_with_the_same_finding_together():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = ProgressiveNetwork("resnet18_half", FINDINGS, steps=2, dimensions=16, normalisation="batch")
    images, labels = radiographs(STEPS * BATCH, generator)
    fresh = radiographs(200, generator)
    before = precision_at_1(network, *fresh)
    losses = LossSettings(contrastive_from=0.3)
    objective = Objective.build(losses, labels, 2, 0.1, torch.device("cpu"))
    classes = centre_targets(labels[:1], losses.no_finding).shape[1]
    centres = Centres(tables=4, classes=classes, dimensions=16, rate=losses.centre_rate, seed=0)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    seen: list[dict[str, float]] = []
    for step in range(STEPS):
        network.train()
        batch = slice(step * BATCH, (step + 1) * BATCH)
        output = network(images[batch])
        loss, parts = objective(output, labels[batch], objective.ccloss(centres), step / STEPS)
        optimizer.zero_grad()
        loss.backward()
        gather_centres(output, centre_targets(labels[batch], losses.no_finding), centres)
        centres.reduce()
        optimizer.step()
        centres.apply()
        seen.append({name: float(value) for name, value in parts.items() if value.dim() == 0})
    after = precision_at_1(network, *fresh)
    for part in ("cross_entropy", "ccloss"):
        assert sum(s[part] for s in seen[-10:]) < 0.8 * sum(s[part] for s in seen[:10]), part
    for name in ("step2", "global", "combined", "profile"):
        assert after[name] > 0.9, (name, before, after)
        assert 1 - after[name] < 0.5 * (1 - before[name]), (name, before, after)


def test_the_average_of_the_weights_forgets_the_first_steps_and_then_moves_by_the_decay():
    average, count = torch.zeros(1), torch.zeros(1, dtype=torch.long)
    follow = running_average(0.9)
    for step in range(1, 200):
        follow([average, count], [torch.ones(1), torch.full((1,), step)], torch.tensor(step))
        if step == 1:
            assert torch.allclose(average, torch.tensor([1 - 2 / 11]))
    assert count.item() == 199
    assert torch.allclose(average, torch.ones(1))
    follow([average], [torch.zeros(1)], torch.tensor(200))
    assert torch.allclose(average, torch.tensor([0.9]))


def test_without_a_decay_the_average_is_the_weights_of_the_step():
    average = torch.zeros(3)
    running_average(0.0)([average], [torch.arange(3.0)], 1)
    assert torch.equal(average, torch.arange(3.0))
