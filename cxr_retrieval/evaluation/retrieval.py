"""Exact ranking of a gallery for every query, and the figures of each ranking.

A query ranks its *candidates*: gallery images of other patients, of its own group where groups are given, whose
relevance is decided (see `relevance`). More similar comes first, similarity being the dot product of unit vectors;
equally similar images keep the gallery's order. Queries are worked off in blocks; Q x G is never held at once.

Similarity is exact and the same on every machine, with any block size and number of threads: entries are rounded
to 2^-25 (an error below that of a float32 dot product), so that every partial sum in float64 is a whole number
below 2^53 units and no order of summation can change it. Otherwise the equal distances that simple embeddings
have in plenty (view, sex and age, for one) would be ordered by the rounding noise of the matrix product.
It is then rounded to 2^-30 and packed with the gallery position into one integer, which sorts fast and stably.

Shapes: Q queries, Q' queries that count, G gallery images, C findings, D dimensions, K cut-offs, B block, T places
(first ranks).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cxr_retrieval.evaluation.chance import discount
from cxr_retrieval.evaluation.relevance import (
    check_labels,
    exact_from_shared,
    has_finding,
    shared_findings,
    undecided,
)

# Bounds the working memory (about 60 bytes a pair) however large the gallery is: the block shrinks instead.
MAX_PAIRS = 1 << 22
_ROWS_AT_ONCE = 1 << 14
_ENTRY_UNITS = float(1 << 25)
_SIMILARITY_UNITS = float(1 << 30)
# Below every similarity that two unit vectors can have.
_LAST = -(1 << 31) + 1
_POSITION_BITS = 32
_POSITION_MASK = (1 << _POSITION_BITS) - 1
_NORM_TOLERANCE = 1e-2


@dataclass(frozen=True)
class QueryFigures:
    """The figures of each query, on the CPU. `_Q` fields have a row for every query given; all others, Q' of them,
    a row for every query that counts (`kept_Q`), in the order given. Figures are float64 in 0 to 1.

    With fewer than k candidates, the first k are those there are: precision divides by their number.
    """

    cutoffs: tuple[int, ...]
    kept_Q: Tensor
    """bool [Q]: has a finding and at least one relevant candidate. It does not depend on the embeddings."""
    has_finding_Q: Tensor
    """bool [Q]: has a finding. Those with a finding that are not kept are the *excluded* queries."""
    recall: Tensor
    """[Q', K]: 1 if some of the first k shares a finding with the query, else 0 (the paper's Recall@k)."""
    precision: Tensor
    """[Q', K]: share of the first k that share a finding with the query."""
    ap: Tensor
    """[Q']: average precision over the whole ranking."""
    ndcg: Tensor
    """[Q', K]: gain = number of findings shared, discount 1 / log2(1 + rank), over the candidates' best order."""
    exact_recall: Tensor
    """[Q', K]: 1 if some of the first k has exactly the query's findings (`relevance.exact_match`), else 0."""
    candidates: Tensor
    """int64 [Q']: images ranked."""
    relevant: Tensor
    """int64 [Q']: candidates that share a finding."""
    exact: Tensor
    """int64 [Q']: candidates with exactly the query's findings; may be 0, exact recall is 0 then."""
    mean_gain: Tensor
    """[Q']: mean number of findings shared, over the candidates; 0 to C."""
    ideal_dcg: Tensor
    """[Q', K]: DCG@k of the candidates' best order."""
    first: Tensor
    """int64 [Q', k]: gallery positions of the first k of the largest cut-off, -1 where there are fewer candidates."""
    same_patient_rank_Q: Tensor
    """int64 [Q]: rank of the nearest other image of the query's patient, among all of the gallery but the query itself;
    0 where there is none. Groups and labels play no part."""
    same_patient_Q: Tensor
    """int64 [Q]: other images of the query's patient in the gallery."""
    others_Q: Tensor
    """int64 [Q]: images of the gallery but the query itself."""


def retrieve(
    query_QD: Tensor,
    gallery_GD: Tensor,
    query_labels_QC: Tensor,
    gallery_labels_GC: Tensor,
    query_patients_Q: Tensor,
    gallery_patients_G: Tensor,
    *,
    cutoffs: Sequence[int] = (2, 4, 6, 8),
    query_positions_Q: Tensor | None = None,
    query_groups_Q: Tensor | None = None,
    gallery_groups_G: Tensor | None = None,
    block: int = 64,
) -> QueryFigures:
    """Rank the gallery for every query and return the figures of each ranking.

    `query_QD` and `gallery_GD` are floating point with rows of unit length (normalised by the caller; within 1%,
    so that half precision passes) or all zero, which is equally far from everything. Labels are integer matrices
    of -1, 0, 1. Patients and groups are integer codes; where groups are given (a view, say) only gallery images of
    the query's group are candidates. `query_positions_Q` is each query's own row in the gallery, or -1: needed for
    re-identification only, since ranking leaves out the whole patient; without it no query counts as being in the
    gallery. All tensors lie on one device. The cost is Q G (D + log G); `block` queries at most are ranked at once.

    Raises `ValueError` for shapes that disagree, vectors that are not of unit length, labels other than -1, 0, 1,
    cut-offs that are not distinct, ascending and positive, groups given for one side only, and a position that
    holds another patient's image.
    """
    cutoffs = tuple(int(cutoff) for cutoff in cutoffs)
    if not cutoffs or cutoffs[0] < 1 or list(cutoffs) != sorted(set(cutoffs)):
        raise ValueError(f"cutoffs must be distinct, ascending and at least 1, got {cutoffs}")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    _check_vectors(query_QD, gallery_GD)
    check_labels(query_labels_QC, gallery_labels_GC)
    if (query_groups_Q is None) != (gallery_groups_G is None):
        raise ValueError("groups must be given for queries and gallery, or for neither")
    if query_positions_Q is None:
        query_positions_Q = torch.full_like(query_patients_Q, -1, dtype=torch.int64)
    _check_rows("query", len(query_QD), query_labels_QC, query_patients_Q, query_positions_Q, query_groups_Q)
    _check_rows("gallery", len(gallery_GD), gallery_labels_GC, gallery_patients_G, gallery_groups_G)
    _check_positions(query_positions_Q, query_patients_Q, gallery_patients_G)

    rows = max(1, min(block, MAX_PAIRS // len(gallery_GD)))
    columns: dict[str, Tensor] = {}
    for start in range(0, len(query_QD), rows):
        chosen = slice(start, start + rows)
        fixed_BG = _similarity(query_QD[chosen], gallery_GD)
        own_BG = query_patients_Q[chosen, None] == gallery_patients_G
        part = _same_patient(fixed_BG, own_BG, query_positions_Q[chosen])
        candidate_BG = ~own_BG
        if query_groups_Q is not None and gallery_groups_G is not None:
            candidate_BG &= query_groups_Q[chosen, None] == gallery_groups_G
        part |= _rank(fixed_BG, candidate_BG, query_labels_QC[chosen], gallery_labels_GC, cutoffs)
        for name, value in part.items():
            # In one piece: small ones of every block would keep the rooms of its large ones from being freed.
            if name not in columns:
                columns[name] = torch.empty(len(query_QD), *value.shape[1:], dtype=value.dtype)
            columns[name][chosen] = value.cpu()

    has_finding_Q = has_finding(query_labels_QC).cpu()
    kept_Q = has_finding_Q & (columns["relevant"] > 0)
    figures = {name: value if name.endswith("_Q") else value[kept_Q] for name, value in columns.items()}
    return QueryFigures(cutoffs=cutoffs, kept_Q=kept_Q, has_finding_Q=has_finding_Q, **figures)


def _similarity(query_BD: Tensor, gallery_GD: Tensor) -> Tensor:
    """Dot products in units of 2^-30, `int64 [B, G]`: exact for entries rounded to 2^-25 (module docstring)."""
    query_units_BD = query_BD.double().mul_(_ENTRY_UNITS).round_()
    fixed_BG = torch.empty(len(query_BD), len(gallery_GD), dtype=torch.int64, device=query_BD.device)
    # By chunks, so that the gallery is never held a second time in float64.
    for start in range(0, len(gallery_GD), _ROWS_AT_ONCE):
        chosen = slice(start, start + _ROWS_AT_ONCE)
        gallery_units_GD = gallery_GD[chosen].double().mul_(_ENTRY_UNITS).round_()
        dot_BG = query_units_BD @ gallery_units_GD.T
        fixed_BG[:, chosen] = dot_BG.mul_(_SIMILARITY_UNITS / _ENTRY_UNITS**2).round_()
    return fixed_BG


def _sort_keys(fixed_BG: Tensor) -> Tensor:
    """One integer a pair that sorts ascending by falling similarity, then by gallery position."""
    position_G = torch.arange(fixed_BG.shape[1], device=fixed_BG.device)
    return (fixed_BG << _POSITION_BITS).neg_().add_(position_G)


def _same_patient(fixed_BG: Tensor, own_BG: Tensor, positions_B: Tensor) -> dict[str, Tensor]:
    """Re-identification: where the nearest image of the same patient stands, the query itself left out."""
    in_gallery_B = positions_B >= 0
    rows_B = in_gallery_B.nonzero()[:, 0]
    last = torch.iinfo(torch.int64).max
    keys_BG = _sort_keys(fixed_BG)
    keys_BG[rows_B, positions_B[rows_B]] = last
    nearest_B = keys_BG.masked_fill(~own_BG, last).min(dim=1).values
    rank_B = (keys_BG < nearest_B[:, None]).sum(dim=1) + 1
    same_B = own_BG.sum(dim=1) - in_gallery_B.long()
    return {
        "same_patient_rank_Q": rank_B.where(same_B > 0, 0),
        "same_patient_Q": same_B,
        "others_Q": own_BG.shape[1] - in_gallery_B.long(),
    }


def _rank(
    fixed_BG: Tensor, candidate_BG: Tensor, query_BC: Tensor, gallery_GC: Tensor, cutoffs: tuple[int, ...]
) -> dict[str, Tensor]:
    """Figures of one block. A pair outside the ranking sorts behind all others and has gain 0; `fixed_BG` is spent."""
    candidate_BG = candidate_BG & ~undecided(query_BC, gallery_GC)
    shared_BG = shared_findings(query_BC, gallery_GC)
    exact_BG = exact_from_shared(shared_BG, query_BC, gallery_GC) & candidate_BG
    shared_BG = shared_BG * candidate_BG

    order_BG = _sorted(_sort_keys(fixed_BG.masked_fill_(~candidate_BG, _LAST))).bitwise_and_(_POSITION_MASK)
    gain_BG = shared_BG.gather(1, order_BG)
    hit_BG = gain_BG > 0
    rank_G = torch.arange(1, gain_BG.shape[1] + 1, device=gain_BG.device)
    relevant_B = hit_BG.sum(dim=1)
    precision_BG = hit_BG.cumsum(dim=1, dtype=torch.float64).div_(rank_G)
    ap_B = precision_BG.mul_(hit_BG).sum(dim=1) / relevant_B.clamp(min=1)

    last = min(cutoffs[-1], gain_BG.shape[1])
    candidates_B = candidate_BG.sum(dim=1)
    seen_BK = torch.stack([candidates_B.clamp(min=1, max=cutoff) for cutoff in cutoffs], dim=1)
    hits_BK = _at(hit_BG[:, :last].double(), cutoffs)
    weight_T = discount(last, gain_BG.device)
    dcg_BK = _at(gain_BG[:, :last] * weight_T, cutoffs)
    ideal_BK = _at(shared_BG.topk(last, dim=1).values * weight_T, cutoffs)
    return {
        "recall": (hits_BK > 0).double(),
        "precision": hits_BK / seen_BK,
        "ap": ap_B,
        "ndcg": dcg_BK / torch.where(ideal_BK > 0, ideal_BK, 1.0),
        "exact_recall": (_at(exact_BG.gather(1, order_BG[:, :last]).double(), cutoffs) > 0).double(),
        "candidates": candidates_B,
        "relevant": relevant_B,
        "exact": exact_BG.sum(dim=1),
        "mean_gain": shared_BG.sum(dim=1).double() / candidates_B.clamp(min=1),
        "ideal_dcg": ideal_BK,
        "first": F.pad(
            order_BG[:, :last].where(rank_G[:last] <= candidates_B[:, None], -1), (0, cutoffs[-1] - last), value=-1
        ),
    }


def _sorted(keys_BG: Tensor) -> Tensor:
    """Each row ascending, on a CPU in place and by NumPy: several times faster than PyTorch there."""
    if keys_BG.device.type != "cpu":
        return keys_BG.sort(dim=1).values
    keys_BG.numpy().sort(axis=1)
    return keys_BG


def _at(values_BT: Tensor, cutoffs: tuple[int, ...]) -> Tensor:
    """Sum of the first k columns for every cut-off k, `[B, K]`; columns that are not there count as 0."""
    total_BT = F.pad(values_BT, (0, cutoffs[-1] - values_BT.shape[1])).cumsum(dim=1)
    return total_BT[:, [cutoff - 1 for cutoff in cutoffs]]


def _check_vectors(query_QD: Tensor, gallery_GD: Tensor) -> None:
    if query_QD.dim() != 2 or gallery_GD.dim() != 2 or query_QD.shape[1] != gallery_GD.shape[1]:
        raise ValueError(
            "embeddings must be [images, dimensions] with the same dimensions, "
            f"got {tuple(query_QD.shape)} and {tuple(gallery_GD.shape)}"
        )
    for name, vectors_ND in (("query", query_QD), ("gallery", gallery_GD)):
        if len(vectors_ND) == 0:
            raise ValueError(f"no {name} embeddings")
        if not vectors_ND.is_floating_point():
            raise ValueError(f"{name} embeddings must be floating point, got {vectors_ND.dtype}")
        # By chunks: the norm of a whole matrix takes a copy of it.
        norm_N = torch.cat([chunk_BD.float().norm(dim=1) for chunk_BD in vectors_ND.split(_ROWS_AT_ONCE)])
        good_N = ((norm_N - 1).abs() <= _NORM_TOLERANCE) | (norm_N == 0)
        if not bool(good_N.all()):
            row = int((~good_N).nonzero()[0])
            raise ValueError(
                f"{name} embeddings must have unit length: {int((~good_N).sum())} do not, "
                f"the first is row {row} with length {float(norm_N[row]):.4g}; normalise them first"
            )


def _check_rows(side: str, rows: int, *columns: Tensor | None) -> None:
    lengths = [len(column) for column in columns if column is not None]
    if any(length != rows for length in lengths):
        raise ValueError(f"{side}: {rows} embeddings, but labels, patients, positions or groups have {lengths} rows")
    if any(column.is_floating_point() for column in columns if column is not None):
        raise ValueError(f"{side}: labels, patients, positions and groups must be integers")


def _check_positions(positions_Q: Tensor, query_patients_Q: Tensor, gallery_patients_G: Tensor) -> None:
    if bool(((positions_Q < -1) | (positions_Q >= len(gallery_patients_G))).any()):
        raise ValueError(f"query positions must lie between -1 and {len(gallery_patients_G) - 1}")
    inside_Q = positions_Q >= 0
    if bool((gallery_patients_G[positions_Q[inside_Q]] != query_patients_Q[inside_Q]).any()):
        raise ValueError("a query position points at an image of another patient")
