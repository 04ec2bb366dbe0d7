"""Retrieval figures against plain loops, and chance levels against every ordering there is."""

import itertools
import json
import math
from dataclasses import dataclass, fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_retrieval.evaluation import retrieval
from cxr_retrieval.evaluation.chance import (
    chance_average_precision,
    chance_ndcg,
    chance_precision,
    chance_recall,
)
from cxr_retrieval.evaluation.retrieval import QueryFigures, retrieve
from cxr_retrieval.evaluation.tables import chance_levels, compare, per_finding, summarise, summarise_findings

CUTOFFS = (1, 2, 4, 8)


@dataclass
class Archive:
    """A gallery whose first images are the queries too."""

    vectors: torch.Tensor
    labels: torch.Tensor
    patients: torch.Tensor
    groups: torch.Tensor
    queries: int

    def retrieve(self, *, grouped: bool = False, **settings: object) -> QueryFigures:
        groups = {"query_groups_Q": self.groups[: self.queries], "gallery_groups_G": self.groups} if grouped else {}
        defaults: dict[str, object] = {"cutoffs": CUTOFFS, "query_positions_Q": torch.arange(self.queries)}
        return retrieve(
            self.vectors[: self.queries],
            self.vectors,
            self.labels[: self.queries],
            self.labels,
            self.patients[: self.queries],
            self.patients,
            **(defaults | groups | settings),
        )


def archive(seed: int, images: int, *, findings: int = 3, ties: bool = False, unknown: float = 0.15) -> Archive:
    generator = torch.Generator().manual_seed(seed)
    if ties:
        # Signed unit and half vectors: similarities are multiples of a half, nearly all of them tied.
        halves = torch.tensor(list(itertools.product([0.5, -0.5], repeat=4)))
        choices = torch.cat([torch.eye(4), -torch.eye(4), halves])
        vectors = choices[torch.randint(len(choices), (images,), generator=generator)]
    else:
        vectors = torch.nn.functional.normalize(torch.randn(images, 6, generator=generator), dim=1)
    labels = (torch.rand(images, findings, generator=generator) < 0.4).to(torch.int8)
    labels[torch.rand(images, findings, generator=generator) < unknown] = -1
    patients = torch.randint(100, 100 + max(2, images // 2), (images,), generator=generator)
    groups = torch.randint(2, (images,), generator=generator)
    return Archive(vectors, labels, patients, groups, queries=max(1, images // 2))


def gains_of(ranking: list[int], gains: list[int], cutoff: int) -> float:
    return sum(gains[g] / math.log2(place + 2) for place, g in enumerate(ranking[:cutoff]))


def plain(case: Archive, grouped: bool) -> list[dict | None]:
    """The definition, image by image."""
    vectors, labels = case.vectors.double().tolist(), case.labels.tolist()
    patients, groups = case.patients.tolist(), case.groups.tolist()
    answers: list[dict | None] = []
    for q in range(case.queries):
        gains = [sum(a == 1 and b == 1 for a, b in zip(labels[q], row, strict=True)) for row in labels]
        similar = [math.fsum(a * b for a, b in zip(vectors[q], row, strict=True)) for row in vectors]
        ranking = []
        for g in sorted(range(len(vectors)), key=lambda g, similar=similar: (-similar[g], g)):
            maybe = any({a, b} == {1, -1} for a, b in zip(labels[q], labels[g], strict=True))
            if patients[g] == patients[q] or (gains[g] == 0 and maybe) or (grouped and groups[g] != groups[q]):
                continue
            ranking.append(g)
        places = [place for place, g in enumerate(ranking, start=1) if gains[g]]
        if 1 not in labels[q] or not places:
            answers.append(None)
            continue
        exact = [labels[g] == labels[q] and -1 not in labels[q] for g in ranking]
        best = sorted(ranking, key=lambda g, gains=gains: -gains[g])
        answers.append(
            {
                "candidates": len(ranking),
                "relevant": len(places),
                "exact": sum(exact),
                "mean_gain": sum(gains[g] for g in ranking) / len(ranking),
                "ideal_dcg": [gains_of(best, gains, k) for k in CUTOFFS],
                "ap": sum((i + 1) / place for i, place in enumerate(places)) / len(places),
                "recall": [float(places[0] <= k) for k in CUTOFFS],
                "precision": [sum(place <= k for place in places) / min(k, len(ranking)) for k in CUTOFFS],
                "ndcg": [gains_of(ranking, gains, k) / gains_of(best, gains, k) for k in CUTOFFS],
                "exact_recall": [float(any(exact[:k])) for k in CUTOFFS],
                "first": (ranking + [-1] * CUTOFFS[-1])[: CUTOFFS[-1]],
            }
        )
    return answers


def assert_same_figures(left: QueryFigures, right: QueryFigures) -> None:
    for field in fields(QueryFigures):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=field.name)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 24), st.booleans(), st.booleans())
def test_figures_equal_plain_loops(seed: int, images: int, ties: bool, grouped: bool) -> None:
    case = archive(seed, images, ties=ties)
    figures = case.retrieve(grouped=grouped)
    expected = plain(case, grouped)
    assert figures.kept_Q.tolist() == [answer is not None for answer in expected]
    kept = [answer for answer in expected if answer is not None]
    for name in kept[0] if kept else ():
        wanted = torch.tensor([answer[name] for answer in kept], dtype=torch.float64)
        torch.testing.assert_close(getattr(figures, name).double(), wanted, rtol=0, atol=1e-12, msg=name)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 60), st.integers(1, 12), st.booleans())
