"""Cells of the CheXpert labeller, which CheXpert and MIMIC-CXR-JPG share: 1 present, 0 absent, -1 uncertain, blank.

Irvin et al., CheXpert: a large chest radiograph dataset with uncertainty labels and expert comparison, 2019
(arXiv:1901.07031).
"""

from collections.abc import Mapping
from typing import Any

from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.corpus.findings import ABSENT, NO_FINDING, PRESENT, UNKNOWN
from cxr_retrieval.corpus.formats.labels import quoted
from cxr_retrieval.corpus.formats.vocabulary import CHEXPERT

OBSERVATIONS = (NO_FINDING, *CHEXPERT.meanings)
CELLS = {"1.0": PRESENT, "1": PRESENT, "0.0": ABSENT, "0": ABSENT, "-1.0": UNKNOWN, "-1": UNKNOWN}
POLICY = {"unknown": UNKNOWN, "present": PRESENT, "absent": ABSENT}


class Observations:
    """How rows are read: by `corpus.uncertain` and `corpus.unmentioned`."""

    def __init__(self, settings: CorpusSettings) -> None:
        self._uncertain, self._unmentioned = POLICY[settings.uncertain], POLICY[settings.unmentioned]

    def facts(self, cells: Mapping[str, str]) -> dict[str, Any]:
        """What the cells of OBSERVATIONS tell, as fields of Label. No Finding rules out all that is not mentioned."""
        states = {}
        for name, cell in cells.items():
            if not cell:
                continue
            if cell not in CELLS:
                return {"reason": "unknown_label", "text": f"{name} is {quoted(cell)}: none of 1, 0, -1 and blank"}
            states[name] = CELLS[cell]
        nothing = states.pop(NO_FINDING, None) == PRESENT
        settled = {name: self._uncertain if state == UNKNOWN else state for name, state in states.items()}
        return CHEXPERT.read(settled, ABSENT if nothing else self._unmentioned)._asdict()
