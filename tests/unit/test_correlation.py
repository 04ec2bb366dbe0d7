"""The loss of two views against its equation, and that it is one loss however the images are dealt to workers."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from cxr_retrieval.losses.correlation import barlow_twins

SHARES = (slice(0, 3), slice(3, 10))  # of workers, unequal on purpose


def views(images: int = 10, dimensions: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    one = torch.randn(images, dimensions, generator=generator, dtype=torch.float64)
    other = 0.6 * one + 0.8 * torch.randn(images, dimensions, generator=generator, dtype=torch.float64) + 2
    return one.to(dtype), other.to(dtype)


def reference(one: list[list[float]], other: list[list[float]], redundancy: float) -> float:
    """Zbontar et al. 2021, eqs. 1 and 2, by loops, divided by the number of dimensions."""
    count, dimensions = len(one), len(one[0])

    def standard(view: list[list[float]], d: int) -> list[float]:
        column = [row[d] for row in view]
        mean = sum(column) / count
        length = math.sqrt(sum((value - mean) ** 2 for value in column))
        return [(value - mean) / length for value in column]

    total = 0.0
    for i in range(dimensions):
        for j in range(dimensions):
            c = sum(a * b for a, b in zip(standard(one, i), standard(other, j), strict=True))
            total += (1 - c) ** 2 if i == j else redundancy * c**2
    return total / dimensions


@pytest.mark.parametrize("redundancy", [0.0, 0.005, 1.0])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 1e-5)])
def test_the_loss_is_its_equation(redundancy: float, dtype: torch.dtype, near: float) -> None:
    one, other = views(dtype=dtype)
    found = barlow_twins(one, other, redundancy)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(
        reference(one.double().tolist(), other.double().tolist(), redundancy), abs=near
    )


def test_it_is_0_for_equal_views_without_redundancy_and_near_1_for_views_with_nothing_in_common() -> None:
    basis, _ = torch.linalg.qr(views(10, 5, torch.float64)[0] - views(10, 5, torch.float64)[0].mean(0))
    assert float(barlow_twins(basis, 3 * basis + 1)) == pytest.approx(0, abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(4000, 5, generator=generator) for _ in range(2))
    assert float(barlow_twins(one, other)) == pytest.approx(1, abs=0.05)


def test_views_that_all_images_share_get_no_infinite_gradient() -> None:
    one, other = torch.ones(6, 4, requires_grad=True), torch.ones(6, 4)
    loss = barlow_twins(one, other)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1)
    assert one.grad is not None
    assert one.grad.isfinite().all()


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two views must have one shape \[B, D\], got \[6, 4\] and \[6, 3\]"):
        barlow_twins(torch.ones(6, 4), torch.ones(6, 3))


def test_its_gradient_is_that_of_its_differences() -> None:
    one, other = views(6, 3, torch.float64)
    for view in (0, 1):
        given = [one.clone(), other.clone()]
        given[view].requires_grad_()
        barlow_twins(*given, redundancy=0.3).backward()
        for row, column in ((0, 0), (5, 2)):
            values = []
            for by in (1e-4, -1e-4):
                moved = [one.clone(), other.clone()]
                moved[view][row, column] += by
                values.append(reference(moved[0].tolist(), moved[1].tolist(), 0.3))
            assert float(given[view].grad[row, column]) == pytest.approx((values[0] - values[1]) / 2e-4, abs=1e-5)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        one, other = (view[SHARES[rank]].requires_grad_() for view in views())
        loss = barlow_twins(one, other)
        loss.backward()
        torch.save({"loss": loss.detach(), "one": one.grad, "other": other.grad}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_workers_take_the_correlation_of_the_whole_batch_and_their_mean_gradient_is_its_own(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    one, other = (view.requires_grad_() for view in views())
    loss = barlow_twins(one, other)
    loss.backward()
    for rank, share in enumerate(SHARES):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found["loss"], loss.detach(), atol=1e-7, rtol=0)
        for name, view in (("one", one), ("other", other)):
            # Each worker takes the loss of the whole batch, so DDP's mean halves what is twice the gradient.
            torch.testing.assert_close(found[name] / 2, view.grad[share], atol=1e-7, rtol=1e-5)
