"""Figures of many queries as tables: means with intervals and chance levels, findings one by one, differences.

Shapes: Q queries given to `retrieve`, Q' those that count, C findings, K cut-offs, M figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cxr_retrieval.evaluation.chance import (
    chance_average_precision,
    chance_ndcg,
    chance_precision,
    chance_recall,
)
from cxr_retrieval.evaluation.intervals import finding_bootstrap, number, paired_difference, patient_bootstrap
from cxr_retrieval.evaluation.relevance import PRESENT, check_labels
from cxr_retrieval.evaluation.retrieval import QueryFigures


@dataclass(frozen=True)
class ChanceFigures:
    """Expected figures of a random ranking for each query that counts, float64; named as in `QueryFigures`."""

    recall: Tensor
    precision: Tensor
    ap: Tensor
    ndcg: Tensor
    exact_recall: Tensor


@dataclass(frozen=True)
class FindingFigures:
    """Means over the queries that have a finding, float64, NaN where there is none; `macro_*` are their means over
    the findings with support. Relevance stays that of the query: a hit may share another finding than this one.
    """

    cutoffs: tuple[int, ...]
    support: Tensor
    """int64 [C]: queries that count and have the finding."""
    recall: Tensor
    """[C, K]"""
    precision: Tensor
    """[C, K]"""
    ap: Tensor
    """[C]"""
    chance_recall: Tensor
    """[C, K]"""
    chance_precision: Tensor
    """[C]: the same at every cut-off."""
    chance_ap: Tensor
    """[C]"""
    macro_recall: Tensor
    """[K]"""
    macro_precision: Tensor
    """[K]"""
    macro_ap: Tensor
    """[]"""


def chance_levels(figures: QueryFigures) -> ChanceFigures:
    """Exact chance level of every figure of every query (formulas in `chance`)."""
    n, m = figures.candidates, figures.relevant
    precision = chance_precision(n, m)
    columns = range(len(figures.cutoffs))
    return ChanceFigures(
        recall=torch.stack([chance_recall(n, m, k) for k in figures.cutoffs], dim=1),
        precision=torch.stack([precision for _ in columns], dim=1),
        ap=chance_average_precision(n, m),
        ndcg=torch.stack(
            [chance_ndcg(n, figures.mean_gain, figures.ideal_dcg[:, i], figures.cutoffs[i]) for i in columns], dim=1
        ),
        exact_recall=torch.stack([chance_recall(n, figures.exact, k) for k in figures.cutoffs], dim=1),
    )


def summarise(
    figures: QueryFigures,
    query_patients_Q: Tensor,
    *,
    subset_Q: Tensor | None = None,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """Means over the queries that count, with patient-bootstrap intervals and chance levels, ready for JSON.

    `query_patients_Q` is the tensor given to `retrieve`; `subset_Q` (bool) narrows the queries (one view, one sex,
    an age band) but not their candidates. Keys: `recall_at`, `precision_at`, `ndcg_at`, `exact_recall_at` (each by
    cut-off, as a string), `map`, `same_patient`; every leaf is {value, low, high, standard_error, chance}
    in 0 to 1, None where not defined (no query; spread with fewer than two patients). Also `queries`,
    `excluded_queries` (a finding, but no relevant candidate), `queries_without_finding`,
    `queries_with_exact_match` (at least one candidate with the same findings), `patients`, `candidates_mean`,
    `relevant_mean`, and `answers`: how many `distinct` images are among the first k of all queries (k the largest
    cut-off), and the share of queries that have the `most` frequent one there. Few images that answer everyone are hubs
    (Radovanovic et al. 2010): a ranking by how abnormal an image looks has them, and scores well, and finds nothing
    that is alike. `same_patient` is re-identification: `recall_at` k, how often the first k images of the whole gallery
    hold another one of the query's patient, over its own `queries`, those that have one.

    Raises `ValueError` for lengths that disagree.
    """
    chosen_Q = _chosen(figures, query_patients_Q, subset_Q)
    counted = chosen_Q[figures.kept_Q]
    patients = query_patients_Q.cpu()[figures.kept_Q & chosen_Q]
    resampling: dict[str, Any] = {"draws": draws, "seed": seed, "level": level}

    cells = _cells(_columns(figures)[counted], _columns(chance_levels(figures))[counted], patients, **resampling)
    table = _arrange(cells, figures.cutoffs)
    return table | {
        "same_patient": _same_patient(figures, query_patients_Q.cpu(), chosen_Q, resampling),
        "queries": int(counted.sum()),
        "excluded_queries": int((figures.has_finding_Q & ~figures.kept_Q & chosen_Q).sum()),
        "queries_without_finding": int((~figures.has_finding_Q & chosen_Q).sum()),
        "queries_with_exact_match": int((figures.exact[counted] > 0).sum()),
        "patients": len(patients.unique()),
        "candidates_mean": number(figures.candidates[counted].double().mean()),
        "relevant_mean": number(figures.relevant[counted].double().mean()),
        "answers": _answers(figures.first[counted]),
    }


def _same_patient(
    figures: QueryFigures, patients_Q: Tensor, chosen_Q: Tensor, resampling: dict[str, Any]
) -> dict[str, Any]:
    mine_Q = (figures.same_patient_Q > 0) & chosen_Q
    cutoffs = sorted({1, *figures.cutoffs})
    rank_Q, others_Q, same_Q = (
        column[mine_Q] for column in (figures.same_patient_rank_Q, figures.others_Q, figures.same_patient_Q)
    )
    found = torch.stack([(rank_Q <= cutoff).double() for cutoff in cutoffs], dim=1)
    chance = torch.stack([chance_recall(others_Q, same_Q, cutoff) for cutoff in cutoffs], dim=1)
    cells = _cells(found, chance, patients_Q[mine_Q], **resampling)
    return {"recall_at": dict(zip(map(str, cutoffs), cells, strict=True)), "queries": int(mine_Q.sum())}


def _answers(first: Tensor) -> dict[str, float | None]:
    times = torch.bincount(first[first >= 0])
    most = float(times.max()) / len(first) if len(times) else None
    return {"distinct": int((times > 0).sum()), "most": most}


def compare(
    figures_a: QueryFigures,
    figures_b: QueryFigures,
    query_patients_Q: Tensor,
    *,
    subset_Q: Tensor | None = None,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """Paired differences a - b of two embeddings over the same queries and gallery, ready for JSON.

    Keys as the figures of `summarise`; every leaf is {difference, low, high, standard_error, detectable}, where
    `detectable` is the true difference that would have been found with 80% power at 5%.

    Raises `ValueError` if the two were not computed over the same queries, candidates and cut-offs.
    """
    same = figures_a.cutoffs == figures_b.cutoffs and torch.equal(figures_a.kept_Q, figures_b.kept_Q)
    if not same or not torch.equal(figures_a.candidates, figures_b.candidates):
        raise ValueError("a and b must be figures of the same queries, gallery and cut-offs")
    chosen_Q = _chosen(figures_a, query_patients_Q, subset_Q)
    counted = chosen_Q[figures_a.kept_Q]
    patients = query_patients_Q.cpu()[figures_a.kept_Q & chosen_Q]
    a, b = _columns(figures_a)[counted], _columns(figures_b)[counted]
    if len(patients):
        cells = paired_difference(a, b, patients, draws=draws, seed=seed, level=level).differences()
    else:
        cells = [
            dict.fromkeys(("difference", "low", "high", "standard_error", "detectable")) for _ in range(a.shape[1])
        ]
    return _arrange(cells, figures_a.cutoffs)


def per_finding(figures: QueryFigures, query_labels_QC: Tensor) -> FindingFigures:
    """Figures of each finding, over the queries that have it, and their macro means.

    `query_labels_QC` is the matrix given to `retrieve`. Raises `ValueError` if its length is another.
    """
    check_labels(query_labels_QC)
    if len(query_labels_QC) != len(figures.kept_Q):
        raise ValueError(f"{len(figures.kept_Q)} queries, but {len(query_labels_QC)} rows of labels")
    present = (query_labels_QC.cpu()[figures.kept_Q] == PRESENT).double()
    support_C = present.sum(dim=0)
    chance = chance_levels(figures)

    def mean_by_finding(values: Tensor) -> Tensor:
        # 0 / 0 is the NaN that a finding without queries should have.
        return (present.T @ values) / (support_C if values.dim() == 1 else support_C[:, None])

    recall, precision = mean_by_finding(figures.recall), mean_by_finding(figures.precision)
    ap = mean_by_finding(figures.ap)
    return FindingFigures(
        cutoffs=figures.cutoffs,
        support=support_C.long(),
        recall=recall,
        precision=precision,
        ap=ap,
        chance_recall=mean_by_finding(chance.recall),
        chance_precision=mean_by_finding(chance.precision[:, 0]),
        chance_ap=mean_by_finding(chance.ap),
        macro_recall=recall.nanmean(dim=0),
        macro_precision=precision.nanmean(dim=0),
        macro_ap=ap.nanmean(),
    )


def summarise_findings(
    figures: QueryFigures,
    query_labels_QC: Tensor,
    query_patients_Q: Tensor,
    findings: Sequence[str],
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """Figures of each finding that some query has, and their macro means, with intervals over patients, ready for JSON.

    `findings` names the columns of the labels, which are those given to `retrieve`. Keys: `findings`, a table by name
    with its `support` (queries) and `patients`, and `macro`; figures in both: recall and precision at the largest
    cut-off k (`recall_at_k`, `precision_at_k`) and `map`, leaves as in `summarise`.
    """
    means = per_finding(figures, query_labels_QC)
    keys = (f"recall_at_{figures.cutoffs[-1]}", f"precision_at_{figures.cutoffs[-1]}", "map")
    if not means.support.any():
        return {"findings": {}, "macro": dict.fromkeys(keys, dict.fromkeys(_CELL))}
    values = torch.stack([figures.recall[:, -1], figures.precision[:, -1], figures.ap], dim=1)
    present = query_labels_QC.cpu()[figures.kept_Q] == PRESENT
    patients = query_patients_Q.cpu()[figures.kept_Q]
    each, macro = finding_bootstrap(values, present, patients, draws=draws, seed=seed, level=level)
    chance = torch.stack([means.chance_recall[:, -1], means.chance_precision, means.chance_ap], dim=1)

    tables = {
        name: {
            "support": int(means.support[c]),
            "patients": len(patients[present[:, c]].unique()),
            **dict(zip(keys, each[c].figures(chance=chance[c]), strict=True)),
        }
        for c, name in enumerate(findings)
        if means.support[c] > 0
    }
    return {"findings": tables, "macro": dict(zip(keys, macro.figures(chance=chance.nanmean(dim=0)), strict=True))}


_CELL = ("value", "low", "high", "standard_error", "chance")
_BY_CUTOFF = ("recall_at", "precision_at", "ndcg_at", "exact_recall_at")


def _columns(figures: QueryFigures | ChanceFigures) -> Tensor:
    """All figures side by side, `[Q', M]`: one column a cut-off in the order of `_BY_CUTOFF`, then AP."""
    parts = (figures.recall, figures.precision, figures.ndcg, figures.exact_recall, figures.ap[:, None])
    return torch.cat(parts, dim=1)


def _arrange(cells: list[dict[str, float | None]], cutoffs: tuple[int, ...]) -> dict[str, Any]:
    """The inverse of `_columns` for one cell a column."""
    table: dict[str, Any] = {}
    for i in range(len(_BY_CUTOFF)):
        row = cells[i * len(cutoffs) : (i + 1) * len(cutoffs)]
        table[_BY_CUTOFF[i]] = {str(cutoff): cell for cutoff, cell in zip(cutoffs, row, strict=True)}
    return table | {"map": cells[-1]}


def _cells(
    values_QM: Tensor, chance_QM: Tensor, patients_Q: Tensor, *, draws: int, seed: int, level: float
) -> list[dict[str, float | None]]:
    if len(values_QM) == 0:
        return [dict.fromkeys(_CELL) for _ in range(values_QM.shape[1])]
    interval = patient_bootstrap(values_QM, patients_Q, draws=draws, seed=seed, level=level)
    return interval.figures(chance=chance_QM.mean(dim=0))


def _chosen(figures: QueryFigures, query_patients_Q: Tensor, subset_Q: Tensor | None) -> Tensor:
    queries = len(figures.kept_Q)
    if len(query_patients_Q) != queries or (subset_Q is not None and len(subset_Q) != queries):
        raise ValueError(f"patients and subset must have one row for each of the {queries} queries")
    return torch.ones(queries, dtype=torch.bool) if subset_Q is None else subset_Q.cpu().bool()
