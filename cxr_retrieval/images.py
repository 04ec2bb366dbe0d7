"""The images of a split as an evaluation needs them: figures of all of them, and a few as cases to look at.

Shapes: P passes, S steps, N images, M of them in a part, D dimensions, C findings, E numbers of a floor's vector.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cxr_retrieval.artifacts import Artifact
from cxr_retrieval.corpus.census import age_band
from cxr_retrieval.corpus.reading import Corpus, labels_of, pixels_of
from cxr_retrieval.corpus.splits import patient_position
from cxr_retrieval.embedding.stream import read_part
from cxr_retrieval.errors import UserError
from cxr_retrieval.network.progressive import Output, embeddings
from cxr_retrieval.progress import Progress
from cxr_retrieval.report.gallery import Case
from cxr_retrieval.training.model import Model

DRAW = "evaluated"  # salt of the patients that are drawn from a split: independent of the split itself
PIXEL_SIDE = 32
FILM_SIDE = 320  # of a case to look at
COLUMNS = ["patient_id", "view", "sex", "age_years", "findings", "unknown", "boxes", "pixels", "split"]
CASE_COLUMNS = ["image_id", "patient_id", "view", "sex", "age_years", "findings", "pixels"]
METADATA = {"view": ("PA", "AP"), "sex": ("M", "F")}
MIDDLE_AGE_YEARS, AGE_STEP_YEARS = 50.0, 20.0


@dataclass(frozen=True)
class Images:
    """Images of one split: what the network said of them, labels, patients, views, and the floors' vectors.

    `row_N` is the place of each among all images of its split, in the order of the corpus.
    """

    row_N: np.ndarray
    z_PSND: Tensor
    joint_PNC: Tensor
    crop_N4: np.ndarray
    labels_NC: Tensor
    patients: list[str]
    groups: dict[str, list[str | None]]
    pixels_NE: Tensor
    metadata_NE: Tensor
    boxes: list[list[dict[str, Any]]]

    def embeddings(self, model: Model) -> dict[str, Tensor]:
        """Every named embedding [N, ...], centred and of unit length."""
        empty = self.z_PSND.new_zeros(0)
        return embeddings(Output(self.z_PSND, empty, self.joint_PNC, empty, empty), model.centring)


def read_images(embedded: Artifact, corpus: Corpus, model: Model, split: str, most: int, progress: Progress) -> Images:
    """The images of one split, part by part; prepared pixels are reduced at once and not kept.

    Of a split with more than `most` images, about as many: those of patients that a hash draws.
    """
    parts = []
    seen = 0
    share = min(1.0, most / max(1, corpus.artifact.manifest["splits"][split]["images"]))
    for number in range(len(corpus.files)):
        part = read_part(embedded, corpus, number, model, COLUMNS)
        progress.advance(1)
        mine = np.flatnonzero(np.asarray(part.facts["split"].to_pylist(), dtype=object) == split)
        row_M = seen + np.arange(len(mine))
        seen += len(mine)
        if share < 1.0:
            patients = part.facts["patient_id"]
            drawn = [patient_position(patients[int(row)].as_py(), DRAW) < share for row in mine]
            mine, row_M = mine[drawn], row_M[drawn]
        if len(mine):
            facts = part.facts.take(pa.array(mine))
            parts.append(
                (
                    row_M,
                    part.z_PSND[:, :, mine],
                    part.joint_PNC[:, mine],
                    part.crop_N4[mine],
                    torch.as_tensor(labels_of(facts)),
                    _reduced(pixels_of(facts, corpus.recipe.size)),
                    facts.drop_columns(["pixels"]),
                )
            )
    if not parts:
        raise UserError(f"{corpus.artifact.uri} has no image in its {split} split")
    rows, z, joint, crop, labels, pixels, tables = zip(*parts, strict=True)
    facts = pa.concat_tables(tables)
    return Images(
        np.concatenate(rows),
        torch.cat(z, dim=2),
        torch.cat(joint, dim=1),
        np.concatenate(crop),
        torch.cat(labels),
        facts["patient_id"].to_pylist(),
        _groups(facts),
        torch.as_tensor(np.concatenate(pixels)),
        _metadata(facts),
        facts["boxes"].to_pylist(),
    )


def read_cases(
    corpus: Corpus, split: str, looks: Sequence[Mapping[int, Sequence[int]]], names: bool
) -> dict[int, Case]:
    """Cases to look at by their row in the split, each with its crop; pixels are reduced to `FILM_SIDE`.

    `looks` are crops (x, y, w, h in prepared pixels) by row; those of one mapping are read together, so that what is
    held is a row group for each of them. Without `names` a case tells neither its image's name nor its patient's.
    """
    places, size = corpus.places(split), corpus.recipe.size
    cases: dict[int, Case] = {}
    for crops in looks:
        table = corpus.take(places[list(crops)], CASE_COLUMNS)
        facts = table.drop_columns(["pixels"]).to_pylist()
        for (row, crop), known, pixels in zip(crops.items(), facts, pixels_of(table, size), strict=True):
            x, y, w, h = crop
            pixels = _resized(pixels, min(size, FILM_SIDE))
            cases[row] = Case.of_row(known, pixels, size, names, (x, y, w, h))
    return cases


def _reduced(pixels_NHW: np.ndarray) -> np.ndarray:
    """The floor of pixels: 32 x 32 grey values, float32 [N, 1024]."""
    small = [_resized(pixels, PIXEL_SIDE) for pixels in pixels_NHW]
    return np.stack(small).reshape(len(small), -1).astype(np.float32) / 255.0


def _groups(facts: pa.Table) -> dict[str, list[str | None]]:
    """View, sex and age band of every image; None where unknown."""
    bands = [age_band(years) for years in facts["age_years"].to_pylist()]
    return {"view": facts["view"].to_pylist(), "sex": facts["sex"].to_pylist(), "age": bands}


def _metadata(facts: pa.Table) -> Tensor:
    """The floor of metadata, float32 [N, 5]: view and sex as unit columns, age in 20 years; 0 where unknown."""
    columns = [
        [float(value == kind) for value in facts[name].to_pylist()]
        for name, kinds in METADATA.items()
        for kind in kinds
    ]
    ages = facts["age_years"].to_pylist()
    columns.append([0.0 if age is None else (age - MIDDLE_AGE_YEARS) / AGE_STEP_YEARS for age in ages])
    return torch.tensor(columns, dtype=torch.float32).T.contiguous()


def _resized(pixels: np.ndarray, side: int) -> np.ndarray:
    return cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA)
