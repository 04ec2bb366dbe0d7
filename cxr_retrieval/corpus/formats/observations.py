"""Tables with a column for each finding, and cells as the CheXpert labeller writes them: 1 present, 0 absent, -1
uncertain, blank. CheXpert and MIMIC-CXR-JPG share their columns; a table of one's own has others.

Irvin et al., CheXpert: a large chest radiograph dataset with uncertainty labels and expert comparison, 2019
(arXiv:1901.07031).
"""

from collections.abc import Mapping
from typing import Any

from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.corpus.findings import ABSENT, NO_FINDING, PRESENT, UNKNOWN
from cxr_retrieval.corpus.formats.labels import quoted
from cxr_retrieval.corpus.formats.vocabulary import CHEXPERT, Vocabulary, in_our_words

OBSERVATIONS = (NO_FINDING, *CHEXPERT.meanings)
CELLS = {"1.0": PRESENT, "1": PRESENT, "0.0": ABSENT, "0": ABSENT, "-1.0": UNKNOWN, "-1": UNKNOWN}
POLICY = {"unknown": UNKNOWN, "present": PRESENT, "absent": ABSENT}


class Observations:
    """How rows are read: by what the columns' names mean, `corpus.uncertain` and `corpus.unmentioned`."""

    def __init__(self, settings: CorpusSettings, vocabulary: Vocabulary = CHEXPERT) -> None:
        self._vocabulary = vocabulary
        self._uncertain, self._unmentioned = POLICY[settings.uncertain], POLICY[settings.unmentioned]

    def facts(self, cells: Mapping[str, str]) -> dict[str, Any]:
        """What cells by their columns' names tell, as fields of Label. No Finding rules out all that is not mentioned
        of what has a column."""
        states = {}
        for name, cell in cells.items():
            if not cell:
                continue
            if cell not in CELLS:
                return {"reason": "unknown_label", "text": f"{name} is {quoted(cell)}: none of 1, 0, -1 and blank"}
            states[name] = CELLS[cell]
        nothing = PRESENT in [states.pop(name) for name in list(states) if in_our_words(name) == NO_FINDING]
        settled = {name: self._uncertain if state == UNKNOWN else state for name, state in states.items()}
        return self._vocabulary.read(settled, ABSENT if nothing else self._unmentioned)._asdict()
