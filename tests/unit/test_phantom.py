"""Phantom radiographs keep the promises that the demo and the tests of learning rest on."""

import csv
from itertools import pairwise

import numpy as np
import pytest

from cxr_retrieval.corpus.findings import FINDINGS, NO_FINDING
from cxr_retrieval.corpus.phantom.anatomy import sample_anatomy, sample_exposure
from cxr_retrieval.corpus.phantom.cohort import film_count, history
from cxr_retrieval.corpus.phantom.radiographs import (
    Box,
    PhantomImage,
    bbox_header,
    bbox_rows,
    data_entry_header,
    data_entry_row,
    draw_film,
    draw_patient,
    patients_for,
)
from cxr_retrieval.corpus.phantom.signs import Sign

SEED = 7
SIZE = 128


@pytest.fixture(scope="module")
def films() -> list[PhantomImage]:
    return [image for patient in range(1, 26) for image in draw_patient(patient, SEED, SIZE)]


def test_same_patient_and_seed_give_the_same_bytes() -> None:
    first, second = draw_patient(3, SEED, SIZE), draw_patient(3, SEED, SIZE)
    assert [image.pixels.tobytes() for image in first] == [image.pixels.tobytes() for image in second]
    assert [(image.image_id, image.findings, image.boxes) for image in first] == [
        (image.image_id, image.findings, image.boxes) for image in second
    ]


def test_another_seed_or_patient_gives_another_chest() -> None:
    chest = draw_patient(2, SEED, SIZE)[0].pixels
    assert not np.array_equal(chest, draw_patient(2, SEED + 1, SIZE)[0].pixels)
    assert not np.array_equal(chest, draw_patient(4, SEED, SIZE)[0].pixels)


def test_size_changes_the_resolution_and_not_the_case() -> None:
    small, large = draw_patient(5, SEED, 128), draw_patient(5, SEED, 256)
    for low, high in zip(small, large, strict=True):
        assert (low.image_id, low.findings, low.view) == (high.image_id, high.findings, high.view)
        halved = high.pixels.reshape(128, 2, 128, 2).mean(axis=(1, 3))
        assert np.corrcoef(halved.ravel(), low.pixels.ravel())[0, 1] > 0.95


def test_images_are_complete_and_named_as_nih_names_them(films: list[PhantomImage]) -> None:
    for image in films:
        assert image.pixels.shape == (SIZE, SIZE)
        assert image.pixels.dtype == np.uint8
        assert image.image_id == f"{int(image.patient_id):08d}_{image.follow_up:03d}.png"
        assert 1 <= image.age_years <= 95
        assert image.sex in ("M", "F")
        assert image.view in ("PA", "AP")
        assert list(image.findings) == sorted(image.findings, key=FINDINGS.index)
        assert len(image.findings) <= 3


def test_every_finding_has_a_box_inside_the_image_and_no_other_box_exists(films: list[PhantomImage]) -> None:
    for image in films:
        assert {box.finding for box in image.boxes} == set(image.findings)
        for box in image.boxes:
            assert box.x >= 0
            assert box.y >= 0
            assert box.w >= 2
            assert box.h >= 2
            assert box.x + box.w <= SIZE
            assert box.y + box.h <= SIZE


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_finding_occurs_among_the_first_patients(seed: int) -> None:
    seen = {name for patient in range(1, 41) for visit in history(patient, seed) for name in visit.findings}
    assert seen == set(FINDINGS)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_six_hundred_images_hold_enough_of_everything(seed: int) -> None:
    visits = [visit for patient in patients_for(600, seed) for visit in history(patient, seed)]
    counts = {name: sum(name in visit.findings for visit in visits) for name in FINDINGS}
    assert min(counts.values()) >= 8, counts
    assert 0.45 < sum(not visit.findings for visit in visits) / len(visits) < 0.62
    assert 0.32 < sum(visit.view == "AP" for visit in visits) / len(visits) < 0.47


def test_findings_are_as_frequent_together_and_on_portable_films_as_in_nih() -> None:
    """Against NIH's Data_Entry_2017_v2020.csv, 112,120 images."""
    visits = [visit for patient in patients_for(12_000, 0) for visit in history(patient, 0)]

    def share(finding: str, *given: str) -> float:
        among = [visit for visit in visits if set(given) <= {*visit.findings, visit.view}]
        return sum(finding in (*visit.findings, visit.view) for visit in among) / len(among)

    for finding, nih in {"Infiltration": 0.177, "Effusion": 0.119, "Atelectasis": 0.103, "Nodule": 0.056}.items():
        assert 0.75 < share(finding) / nih < 1.35, finding
    assert all(share(finding) < 0.04 for finding in ("Hernia", "Pneumonia", "Fibrosis", "Edema"))
    for finding, given, nih in [
        ("Infiltration", "Edema", 0.43), ("Effusion", "Cardiomegaly", 0.38), ("Emphysema", "Pneumothorax", 0.14),
        ("Atelectasis", "Effusion", 0.25), ("Infiltration", "Nodule", 0.24), ("AP", "Edema", 0.88),
        ("AP", "Hernia", 0.15),
    ]:  # fmt: skip
        assert abs(share(finding, given) - nih) < 0.17, (finding, given)


def test_signs_are_of_every_severity_and_often_mild() -> None:
    severities = np.array(
        [s for patient in range(1, 400) for visit in history(patient, SEED) for s in visit.severities]
    )
    assert 0 <= severities.min() <= severities.max() <= 1
    assert 0.30 < np.median(severities) < 0.45
    assert np.histogram(severities, np.linspace(0, 1, 6))[0].min() > 0.03 * len(severities)


