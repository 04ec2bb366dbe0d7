"""Validation images whose crops are followed while a network learns."""

import numpy as np

from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.corpus.splits import VALIDATION

EXAMPLES, LOOKED_AT = 6, 2048


def example_places(corpus: Corpus, without: list[str]) -> np.ndarray:
    """Where a few validation images with a finding are, each of another patient: an array of PLACE.

    The same for every run on a corpus. Fewer where there are fewer, among the first that are looked at.
    """
    places = corpus.places(VALIDATION, without)[:LOOKED_AT]
    facts = corpus.take(places, ["findings", "patient_id"]).to_pylist()
    first = {row["patient_id"]: number for number, row in reversed(list(enumerate(facts))) if row["findings"]}
    return places[sorted(first.values())[:EXAMPLES]]
