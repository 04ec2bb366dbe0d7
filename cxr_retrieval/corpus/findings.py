"""The findings of ChestX-ray14, in the order of every label matrix in this project."""

import numpy as np

FINDINGS: tuple[str, ...] = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
NO_FINDING = "No Finding"

PRESENT, ABSENT, UNKNOWN = 1, 0, -1


def label_vector(findings: list[str], unknown: list[str]) -> np.ndarray:
    """Labels of one image as `int8 [C]`: 1 present, 0 absent, -1 unknown (uncertain or not assessed)."""
    vector = np.zeros(len(FINDINGS), dtype=np.int8)
    vector[[FINDINGS.index(name) for name in unknown]] = UNKNOWN
    vector[[FINDINGS.index(name) for name in findings]] = PRESENT
    return vector
