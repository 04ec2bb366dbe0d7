"""Augmentation: repeatable, small, and never a mirror image.

B images, H W sides in pixels.
"""

from collections.abc import Iterable

import pytest
import torch

from cxr_retrieval.training import augmentation
from cxr_retrieval.training.augmentation import augment, by_lane

SIDE = 64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(number: int = 8) -> torch.Tensor:
    return torch.randn(number, 1, SIDE, SIDE, generator=generator(9))


def test_shape_and_type_stay_and_the_input_is_not_changed():
    before_B1HW = images()
    given_B1HW = before_B1HW.clone()
    after_B1HW = augment(given_B1HW, generator(0))
    assert after_B1HW.shape == given_B1HW.shape
    assert after_B1HW.dtype == torch.float32
    assert torch.isfinite(after_B1HW).all()
    assert torch.equal(given_B1HW, before_B1HW)


def test_the_generator_decides_alone():
    torch.manual_seed(1)
    one = augment(images(), generator(5))
    torch.manual_seed(2)
    assert torch.equal(augment(images(), generator(5)), one)
    assert not torch.equal(augment(images(), generator(6)), one)


def test_each_image_is_changed_in_its_own_way():
    same_B1HW = images(1).expand(4, -1, -1, -1)
    changed_B1HW = augment(same_B1HW, generator(0))
    assert len({image.numpy().tobytes() for image in changed_B1HW}) == 4


def test_without_spread_an_image_stays_what_it_is(monkeypatch):
    for name in ("TURN_DEGREES", "SHIFT", "SCALE", "CONTRAST", "BRIGHTNESS"):
        monkeypatch.setattr(augmentation, name, 0.0)
    torch.testing.assert_close(augment(images(), generator(0)), images(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("axis", ["left of right", "above below"])
def test_a_mark_stays_on_its_side(axis):
    """The heart lies on the left and the diaphragm below: a mirror image would be another patient."""
    marked_B1HW = torch.full((400, 1, SIDE, SIDE), -2.0)
    if axis == "left of right":
        marked_B1HW[:, :, 24:40, 8:16] = 2.0
    else:
        marked_B1HW[:, :, 8:16, 24:40] = 2.0
    changed_BHW = augment(marked_B1HW, generator(0))[:, 0]
    halves = changed_BHW.amax((1, 2))[:, None, None] - 0.5 < changed_BHW
    near, far = (halves[:, :, :32], halves[:, :, 32:]) if axis == "left of right" else (halves[:, :32], halves[:, 32:])
    assert near.any((1, 2)).all()
    assert not far.any()


def test_exposure_and_place_move_by_little():
    flat_B1HW = torch.ones(400, 1, SIDE, SIDE)
    changed_B1HW = augment(flat_B1HW, generator(0))
    # The border continues the edge, so a flat image stays flat: exposure alone.
    assert changed_B1HW.flatten(1).std(1).max() < 1e-5
    assert changed_B1HW.min() >= 1 - augmentation.CONTRAST - augmentation.BRIGHTNESS - 1e-5
    assert changed_B1HW.max() <= 1 + augmentation.CONTRAST + augmentation.BRIGHTNESS + 1e-5
    dot_B1HW = torch.zeros(400, 1, SIDE, SIDE)
    dot_B1HW[:, :, 28:36, 28:36] = 4.0
    weight_BHW = augment(dot_B1HW, generator(1))[:, 0]
    weight_BHW = weight_BHW - weight_BHW.amin((1, 2), keepdim=True)
    columns_W = torch.arange(SIDE) + 0.5
    centre_B = (weight_BHW.sum(1) * columns_W).sum(1) / weight_BHW.sum((1, 2))
    limit = augmentation.SHIFT * SIDE / (1 - augmentation.SCALE)
    assert (centre_B - SIDE / 2).abs().max() <= limit * 1.2
    assert centre_B.std() > 1.0


def dice(lanes: Iterable[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(10 + lane) for lane in lanes]


def test_an_image_is_changed_alike_however_lanes_are_dealt_to_workers():
    whole = by_lane(images(8), dice(range(4)), augment)
    for rank, workers in ((0, 2), (1, 2), (2, 3)):
        lanes = range(rank, 4, workers)
        mine = torch.cat([images(8)[2 * lane : 2 * lane + 2] for lane in lanes])
        expected = torch.cat([whole[2 * lane : 2 * lane + 2] for lane in lanes])
        torch.testing.assert_close(by_lane(mine, dice(lanes), augment), expected, atol=1e-6, rtol=0)