def test_block_size_changes_nothing(seed: int, images: int, block: int, ties: bool) -> None:
    case = archive(seed, images, ties=ties)
    assert_same_figures(case.retrieve(), case.retrieve(block=block))


def test_bounded_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = archive(1, 200, ties=True)
    whole = case.retrieve()
    monkeypatch.setattr(retrieval, "MAX_PAIRS", 500)
    monkeypatch.setattr(retrieval, "_ROWS_AT_ONCE", 7)
    assert_same_figures(whole, case.retrieve())


def test_equal_vectors_tie_wherever_they_stand_in_the_gallery() -> None:
    generator = torch.Generator().manual_seed(0)
    query, other = torch.nn.functional.normalize(torch.randn(2, 197, generator=generator), dim=1)
    gallery = other.repeat(1001, 1)
    labels = torch.zeros(1001, 1, dtype=torch.int8)
    for first in (0, 1, 500, 1000):
        labels.zero_()
        labels[first] = 1
        ones = torch.ones(1, 1, dtype=torch.int8)
        figures = retrieve(query[None], gallery, ones, labels, torch.tensor([-1]), torch.arange(1001))
        assert figures.ap.item() == pytest.approx(1 / (first + 1), rel=1e-12)


@settings(max_examples=10)
@given(st.integers(0, 10**6))
def test_own_patient_is_never_counted(seed: int) -> None:
    case = archive(seed, 20)
    before = case.retrieve()
    # Twins of every query under its own patient: the nearest images there are, with just its findings.
    more = Archive(
        torch.cat([case.vectors, case.vectors[: case.queries]]),
        torch.cat([case.labels, case.labels[: case.queries]]),
        torch.cat([case.patients, case.patients[: case.queries]]),
        torch.cat([case.groups, case.groups[: case.queries]]),
        case.queries,
    )
    alone = before.kept_Q
    for q in range(case.queries):
        # A twin is a candidate for the queries of other patients: compare one query at a time.
        keep = torch.ones(len(more.vectors), dtype=torch.bool)
        keep[len(case.vectors) :] = False
        keep[len(case.vectors) + q] = True
        one = retrieve(
            case.vectors[q : q + 1],
            more.vectors[keep],
            case.labels[q : q + 1],
            more.labels[keep],
            case.patients[q : q + 1],
            more.patients[keep],
            cutoffs=CUTOFFS,
        )
        assert one.kept_Q.item() == alone[q].item()
        if alone[q]:
            row = int(alone[:q].sum())
            assert one.ap.item() == pytest.approx(before.ap[row].item(), rel=1e-12)
            assert one.candidates.item() == before.candidates[row].item()


