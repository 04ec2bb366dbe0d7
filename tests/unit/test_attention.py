"""The attention crop: largest component, boxes, resampling, heat, screen."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch.nn import functional as F

from cxr_retrieval.network.attention import (
    Screen,
    crop_and_resize,
    crop_boxes,
    heat_map,
    largest_component,
    sum_activations,
)

MASKS = arrays(np.bool_, array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=12))
HEATS = arrays(
    np.float32, st.tuples(st.just(2), st.integers(1, 7), st.integers(1, 7)), elements=st.floats(0, 1, width=16)
)


def components(mask_HW: np.ndarray) -> list[set[tuple[int, int]]]:
    """Flood fill, one pixel after the other."""
    left = set(zip(*np.nonzero(mask_HW), strict=True))
    found = []
    while left:
        stack = [left.pop()]
        component = set(stack)
        while stack:
            y, x = stack.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            component |= near
            stack += near
        found.append(component)
    return found


@settings(max_examples=150)
@given(MASKS)
def test_largest_component_is_that_of_a_flood_fill(mask_BHW):
    result_BHW = largest_component(torch.from_numpy(mask_BHW)).numpy()
    for mask_HW, result_HW in zip(mask_BHW, result_BHW, strict=True):
        pixels = set(zip(*np.nonzero(result_HW), strict=True))
        reference = components(mask_HW)
        if not reference:
            assert not pixels
            continue
        assert pixels in reference
        assert len(pixels) == max(map(len, reference))


def test_a_snake_through_the_whole_map_is_one_component():
    snake_HW = torch.zeros(33, 33)
    snake_HW[::2] = 1
    snake_HW[1::4, -1] = 1
    snake_HW[3::4, 0] = 1
    assert torch.equal(largest_component(snake_HW[None])[0], snake_HW.bool())


@settings(max_examples=60)
@given(HEATS, st.floats(0.05, 0.95), st.floats(0.05, 1), st.sampled_from([(128, 128), (97, 130)]))
def test_boxes_lie_inside_the_image_and_are_no_smaller_than_the_minimum(heat_BHW, threshold, minimum, image_size):
    boxes_B4 = crop_boxes(torch.from_numpy(heat_BHW), threshold, image_size, minimum)
    assert boxes_B4.dtype == torch.int64
    for x, y, w, h in boxes_B4.tolist():
        assert x >= 0
        assert y >= 0
        assert x + w <= image_size[1]
        assert y + h <= image_size[0]
        assert w >= minimum * image_size[1] - 1e-6
        assert h >= minimum * image_size[0] - 1e-6


@settings(max_examples=60)
@given(HEATS, st.floats(0.1, 0.9), st.floats(0.1, 0.9))
def test_a_higher_threshold_never_gives_a_larger_component(heat_BHW, one, other):
    # Not so for boxes: a thin diagonal that survives can have a wider box than the square that did not.
    heat_BHW = torch.from_numpy(heat_BHW)
    low_B, high_B = (largest_component(heat_BHW >= t).sum((1, 2)) for t in sorted((one, other)))
    assert (high_B <= low_B).all()


@settings(max_examples=60)
@given(st.integers(0, 7), st.integers(0, 7), st.floats(0.5, 3), st.floats(0.2, 0.9), st.floats(0.05, 0.6))
def test_the_crop_of_a_single_peak_contains_its_maximum(row, column, width, threshold, minimum):
    place = torch.arange(8.0)
    heat_HW = torch.exp(-((place[:, None] - row) ** 2 + (place[None] - column) ** 2) / (2 * width**2))
    x, y, w, h = crop_boxes(heat_HW[None], threshold, (128, 128), minimum)[0].tolist()
    assert x <= (column + 0.5) * 16 <= x + w
    assert y <= (row + 0.5) * 16 <= y + h


def test_the_largest_hot_region_wins_over_a_small_hotter_one():
    heat_HW = torch.zeros(32, 32)
    heat_HW[2:4, 2:4] = 1.0
    heat_HW[16:28, 20:30] = 0.8
    assert crop_boxes(heat_HW[None], 0.5, (320, 160), 0.1)[0].tolist() == [100, 160, 50, 120]


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_where_nothing_is_hot_the_crop_is_the_whole_image(value):
    heat_BHW = torch.full((2, 4, 4), value)
    heat_BHW[1] = torch.eye(4)
    boxes_B4 = crop_boxes(heat_BHW, 0.9, (96, 128), 0.2)
    assert boxes_B4[0].tolist() == [0, 0, 128, 96]
    assert boxes_B4[1].tolist() != [0, 0, 128, 96]


@pytest.mark.parametrize("size", [(64, 64), (50, 90), (97, 33)])
def test_the_box_of_the_whole_image_gives_back_the_very_same_values(size):
    images_B1HW = torch.rand(3, 1, *size)
    boxes_B4 = torch.tensor([[0, 0, size[1], size[0]], [1, 2, 20, 30], [0, 0, size[1], size[0]]])
    crops_B1HW = crop_and_resize(images_B1HW, boxes_B4, size)
    assert torch.equal(crops_B1HW[[0, 2]], images_B1HW[[0, 2]])
    assert not torch.equal(crops_B1HW[1], images_B1HW[1])


def test_a_crop_is_the_cut_then_interpolated():
    images_B1HW = torch.rand(1, 1, 60, 80)
    x, y, w, h = 10, 5, 40, 20
    cut_B1hw = crop_and_resize(images_B1HW, torch.tensor([[x, y, w, h]]), (h, w))
    torch.testing.assert_close(cut_B1hw, images_B1HW[:, :, y : y + h, x : x + w], atol=1e-5, rtol=0)
    twice_B1hw = crop_and_resize(images_B1HW, torch.tensor([[x, y, w, h]]), (2 * h, 2 * w))
    plain_B1hw = F.interpolate(images_B1HW, scale_factor=2, mode="bilinear", align_corners=False)
    plain_B1hw = plain_B1hw[:, :, 2 * y : 2 * (y + h), 2 * x : 2 * (x + w)]
    torch.testing.assert_close(twice_B1hw, plain_B1hw, atol=1e-5, rtol=0)


def test_heat_reaches_from_0_to_1_and_a_constant_map_is_all_zeros():
    activations_BCHW = torch.randn(4, 5, 6, 7)
    activations_BCHW[1] = 3.0
    heat_BHW = heat_map(activations_BCHW, torch.randn(4, 5))
    assert heat_BHW.shape == (4, 6, 7)
    assert heat_BHW.amin((1, 2)).tolist() == [0, 0, 0, 0]
    assert heat_BHW.amax((1, 2)).tolist() == [1, 0, 1, 1]


def test_heat_follows_the_finding_that_is_probable():
    activations_BCHW = torch.zeros(1, 2, 4, 4)
    activations_BCHW[0, 0, 0, 0] = activations_BCHW[0, 1, 3, 3] = 1
    assert heat_map(activations_BCHW, torch.tensor([[4.0, -4.0]]))[0].argmax() == 0
    assert heat_map(activations_BCHW, torch.tensor([[-4.0, 4.0]]))[0].argmax() == 15


def test_activations_of_two_steps_add_up_at_one_resolution():
    fine_BCHW, coarse_BCHW = torch.randn(2, 3, 8, 8), torch.full((2, 3, 4, 4), 2.0)
    torch.testing.assert_close(sum_activations([fine_BCHW, coarse_BCHW], 8), fine_BCHW + 2)
    assert sum_activations([fine_BCHW, coarse_BCHW], 32).shape == (2, 3, 32, 32)


def test_the_screen_only_weakens():
    features_BKHW = torch.randn(2, 32, 5, 5)
    screened_BKHW = Screen(32)(features_BKHW)
    assert (screened_BKHW.abs() < features_BKHW.abs()).all()
    assert (screened_BKHW.sign() == features_BKHW.sign()).all()
