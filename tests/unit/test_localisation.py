"""Crops against annotated boxes, by counting pixels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_retrieval.evaluation.localisation import centred_crop, crop_hits

SIDE = 12


@st.composite
def rectangles(draw: st.DrawFn) -> list[int]:
    x, y = draw(st.integers(0, SIDE - 1)), draw(st.integers(0, SIDE - 1))
    return [x, y, draw(st.integers(1, SIDE - x)), draw(st.integers(1, SIDE - y))]


def pixels(rectangle: list[int]) -> set[tuple[int, int]]:
    x, y, width, height = rectangle
    return {(column, row) for column in range(x, x + width) for row in range(y, y + height)}


@settings(max_examples=80, deadline=None)
@given(rectangles(), rectangles())
def test_overlap_equals_counted_pixels(box: list[int], crop: list[int]) -> None:
    hits = crop_hits(torch.tensor([box]), torch.tensor([crop]))
    shared = len(pixels(box) & pixels(crop))
    assert hits["iobb"].item() == pytest.approx(shared / len(pixels(box)))
    assert hits["iou"].item() == pytest.approx(shared / len(pixels(box) | pixels(crop)))
    centre = box[0] + box[2] / 2, box[1] + box[3] / 2
    inside = all(crop[i] <= centre[i] <= crop[i] + crop[i + 2] for i in (0, 1))
    assert hits["centre_in_crop"].item() is inside


@settings(max_examples=40, deadline=None)
@given(rectangles())
def test_control_keeps_the_shape_and_sits_in_the_centre(crop: list[int]) -> None:
    x, y, width, height = centred_crop(torch.tensor([crop]), SIDE)[0].tolist()
    assert [width, height] == crop[2:]
    assert (x + width / 2, y + height / 2) == (SIDE / 2, SIDE / 2)
    assert min(x, y) >= 0


def test_crop_that_is_the_box_hits_it_fully() -> None:
    box = torch.tensor([[3.5, 2.25, 4.0, 1.5]])
    hits = crop_hits(box, box)
    assert (hits["centre_in_crop"].item(), hits["iobb"].item(), hits["iou"].item()) == (True, 1.0, 1.0)


def test_no_boxes_give_no_hits() -> None:
    assert len(crop_hits(torch.zeros(0, 4), torch.zeros(0, 4))["iou"]) == 0


def test_wrong_rectangles_are_refused() -> None:
    good = torch.tensor([[0.0, 0, 2, 2]])
    with pytest.raises(ValueError, match="boxes must be"):
        crop_hits(torch.zeros(4), good)
    with pytest.raises(ValueError, match="crops must have a positive"):
        crop_hits(good, torch.tensor([[0.0, 0, 0, 2]]))
    with pytest.raises(ValueError, match="one crop a box"):
        crop_hits(good, good.repeat(2, 1))
    with pytest.raises(ValueError, match="larger than the image"):
        centred_crop(torch.tensor([[0.0, 0, 20, 2]]), SIDE)
