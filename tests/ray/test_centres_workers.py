"""Centres move alike on one and on two real Ray Train workers, and whatever the accumulation.

T tables, N images of a step, K classes, D dimensions, U updates.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

T, N, K, D, U = 4, 24, 7, 16, 5
ACCUMULATIONS = (1, 2, 3)
RATE = 0.5
FIRST_SHARE = 9  # images of the first of two workers: unequal on purpose
pytestmark = pytest.mark.usefixtures("ray_session")


def given() -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of unit length [U, T, N, D] and targets [U, N, K]; class 0 is never present, and in update 1 the
    second worker has no finding at all."""
    generator = torch.Generator().manual_seed(4)
    z_UTND = torch.nn.functional.normalize(torch.randn(U, T, N, D, generator=generator), dim=-1)
    targets_UNK = torch.randint(-1, 2, (U, N, K), generator=generator, dtype=torch.int8)
    targets_UNK[:, :, 0] = targets_UNK[:, :, 0].clamp(max=0)
    targets_UNK[1, FIRST_SHARE:] = 0
    return z_UTND, targets_UNK


def tables(workers: int, folder: Path) -> dict[int, np.ndarray]:
    """Centres after each update [workers, U, T, K, D], by accumulation: of this process, or of Ray Train workers."""

    def worker(config: dict) -> dict[int, np.ndarray]:
        import ray.train
        import torch.distributed as dist

        from cxr_retrieval.losses.centres import Centres

        world, rank = config["workers"], 0
        if world > 1:
            context = ray.train.get_context()
            assert context.get_world_size() == world
            rank = context.get_world_rank()
        assert dist.get_world_size() == world if dist.is_initialized() else world == 1
        z_UTND, targets_UNK = (torch.as_tensor(array) for array in config["given"])
        bounds = [0, z_UTND.shape[2]] if world == 1 else [0, config["first_share"], z_UTND.shape[2]]
        share = torch.arange(bounds[rank], bounds[rank + 1])
        found = {}
        for accumulation in config["accumulations"]:
            centres = Centres(z_UTND.shape[1], targets_UNK.shape[2], z_UTND.shape[3], config["rate"], seed=1)
            after = []
            for z_TND, targets_NK in zip(z_UTND, targets_UNK, strict=True):
                for micro in share.chunk(accumulation):
                    for table in range(len(z_TND)):
                        centres.accumulate(table, z_TND[table, micro], targets_NK[micro])
                centres.reduce()
                centres.apply()
                after.append(centres.vectors_TCD.clone())
            everyone = [torch.stack(after)] * world
            if world > 1:
                dist.all_gather_object(everyone, torch.stack(after))
            found[accumulation] = torch.stack(everyone).numpy()
        return found

    config = {"workers": workers, "first_share": FIRST_SHARE, "accumulations": ACCUMULATIONS, "rate": RATE}
    config["given"] = [tensor.numpy() for tensor in given()]
    if workers == 1:
        return worker(config)
    trainer = TorchTrainer(
        worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(name=f"centres-{workers}", storage_path=str(folder)),
    )
    return trainer.fit().return_value


@pytest.fixture(scope="module")
def by_workers(tmp_path_factory) -> dict[int, dict[int, np.ndarray]]:
    folder = tmp_path_factory.mktemp("centres")
    return {workers: tables(workers, folder) for workers in (1, 2)}


@pytest.mark.parametrize("updates", [1, U])
@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("workers", [1, 2])
def test_centres_agree_over_workers_and_accumulation(by_workers, workers, accumulation, updates):
    expected_TKD = by_workers[1][1][0, updates - 1]
    for found_UTKD in by_workers[workers][accumulation]:
        np.testing.assert_allclose(found_UTKD[updates - 1], expected_TKD, atol=1e-6, rtol=0)


def test_every_worker_holds_the_same_centres_bit_for_bit(by_workers):
    for one_UTKD, other_UTKD in by_workers[2].values():
        assert np.array_equal(one_UTKD, other_UTKD)


def test_the_updates_are_those_of_the_equation(by_workers):
    """c <- unit(c - rate * Delta), Delta = sum over positives of (c - z) / (1 + their number)."""
    from cxr_retrieval.losses.centres import Centres

    z_UTND, targets_UNK = given()
    c_TKD = Centres(T, K, D, RATE, seed=1).vectors_TCD.double().numpy()
    first_KD = c_TKD[:, 0].copy()
    for update in range(U):
        for table in range(T):
            for k in range(K):
                z_PD = z_UTND[update, table, targets_UNK[update, :, k] == 1].double().numpy()
                moved_D = c_TKD[table, k] - RATE * (c_TKD[table, k] - z_PD).sum(0) / (1 + len(z_PD))
                c_TKD[table, k] = moved_D / np.linalg.norm(moved_D)
        np.testing.assert_allclose(by_workers[2][1][0, update], c_TKD, atol=1e-6, rtol=0)
    assert np.array_equal(by_workers[2][1][0, -1, :, 0], first_KD.astype(np.float32))  # a class nobody has stays
