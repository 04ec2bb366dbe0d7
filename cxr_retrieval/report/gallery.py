"""Similar cases as one HTML file: each query with its crop, its hits with theirs, shared findings marked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cxr_retrieval.report.films import data_uri
from cxr_retrieval.report.pages import finding_label, render

_SEX = {"F": "female", "M": "male"}
_SCORES_SHOWN = 6


@dataclass(frozen=True)
class Case:
    """One image and what is known of it.

    `pixels` are uint8 [S, S] or the bytes of a PNG or JPEG file, a thumbnail of the whole prepared image at any size;
    `crop` is (x, y, w, h) in pixels of the prepared image, whose side is `image_size`. `image_id` and `patient` are
    None where a page must not tell them.
    """

    image_id: str | None
    findings: tuple[str, ...]
    view: str | None
    age_years: int | None
    sex: str | None
    patient: str | None
    study_date: str | None
    pixels: np.ndarray | bytes = field(repr=False, compare=False)
    crop: tuple[float, float, float, float] | None
    image_size: int

    def __post_init__(self) -> None:
        if self.image_size <= 0:
            raise ValueError(f"image_size must be positive, got {self.image_size}")
        if self.crop is not None:
            numbers = all(math.isfinite(number) for number in self.crop)
            if len(self.crop) != 4 or not numbers or min(self.crop[2:]) <= 0:
                raise ValueError(f"crop must be (x, y, w, h) with a positive width and height, got {self.crop}")

    @classmethod
    def of_row(
        cls,
        known: Mapping[str, Any],
        pixels: np.ndarray,
        size: int,
        names: bool,
        crop: tuple[float, float, float, float] | None = None,
    ) -> "Case":
        """What is known of a row of a corpus of `size` pixels a side. Without `names` a case tells neither its image's
        name nor its patient's."""
        return cls(
            image_id=known["image_id"] if names else None,
            findings=tuple(known["findings"]),
            view=known["view"],
            age_years=known["age_years"],
            sex=known["sex"],
            patient=known["patient_id"] if names else None,
            study_date=None,
            pixels=pixels,
            crop=crop,
            image_size=size,
        )


@dataclass(frozen=True)
class Hit:
    """A case that was found: its place, its distance to the query and the findings that both have."""

    case: Case
    rank: int
    distance: float
    shared: tuple[str, ...]


@dataclass(frozen=True)
class QueryResult:
    """A query and its hits. `warning` is shown above them; `scores` are the model's finding probabilities."""

    title: str
    case: Case
    hits: tuple[Hit, ...]
    warning: str | None = None
    scores: Mapping[str, float] | None = None


@dataclass(frozen=True)
class PageFacts:
    """Where the hits come from, for the head of the page; what is None is left out."""

    index: str | None = None
    version: str | None = None
    alias: str | None = None
    embedding: str | None = None
    indexed_images: int | None = None
    model: str | None = None
    created: str | None = None


def write_gallery(queries: Sequence[QueryResult], facts: PageFacts | None = None) -> str:
    """HTML text of one file that opens offline and holds every query with its hits, images included."""
    facts = facts or PageFacts()
    return render(
        "gallery.html.j2",
        title="Similar cases",
        facts=[
            ("Index", facts.index),
            ("Version", facts.version),
            ("Alias", facts.alias),
            ("Images indexed", facts.indexed_images),
            ("Embedding", facts.embedding),
            ("Model", facts.model),
            ("Created", facts.created),
        ],
        script="gallery.js",
        queries=[_query(query) for query in queries],
    )


def _query(query: QueryResult) -> dict[str, Any]:
    scores = sorted((query.scores or {}).items(), key=lambda item: -item[1])
    return {
        "title": query.title,
        "warning": query.warning,
        "film": _film(query.case, "Query"),
        "hits": [_hit(hit) for hit in query.hits],
        "sharing": sum(bool(hit.shared) for hit in query.hits) if query.case.findings else None,
        "scores": scores[:_SCORES_SHOWN],
        "more_scores": scores[_SCORES_SHOWN:],
    }


def _hit(hit: Hit) -> dict[str, Any]:
    return {
        "film": _film(hit.case, f"Hit {hit.rank}"),
        "rank": hit.rank,
        "distance": f"{hit.distance:.3f}",
        "shared": hit.shared,
    }


def described(case: Case, role: str) -> dict[str, Any]:
    """What a template says of a case: its text for those who do not see it, and who it is of."""
    age = None if case.age_years is None else f"{case.age_years} years"
    person = [part for part in (case.view, age, _SEX.get(case.sex or "", case.sex)) if part]
    findings = ", ".join(map(finding_label, case.findings)) or "none recorded"
    alt = f"{role}: " + ", ".join(["chest X-ray", *person]) + f". Findings: {findings}."
    if case.crop is not None:
        share = case.crop[2] * case.crop[3] / case.image_size**2
        alt += f" The model's crop covers {share:.0%} of the image."
    return {"case": case, "alt": alt, "person": person}


def _film(case: Case, role: str) -> dict[str, Any]:
    return described(case, role) | {"uri": data_uri(case.pixels)}