@settings(max_examples=12)
@given(st.integers(0, 10**6))
def test_undecided_image_is_neither_hit_nor_miss(seed: int) -> None:
    case = archive(seed, 16, unknown=0)
    labels = torch.full((1, 3), -1, dtype=torch.int8)
    for q in range(case.queries):
        query = case.vectors[q : q + 1], case.labels[q : q + 1], case.patients[q : q + 1]
        without = retrieve(query[0], case.vectors, query[1], case.labels, query[2], case.patients)
        with_unknown = retrieve(
            query[0],
            torch.cat([query[0], case.vectors]),
            query[1],
            torch.cat([labels, case.labels]),
            query[2],
            torch.cat([torch.tensor([-5]), case.patients]),
        )
        assert torch.equal(with_unknown.kept_Q, without.kept_Q)
        for name in ("recall", "precision", "ap", "ndcg", "exact_recall", "candidates"):
            assert torch.equal(getattr(with_unknown, name), getattr(without, name)), name


def test_same_group_gallery_is_the_gallery_of_that_group() -> None:
    case = archive(3, 40)
    grouped = case.retrieve(grouped=True)
    for group in (0, 1):
        asked, held = case.groups[: case.queries] == group, case.groups == group
        alone = retrieve(
            case.vectors[: case.queries][asked],
            case.vectors[held],
            case.labels[: case.queries][asked],
            case.labels[held],
            case.patients[: case.queries][asked],
            case.patients[held],
            cutoffs=CUTOFFS,
        )
        assert torch.equal(grouped.ap[asked[grouped.kept_Q]], alone.ap)


def test_fewer_candidates_than_k_use_what_is_there() -> None:
    vectors = torch.eye(3)
    labels = torch.tensor([[1], [1], [0]], dtype=torch.int8)
    figures = retrieve(vectors[:1], vectors[1:], labels[:1], labels[1:], torch.tensor([0]), torch.tensor([1, 2]))
    assert figures.precision[0].tolist() == [0.5] * 4
    assert figures.recall[0].tolist() == [1.0] * 4
    assert chance_levels(figures).recall[0].tolist() == [1.0] * 4


def test_reidentification_leaves_out_the_query_and_looks_at_everyone() -> None:
    vectors = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 0.9], [0.8, 0.2]]), dim=1)
    labels = torch.tensor([[1], [0], [1], [1], [1]], dtype=torch.int8)
    patients = torch.tensor([5, 5, 6, 7, 6])
    figures = retrieve(vectors, vectors, labels, labels, patients, patients, query_positions_Q=torch.arange(5))
    assert figures.same_patient_rank_Q.tolist() == [1, 1, 2, 0, 4]
    assert figures.same_patient_Q.tolist() == [1, 1, 1, 0, 1]
    assert figures.others_Q.tolist() == [4] * 5
    assert figures.has_finding_Q.tolist() == [True, False, True, True, True]


def test_reidentification_counts_the_first_k_as_a_plain_loop_does() -> None:
    case = archive(13, 40)
    figures = case.retrieve()
    patients = case.patients[: case.queries]
    ranks, chances = [], []
    for query in range(case.queries):
        others = [g for g in range(40) if g != query]
        ranked = sorted(others, key=lambda g, query=query: (-float(case.vectors[query] @ case.vectors[g]), g))
        own = [rank for rank, g in enumerate(ranked, start=1) if case.patients[g] == patients[query]]
        if own:
            ranks.append(own[0])
            chances.append(1 - math.comb(39 - len(own), 4) / math.comb(39, 4))
    table = summarise(figures, patients, draws=50)["same_patient"]
    assert table["queries"] == len(ranks) > 0
    assert list(table["recall_at"]) == ["1", "2", "4", "8"]
    for k in (1, 2, 4, 8):
        assert table["recall_at"][str(k)]["value"] == pytest.approx(sum(rank <= k for rank in ranks) / len(ranks))
    assert table["recall_at"]["4"]["chance"] == pytest.approx(sum(chances) / len(chances))


def test_half_precision_and_zero_vectors_are_ranked() -> None:
    case = archive(4, 30)
    case.vectors = case.vectors.half()
    case.vectors[3] = 0
    assert case.retrieve().ap.isfinite().all()


