"""Which patients there are: age, sex, number of films, and the findings of each film. Nothing is drawn here.

Patients come in cycles of 20: each of the 14 findings leads one patient of a cycle and 6 are healthy, in an order
that the seed shuffles. So every finding occurs in the first 20 patients, at the price of prevalences far flatter than
in a hospital (NIH: Hernia in 0.2% of images, here about 5%).
"""

from dataclasses import dataclass

import numpy as np

from cxr_retrieval.corpus.findings import FINDINGS

HEALTHY_PER_CYCLE = 6
MAX_FILMS = 12
MAX_FINDINGS = 3
# Streams of random numbers that must not depend on one another.
_ORDER, _FILMS, _PERSON, _HISTORY = 11, 12, 13, 14

# Findings that stay once seen; the others come and go.
CHRONIC = frozenset({"Cardiomegaly", "Mass", "Nodule", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"})
# Share of portable films while the finding is there; the worst finding counts.
_PORTABLE = {
    "Edema": 0.85, "Effusion": 0.6, "Consolidation": 0.65, "Pneumonia": 0.6, "Pneumothorax": 0.6,
    "Atelectasis": 0.6, "Infiltration": 0.5,
}  # fmt: skip
_PORTABLE_HEALTHY, _PORTABLE_CHRONIC = 0.24, 0.30
# Lead finding -> (companion, chance that the patient has it), after the co-occurrence in ChestX-ray14.
_COMPANIONS: dict[str, tuple[tuple[str, float], ...]] = {
    "Atelectasis": (("Effusion", 0.45), ("Infiltration", 0.3), ("Consolidation", 0.1)),
    "Cardiomegaly": (("Effusion", 0.45), ("Edema", 0.25), ("Atelectasis", 0.15)),
    "Effusion": (("Atelectasis", 0.45), ("Infiltration", 0.3), ("Pleural_Thickening", 0.1)),
    "Infiltration": (("Effusion", 0.2), ("Pneumonia", 0.15), ("Edema", 0.12), ("Nodule", 0.1)),
    "Mass": (("Nodule", 0.3), ("Effusion", 0.25), ("Pleural_Thickening", 0.1)),
    "Nodule": (("Mass", 0.25), ("Infiltration", 0.2)),
    "Pneumonia": (("Infiltration", 0.5), ("Edema", 0.25), ("Effusion", 0.2)),
    "Pneumothorax": (("Emphysema", 0.3), ("Effusion", 0.25), ("Atelectasis", 0.2)),
    "Consolidation": (("Effusion", 0.4), ("Atelectasis", 0.25), ("Infiltration", 0.15)),
    "Edema": (("Infiltration", 0.35), ("Effusion", 0.4), ("Cardiomegaly", 0.2)),
    "Emphysema": (("Pneumothorax", 0.3), ("Nodule", 0.1), ("Pleural_Thickening", 0.1)),
    "Fibrosis": (("Pleural_Thickening", 0.25), ("Infiltration", 0.2), ("Nodule", 0.1)),
    "Pleural_Thickening": (("Effusion", 0.3), ("Fibrosis", 0.15)),
    "Hernia": (("Atelectasis", 0.15), ("Cardiomegaly", 0.1)),
}
_MEAN_AGE = {"Hernia": 68, "Emphysema": 58, "Fibrosis": 60, "Cardiomegaly": 55, "Pneumothorax": 42}


@dataclass(frozen=True)
class Visit:
    """One film of a patient: what is on it, not yet how it looks."""

    follow_up: int
    age_years: int
    view: str
    findings: tuple[str, ...]
    severities: tuple[float, ...]  # one per finding, 0 subtle .. 1 plain


def lead_finding(patient_number: int, seed: int) -> str | None:
    """The finding that this patient has for certain, None for a healthy one."""
    cycle_length = len(FINDINGS) + HEALTHY_PER_CYCLE
    cycle, place = divmod(patient_number - 1, cycle_length)
    slot = int(np.random.default_rng([seed, cycle, _ORDER]).permutation(cycle_length)[place])
    return FINDINGS[slot] if slot < len(FINDINGS) else None


def film_count(patient_number: int, seed: int) -> int:
    """Films of this patient, 1..12, heavy tailed; about 3 on average and more for the sick."""
    rng = np.random.default_rng([seed, patient_number, _FILMS])
    median = 2.5 if lead_finding(patient_number, seed) is not None else 1.9
    return int(np.clip(round(median * float(np.exp(rng.normal(0, 0.75)))), 1, MAX_FILMS))


def person(patient_number: int, seed: int) -> tuple[int, str]:
    """Age in years at the first film, and sex."""
    rng = np.random.default_rng([seed, patient_number, _PERSON])
    lead = lead_finding(patient_number, seed)
    mean = _MEAN_AGE.get(lead, 47) if lead is not None else 43
    return int(np.clip(round(rng.normal(mean, 17)), 1, 90)), "M" if rng.random() < 0.56 else "F"


def history(patient_number: int, seed: int) -> list[Visit]:
    """All films of a patient in order, with 1..3 findings each or none."""
    rng = np.random.default_rng([seed, patient_number, _HISTORY])
    lead = lead_finding(patient_number, seed)
    count = film_count(patient_number, seed)
    age, _ = person(patient_number, seed)
    courses = _courses(lead, count, rng)
    visits = []
    for follow_up in range(count):
        present = [name for name in courses if courses[name][follow_up] is not None]
        # The lead comes first in `courses`, so a full film drops companions.
        shown = sorted(present[:MAX_FINDINGS], key=FINDINGS.index)
        severities = tuple(float(courses[name][follow_up] or 0.0) for name in shown)
        chances = [_PORTABLE.get(name, _PORTABLE_CHRONIC) for name in shown]
        view = "AP" if rng.random() < max(chances, default=_PORTABLE_HEALTHY) else "PA"
        visits.append(Visit(follow_up, min(age, 95), view, tuple(shown), severities))
        age += int(rng.random() < 0.25)
    return visits


def _courses(lead: str | None, count: int, rng: np.random.Generator) -> dict[str, list[float | None]]:
    """Finding -> severity at each film, None where it is absent."""
    if lead is None:
        return {}
    courses = {lead: _course(lead in CHRONIC, 0.85, count, rng)}
    if all(severity is None for severity in courses[lead]):
        courses[lead][0] = float(rng.uniform(0.3, 0.9))
    for companion, chance in _COMPANIONS[lead]:
        if rng.random() < chance:
            course = _course(companion in CHRONIC, 0.6, count, rng)
            # Companions belong to the illness: an acute one only shows beside its lead.
            if companion not in CHRONIC:
                pairs = zip(course, courses[lead], strict=True)
                course = [severity if main is not None else None for severity, main in pairs]
            courses[companion] = course
    return courses


def _course(chronic: bool, first: float, count: int, rng: np.random.Generator) -> list[float | None]:
    """One finding over time: a chronic one stays and slowly grows, an acute one comes and goes."""
    level = float(rng.beta(1.7, 1.9))
    onset = 0 if rng.random() < first else int(rng.integers(0, count + 1))
    present = not chronic and onset == 0
    course: list[float | None] = []
    for follow_up in range(count):
        if chronic:
            present = follow_up >= onset
        elif follow_up > 0:
            present = bool(rng.random() < (0.68 if present else 0.40))
        level = float(np.clip(level + (rng.normal(0.02, 0.05) if chronic else rng.normal(0, 0.22)), 0.08, 1.0))
        course.append(level if present else None)
    return course
