"""Pretraining by puzzles: whose turn it is, what is compared, and that workers and labels change nothing in it."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cxr_retrieval.config import TrainingSettings
from cxr_retrieval.losses.centres import Centres
from cxr_retrieval.network.progressive import ProgressiveNetwork
from cxr_retrieval.training.optimisation import Optimisation
from cxr_retrieval.training.pretraining import agreement, turn_of, two_views

B, C, D, STEPS, SIDE, LANES = 8, 3, 8, 2, 64, 4


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: threads that wait for each other cost more than they bring, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images() -> Tensor:
    return torch.randn(B, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def dice(lanes: range, step: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(10 * step + lane) for lane in lanes]


def started(parallel: bool = False) -> Optimisation:
    torch.manual_seed(0)
    network = ProgressiveNetwork("resnet18_half", C, steps=STEPS, dimensions=D)
    model = DistributedDataParallel(network) if parallel else network
    settings = TrainingSettings(precision="float32", pretraining=1, learning_rate=1e-3)
    return Optimisation(network, model, Centres(2 * STEPS, C, D, 0.5), settings, 100, 50)


def step(stepped: Optimisation, number: int, lanes: range, given: Tensor) -> float:
    """A pretraining step; the dice of a turn are the same every time."""
    turn = turn_of(number, STEPS)
    stepped.begin(number)
    with stepped.micro_batch(last=True):
        loss = agreement(
            stepped.forward(two_views(given, turn.patches, dice(lanes, number % (STEPS + 1))), crop=False), turn.steps
        )
        stepped.backward(loss)
    assert stepped.end()
    return float(loss.detach())


def test_puzzles_go_from_fine_to_coarse_with_the_steps_and_then_all_see_whole_images() -> None:
    turns = [turn_of(number, 3) for number in range(8)]
    assert [turn.patches for turn in turns] == [8, 4, 2, 1, 8, 4, 2, 1]
    assert [list(range(3))[turn.steps] for turn in turns[:5]] == [[0], [1], [2], [0, 1, 2], [0]]
    assert [turn_of(number, 1).patches for number in range(3)] == [2, 1, 2]


def test_the_second_view_is_made_of_patches_of_the_image_varied_anew() -> None:
    views = two_views(images(), 4, dice(range(LANES)))
    one, other = two_views(images(), 1, dice(range(LANES))).chunk(2)
    assert views.shape == (2 * B, 1, SIDE, SIDE)
    assert torch.equal(views[:B], one), "the first view is not shuffled"
    assert not torch.equal(one, other), "the second view is varied by itself"

    def patches(view: Tensor) -> list[list[list[float]]]:
        cut = view.unfold(2, SIDE // 4, SIDE // 4).unfold(3, SIDE // 4, SIDE // 4).reshape(B, 16, -1)
        return [sorted(patch.tolist() for patch in image) for image in cut]

    assert patches(views[B:]) == patches(other)
    assert not torch.equal(views[B:], other)


def test_an_image_is_changed_alike_whichever_worker_has_its_lane() -> None:
    whole = two_views(images(), 4, dice(range(LANES))).unflatten(0, (2, LANES, -1))
    for rank in range(2):
        lanes = range(LANES)[rank::2]
        mine = images().unflatten(0, (LANES, -1))[rank::2].flatten(0, 1)
        assert torch.equal(two_views(mine, 4, dice(lanes)).unflatten(0, (2, 2, -1)), whole[:, rank::2])


def test_a_turn_teaches_its_own_step_and_what_lies_before_it() -> None:
    stepped = started()
    for number, taught in ((0, {0}), (1, {1}), (2, {0, 1})):
        turn = turn_of(number, STEPS)
        stepped.network.zero_grad()
        views = two_views(images(), turn.patches, dice(range(LANES)))
        agreement(stepped.forward(views, crop=False), turn.steps).backward()
        for place, own in enumerate(stepped.network.steps):
            assert bool(own.embed.weight.grad.any()) == (place in taught)
            assert not own.classifier.weight.grad.any(), "there are no labels"
        assert all(p.grad is not None for p in stepped.network.parameters()), "DDP would wait for it"


def test_pretraining_learns_and_leaves_the_centres_alone() -> None:
    stepped = started()
    before = stepped.centres.vectors_TCD.clone()
    losses = [step(stepped, number, range(LANES), images()) for number in range(30)]
    for turn in range(STEPS + 1):
        own = losses[turn :: STEPS + 1]
        assert own[-1] < 0.7 * own[0], own
    assert torch.equal(stepped.centres.vectors_TCD, before)


def gradients(stepped: Optimisation, number: int, lanes: range, given: Tensor) -> dict[str, Tensor]:
    """Those of a turn, by the name of the weight, and its loss; nothing moves."""
    turn = turn_of(number, STEPS)
    stepped.begin(number)
    views = two_views(given, turn.patches, dice(lanes, number))
    loss = agreement(stepped.forward(views, crop=False), turn.steps)
    stepped.backward(loss)
    found = {name: p.grad.clone() for name, p in stepped.network.named_parameters()}
    stepped.optimizer.zero_grad()
    return found | {"loss": loss.detach()}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        lanes = (range(1), range(1, LANES))[rank]  # unequal on purpose
        mine = images().unflatten(0, (LANES, -1))[lanes.start : lanes.stop].flatten(0, 1)
        stepped = started(parallel=True)
        torch.save([gradients(stepped, turn, lanes, mine) for turn in range(STEPS + 1)], f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_workers_have_the_loss_and_the_gradients_of_one_in_every_turn(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    stepped = started()
    of_workers = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for turn in range(STEPS + 1):
        straight = gradients(stepped, turn, range(LANES), images())
        assert straight["backbone.body.embedder.embedder.convolution.weight"].norm() > 0.01
        for found in of_workers:
            for name, value in straight.items():
                torch.testing.assert_close(found[turn][name], value, atol=1e-5, rtol=1e-3, msg=f"{turn}: {name}")