@pytest.mark.parametrize(("n", "m"), [(n, m) for n in range(1, 7) for m in range(n + 1)])
def test_chance_is_the_mean_over_every_ordering(n: int, m: int) -> None:
    gains = [2] * (m // 2) + [1] * (m - m // 2) + [0] * (n - m)
    orders = list(itertools.permutations(gains))
    candidates, relevant = torch.tensor([n]), torch.tensor([m])
    found = []
    for order in orders:
        places = [place for place, gain in enumerate(order, start=1) if gain]
        found.append(sum((i + 1) / place for i, place in enumerate(places)) / m if m else 0.0)
    assert chance_average_precision(candidates, relevant).item() == pytest.approx(sum(found) / len(orders), abs=1e-12)
    for k in (1, 2, 3, 8):
        first = [order[:k] for order in orders]
        recall = sum(any(order) for order in first) / len(orders)
        precision = sum(sum(gain > 0 for gain in order) / len(order) for order in first) / len(orders)
        assert chance_recall(candidates, relevant, k).item() == pytest.approx(recall, abs=1e-12)
        assert chance_precision(candidates, relevant).item() == pytest.approx(precision, abs=1e-12)
        places = list(range(n))
        ideal = gains_of(places, gains, k)
        ndcg = sum(gains_of(places, list(order), k) for order in orders) / len(orders) / ideal if m else 0.0
        mean_gain, best = torch.tensor([[sum(gains) / n], [ideal]], dtype=torch.float64)
        assert chance_ndcg(candidates, mean_gain, best, k).item() == pytest.approx(ndcg, abs=1e-12)


def test_chance_holds_for_archives_of_millions() -> None:
    n, m = torch.tensor([10_000_000]), torch.tensor([2_000_000])
    assert chance_recall(n, m, 8).item() == pytest.approx(1 - 0.8**8, abs=1e-6)
    assert chance_average_precision(n, m).item() == pytest.approx(0.2, abs=1e-5)


def test_embeddings_of_noise_score_at_chance() -> None:
    case = archive(7, 1200, findings=5, unknown=0.05)
    case.patients = torch.arange(1200)
    figures = case.retrieve()
    table = summarise(figures, case.patients[: case.queries])
    cells = [table["map"], *(table[f"{name}_at"]["1"] for name in ("recall", "precision", "ndcg", "exact_recall"))]
    for cell in cells:
        assert cell["low"] - cell["standard_error"] <= cell["chance"] <= cell["high"] + cell["standard_error"]


def test_summary_is_the_mean_of_its_queries_and_fits_json() -> None:
    case = archive(8, 60)
    patients = case.patients[: case.queries]
    figures = case.retrieve()
    table = summarise(figures, patients, draws=100)
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert list(table["recall_at"]) == ["1", "2", "4", "8"]
    assert table["precision_at"]["4"]["value"] == pytest.approx(figures.precision[:, 2].mean().item())
    assert table["ndcg_at"]["1"]["chance"] == pytest.approx(chance_levels(figures).ndcg[:, 0].mean().item())
    assert table["map"]["value"] == pytest.approx(figures.ap.mean().item())
    assert table["queries"] + table["excluded_queries"] + table["queries_without_finding"] == case.queries
    assert table["patients"] == len(set(patients[figures.kept_Q].tolist()))
    assert table["same_patient"]["queries"] == int((figures.same_patient_Q > 0).sum())


def test_a_ranking_that_gives_everyone_the_same_images_is_seen() -> None:
    case = archive(8, 60, unknown=0.0)
    case.patients = torch.arange(60)
    patients = case.patients[: case.queries]
    varied = summarise(case.retrieve(), patients, draws=10)["answers"]
    case.vectors[:-9] = torch.eye(6)[0]  # as near to everyone as can be, and the first of those that are
    same = summarise(case.retrieve(), patients, draws=10)["answers"]
    assert same["distinct"] < 20
    assert same["most"] > 0.8 > varied["most"]
    assert varied["distinct"] > 2 * same["distinct"]


def test_subsets_share_out_all_queries() -> None:
    case = archive(9, 60)
    patients, first = case.patients[: case.queries], case.groups[: case.queries] == 0
    figures = case.retrieve()
    whole, *parts = (
        summarise(figures, patients, subset_Q=subset, draws=50)
        for subset in (torch.ones(case.queries, dtype=torch.bool), first, ~first)
    )
    total = sum(part["map"]["value"] * part["queries"] for part in parts)
    assert total / whole["queries"] == pytest.approx(whole["map"]["value"])
    empty = summarise(figures, patients, subset_Q=torch.zeros(case.queries, dtype=torch.bool))
    assert (empty["queries"], empty["map"]["value"], empty["candidates_mean"]) == (0, None, None)
    json.dumps(empty, allow_nan=False)


def test_comparison_is_paired_and_says_what_it_could_detect() -> None:
    case, other = archive(10, 80), archive(10, 80)
    other.vectors = archive(11, 80).vectors
    patients = case.patients[: case.queries]
    a, b = case.retrieve(), other.retrieve()
    table = compare(a, b, patients, draws=200)
    assert table["map"]["difference"] == pytest.approx((a.ap - b.ap).mean().item())
    assert table["map"]["detectable"] == pytest.approx(2.802 * table["map"]["standard_error"], rel=1e-3)
    same = compare(a, a, patients, draws=50)["recall_at"]["8"]
    assert same == {"difference": 0, "low": 0, "high": 0, "standard_error": 0, "detectable": 0}
    assert compare(a, b, patients, subset_Q=torch.zeros(case.queries, dtype=torch.bool))["map"]["low"] is None
    with pytest.raises(ValueError, match="same queries"):
        compare(a, case.retrieve(grouped=True), patients)


def test_findings_are_averaged_over_their_own_queries() -> None:
    case = archive(12, 60)
    case.labels[: case.queries, 2] = 0
    labels = case.labels[: case.queries]
    figures = case.retrieve()
    table = per_finding(figures, labels)
    kept = labels[figures.kept_Q]
    for c in (0, 1):
        assert table.support[c] == (kept[:, c] == 1).sum()
        assert table.ap[c].item() == pytest.approx(figures.ap[kept[:, c] == 1].mean().item())
        assert table.recall[c].tolist() == pytest.approx(figures.recall[kept[:, c] == 1].mean(dim=0).tolist())
    assert table.support[2] == 0
    assert table.ap[2].isnan()
    assert table.macro_ap.item() == pytest.approx(table.ap[:2].mean().item())
    assert table.macro_precision.tolist() == pytest.approx(table.precision[:2].mean(dim=0).tolist())

    told = summarise_findings(figures, labels, case.patients[: case.queries], ["a", "b", "c"], draws=50)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert list(told["findings"]) == ["a", "b"]
    for c, name in enumerate("ab"):
        cells = told["findings"][name]
        assert cells["support"] == table.support[c]
        assert cells["map"]["value"] == pytest.approx(table.ap[c].item())
        assert cells["map"]["chance"] == pytest.approx(table.chance_ap[c].item())
        assert cells["recall_at_8"]["value"] == pytest.approx(table.recall[c, -1].item())
        assert cells["map"]["low"] < cells["map"]["value"] < cells["map"]["high"]
    assert told["macro"]["precision_at_8"]["value"] == pytest.approx(table.macro_precision[-1].item())


def test_without_a_query_that_counts_no_finding_has_figures() -> None:
    case = archive(12, 60)
    case.labels[:] = 0
    figures = case.retrieve()
    told = summarise_findings(figures, case.labels[: case.queries], case.patients[: case.queries], ["a", "b", "c"])
    assert told["findings"] == {}
    assert told["macro"]["map"]["value"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cutoffs": ()}, "cutoffs"),
        ({"cutoffs": (4, 2)}, "ascending"),
        ({"block": 0}, "block"),
        ({"query_groups_Q": torch.zeros(5, dtype=torch.int64)}, "groups"),
        ({"query_positions_Q": torch.full((5,), 99)}, "positions must lie"),
        ({"query_positions_Q": torch.arange(4)}, "rows"),
        ({"query_positions_Q": torch.arange(5).flip(0)}, "another patient"),
    ],
)
def test_wrong_settings_are_refused(change: dict, message: str) -> None:
    case = archive(0, 10)
    case.patients = torch.arange(10)
    with pytest.raises(ValueError, match=message):
        case.retrieve(**change)


def test_vectors_without_unit_length_are_refused_by_row() -> None:
    case = archive(0, 10)
    case.vectors[7] *= 3
    with pytest.raises(ValueError, match=r"gallery embeddings must have unit length: 1 do not, the first is row 7"):
        case.retrieve()
    case.vectors[7] = torch.nan
    with pytest.raises(ValueError, match="unit length"):
        case.retrieve()
    with pytest.raises(ValueError, match="relevant"):
        chance_recall(torch.tensor([2]), torch.tensor([3]), 1)
