"""Evaluating a model on a corpus: its embeddings against every gallery and the floors, as one artifact.

Queries are images with a finding of held-out patients. Galleries: *all* (every held-out image), *findings* (those with
a finding), *same_view* (all, of the query's view), *archive* (the images that were trained on: what a deployment
searches).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from cxr_retrieval import storage
from cxr_retrieval.artifacts import Artifact, Draft, find
from cxr_retrieval.config import EvaluationSettings
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.corpus.reading import Corpus, labels_of, pixels_of
from cxr_retrieval.corpus.splits import TRAIN, patient_position
from cxr_retrieval.embedding.stream import read_part
from cxr_retrieval.errors import UserError
from cxr_retrieval.evaluation.localisation import centred_crop, crop_hits
from cxr_retrieval.evaluation.retrieval import QueryFigures, retrieve
from cxr_retrieval.evaluation.tables import compare, per_finding, summarise
from cxr_retrieval.network.progressive import Output, embeddings
from cxr_retrieval.progress import Progress
from cxr_retrieval.report.evaluation import write_evaluation
from cxr_retrieval.training.model import Model

KIND = "evaluation"
EVALUATION_FILE, REPORT_FILE = "evaluation.json", "evaluation.html"
DRAW = "evaluated"  # salt of the patients that are drawn from a split: independent of the split itself
PIXEL_SIDE = 32
COLUMNS = ["patient_id", "view", "sex", "age_years", "findings", "unknown", "boxes", "pixels", "split"]
METADATA = {"view": ("PA", "AP"), "sex": ("M", "F")}
AGE_BANDS = (("0 to 17", 17), ("18 to 39", 39), ("40 to 64", 64), ("65 and over", 999))
MIDDLE_AGE_YEARS, AGE_STEP_YEARS = 50.0, 20.0


@dataclass(frozen=True)
class Images:
    """Images of one split: what the network said of them, labels, patients, views, and the floors' vectors."""

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


def evaluate(
    settings: EvaluationSettings, workspace: str, model_uri: str, corpus: Corpus, embedded: Artifact
) -> tuple[Artifact, bool]:
    """The evaluation of a model on a corpus, and whether anything had to be done.

    Raises UserError where no held-out image has a finding.
    """
    folder = storage.join(workspace, "reports", "evaluation")
    draft = Draft.under(folder, KIND, settings.model_dump(), (embedded.input_id,))
    done = find(draft.uri)
    if done:
        return done, False
    draft.begin()
    model = Model.open(model_uri)
    galleries = [settings.split] + ([TRAIN] if corpus.artifact.manifest["splits"][TRAIN]["images"] else [])
    parts = len(corpus.files) * len(galleries)
    with Progress.of(workspace, draft, "evaluate", parts, "parts") as progress:
        images = [read_images(embedded, corpus, model, split, settings.max_images, progress) for split in galleries]
        figures = _figures(settings, model, corpus, embedded, *images)
        files = [
            draft.write(EVALUATION_FILE, json.dumps(figures, indent=1).encode()),
            draft.write(REPORT_FILE, write_evaluation(figures).encode()),
        ]
        counts = {"images": len(images[0].patients), "queries": figures["queries"]}
        return draft.finish(files, counts), True


def _figures(
    settings: EvaluationSettings,
    model: Model,
    corpus: Corpus,
    embedded: Artifact,
    queries: Images,
    archive: Images | None = None,
) -> dict[str, Any]:
    if not (queries.labels_NC == 1).any():
        raise UserError(
            f"{corpus.artifact.uri}: no image of the {settings.split} split has a finding, nothing to retrieve"
        )
    figures = assess(queries, archive, model, settings)
    splits = corpus.artifact.manifest["splits"]
    used = {settings.split: queries} | ({TRAIN: archive} if archive else {})
    drawn = [
        f"{len(images.patients):,} of the {splits[split]['images']:,} images of the {split} split"
        for split, images in used.items()
        if len(images.patients) < splits[split]["images"]
    ]
    facts = {"corpus": corpus.artifact.input_id, "model": embedded.manifest["model"], "split": settings.split}
    return figures | facts | {"drawn": drawn}


