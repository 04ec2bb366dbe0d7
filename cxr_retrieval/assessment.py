"""Evaluating a model on a corpus: its embeddings against every gallery and the floors, as one artifact.

Queries are images with a finding of held-out patients. Galleries: *all* (every held-out image), *findings* (those with
a finding), *same_view* (all, of the query's view), *archive* (the images that were trained on: what a deployment
searches).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cxr_retrieval import storage
from cxr_retrieval.artifacts import Artifact, Draft, find
from cxr_retrieval.config import EvaluationSettings
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.corpus.splits import TRAIN
from cxr_retrieval.errors import UserError
from cxr_retrieval.evaluation.examples import example_queries
from cxr_retrieval.evaluation.localisation import localise
from cxr_retrieval.evaluation.retrieval import QueryFigures, retrieve
from cxr_retrieval.evaluation.tables import chance_levels, compare, summarise, summarise_findings
from cxr_retrieval.images import Images, read_cases, read_images
from cxr_retrieval.progress import Progress
from cxr_retrieval.report.evaluation import write_evaluation
from cxr_retrieval.training.model import Model

KIND = "evaluation"
EVALUATION_FILE, REPORT_FILE = "evaluation.json", "evaluation.html"
EXAMPLES = 4  # queries that are shown of each kind


def evaluate(
    settings: EvaluationSettings, workspace: str, model_uri: str, corpus: Corpus, embedded: Artifact, *, names: bool
) -> tuple[Artifact, bool]:
    """The evaluation of a model on a corpus, and whether anything had to be done.

    `names`: whether the page tells the names of the images and patients that it shows. Raises UserError where no
    held-out image has a finding.
    """
    folder = storage.join(workspace, "reports", "evaluation")
    draft = Draft.under(folder, KIND, settings.model_dump() | {"names": names}, (embedded.input_id,))
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
        cases = read_cases(corpus, settings.split, example_crops(figures), names)
        files = [
            draft.write(EVALUATION_FILE, json.dumps(figures, indent=1).encode()),
            draft.write(REPORT_FILE, write_evaluation(figures, cases).encode()),
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


def assess(queries: Images, archive: Images | None, model: Model, settings: EvaluationSettings) -> dict[str, Any]:
    """Every figure of section "Evaluation" for every embedding, ready for JSON; shares are in 0 to 1."""
    patients = _codes(queries.patients + (archive.patients if archive else []))
    own_views = _codes([view or "" for view in queries.groups["view"]])
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
    own = patients[:count]
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
    by_finding = {
        name: summarise_findings(found["all"], labels[asked], own[asked], FINDINGS, draws=settings.draws)
        for name, found in figures.items()
        if name != "metadata"
    }
    return {
        "queries": int(asked.sum()),
        "patients": len(own[asked].unique()),
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
        "per_finding": {name: found["findings"] for name, found in by_finding.items()},
        "macro": {name: found["macro"] for name, found in by_finding.items()},
        "by_group": {
            name: _by_group(figures[name]["all"], queries, asked, settings.draws) for name in (model.chosen, "pixels")
        },
        "same_patient": {name: tables[name]["all"]["same_patient"] for name in (model.chosen, *floors)},
        "examples": _examples(chosen["all"], queries, asked, own, named[model.chosen]),
        **_localisation(queries, own, model.recipe.size, settings.draws),
        **_apart(named, labels, own, model, settings),
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


def _examples(
    figures: QueryFigures, images: Images, asked: Tensor, patients_N: Tensor, vectors_ND: Tensor
) -> dict[str, Any]:
    """The best, typical and worst queries with their first hits; images are named by their row in the split."""
    position_Q = asked.nonzero()[:, 0][figures.kept_Q]
    chance = chance_levels(figures)

    def look(position: int) -> dict[str, Any]:
        return {"row": int(images.row_N[position]), "crop": images.crop_N4[position].tolist()}

    def example(query: int) -> dict[str, Any]:
        position = int(position_Q[query])
        hits = [int(hit) for hit in figures.first[query] if hit >= 0]
        distances = (vectors_ND[hits].double() - vectors_ND[position].double()).norm(dim=1)
        return look(position) | {
            "precision": float(figures.precision[query, -1]),
            "chance_precision": float(chance.precision[query, -1]),
            "ap": float(figures.ap[query]),
            "chance_ap": float(chance.ap[query]),
            "hits": [look(hit) | {"distance": float(distances[place])} for place, hit in enumerate(hits)],
        }

    rows = example_queries(figures, patients_N[asked], EXAMPLES)
    return {kind: [example(query) for query in queries] for kind, queries in rows.items()}


def example_crops(evaluation: Mapping[str, Any]) -> list[dict[int, list[int]]]:
    """The images of each example query of an evaluation, itself and its hits: crops by row in the split."""
    shown = [[query, *query["hits"]] for queries in evaluation["examples"].values() for query in queries]
    return [{image["row"]: image["crop"] for image in images} for images in shown]


def _apart(
    named: Mapping[str, Tensor], labels_NC: Tensor, patients_N: Tensor, model: Model, settings: EvaluationSettings
) -> dict[str, Any]:
    """Retrieval of findings each for itself, a hit is an image that has that very finding: of those `unseen` by
    training, and where it is asked for of those `seen` too."""
    found: dict[str, dict[str, Any]] = {"unseen": {}, "seen": {}}
    for finding in model.findings if settings.apart == "all" else model.unseen:
        only_N1 = labels_NC[:, [model.findings.index(finding)]]
        asked = (only_N1 == 1).any(1)
        if not asked.any():
            continue
        cells = found["unseen" if finding in model.unseen else "seen"].setdefault(finding, {})
        for name, vectors in named.items():
            figures = retrieve(vectors[asked], vectors, only_N1[asked], only_N1, patients_N[asked], patients_N)
            table = summarise(figures, patients_N[asked], draws=settings.draws)
            queries = {"queries": table["queries"]}
            cells[name] = {"precision@8": table["precision_at"]["8"] | queries, "mAP": table["map"] | queries}
    return {kind: tables for kind, tables in found.items() if tables}


def _localisation(images: Images, patients_N: Tensor, size: int, draws: int) -> dict[str, Any]:
    """How the crops meet the annotated boxes, beside centred crops of the same size."""
    pairs = [(n, box) for n, boxes in enumerate(images.boxes) for box in boxes]
    if not pairs:
        return {}
    rows = [n for n, _ in pairs]
    boxes = torch.tensor([[box[side] for side in "xywh"] for _, box in pairs], dtype=torch.float64)
    findings = [box["finding"] for _, box in pairs]
    crops = torch.as_tensor(images.crop_N4[rows])
    return {"localisation": localise(boxes, crops, size, findings, patients_N[rows], draws=draws)}


def _codes(names: Sequence[str]) -> Tensor:
    return torch.as_tensor(np.unique(names, return_inverse=True)[1])


def headline(evaluation: Mapping[str, Any], gallery: str = "all") -> list[list[Any]]:
    """Rows for a person: every embedding and floor with Recall@2/4/6/8, precision@8 and mAP in percent, then chance.

    A dash stands where no query has a relevant image.
    """

    def row(name: str, table: Mapping[str, Any], key: str) -> list[Any]:
        cells = [*table["recall_at"].values(), table["precision_at"]["8"], table["map"]]
        return [name, *(_percent(cell[key]) for cell in cells)]

    named = evaluation["embeddings"] | evaluation["floors"]
    rows = [row(name, tables[gallery], "value") for name, tables in named.items()]
    first = next(iter(named.values()))[gallery]
    return [*rows, row("chance", first, "chance")]


def localisation_rows(evaluation: Mapping[str, Any]) -> list[list[Any]]:
    """Rows for a person: all boxes, then those of each finding, with their number and patients; then in percent how
    often the crop holds a box's centre, how often a centred crop does, and the difference with its interval, and the
    same of the mean IoU. No row where no image has a box."""
    found = evaluation.get("localisation")
    if not found:
        return []

    def row(name: str, table: Mapping[str, Any]) -> list[Any]:
        cells: list[Any] = [name, table["boxes"], table["patients"]]
        for measure in ("centre_in_crop", "iou"):
            cells += [100.0 * table[which][measure]["value"] for which in ("crop", "centred_crop")]
            cells.append(_difference(table["difference"][measure]))
        return cells

    return [row("all", found), *(row(name, table) for name, table in found["findings"].items())]


def apart_rows(evaluation: Mapping[str, Any]) -> list[list[Any]]:
    """Rows for a person, of every finding that was asked for by itself, and whether training saw it: the chosen
    embedding and the pixels, then precision@8 and mAP in percent, each with its chance level. No row where there is
    none."""
    rows: list[list[Any]] = []
    for kind in ("unseen", "seen"):
        for finding, table in evaluation.get(kind, {}).items():
            for name in (evaluation["chosen"], "pixels"):
                cells = [table[name][figure] for figure in ("precision@8", "mAP")]
                shares = [_percent(cell[part]) for cell in cells for part in ("value", "chance")]
                rows.append([finding, kind, cells[0]["queries"], name, *shares])
    return rows


def _percent(share: float | None) -> float | str:
    return "-" if share is None else 100.0 * share


def _difference(cell: Mapping[str, Any]) -> str:
    spread = "" if cell["low"] is None else f" ({100.0 * cell['low']:+.1f} to {100.0 * cell['high']:+.1f})"
    return f"{100.0 * cell['difference']:+.1f}{spread}"
