"""Phantom radiographs: drawn frontal chest films with the sign of every finding at a known box.

They stand in for NIH ChestX-ray14 where no licence, no download and exact ground truth are wanted: the demo, and tests
of localisation, leakage and learning. No model and no real image is behind them. The parts, in order of use:
`cohort` (who, and with what findings), `anatomy` (where organs lie), `layers` (healthy organs), `mimics` (what looks
like a finding and is none), `devices` (lines and implants), `signs` (findings), `film` (from thickness to pixels).
"""

from dataclasses import dataclass

import numpy as np

from cxr_retrieval.corpus.findings import FINDINGS, NO_FINDING
from cxr_retrieval.corpus.phantom.anatomy import Anatomy, Exposure, sample_anatomy, sample_exposure
from cxr_retrieval.corpus.phantom.cohort import film_count, history, person
from cxr_retrieval.corpus.phantom.film import Box, develop, stage
from cxr_retrieval.corpus.phantom.signs import Sign, deformation, draw_sign

__all__ = [
    "Box",
    "PhantomImage",
    "bbox_header",
    "bbox_rows",
    "data_entry_header",
    "data_entry_row",
    "draw_film",
    "draw_patient",
    "patients_for",
]

MIN_SIZE, MAX_SIZE = 64, 2048
# NIH's boxes are in pixels of 1024 x 1024 images, and its box table has its own word for one finding.
_NIH_SIZE = 1024
_NIH_BOX_NAMES = {"Infiltration": "Infiltrate"}
# Width of the drawn field: gives the pixel spacing column a plausible value.
_FIELD_MM = 400.0
# Streams of random numbers that must not depend on one another.
_BODY, _EXPOSURE, _SIGN = 1, 2, 3


@dataclass(frozen=True)
class PhantomImage:
    """One drawn film with its ground truth."""

    image_id: str  # NIH's naming: "00000001_000.png"
    patient_id: str  # "1"
    follow_up: int  # from 0
    age_years: int  # 1..95
    sex: str  # "M" or "F"
    view: str  # "PA" or "AP"
    findings: tuple[str, ...]  # in FINDINGS order; empty is No Finding
    boxes: tuple[Box, ...]  # at least one per finding
    pixels: np.ndarray  # uint8 [S, S]


def patients_for(images: int, seed: int) -> list[int]:
    """The patients 1..n, n as small as possible, who have at least `images` films together. Nothing is drawn.

    The caller trims the last patient's surplus. Raises ValueError for a negative number of images or seed.
    """
    if images < 0 or seed < 0:
        raise ValueError(f"images and seed must not be negative, got {images} and {seed}")
    patients: list[int] = []
    films = 0
    while films < images:
        patients.append(len(patients) + 1)
        films += film_count(patients[-1], seed)
    return patients


def draw_patient(patient_number: int, seed: int, size: int = 512) -> list[PhantomImage]:
    """All films of one patient in order of time, 1..12 of them.

    The result depends on (patient_number, seed, size) alone, so patients can be drawn anywhere and in any order; other
    sizes give the same bodies and findings at another resolution. `size` is in pixels, 64..2048. Raises ValueError
    outside these ranges, for a patient number below 1 or above 99999999 and for a negative seed.
    """
    if not 1 <= patient_number <= 99_999_999:
        raise ValueError(f"patient_number must be within 1..99999999, got {patient_number}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"size must be within {MIN_SIZE}..{MAX_SIZE} pixels, got {size}")
    age_years, sex = person(patient_number, seed)
    anatomy = sample_anatomy(np.random.default_rng([seed, patient_number, _BODY]), age_years, sex)
    images = []
    for visit in history(patient_number, seed):
        film_rng = np.random.default_rng([seed, patient_number, _EXPOSURE, visit.follow_up])
        exposure = sample_exposure(film_rng, visit.view)
        signs = [
            Sign(name, severity, _sign_seed(patient_number, seed, name))
            for name, severity in zip(visit.findings, visit.severities, strict=True)
        ]
        pixels, boxes = draw_film(anatomy, exposure, signs, size)
        image = PhantomImage(
            image_id=f"{patient_number:08d}_{visit.follow_up:03d}.png",
            patient_id=str(patient_number),
            follow_up=visit.follow_up,
            age_years=visit.age_years,
            sex=sex,
            view=visit.view,
            findings=visit.findings,
            boxes=boxes,
            pixels=pixels,
        )
        images.append(image)
    return images


def draw_film(anatomy: Anatomy, exposure: Exposure, signs: list[Sign], size: int) -> tuple[np.ndarray, tuple[Box, ...]]:
    """One film of that body: pixels uint8 [S, S], and the boxes of its signs in the order of the signs."""
    scene = stage(anatomy, exposure, deformation(signs), size)
    for sign in signs:
        draw_sign(scene, sign)
    return develop(scene), tuple(scene.boxes)


def _sign_seed(patient_number: int, seed: int, finding: str) -> int:
    stream = np.random.default_rng([seed, patient_number, _SIGN, FINDINGS.index(finding)])
    return int(stream.integers(1 << 31))


def data_entry_header() -> str:
    """First line of NIH's Data_Entry table, without line end. Its unquoted commas inside brackets are NIH's own."""
    return (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    )


def data_entry_row(image: PhantomImage) -> str:
    """The Data_Entry line of an image, without line end."""
    height, width = image.pixels.shape
    spacing = f"{_FIELD_MM / width:.4g}"
    labels = "|".join(image.findings) or NO_FINDING
    fields = (
        image.image_id, labels, image.follow_up, image.patient_id, image.age_years, image.sex, image.view,
        width, height, spacing, spacing,
    )  # fmt: skip
    return ",".join(str(value) for value in fields)


def bbox_header() -> str:
    """First line of NIH's BBox_List table, without line end."""
    return "Image Index,Finding Label,Bbox [x,y,w,h],,,"


def bbox_rows(image: PhantomImage) -> list[str]:
    """The BBox_List lines of an image: one per box, in the 1024 x 1024 frame whatever the drawn size.

    As NIH does, Infiltration is spelled Infiltrate here. NIH boxes 8 of the findings only; these rows have all 14.
    """
    scale = _NIH_SIZE / image.pixels.shape[1]
    rows = []
    for box in image.boxes:
        label = _NIH_BOX_NAMES.get(box.finding, box.finding)
        numbers = ",".join(f"{value * scale:.12g}" for value in (box.x, box.y, box.w, box.h))
        rows.append(f"{image.image_id},{label},{numbers}")
    return rows
