"""One entry of a contest of losses, on noise: what is shared, what learns, what is judged."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import contest
from benchmarks.contest import (
    BATCH,
    EVALUATED,
    LEARNERS,
    SMALL,
    Centred,
    Contest,
    Images,
    Learner,
    Nothing,
    Paired,
    Proxied,
    Rival,
)
from cxr_retrieval.config import LossSettings
from cxr_retrieval.corpus.decoding import Recipe
from cxr_retrieval.losses import baselines

STEPS, SIDE = 5, 64
CPU = torch.device("cpu")


def noise(count: int, seed: int) -> Images:
    rng = np.random.default_rng(seed)
    labels = torch.as_tensor((rng.random((count, 14)) < 0.15).astype(np.int8))
    pixels = rng.integers(0, 255, (count, SIDE, SIDE), dtype=np.uint8)
    return Images(pixels, labels, np.array([f"p{number // 2}" for number in range(count)]))


def started(learner: Learner = LEARNERS[SMALL]) -> Contest:
    judged = {"validation": noise(30, 1), "test": noise(40, 2)}
    return Contest(LossSettings(), 0, STEPS, noise(BATCH + 6, 0), judged, Recipe(SIDE, "letterbox"), learner)


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("trunk") / "trunk.pt"
    started().grow_trunk(file)
    return file


def ran(trunk: Path, rival: Rival) -> tuple[Contest, Any]:
    run = started()
    return run, run.run(lambda _: rival, trunk)


def test_every_entry_begins_where_the_trunk_ends_and_takes_the_same_steps(trunk: Path) -> None:
    grown = torch.load(trunk, weights_only=True)
    run, entry = ran(trunk, Nothing())
    assert (entry.steps, entry.images) == (STEPS, STEPS * BATCH)
    assert entry.curve[: len(grown["curve"])] == grown["curve"]
    assert entry.seconds > grown["seconds"]
    again = ran(trunk, Nothing())[1]
    assert again.figures == entry.figures, "a seed gives the same run"
    assert any(not torch.equal(value, grown["network"][name]) for name, value in run.network.state_dict().items())


def test_a_learner_from_imagenet_is_judged_like_one_from_nothing(trunk: Path, tmp_path: Path) -> None:
    learner = LEARNERS["efficientnet_lite0"]
    file = tmp_path / "trunk.pt"
    started(learner).grow_trunk(file)
    run = started(learner)
    entry = run.run(lambda device: Centred(0.1, LossSettings(), 0, device), file)
    first = next(run.network.parameters())
    fresh = next(started(learner).network.parameters())
    untaught = replace(learner, network=learner.network.model_copy(update={"weights": None}))
    nothing = next(started(untaught).network.parameters())
    assert torch.allclose(first, fresh, atol=0.01), "it went on from there, at a small rate"
    assert not torch.equal(first, fresh)
    assert not torch.allclose(first, nothing, atol=0.05), "it began with what ImageNet taught"
    plain = ran(trunk, Nothing())[1]
    assert {place: set(names) for place, names in entry.figures.items()} == {
        place: set(names) for place, names in plain.figures.items()
    }


@pytest.mark.parametrize("table", [baselines.ProxyAnchor, baselines.MultiLabelProxies])
def test_proxies_learn_ten_times_as_fast_as_the_network(trunk: Path, table: Any) -> None:
    rival = Proxied(0.1, table)
    before = [proxies.detach().clone() for proxies in rival.parameters()]
    run, _ = ran(trunk, rival)
    whole = len(before) // 2  # tables of the crop's pass are used as soon as it is seen
    assert all(
        not torch.equal(old, new) for old, new in zip(before[:whole], list(rival.parameters())[:whole], strict=True)
    )
    rates = [group["lr"] for group in run.optimizer.param_groups]
    assert rates[-1] == pytest.approx(contest.PROXY_RATE * rates[0])


def test_centres_go_on_from_those_of_the_trunk(trunk: Path) -> None:
    rival = Centred(0.1, LossSettings(), 7, CPU)
    random = rival.centres.vectors_TCD.clone()
    ran(trunk, rival)
    grown = torch.load(trunk, weights_only=True)["centres"]["vectors"]
    assert not torch.equal(rival.centres.vectors_TCD, random)
    assert not torch.equal(rival.centres.vectors_TCD, grown)
    nearer = (rival.centres.vectors_TCD - grown).norm() < (rival.centres.vectors_TCD - random).norm()
    assert nearer


def test_a_loss_changes_the_embeddings_and_every_query_is_judged(trunk: Path) -> None:
    _, plain = ran(trunk, Nothing())
    _, entry = ran(trunk, Paired(5.0, baselines.pair_contrast))
    assert set(entry.figures) == {"test"}  # validation is for looking while training
    for found in entry.figures.values():
        assert set(found) == set(EVALUATED)
        for figures in found.values():
            count = len(figures["patients"])
            assert count > 0
            assert {len(figures[name]) for name in ("recall", "hits_of_8", "ap", "ndcg_at_8")} == {count}
    assert entry.figures["test"]["global"]["ap"] != plain.figures["test"]["global"]["ap"]
