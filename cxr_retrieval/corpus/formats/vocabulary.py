"""What the finding names of each archive mean among FINDINGS: the one table of them, and how names are read by it.

A meaning is written as names of FINDINGS: `Effusion` is that finding; `Mass? Nodule?` may be any of them, so that all
are unknown where the name is present, and absent where it is absent; an empty meaning is none of FINDINGS. Words are
meant as the archive's own hierarchy of labels has them: what a word means, every word below it means too, and what a
broader word could stand for is marked with `?`.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cxr_retrieval.corpus.findings import ABSENT, FINDINGS, NO_FINDING, PRESENT, UNKNOWN


class Told(NamedTuple):
    """What an archive tells of one image: findings that are present, those that are unknown, and words of its own for
    what is none of FINDINGS. `findings` and `unknown` are in the order of FINDINGS and share none; others are absent.
    """

    findings: list[str]
    unknown: list[str]
    other: list[str]


class Vocabulary:
    """The finding names of one archive. FINDINGS that none of its names mean are never labelled there: unknown."""

    def __init__(self, meanings: Mapping[str, str]) -> None:
        self.meanings = meanings
        self._sure = {name: [word for word in text.split() if word[-1] != "?"] for name, text in meanings.items()}
        self._may = {name: [word[:-1] for word in text.split() if word[-1] == "?"] for name, text in meanings.items()}
        meant = {finding for words in (*self._sure.values(), *self._may.values()) for finding in words}
        if strange := meant - set(FINDINGS):
            raise ValueError(f"{sorted(strange)} are none of FINDINGS")
        self.labelled = frozenset(meant)

    def among(self, names: Iterable[str]) -> "Vocabulary":
        """The vocabulary of a table that has these names and no others; what is not in this one is none of FINDINGS."""
        return Vocabulary({name: self.meanings.get(name, "") for name in names})

    def read(self, states: Mapping[str, int], rest: int) -> Told:
        """What names in the states PRESENT, ABSENT or UNKNOWN tell of an image.

        `rest` is the state of findings that the archive labels and no name of `states` means. A name that is not in the
        vocabulary is none of FINDINGS. Of several names for one finding, one that is present decides, then one that
        leaves it unknown.
        """
        found: dict[str, set[int]] = {}
        for name, state in states.items():
            for finding in self._sure.get(name, ()):
                found.setdefault(finding, set()).add(state)
            for finding in self._may.get(name, ()):
                found.setdefault(finding, set()).add(UNKNOWN if state == PRESENT else state)
        decided = {
            finding: next(state for state in (PRESENT, UNKNOWN, ABSENT) if state in seen)
            for finding, seen in found.items()
        }
        untold = {finding: rest if finding in self.labelled else UNKNOWN for finding in FINDINGS}
        told = untold | decided
        return Told(
            [finding for finding in FINDINGS if told[finding] == PRESENT],
            [finding for finding in FINDINGS if told[finding] == UNKNOWN],
            [name for name, state in states.items() if state == PRESENT and not self.meanings.get(name)],
        )


OWN = Vocabulary({finding: finding for finding in FINDINGS})

NIH = Vocabulary({**OWN.meanings, "Infiltrate": "Infiltration"})  # the box table spells one finding in its own way

# CheXpert and MIMIC-CXR-JPG: 13 observations and No Finding. Lung Opacity stands above most others, whose own columns
# tell more; Pleural Other is thickening, plaques or scars.
CHEXPERT = Vocabulary(
    {
        "Enlarged Cardiomediastinum": "",
        "Cardiomegaly": "Cardiomegaly",
        "Lung Opacity": "",
        "Lung Lesion": "Mass? Nodule?",
        "Edema": "Edema",
        "Consolidation": "Consolidation",
        "Pneumonia": "Pneumonia",
        "Atelectasis": "Atelectasis",
        "Pneumothorax": "Pneumothorax",
        "Pleural Effusion": "Effusion",
        "Pleural Other": "Pleural_Thickening?",
        "Fracture": "",
        "Support Devices": "",
    }
)

# PadChest: 193 names, of which those that are not here are none of FINDINGS. They lie in a tree, which is followed.
PADCHEST = Vocabulary(
    {
        "atelectasis": "Atelectasis",
        "atelectasis basal": "Atelectasis",
        "laminar atelectasis": "Atelectasis",
        "lobar atelectasis": "Atelectasis",
        "round atelectasis": "Atelectasis",
        "segmental atelectasis": "Atelectasis",
        "total atelectasis": "Atelectasis",
        "volume loss": "Atelectasis?",
        "hypoexpansion": "Atelectasis?",
        "hypoexpansion basal": "Atelectasis?",
        "cardiomegaly": "Cardiomegaly",
        "heart insufficiency": "Cardiomegaly? Edema?",
        "pleural effusion": "Effusion",
        "loculated pleural effusion": "Effusion",
        "loculated fissural effusion": "Effusion Pleural_Thickening?",
        "hydropneumothorax": "Effusion Pneumothorax",
        "empyema": "Effusion",
        "hemothorax": "Effusion",
        "costophrenic angle blunting": "Effusion? Pleural_Thickening?",
        "infiltrates": "Infiltration",
        "alveolar pattern": "Infiltration Pneumonia? Consolidation? Edema?",
        "ground glass pattern": "Infiltration Pneumonia? Edema? Fibrosis?",
        "increased density": "Infiltration? Mass? Nodule? Consolidation?",
        "interstitial pattern": "Infiltration Edema? Fibrosis?",
        "reticular interstitial pattern": "Infiltration Edema? Fibrosis?",
        "reticulonodular interstitial pattern": "Infiltration Nodule? Edema? Fibrosis?",
        "miliary opacities": "Infiltration Nodule? Edema? Fibrosis?",
        "pulmonary mass": "Mass",
        "mass": "Mass?",
        "breast mass": "Mass?",
        "mediastinal mass": "Mass?",
        "pleural mass": "Mass?",
        "soft tissue mass": "Mass?",
        "lung metastasis": "Mass? Nodule?",
        "lepidic adenocarcinoma": "Mass? Nodule? Consolidation?",
        "nodule": "Nodule",
        "multiple nodules": "Nodule",
        "granuloma": "Nodule?",
        "calcified granuloma": "Nodule?",
        "pseudonodule": "Nodule?",
        "end on vessel": "Nodule?",
        "nipple shadow": "Nodule?",
        "pneumonia": "Pneumonia",
        "atypical pneumonia": "Pneumonia",
        "tuberculosis": "Infiltration? Pneumonia? Consolidation?",
        "pneumothorax": "Pneumothorax",
        "consolidation": "Infiltration Pneumonia? Consolidation Edema?",
        "air bronchogram": "Infiltration Pneumonia? Consolidation Edema?",
        "abscess": "Infiltration? Mass? Consolidation?",
        "lymphangitis carcinomatosa": "Infiltration?",
        "respiratory distress": "Infiltration? Consolidation? Edema?",
        "pulmonary edema": "Edema",
        "kerley lines": "Edema?",
        "hilar congestion": "Edema?",
        "emphysema": "Emphysema",
        "COPD signs": "Emphysema?",
        "air trapping": "Emphysema?",
        "bullas": "Emphysema?",
        "hyperinflated lung": "Emphysema?",
        "pulmonary fibrosis": "Fibrosis",
        "asbestosis signs": "Fibrosis Pleural_Thickening?",
        "chronic changes": "Emphysema? Fibrosis?",
        "fibrotic band": "Fibrosis?",
        "post radiotherapy changes": "Fibrosis",
        "tuberculosis sequelae": "Infiltration? Pneumonia? Consolidation? Fibrosis? Pleural_Thickening?",
        "pleural thickening": "Pleural_Thickening",
        "apical pleural thickening": "Pleural_Thickening",
        "calcified pleural thickening": "Pleural_Thickening",
        "pleural plaques": "Pleural_Thickening?",
        "calcified pleural plaques": "Pleural_Thickening?",
        "fissure thickening": "Pleural_Thickening?",
        "major fissure thickening": "Pleural_Thickening?",
        "minor fissure thickening": "Pleural_Thickening?",
        "hiatal hernia": "Hernia",
    }
)

# VinDr-CXR: 22 local names, with boxes, and 6 of the whole image, of which `No finding` is no name. The part that was
# on Kaggle has 14 of them.
VINDR = Vocabulary(
    {
        "Aortic enlargement": "",
        "Atelectasis": "Atelectasis",
        "Calcification": "",
        "Cardiomegaly": "Cardiomegaly",
        "Clavicle fracture": "",
        "Consolidation": "Consolidation",
        "Edema": "Edema",
        "Emphysema": "Emphysema",
        "Enlarged PA": "",
        "ILD": "Infiltration? Fibrosis?",
        "Infiltration": "Infiltration",
        "Lung Opacity": "Infiltration? Mass? Nodule? Pneumonia? Consolidation?",
        "Lung cavity": "",
        "Lung cyst": "",
        "Mediastinal shift": "",
        "Nodule/Mass": "Mass? Nodule?",
        "Pleural effusion": "Effusion",
        "Pleural thickening": "Pleural_Thickening",
        "Pneumothorax": "Pneumothorax",
        "Pulmonary fibrosis": "Fibrosis",
        "Rib fracture": "",
        "Other lesion": "",
        "COPD": "Emphysema?",
        "Lung tumor": "Mass? Nodule?",
        "Pneumonia": "Pneumonia",
        "Tuberculosis": "Infiltration? Pneumonia? Consolidation?",
        "Other disease": "",
        "Other diseases": "",
    }
)


def _folded(name: str) -> str:
    return name.replace("_", " ").casefold()


# How a table of one's own may call a finding: as any archive does whose labels are as broad as FINDINGS. PadChest's are
# finer: who has no round atelectasis may have another.
SPELLINGS: Mapping[str, str] = {
    _folded(name): meaning
    for vocabulary in (NIH, CHEXPERT, VINDR)
    for name, meaning in vocabulary.meanings.items()
    if meaning in FINDINGS
} | {_folded(NO_FINDING): NO_FINDING, "normal": NO_FINDING}


def in_our_words(name: str) -> str:
    """The one of FINDINGS that a name surely is, or NO_FINDING; else the name."""
    return SPELLINGS.get(_folded(name), name)


def named(names: Iterable[str]) -> Vocabulary:
    """The vocabulary of a table that has these names for findings; those that are none of ours mean none."""
    return Vocabulary({name: ours if (ours := in_our_words(name)) in FINDINGS else "" for name in names})


VOCABULARIES: Mapping[str, Vocabulary] = {
    "NIH ChestX-ray14": NIH,
    "CheXpert, MIMIC-CXR-JPG": CHEXPERT,
    "PadChest": PADCHEST,
    "VinDr-CXR": VINDR,
}
