"""Which patients there are: age, sex, number of films, and the findings of each film. Nothing is drawn here.

Patients come in cycles of 40: a finding leads as many of them as `_LEADS` says and 19 are healthy, in an order that the
seed shuffles. So every finding occurs in the first 40 patients. How often findings occur, alone and together, how
often a film is portable, and ages follow NIH's table of 112,120 images; what deviates, and why:

- a rare finding leads one patient of a cycle, or an archive of some hundred films had none (NIH: Hernia 0.2% of the
  images, Pneumonia 1.3%, Fibrosis 1.5%; here 2% to 4%);
- at most 3 findings a film (NIH: 1.4% have more) and 12 films a patient (NIH: 5% of the patients have more);
- labels are what is drawn, without the errors of text mining: they are the ground truth of tests, and faint signs
  make them hard enough.
"""

from dataclasses import dataclass

import numpy as np

from cxr_retrieval.corpus.findings import FINDINGS

CYCLE = 40
MAX_FILMS = 12
MAX_FINDINGS = 3
# Streams of random numbers that must not depend on one another.
_ORDER, _FILMS, _PERSON, _HISTORY = 11, 12, 13, 14

# Patients of a cycle whom a finding leads; one where it is not named.
_LEADS = {"Infiltration": 4, "Effusion": 2, "Atelectasis": 2, "Nodule": 2, "Pneumothorax": 2}
# Parameters of the beta distribution of a first severity: continuous, mild ones most often.
_SEVERITY = (1.2, 1.8)
# Findings that stay once seen; the others come and go.
CHRONIC = frozenset({"Cardiomegaly", "Mass", "Nodule", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"})
# Share of portable films while the finding is there; the worst finding counts.
_PORTABLE = {
    "Edema": 0.88, "Consolidation": 0.62, "Pneumonia": 0.50, "Infiltration": 0.48, "Effusion": 0.44,
    "Atelectasis": 0.42, "Cardiomegaly": 0.38, "Emphysema": 0.36, "Pneumothorax": 0.32, "Fibrosis": 0.16,
    "Hernia": 0.15,
}  # fmt: skip
_PORTABLE_OTHERWISE = 0.33
# Lead finding -> (companion, share of the lead's images that have it): ChestX-ray14's own.
_COMPANIONS: dict[str, tuple[tuple[str, float], ...]] = {
    "Atelectasis": (("Effusion", 0.28), ("Infiltration", 0.28), ("Consolidation", 0.11), ("Pneumothorax", 0.07)),
    "Cardiomegaly": (("Effusion", 0.38), ("Infiltration", 0.21), ("Atelectasis", 0.13), ("Edema", 0.05)),
    "Effusion": (("Infiltration", 0.30), ("Atelectasis", 0.25), ("Consolidation", 0.10), ("Mass", 0.09)),
    "Infiltration": (("Effusion", 0.20), ("Atelectasis", 0.16), ("Nodule", 0.08), ("Consolidation", 0.06)),
    "Mass": (("Effusion", 0.22), ("Infiltration", 0.20), ("Nodule", 0.16), ("Atelectasis", 0.13)),
    "Nodule": (("Infiltration", 0.24), ("Effusion", 0.14), ("Mass", 0.14), ("Atelectasis", 0.09)),
    "Pneumonia": (("Infiltration", 0.42), ("Edema", 0.24), ("Effusion", 0.19), ("Atelectasis", 0.18)),
    "Pneumothorax": (("Effusion", 0.19), ("Infiltration", 0.18), ("Atelectasis", 0.15), ("Emphysema", 0.14)),
    "Consolidation": (("Effusion", 0.28), ("Atelectasis", 0.26), ("Infiltration", 0.26), ("Mass", 0.13)),
    "Edema": (("Infiltration", 0.43), ("Effusion", 0.26), ("Pneumonia", 0.15), ("Atelectasis", 0.10)),
    "Emphysema": (("Pneumothorax", 0.30), ("Infiltration", 0.18), ("Atelectasis", 0.17), ("Effusion", 0.14)),
    "Fibrosis": (("Infiltration", 0.20), ("Atelectasis", 0.13), ("Effusion", 0.11), ("Pleural_Thickening", 0.10)),
    "Pleural_Thickening": (("Effusion", 0.25), ("Infiltration", 0.22), ("Atelectasis", 0.15), ("Mass", 0.13)),
    "Hernia": (("Atelectasis", 0.18), ("Infiltration", 0.15), ("Mass", 0.11), ("Effusion", 0.09)),
}
# Share of a lead's films that a companion is on once the patient has it.
_ACCOMPANIED = 0.6
_MEAN_AGE = {"Hernia": 63, "Fibrosis": 52}
_MEAN_AGE_SICK, _MEAN_AGE_HEALTHY = 49, 44


@dataclass(frozen=True)
class Visit:
    """One film of a patient: what is on it, not yet how it looks."""

    follow_up: int
    age_years: int
    view: str
    findings: tuple[str, ...]
    severities: tuple[float, ...]  # one per finding, 0 hardly to be seen .. 1 plain; half are below 0.4


def lead_finding(patient_number: int, seed: int) -> str | None:
    """The finding that this patient has for certain, None for a healthy one."""
    cycle, place = divmod(patient_number - 1, CYCLE)
    slot = int(np.random.default_rng([seed, cycle, _ORDER]).permutation(CYCLE)[place])
    leads = [name for name in FINDINGS for _ in range(_LEADS.get(name, 1))]
    return leads[slot] if slot < len(leads) else None


def film_count(patient_number: int, seed: int) -> int:
    """Films of this patient, 1..12, heavy tailed; about 3 on average and more for the sick."""
    rng = np.random.default_rng([seed, patient_number, _FILMS])
    median = 2.5 if lead_finding(patient_number, seed) is not None else 1.9
    return int(np.clip(round(median * float(np.exp(rng.normal(0, 0.75)))), 1, MAX_FILMS))


def person(patient_number: int, seed: int) -> tuple[int, str]:
    """Age in years at the first film, and sex."""
    rng = np.random.default_rng([seed, patient_number, _PERSON])
    lead = lead_finding(patient_number, seed)
    mean = _MEAN_AGE.get(lead, _MEAN_AGE_SICK) if lead is not None else _MEAN_AGE_HEALTHY
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
        chances = [_PORTABLE.get(name, _PORTABLE_OTHERWISE) for name in shown]
        view = "AP" if rng.random() < max(chances, default=_PORTABLE_OTHERWISE) else "PA"
        visits.append(Visit(follow_up, min(age, 95), view, tuple(shown), severities))
        age += int(rng.random() < 0.25)
    return visits


def _courses(lead: str | None, count: int, rng: np.random.Generator) -> dict[str, list[float | None]]:
    """Finding -> severity at each film, None where it is absent."""
    if lead is None:
        return {}
    courses = {lead: _course(lead in CHRONIC, 0.85, count, rng)}
    if all(severity is None for severity in courses[lead]):
        courses[lead][0] = float(rng.beta(*_SEVERITY))
    for companion, chance in _COMPANIONS[lead]:
        if rng.random() < chance / _ACCOMPANIED:
            course = _course(companion in CHRONIC, _ACCOMPANIED, count, rng)
            # Companions belong to the illness: an acute one only shows beside its lead.
            if companion not in CHRONIC:
                pairs = zip(course, courses[lead], strict=True)
                course = [severity if main is not None else None for severity, main in pairs]
            courses[companion] = course
    return courses


def _course(chronic: bool, first: float, count: int, rng: np.random.Generator) -> list[float | None]:
    """One finding over time: a chronic one stays and slowly grows, an acute one comes and goes."""
    level = float(rng.beta(*_SEVERITY))
    onset = 0 if rng.random() < first else int(rng.integers(0, count + 1))
    present = not chronic and onset == 0
    course: list[float | None] = []
    for follow_up in range(count):
        if chronic:
            present = follow_up >= onset
        elif follow_up > 0:
            present = bool(rng.random() < (0.68 if present else 0.40))
        level = float(np.clip(level + (rng.normal(0.01, 0.04) if chronic else rng.normal(0, 0.15)), 0.03, 1.0))
        course.append(level if present else None)
    return course
