"""Relevance of pairs: graded, and silent where labels are unknown."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_retrieval.evaluation.relevance import check_labels, exact_match, has_finding, shared_findings, undecided


def labels(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int8)


@st.composite
def label_pairs(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]]]:
    findings = draw(st.integers(1, 5))
    row = st.lists(st.sampled_from([1, 0, -1]), min_size=findings, max_size=findings)
    return draw(st.lists(row, min_size=1, max_size=5)), draw(st.lists(row, min_size=1, max_size=5))


@settings(max_examples=60)
@given(label_pairs())
def test_every_pair_follows_its_definition(pair: tuple[list[list[int]], list[list[int]]]) -> None:
    query, gallery = pair
    shared, unsure, exact = (
        function(labels(*query), labels(*gallery)) for function in (shared_findings, undecided, exact_match)
    )
    for q, left in enumerate(query):
        for g, right in enumerate(gallery):
            both = sum(a == 1 and b == 1 for a, b in zip(left, right, strict=True))
            maybe = any({a, b} == {1, -1} for a, b in zip(left, right, strict=True))
            assert shared[q, g] == both
            assert unsure[q, g] == (both == 0 and maybe)
            assert exact[q, g] == (left == right and -1 not in left)


@settings(max_examples=40)
@given(label_pairs())
def test_relevance_does_not_depend_on_who_asks(pair: tuple[list[list[int]], list[list[int]]]) -> None:
    query, gallery = labels(*pair[0]), labels(*pair[1])
    for function in (shared_findings, undecided, exact_match):
        assert torch.equal(function(query, gallery), function(gallery, query).T)


def test_finding_unknown_in_both_decides_nothing() -> None:
    assert not undecided(labels([1, 0, -1]), labels([0, 1, -1])).any()


def test_shared_finding_outweighs_an_unknown_one() -> None:
    assert not undecided(labels([1, 1]), labels([1, -1])).any()
    assert shared_findings(labels([1, 1]), labels([1, -1])).item() == 1


def test_queries_need_a_present_finding() -> None:
    assert has_finding(labels([0, 0], [0, -1], [0, 1])).tolist() == [False, False, True]


@pytest.mark.parametrize(
    "wrong", [torch.zeros(3), torch.zeros(2, 3), torch.full((2, 3), 2), torch.zeros(2, 3, dtype=torch.bool)]
)
def test_labels_of_another_kind_are_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="labels"):
        check_labels(wrong)


def test_labels_over_different_findings_are_refused() -> None:
    with pytest.raises(ValueError, match="same findings"):
        check_labels(labels([1, 0]), labels([1, 0, 0]))