def read_images(embedded: Artifact, corpus: Corpus, model: Model, split: str, most: int, progress: Progress) -> Images:
    """The images of one split, part by part; prepared pixels are reduced at once and not kept.

    Of a split with more than `most` images, about as many: those of patients that a hash draws.
    """
    parts = []
    share = min(1.0, most / max(1, corpus.artifact.manifest["splits"][split]["images"]))
    for number in range(len(corpus.files)):
        part = read_part(embedded, corpus, number, model, COLUMNS)
        progress.advance(1)
        mine = np.flatnonzero(np.asarray(part.facts["split"].to_pylist(), dtype=object) == split)
        if share < 1.0:
            patients = part.facts["patient_id"]
            mine = mine[[patient_position(patients[int(row)].as_py(), DRAW) < share for row in mine]]
        if len(mine):
            facts = part.facts.take(pa.array(mine))
            parts.append(
                (
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
    z, joint, crop, labels, pixels, tables = zip(*parts, strict=True)
    facts = pa.concat_tables(tables)
    return Images(
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


def assess(queries: Images, archive: Images | None, model: Model, settings: EvaluationSettings) -> dict[str, Any]:
    """Every figure of section "Evaluation" for every embedding, ready for JSON; shares are in 0 to 1."""
    every = queries if archive is None else _joined(queries, archive)
    patients = _codes(every.patients)
    views = _codes([view or "" for view in every.groups["view"]])
    count = len(queries.patients)
    named = queries.embeddings(model)
    named_archive = archive.embeddings(model) if archive else {}
    centre = (archive or queries).pixels_NE.mean(0)
    named["pixels"] = F.normalize(queries.pixels_NE - centre, dim=1)
    named["metadata"] = F.normalize(queries.metadata_NE, dim=1)
    if archive:
        named_archive["pixels"] = F.normalize(archive.pixels_NE - centre, dim=1)
        named_archive["metadata"] = F.normalize(archive.metadata_NE, dim=1)

    labels = queries.labels_NC
    asked = (labels == 1).any(1)
    own, own_views = patients[:count], views[:count]
    place = torch.arange(count)

    def ranked(name: str, gallery: str) -> QueryFigures:
        vectors, ask = named[name], (named[name][asked], labels[asked], own[asked])
        if gallery == "archive":
            assert archive is not None
            return retrieve(ask[0], named_archive[name], ask[1], archive.labels_NC, ask[2], patients[count:])
        if gallery == "findings":
            inside = torch.cumsum(asked, 0) - 1
            return retrieve(
                ask[0], vectors[asked], ask[1], labels[asked], ask[2], own[asked], query_positions_Q=inside[asked]
            )
        same_view = gallery == "same_view"
        return retrieve(
            *(ask[0], vectors, ask[1], labels, ask[2], own),
            query_positions_Q=place[asked],
            query_groups_Q=own_views[asked] if same_view else None,
            gallery_groups_G=own_views if same_view else None,
        )

    galleries = ["all", "findings", "same_view"] + (["archive"] if archive else [])
    figures = {name: {gallery: ranked(name, gallery) for gallery in galleries} for name in named}
    tables = {
        name: {gallery: summarise(found, own[asked], draws=settings.draws) for gallery, found in by_gallery.items()}
        for name, by_gallery in figures.items()
    }
    floors = ("pixels", "metadata")
    chosen = figures[model.chosen]
    return {
        "queries": int(asked.sum()),
        "patients": len(set(queries.patients)),
        "images": count,
        "chosen": model.chosen,
        "embeddings": {name: table for name, table in tables.items() if name not in floors},
        "floors": {name: tables[name] for name in floors},
        "chosen_minus_floor": {
            name: {
                gallery: compare(chosen[gallery], figures[name][gallery], own[asked], draws=settings.draws)
                for gallery in galleries
            }
            for name in floors
        },
        "per_finding": {
            name: _by_finding(figures[name]["all"], labels[asked]) for name in tables if name not in floors
        },
        "by_group": {model.chosen: _by_group(chosen["all"], queries, asked, settings.draws)},
        "same_patient_nearest": {name: tables[name]["all"]["same_patient_nearest"] for name in (model.chosen, *floors)},
        **_localisation(queries, model.recipe.size),
        **_unseen(named, labels, own, model, settings.draws),
    }


def _by_group(figures: QueryFigures, images: Images, asked: Tensor, draws: int) -> dict[str, Any]:
    """Figures of the queries of each view, sex and age band; the gallery stays whole."""
    patients = _codes(images.patients)[asked]
    found: dict[str, Any] = {}
    for name, values in images.groups.items():
        mine = np.asarray(values, dtype=object)[asked.numpy()]
        found[name] = {
            value: summarise(figures, patients, subset_Q=torch.as_tensor(mine == value), draws=draws)
            for value in sorted(set(mine) - {None})
        }
    return found


def _by_finding(figures: QueryFigures, labels_QC: Tensor) -> dict[str, Any]:
    found = per_finding(figures, labels_QC)
    return {
        name: {
            "support": int(found.support[index]),
            "recall_at_8": float(found.recall[index, -1]),
            "precision_at_8": float(found.precision[index, -1]),
            "map": float(found.ap[index]),
            "chance_precision": float(found.chance_precision[index]),
            "chance_map": float(found.chance_ap[index]),
        }
        for index, name in enumerate(FINDINGS)
        if found.support[index] > 0
    }


def _unseen(
    named: Mapping[str, Tensor], labels_NC: Tensor, patients_N: Tensor, model: Model, draws: int
) -> dict[str, Any]:
    """Retrieval of findings that training never saw, each for itself: a hit is an image that has that very finding."""
    found: dict[str, Any] = {}
    for finding in model.unseen:
        only_N1 = labels_NC[:, [model.findings.index(finding)]]
        asked = (only_N1 == 1).any(1)
        for name, vectors in named.items():
            if not asked.any():
                continue
            figures = retrieve(vectors[asked], vectors, only_N1[asked], only_N1, patients_N[asked], patients_N)
            table = summarise(figures, patients_N[asked], draws=draws)
            queries = {"queries": table["queries"]}
            cells = {"precision@8": table["precision_at"]["8"] | queries, "mAP": table["map"] | queries}
            found.setdefault(finding, {})[name] = cells
    return {"unseen": found} if found else {}


def _localisation(images: Images, size: int) -> dict[str, Any]:
    """How often the crop hits an annotated box, and how often a centred crop of the same size does."""
    pairs = [(box, images.crop_N4[n]) for n, boxes in enumerate(images.boxes) for box in boxes]
    if not pairs:
        return {}
    boxes = torch.tensor([[box[side] for side in "xywh"] for box, _ in pairs], dtype=torch.float64)
    crops = torch.as_tensor(np.stack([crop for _, crop in pairs])).double()
    found, control = crop_hits(boxes, crops), crop_hits(boxes, centred_crop(crops, size))
    return {
        "localisation": {
            "boxes": len(pairs),
            "crop": {name: float(value.double().mean()) for name, value in found.items()},
            "centred_crop": {name: float(value.double().mean()) for name, value in control.items()},
        }
    }


def _joined(a: Images, b: Images) -> Images:
    return Images(
        torch.cat([a.z_PSND, b.z_PSND], dim=2),
        torch.cat([a.joint_PNC, b.joint_PNC], dim=1),
        np.concatenate([a.crop_N4, b.crop_N4]),
        torch.cat([a.labels_NC, b.labels_NC]),
        a.patients + b.patients,
        {name: a.groups[name] + b.groups[name] for name in a.groups},
        torch.cat([a.pixels_NE, b.pixels_NE]),
        torch.cat([a.metadata_NE, b.metadata_NE]),
        a.boxes + b.boxes,
    )


def _codes(names: list[str]) -> Tensor:
    return torch.as_tensor(np.unique(names, return_inverse=True)[1])


def _reduced(pixels_NHW: np.ndarray) -> np.ndarray:
    """The floor of pixels: 32 x 32 grey values, float32 [N, 1024]."""
    small = [cv2.resize(pixels, (PIXEL_SIDE, PIXEL_SIDE), interpolation=cv2.INTER_AREA) for pixels in pixels_NHW]
    return np.stack(small).reshape(len(small), -1).astype(np.float32) / 255.0


def _groups(facts: pa.Table) -> dict[str, list[str | None]]:
    """View, sex and age band of every image; None where unknown."""
    bands = [
        None if age is None else next(name for name, last in AGE_BANDS if age <= last)
        for age in facts["age_years"].to_pylist()
    ]
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


def headline(evaluation: Mapping[str, Any], gallery: str = "all") -> list[list[Any]]:
    """Rows for a person: every embedding and floor with Recall@2/4/6/8, precision@8 and mAP in percent, then chance.

    A dash stands where no query has a relevant image.
    """

    def row(name: str, table: Mapping[str, Any], key: str) -> list[Any]:
        cells = [*table["recall_at"].values(), table["precision_at"]["8"], table["map"]]
        return [name, *("-" if cell[key] is None else 100.0 * cell[key] for cell in cells)]

    named = evaluation["embeddings"] | evaluation["floors"]
    rows = [row(name, tables[gallery], "value") for name, tables in named.items()]
    first = next(iter(named.values()))[gallery]
    return [*rows, row("chance", first, "chance")]
