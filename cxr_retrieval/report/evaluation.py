"""An evaluation as one HTML file: plots first, then the tables; every figure beside its chance level and floors."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cxr_retrieval.report.charts import Figure, Forest, Series, forest
from cxr_retrieval.report.examples import examples
from cxr_retrieval.report.gallery import Case
from cxr_retrieval.report.pages import finding_label, render

GALLERIES = {
    "findings": "Test images with at least one finding: the protocol of retrieval among diseases.",
    "all": "Every test image, those without a finding too: what an archive is.",
    "archive": "The training patients' images: what a deployment searches. The network has seen them.",
    "same_view": "Test images with the query's own view (PA or AP).",
}
MEASURES = {
    "centre_in_crop": "Centre in the crop",
    "iobb": "Share of the box in the crop",
    "iou": "Intersection over union",
}
APART = {
    "unseen": ("Findings that training never saw", "No image with one of these findings was in training."),
    "seen": ("Findings that training saw, each by itself", "Images with these findings were in training."),
}
CHANCE = "chance"
FLOORS = {"pixels": "pixels alone", "metadata": "view, sex and age alone"}
BESIDE = "pixels"  # the floor that stands in the cells of tables by finding and by group

_FEW = 20
_RECALL_CUTOFFS = (2, 4, 6, 8)
_CUTOFF = 8
_KINDS = (
    ("recall_at", "Recall"),
    ("precision_at", "Precision"),
    ("ndcg_at", "nDCG"),
    ("exact_recall_at", "Exact recall"),
)


@dataclass(frozen=True)
class _Column:
    """A figure of an evaluation table: `key` at a cut-off, or `key` itself."""

    title: str
    key: str
    cutoff: str | None = None

    def read(self, table: Mapping[str, Any] | None) -> Figure:
        cell = (table or {}).get(self.key)
        if self.cutoff is not None:
            cell = (cell or {}).get(self.cutoff)
        return _figure(cell)


_PRECISION = _Column(f"Precision@{_CUTOFF}", "precision_at", str(_CUTOFF))
_MAP = _Column("mAP", "map")
_DECIDING = (_PRECISION, _MAP, _Column(f"Recall@{_CUTOFF}", "recall_at", str(_CUTOFF)))
_RECALLS = tuple(_Column(f"Recall@{cutoff}", "recall_at", str(cutoff)) for cutoff in _RECALL_CUTOFFS)


def write_evaluation(evaluation: Mapping[str, Any], cases: Mapping[int, Case] = {}) -> str:
    """HTML text of one offline file about an evaluation, given as the content of its `evaluation.json`.

    Only `embeddings` is needed: {embedding: {gallery: table}}, a table as `evaluation.tables.summarise` gives it.
    `floors` has the same shape; `chosen` names the embedding that the model recommends. Sections whose keys are
    absent (`by_group`, `per_finding`, `localisation`, `examples`, `same_patient`) are left out, and so are figures
    without a value. `cases` are the images of the `examples` by their row in the split; without them there is nothing
    to show, and that section is left out too.
    """
    embeddings: Mapping[str, Any] = evaluation["embeddings"]
    floors: Mapping[str, Any] = evaluation.get("floors") or {}
    chosen = evaluation.get("chosen")
    less_floors: Mapping[str, Any] = evaluation.get("chosen_minus_floor") or {}
    galleries = _galleries([*embeddings.values(), *floors.values()])
    by_group: Mapping[str, Any] = evaluation.get("by_group") or {}
    groups = _groups(by_group.get(chosen or "") or {}, by_group.get(BESIDE) or {})
    located = _localisation(evaluation.get("localisation"))
    return render(
        "evaluation.html.j2",
        title="Retrieval evaluation",
        facts=[
            ("Queries", evaluation.get("queries")),
            ("Patients", evaluation.get("patients")),
            ("Drawn", "; ".join(evaluation.get("drawn") or ()) or None),
            ("Chosen embedding", chosen),
            ("Corpus", evaluation.get("corpus")),
            ("Model", evaluation.get("model")),
            ("Created", evaluation.get("created")),
        ],
        galleries=[
            _gallery(name, embeddings, floors, chosen, less_floors) | {"differences": _differences(name, less_floors)}
            for name in galleries
        ],
        groups=groups,
        group_plot=_group_plot(groups),
        examples=examples(evaluation.get("examples") or {}, cases),
        per_finding=_per_finding(evaluation.get("per_finding") or {}, evaluation.get("macro") or {}, chosen),
        few=_FEW,
        deciding=[column.title for column in _DECIDING],
        measures=list(MEASURES.values()),
        apart=[
            (heading, meaning, lines)
            for kind, (heading, meaning) in APART.items()
            if (lines := _lines(evaluation.get(kind)))
        ],
        localisation=located,
        localisation_plot=_localisation_plot(located),
        same_patient=_same_patient(evaluation.get("same_patient") or {}),
    )


def _galleries(tables: Iterable[Mapping[str, Any]]) -> list[str]:
    """Gallery names, the known ones first and in our order."""
    names = list(dict.fromkeys(name for table in tables for name in table))
    order = list(GALLERIES)
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def _gallery(
    name: str,
    embeddings: Mapping[str, Any],
    floors: Mapping[str, Any],
    chosen: str | None,
    less_floors: Mapping[str, Any],
) -> dict[str, Any]:
    own = {embedding: tables[name] for embedding, tables in embeddings.items() if tables.get(name)}
    own_floors = {floor: tables[name] for floor, tables in floors.items() if tables.get(name)}
    columns = _columns([*own.values(), *own_floors.values()])
    rows = _series(own, own_floors, columns, chosen)
    return {
        "name": name.replace("_", " "),
        "meaning": GALLERIES.get(name),
        "counts": _counts([*own.values(), *own_floors.values()]),
        "recall": _plot(own, own_floors, _RECALLS, chosen),
        "decisive": _plot(own, own_floors, (_PRECISION, _MAP), chosen),
        "verdicts": _verdicts(
            own, own_floors, chosen, {floor: tables[name] for floor, tables in less_floors.items() if tables.get(name)}
        ),
        "answers": _answers(own, chosen),
        "columns": columns,
        "rows": rows,
        "chance": _common_chance(rows, len(columns)),
    }


def _columns(tables: Sequence[Mapping[str, Any]]) -> list[_Column]:
    """Recall at every cut-off, the other figures at 8 (or at the largest there is), then mAP."""
    columns = []
    for key, title in _KINDS:
        cutoffs = sorted({cutoff for table in tables for cutoff in table.get(key) or {}}, key=int)
        if key != "recall_at":
            cutoffs = [str(_CUTOFF)] if str(_CUTOFF) in cutoffs else cutoffs[-1:]
        columns += [_Column(f"{title}@{cutoff}", key, cutoff) for cutoff in cutoffs]
        if key == "precision_at" and any(table.get("map") for table in tables):
            columns.append(_MAP)
    return columns


def _series(
    embeddings: Mapping[str, Any], floors: Mapping[str, Any], columns: Sequence[_Column], chosen: str | None
) -> list[Series]:
    """One row an embedding, then one a floor."""

    def figures(table: Mapping[str, Any]) -> tuple[Figure, ...]:
        return tuple(column.read(table) for column in columns)

    rows = [Series(name, figures(table), chosen=name == chosen) for name, table in embeddings.items()]
    return rows + [Series(FLOORS.get(name, name), figures(table), floor=True) for name, table in floors.items()]


def _common_chance(rows: Sequence[Series], columns: int) -> list[float | None] | None:
    """The chance level of each column where all rows agree on it; None where some row has its own."""
    common: list[float | None] = []
    for column in range(columns):
        levels = [level for row in rows if (level := row.figures[column].chance) is not None]
        if levels and max(levels) - min(levels) > 5e-4:
            return None
        common.append(levels[0] if levels else None)
    return common


def _counts(tables: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """How many queries and candidates, as a range where embeddings differ."""
    named = (
        ("queries", "queries"),
        ("queries left out: nothing relevant to find", "excluded_queries"),
        ("candidates a query, on average", "candidates_mean"),
    )
    counts = []
    for text, key in named:
        numbers = [number for table in tables if (number := _number(table.get(key))) is not None]
        if numbers:
            low, high = f"{min(numbers):,.0f}", f"{max(numbers):,.0f}"
            counts.append((text, low if low == high else f"{low} to {high}"))
    return counts


def _answers(own: Mapping[str, Any], chosen: str | None) -> str | None:
    """Whether the chosen embedding answers queries by images of their own, or everyone by the same few."""
    answers = (own.get(chosen or "") or {}).get("answers") or {}
    distinct, most = _number(answers.get("distinct")), _number(answers.get("most"))
    if distinct is None or most is None:
        return None
    return (
        f"The first {_CUTOFF} hits of all queries are {distinct:,.0f} different images; the most frequent one answers"
        f" {100 * most:.1f}% of the queries."
    )


def _plot(
    embeddings: Mapping[str, Any],
    floors: Mapping[str, Any],
    columns: Sequence[_Column],
    chosen: str | None,
) -> Forest | None:
    tables = [*embeddings.values(), *floors.values()]
    shown = [column for column in columns if any(column.read(table).value is not None for table in tables)]
    if not shown:
        return None
    return forest(_series(embeddings, floors, shown, chosen), [column.title for column in shown])


def _verdicts(
    embeddings: Mapping[str, Any],
    floors: Mapping[str, Any],
    chosen: str | None,
    less_floors: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """The chosen embedding's deciding figures, each held against the strongest thing that knows no disease: by the
    interval of their difference over the same patients where there is one, else by the figure's own (chance is exact).
    """
    verdicts = []
    for column in _DECIDING:
        figure = column.read(embeddings.get(chosen or ""))
        if figure.value is None:
            continue
        rivals = {name: column.read(table).value for name, table in floors.items()} | {CHANCE: figure.chance}
        known = {name: value for name, value in rivals.items() if value is not None}
        best = max(known, key=lambda name: known[name], default=None)
        standing = None
        if best and best in less_floors:
            difference = _cell_of(column, less_floors[best])
            standing = _standing(difference["low"], difference["high"], 0.0)
        elif best:
            standing = _standing(figure.low, figure.high, known[best])
        verdicts.append(
            {
                "title": column.title,
                "figure": figure,
                "best": FLOORS.get(best, best) if best else None,
                "best_value": known[best] if best else None,
                "standing": standing,
            }
        )
    return verdicts


def _standing(low: float | None, high: float | None, rival: float) -> str:
    if low is None or high is None:
        return "no interval"
    return "above" if low > rival else "below" if high < rival else "level"


def _differences(gallery: str, less_floors: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The chosen embedding less each floor, with what such a comparison could have detected."""
    return [
        {
            "name": FLOORS.get(floor, floor),
            "cells": [_cell_of(column, tables[gallery]) for column in _DECIDING],
        }
        for floor, tables in less_floors.items()
        if tables.get(gallery)
    ]


