"""Which queries a reader is shown: the best, the worst and the typical ones, chosen by their figures and nothing else.

Shapes: Q queries given to `retrieve`, Q' those that count.
"""

from torch import Tensor

from cxr_retrieval.evaluation.chance import chance_average_precision, chance_precision
from cxr_retrieval.evaluation.retrieval import QueryFigures

BEST, TYPICAL, WORST = "best", "typical", "worst"


def example_queries(figures: QueryFigures, query_patients_Q: Tensor, each: int) -> dict[str, list[int]]:
    """Rows in Q' of at most `each` queries of each kind, at most one query a patient.

    Queries are ordered by precision at the largest cut-off less its chance level, that is by what the first hits show;
    equal ones by average precision less its chance level, then as they were given. The worst come from the front of
    that order, the best from its end, the typical from its middle outwards. With few patients the worst are chosen
    first and the typical last: what fails is never crowded out by what works.
    """
    n, m = figures.candidates, figures.relevant
    lift = figures.precision[:, -1] - chance_precision(n, m)
    finer = figures.ap - chance_average_precision(n, m)
    order = sorted(range(len(n)), key=lambda row: (float(lift[row]), float(finer[row]), row))
    middle = len(order) // 2
    outwards = sorted(range(len(order)), key=lambda place: abs(place - middle))
    patients = query_patients_Q.cpu()[figures.kept_Q].tolist()
    seen: set[int] = set()

    def first_of(rows: list[int]) -> list[int]:
        found: list[int] = []
        for row in rows:
            if len(found) < each and patients[row] not in seen:
                seen.add(patients[row])
                found.append(row)
        return found

    worst, best = first_of(order), first_of(order[::-1])
    typical = first_of([order[place] for place in outwards])
    return {BEST: best, TYPICAL: typical, WORST: worst}
