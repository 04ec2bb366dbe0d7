"""Which queries a reader is shown: by their figures, in one order, and the worst of them too."""

import pytest
import torch

from cxr_retrieval.evaluation.chance import chance_average_precision
from cxr_retrieval.evaluation.examples import example_queries
from cxr_retrieval.evaluation.retrieval import QueryFigures, retrieve


def ranked(images: int, patients: int, seed: int = 0) -> tuple[QueryFigures, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.nn.functional.normalize(torch.randn(images, 6, generator=generator), dim=1)
    labels = (torch.rand(images, 3, generator=generator) < 0.3).to(torch.int8)
    names = torch.randint(patients, (images,), generator=generator)
    return retrieve(vectors, vectors, labels, labels, names, names), names


def plain_order(figures: QueryFigures) -> list[int]:
    """All queries from the worst to the best."""
    n, m = figures.candidates.tolist(), figures.relevant.tolist()
    chance = chance_average_precision(figures.candidates, figures.relevant).tolist()
    keys = [(figures.precision[q, -1].item() - m[q] / n[q], figures.ap[q].item() - chance[q], q) for q in range(len(n))]
    return [q for *_, q in sorted(keys)]


def test_best_worst_and_typical_are_the_ends_and_the_middle_of_one_order() -> None:
    figures, patients = ranked(90, 90)
    patients = torch.arange(90)  # everybody once: nobody is passed over
    order = plain_order(figures)
    middle = len(order) // 2
    told = example_queries(figures, patients, 4)
    assert list(told) == ["best", "typical", "worst"]
    assert told["worst"] == order[:4]
    assert told["best"] == order[: -4 - 1 : -1]
    assert sorted(map(order.index, told["typical"])) == [middle - 2, middle - 1, middle, middle + 1]


def test_a_patient_is_shown_once() -> None:
    figures, patients = ranked(120, 15)
    told = example_queries(figures, patients, 4)
    shown = [row for rows in told.values() for row in rows]
    names = patients[figures.kept_Q][shown].tolist()
    assert len(names) == len(set(names)) == 12
    order, seen = plain_order(figures), set()
    for row in order:  # the worst are the first of each patient in the order
        if len(seen) < 4 and int(patients[figures.kept_Q][row]) not in seen:
            assert row in told["worst"]
            seen.add(int(patients[figures.kept_Q][row]))


@pytest.mark.parametrize(("patients", "shown"), [(3, (0, 0, 3)), (6, (2, 0, 4))])
def test_with_few_patients_the_worst_are_still_shown(patients: int, shown: tuple[int, ...]) -> None:
    figures, names = ranked(60, patients)
    assert tuple(map(len, example_queries(figures, names, 4).values())) == shown


def test_without_queries_that_count_there_is_nothing_to_show() -> None:
    vectors, labels = torch.eye(3), torch.eye(3, dtype=torch.int8)
    figures = retrieve(vectors, vectors, labels, labels, torch.arange(3), torch.arange(3))
    assert example_queries(figures, torch.arange(3), 4) == {"best": [], "typical": [], "worst": []}