def test_a_mild_sign_is_weaker_than_what_films_of_the_healthy_differ_by() -> None:
    rng = np.random.default_rng(SEED)
    anatomy, exposure = sample_anatomy(rng, 60, "M"), sample_exposure(rng, "PA")
    healthy = draw_film(anatomy, exposure, [], SIZE)[0].astype(np.float64)
    again = draw_film(anatomy, sample_exposure(rng, "PA"), [], SIZE)[0]
    for finding in FINDINGS:
        mild, boxes = draw_film(anatomy, exposure, [Sign(finding, 0.05, 3)], SIZE)
        box = boxes[0]
        where = np.s_[box.y : box.y + box.h, box.x : box.x + box.w]
        assert 0 < np.abs(mild - healthy)[where].mean() < np.abs(again - healthy)[where].mean(), finding


def test_patients_for_takes_the_fewest_patients_that_suffice() -> None:
    patients = patients_for(100, SEED)
    films_of = [film_count(patient, SEED) for patient in patients]
    assert patients == list(range(1, len(patients) + 1))
    assert sum(films_of) >= 100 > sum(films_of[:-1])
    assert patients_for(0, SEED) == []
    assert len(draw_patient(2, SEED, 64)) == films_of[1]


def test_follow_ups_look_more_alike_than_other_patients(films: list[PhantomImage]) -> None:
    # One view, or the difference between PA and AP would be measured instead.
    upright = [image for image in films if image.view == "PA"]
    flat = np.stack([image.pixels[:, ::2].ravel() for image in upright]).astype(np.float64)
    alike = np.corrcoef(flat)
    owner = np.array([image.patient_id for image in upright])
    same = (owner[:, None] == owner[None, :]) & ~np.eye(len(owner), dtype=bool)
    other = owner[:, None] != owner[None, :]
    assert same.sum() >= 20
    assert alike[same].mean() > alike[other].mean() + 0.02


@pytest.mark.parametrize("finding", FINDINGS)
def test_the_sign_changes_its_box_most(finding: str) -> None:
    inside, outside = [], []
    for number in range(4):
        rng = np.random.default_rng([SEED, number])
        anatomy = sample_anatomy(rng, 50, "F" if number % 2 else "M")
        exposure = sample_exposure(rng, "AP" if number == 3 else "PA")
        healthy, no_boxes = draw_film(anatomy, exposure, [], SIZE)
        sick, boxes = draw_film(anatomy, exposure, [Sign(finding, 0.7, 1000 + number)], SIZE)
        assert no_boxes == ()
        assert {box.finding for box in boxes} == {finding}
        change = np.abs(sick.astype(np.float64) - healthy)
        within = np.zeros((SIZE, SIZE), dtype=bool)
        for box in boxes:
            within[box.y : box.y + box.h, box.x : box.x + box.w] = True
        inside.append(change[within].mean())
        outside.append(change[~within].mean())
    assert np.mean(inside) > 4
    assert np.mean(inside) > 2 * np.mean(outside)


@pytest.mark.parametrize("finding", ["Effusion", "Mass", "Cardiomegaly", "Hernia"])
def test_a_worse_sign_is_a_greater_change(finding: str) -> None:
    rng = np.random.default_rng(SEED)
    anatomy, exposure = sample_anatomy(rng, 60, "M"), sample_exposure(rng, "PA")
    healthy = draw_film(anatomy, exposure, [], SIZE)[0].astype(np.float64)
    changes = []
    for severity in (0.1, 0.5, 1.0):
        sick, _ = draw_film(anatomy, exposure, [Sign(finding, severity, 11)], SIZE)
        changes.append(np.abs(sick - healthy).mean())
    assert all(less < more for less, more in pairwise(changes)), changes


def test_data_entry_rows_parse_back(films: list[PhantomImage]) -> None:
    header = data_entry_header().split(",")
    assert header[:2] == ["Image Index", "Finding Labels"]
    for image in films:
        row = next(csv.reader([data_entry_row(image)]))
        assert len(row) == len(header) == 11
        assert row[0] == image.image_id
        assert row[1] == ("|".join(image.findings) if image.findings else NO_FINDING)
        assert row[2:7] == [str(image.follow_up), image.patient_id, str(image.age_years), image.sex, image.view]
        assert [int(value) for value in row[7:9]] == [SIZE, SIZE]
        assert all(float(value) > 0 for value in row[9:])


def test_box_rows_parse_back_in_the_1024_frame(films: list[PhantomImage]) -> None:
    assert bbox_header() == "Image Index,Finding Label,Bbox [x,y,w,h],,,"
    for image in films:
        parsed = []
        for line in bbox_rows(image):
            name, label, *numbers = next(csv.reader([line]))
            assert name == image.image_id
            finding = "Infiltration" if label == "Infiltrate" else label
            parsed.append(Box(finding, *(round(float(number) * SIZE / 1024) for number in numbers)))
        assert tuple(parsed) == image.boxes


@pytest.mark.parametrize(
    ("patient", "seed", "size"),
    [(0, 0, 512), (-1, 0, 512), (100_000_000, 0, 512), (1, -1, 512), (1, 0, 63), (1, 0, 4096)],
)
def test_values_out_of_range_are_refused(patient: int, seed: int, size: int) -> None:
    with pytest.raises(ValueError, match="must"):
        draw_patient(patient, seed, size)
    with pytest.raises(ValueError, match="must"):
        patients_for(-1, 0)
