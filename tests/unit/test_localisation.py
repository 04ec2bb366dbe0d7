"""Crops against annotated boxes, by counting pixels."""

import json
import random
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_retrieval.evaluation.localisation import MEASURES, centred_crop, crop_hits, localise

SIDE = 12


@st.composite
def rectangles(draw: st.DrawFn) -> list[int]:
    x, y = draw(st.integers(0, SIDE - 1)), draw(st.integers(0, SIDE - 1))
    return [x, y, draw(st.integers(1, SIDE - x)), draw(st.integers(1, SIDE - y))]


def pixels(rectangle: list[int]) -> set[tuple[int, int]]:
    x, y, width, height = rectangle
    return {(column, row) for column in range(x, x + width) for row in range(y, y + height)}


@settings(max_examples=80)
@given(rectangles(), rectangles())
def test_overlap_equals_counted_pixels(box: list[int], crop: list[int]) -> None:
    hits = crop_hits(torch.tensor([box]), torch.tensor([crop]))
    shared = len(pixels(box) & pixels(crop))
    assert hits["iobb"].item() == pytest.approx(shared / len(pixels(box)))
    assert hits["iou"].item() == pytest.approx(shared / len(pixels(box) | pixels(crop)))
    centre = box[0] + box[2] / 2, box[1] + box[3] / 2
    inside = all(crop[i] <= centre[i] <= crop[i] + crop[i + 2] for i in (0, 1))
    assert hits["centre_in_crop"].item() is inside


@settings(max_examples=40)
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


def boxed(count: int) -> tuple[torch.Tensor, torch.Tensor, list[str], torch.Tensor]:
    """Boxes of two findings, crops near some of them, and the patients of both."""
    chance = random.Random(3)
    boxes, crops = [], []
    for _ in range(count):
        x, y = chance.randrange(8), chance.randrange(8)
        boxes.append([x, y, chance.randint(1, 4), chance.randint(1, 4)])
        away = chance.choice([0, 0, 2])
        crops.append([max(0, x - 1), min(6, y + away), 6, 6])
    findings = [chance.choice(["Mass", "Nodule"]) for _ in range(count)]
    patients = torch.tensor([chance.randrange(100, 112) for _ in range(count)])
    return torch.tensor(boxes).double(), torch.tensor(crops), findings, patients


def test_every_box_counts_once_overall_and_with_its_finding() -> None:
    boxes, crops, findings, patients = boxed(40)
    told = localise(boxes, crops, SIDE, findings, patients, draws=200)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    hits = {"crop": crop_hits(boxes, crops), "centred_crop": crop_hits(boxes, centred_crop(crops, SIDE))}
    assert list(told["findings"]) == ["Mass", "Nodule"]
    for name, table in (("", told), *told["findings"].items()):
        rows = [n for n, finding in enumerate(findings) if name in ("", finding)]
        assert (table["boxes"], table["patients"]) == (len(rows), len({int(patients[n]) for n in rows}))
        assert table["crop_share"] == pytest.approx(36 / SIDE**2)
        for measure in MEASURES:
            means = {which: statistics.fmean(float(found[measure][n]) for n in rows) for which, found in hits.items()}
            for which, mean in means.items():
                assert table[which][measure]["value"] == pytest.approx(mean)
                assert table[which][measure]["low"] <= mean <= table[which][measure]["high"]
            assert table["difference"][measure]["difference"] == pytest.approx(means["crop"] - means["centred_crop"])


def test_the_difference_is_paired_and_spreads_as_in_a_plain_loop_over_patients() -> None:
    boxes, crops, findings, patients = boxed(40)
    told = localise(boxes, crops, SIDE, findings, patients, draws=10_000)["difference"]["centre_in_crop"]
    inside = crop_hits(boxes, crops)["centre_in_crop"].double()
    less = (inside - crop_hits(boxes, centred_crop(crops, SIDE))["centre_in_crop"].double()).tolist()
    owner = patients.tolist()
    brought = {name: [less[n] for n in range(40) if owner[n] == name] for name in owner}
    chance, means = random.Random(0), []
    for _ in range(10_000):
        drawn = chance.choices(sorted(brought), k=len(brought))
        means.append(statistics.fmean([value for name in drawn for value in brought[name]]))
    assert told["standard_error"] == pytest.approx(statistics.stdev(means), rel=0.05)
    low, *_, high = statistics.quantiles(means, n=40)
    assert told["low"] == pytest.approx(low, abs=0.02)
    assert told["high"] == pytest.approx(high, abs=0.02)


def test_a_crop_that_is_its_own_control_differs_by_nothing() -> None:
    boxes, crops, findings, patients = boxed(10)
    centred = centred_crop(crops, SIDE)
    told = localise(boxes, centred, SIDE, findings, patients, draws=50)
    for cell in told["difference"].values():
        assert (cell["difference"], cell["low"], cell["high"]) == (0, 0, 0)
