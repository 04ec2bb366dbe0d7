"""A training run as one HTML file: curves of losses and of retrieval, how the centres lie, where the network looks.

A *table* is a step of a pass, as in the history of a model: the whole image's steps first, then the crop's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cxr_retrieval.report.charts import (
    Dimension,
    Matrix,
    Plane,
    epoch_axis,
    matrix,
    number_axis,
    percent_axis,
    plane,
    viridis,
)
from cxr_retrieval.report.films import data_uri
from cxr_retrieval.report.pages import finding_label, render

_SIZE = (640.0, 380.0)
_SHOWN = 4  # looks at one example, from the first epoch to the last
_PASSES = ("whole image", "crop")
CHANCE = "chance"


@dataclass(frozen=True)
class Example:
    """A validation image that was followed: its pixels `uint8 [S, S]`, its findings, and its crop after every epoch
    (x, y, width, height in pixels)."""

    pixels: np.ndarray
    findings: Sequence[str]
    crops: Sequence[Sequence[int]]


@dataclass(frozen=True)
class _Line:
    """A line of a plot in pixels, with its name and colour; `faint` for what it is compared with."""

    name: str
    corners: str
    colour: str
    faint: bool


@dataclass(frozen=True)
class _Chart:
    label: str
    note: str
    plane: Plane
    lines: tuple[_Line, ...]


def write_training(
    model: Mapping[str, Any], centres: np.ndarray, classes: Sequence[str], films: Sequence[Example]
) -> str:
    """The page of a model, from the facts of its `model.json` and its centres `[T, K, D]` of the `classes` [K] that it
    learnt."""
    history, pretraining = model["history"], model.get("pretraining", ())
    steps = len(centres) // len(_PASSES)
    tables = [f"{which}, step {step + 1}" for which in _PASSES for step in range(steps)]
    best = history[model["best_epoch"]]
    chosen = model["chosen"]
    figures = model["validation"][chosen]
    return render(
        "training.html.j2",
        title="Training",
        facts=[
            *([("Epochs without labels", len(pretraining))] if pretraining else []),
            ("Epochs", f"{len(history)}, stopped early" if model["stopped_early"] else len(history)),
            ("Best epoch", model["best_epoch"] + 1),
            ("Chosen embedding", chosen),
            ("Its validation mAP, %", f"{100 * figures['map']:.1f}"),
            ("Chance, %", f"{100 * figures['chance_map']:.1f}"),
            ("Images a second", f"{np.median([record['images_per_second'] for record in history]):.0f}"),
            ("Unseen findings", ", ".join(map(finding_label, model.get("unseen", ())))),
            ("Corpus", model["corpus"]),
        ],
        collapsed=best["centres_collapsed"],
        charts=[
            _retrieval(history),
            _losses(history, "cross_entropy", "cross-entropy", tables),
            _losses(history, "ccloss", "CCLoss", tables),
            _cosines(history, tables),
            *([_pretraining(pretraining)] if pretraining else []),
        ],
        matrix=_geometry(centres[steps - 1], classes, f"cosine between centres, {tables[steps - 1]}")
        if len(classes) > 1
        else None,
        films=[_film(example) for example in films],
    )


def _retrieval(history: Sequence[Mapping[str, Any]]) -> _Chart:
    names = list(history[0]["validation"])
    curves = {name: [record["validation"][name]["map"] for record in history] for name in names}
    chance = [record["validation"][names[0]]["chance_map"] for record in history]
    values = [value for curve in (*curves.values(), chance) for value in curve]
    y = percent_axis("validation mAP", values)
    return _chart("Validation mAP of every embedding", "", y, curves | {CHANCE: chance})


def _losses(history: Sequence[Mapping[str, Any]], key: str, name: str, tables: Sequence[str]) -> _Chart:
    curves = {table: [record[f"{key}_by_table"][n] for record in history] for n, table in enumerate(tables)}
    y = number_axis(name, "mean over the epoch's images", _known(curves))
    return _chart(f"{name} of every step and pass", "unweighted; a pass begins where it is first seen", y, curves)


def _pretraining(records: Sequence[Mapping[str, Any]]) -> _Chart:
    curve = [record["loss"] for record in records]
    y = number_axis("loss", "mean over the epoch's steps", [*curve, 0.0])
    note = "0 where a puzzle's embedding says all that the image's does; near 1, nothing"
    return _chart("Pretraining without labels, before all else", note, y, {"puzzles and images": curve})


def _cosines(history: Sequence[Mapping[str, Any]], tables: Sequence[str]) -> _Chart:
    curves = {table: [record["centre_cosine"][n] for record in history] for n, table in enumerate(tables)}
    y = number_axis("mean cosine", "between centres of two classes", [*_known(curves), 0.0, 1.0])
    return _chart(
        "How the centres lie", "near 1 they have collapsed onto one point and CCLoss parts nothing", y, curves
    )


def _chart(label: str, note: str, y: Dimension, curves: Mapping[str, Sequence[float | None]]) -> _Chart:
    last = max(len(curve) for curve in curves.values())
    area = plane(epoch_axis(last), y, *_SIZE)
    count = sum(name != CHANCE for name in curves)
    lines = []
    for number, (name, curve) in enumerate(curves.items()):
        corners = [
            f"{area.at_x(epoch)},{area.at_y(value)}" for epoch, value in enumerate(curve, 1) if value is not None
        ]
        if corners:
            faint = name == CHANCE
            colour = "var(--warn)" if faint else viridis(0.25 + 0.75 * number / max(1, count - 1))
            lines.append(_Line(name, " ".join(corners), colour, faint))
    return _Chart(label, note, area, tuple(lines))


def _known(curves: Mapping[str, Sequence[float | None]]) -> list[float]:
    return [value for curve in curves.values() for value in curve if value is not None] or [0.0]


def _apart(cosine: float) -> str:
    """How two unit vectors lie: their cosine, the angle between them and their distance, 0 to 2."""
    return (
        f"cosine {cosine:.2f}, {math.degrees(math.acos(cosine)):.0f} degrees, distance {math.sqrt(2 - 2 * cosine):.2f}"
    )


def _geometry(centres_KD: np.ndarray, classes: Sequence[str], label: str) -> Matrix:
    """Cosines between the centres of every two classes, as colour; their angle and distance in a cell's title."""
    cosines_KK = np.clip(centres_KD.astype(float) @ centres_KD.astype(float).T, -1.0, 1.0)
    labels = [finding_label(name) for name in classes]
    colours = Dimension(
        "cosine", "of two centres", -1.0, 1.0, tuple((c, f"{c:g}") for c in (-1.0, -0.5, 0.0, 0.5, 1.0))
    )
    return matrix(label, labels, colours, cosines_KK.tolist(), _apart)


def _film(example: Example) -> dict[str, Any]:
    """An example with its crop at a few epochs, evenly from the first to the last; boxes as shares of the side."""
    epochs = sorted({round(place) for place in np.linspace(0, len(example.crops) - 1, _SHOWN)})
    side = example.pixels.shape[0]
    return {
        "image": data_uri(example.pixels),
        "findings": ", ".join(map(finding_label, example.findings)),
        "looks": [
            {"epoch": epoch + 1, "box": [round(100 * part / side, 2) for part in example.crops[epoch]]}
            for epoch in epochs
        ],
    }