def _cell_of(column: _Column, table: Mapping[str, Any]) -> Mapping[str, Any]:
    cell = table[column.key]
    found: Mapping[str, Any] = cell if column.cutoff is None else cell[column.cutoff]
    return found


def _groups(by_group: Mapping[str, Any], floor: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The chosen embedding's deciding figures over the queries of each view, sex and age, those that have any,
    beside the floor's."""
    return [
        {
            "group": group,
            "value": value,
            "queries": table["queries"],
            "patients": table["patients"],
            "figures": [column.read(table) for column in _DECIDING],
            "floors": [column.read((floor.get(group) or {}).get(value)) for column in _DECIDING],
        }
        for group, tables in by_group.items()
        for value, table in tables.items()
        if table["queries"]
    ]


def _group_plot(groups: Sequence[Mapping[str, Any]]) -> Forest | None:
    rows = [Series(f"{row['group']} {row['value']}, {row['queries']:,}", tuple(row["figures"])) for row in groups]
    return forest(rows, [column.title for column in _DECIDING]) if rows else None


def _localisation(found: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """All boxes, then those of each finding by falling number: every measure of crop and control, and between them."""
    if not found:
        return []
    tables = sorted(found["findings"].items(), key=lambda item: -item[1]["boxes"])
    return [
        {
            "name": name,
            **{key: table[key] for key in ("boxes", "patients", "crop_share")},
            "measures": [
                {"crop": _figure(table["crop"][key]), "control": _figure(table["centred_crop"][key])}
                | {"difference": table["difference"][key]}
                for key in MEASURES
            ],
        }
        for name, table in [("all findings", found), *tables]
    ]


def _localisation_plot(rows: Sequence[Mapping[str, Any]]) -> Forest | None:
    """The control stands where chance stands elsewhere."""
    series = [
        Series(
            f"{finding_label(row['name'])}, {row['boxes']:,}",
            tuple(replace(pair["crop"], chance=pair["control"].value) for pair in row["measures"]),
            chosen=place == 0,
        )
        for place, row in enumerate(rows)
    ]
    return forest(series, list(MEASURES.values())) if series else None


def _same_patient(tables: Mapping[str, Any]) -> dict[str, Any] | None:
    """Re-identification: how often the first k images hold another one of the query's patient."""
    rows = [
        {
            "name": FLOORS.get(name, name),
            "floor": name in FLOORS,
            "queries": table["queries"],
            "figures": [_figure(cell) for cell in table["recall_at"].values()],
        }
        for name, table in tables.items()
        if table["queries"]
    ]
    cutoffs = next((list(table["recall_at"]) for table in tables.values()), [])
    return {"rows": rows, "cutoffs": cutoffs} if rows else None


def _per_finding(per_finding: Mapping[str, Any], macro: Mapping[str, Any], chosen: str | None) -> list[dict[str, Any]]:
    """One table an embedding, the chosen one first; findings by falling support, with their macro means, each beside
    the floor's."""
    names = sorted((name for name in per_finding if name != BESIDE), key=lambda name: name != chosen)
    floor = per_finding.get(BESIDE) or {}
    keys = ("recall_at_8", "precision_at_8", "map")
    tables = []
    for name in names:
        rows = [
            {
                "finding": finding,
                "support": int(_number(figures.get("support")) or 0),
                "figures": [_figure(figures.get(key)) for key in keys],
                "floors": [_figure((floor.get(finding) or {}).get(key)) for key in keys],
            }
            for finding, figures in per_finding[name].items()
        ]
        rows.sort(key=lambda row: -row["support"])
        means, floors = ([_figure(macro.get(which, {}).get(key)) for key in keys] for which in (name, BESIDE))
        tables.append(
            {"embedding": name, "chosen": name == chosen, "rows": rows, "macro": means, "macro_floors": floors}
        )
    return tables


def _lines(tree: Any, path: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The leaves of a nested table with their path: figures as they are, whole numbers as counts beside them."""
    if not isinstance(tree, Mapping):
        number = _number(tree)
        return [] if number is None else [{"path": path, "figure": Figure(number), "count": None}]
    if "value" in tree:
        count = next((tree[key] for key in ("queries", "boxes", "pairs", "images") if tree.get(key) is not None), None)
        figure = _figure(tree)
        return [] if figure.value is None else [{"path": path, "figure": figure, "count": count}]
    lines = []
    for key, branch in tree.items():
        if isinstance(branch, int) and not isinstance(branch, bool):
            lines.append({"path": (*path, str(key)), "figure": None, "count": branch})
        else:
            lines += _lines(branch, (*path, str(key)))
    return lines


def _figure(cell: Any) -> Figure:
    if isinstance(cell, Mapping):
        return Figure(*(_number(cell.get(key)) for key in ("value", "low", "high", "chance")))
    return Figure(_number(cell))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
