"""Searching a published index with an image: decode, embed, look up, and say what was found."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cxr_retrieval.corpus.decoding import Limits, decode
from cxr_retrieval.errors import UserError
from cxr_retrieval.index.shards import Shards
from cxr_retrieval.index.versions import OpenVersion, open_version
from cxr_retrieval.network.progressive import embeddings
from cxr_retrieval.training.model import MODEL_FILE, WEIGHTS_FILE, Model

QUERY_LIMITS = Limits(min_side=32, max_pixels=100_000_000)


@dataclass(frozen=True)
class Query:
    """An image as the model sees it: prepared pixels, unit vector [D], crop (x, y, w, h), finding probabilities."""

    pixels: np.ndarray
    vector: np.ndarray
    crop: tuple[int, int, int, int]
    scores: dict[str, float]
    pixel_sha256: bytes


@dataclass(frozen=True)
class SimilarCase:
    """One hit and what the index knows of it. `distance` is Euclidean between unit vectors, 0 to 2."""

    rank: int
    distance: float
    image_id: str
    patient: str
    study_date: str | None
    view: str | None
    sex: str | None
    age_years: int | None
    findings: tuple[str, ...]
    crop: tuple[int, int, int, int]
    source: str
    shard: int
    row: int


@dataclass(frozen=True)
class Answer:
    """What was found for one query. `known` is the indexed image that the query is, pixel for pixel, if it is one."""

    cases: tuple[SimilarCase, ...]
    nothing_similar: bool
    known: SimilarCase | None


class Retriever:
    """A published index, opened for searching.

    >>> retriever = Retriever.open("s3://bucket/indexes/chest@latest")
    >>> query = retriever.query(open("film.png", "rb").read())
    >>> for case in retriever.search(query, k=8).cases:
    ...     print(case.distance, case.findings)
    """

    def __init__(self, version: OpenVersion) -> None:
        self.version = version
        self.shards = Shards.open(version.path)
        self.model = Model.parse(version.path(MODEL_PATH).read_bytes(), version.path(WEIGHTS_PATH).read_bytes())
        if self.model.recipe.id != self.shards.facts["decode_recipe_id"]:
            raise ValueError("the version's model and index have different decode recipes")
        self._sidecars = [self.shards.sidecar(number) for number in range(len(self.shards.shards))]
        self._patients = [np.asarray(table["patient"].to_pylist(), dtype=object) for table in self._sidecars]

    @classmethod
    def open(cls, reference: str) -> "Retriever":
        """Open `URI@alias` or `URI@version`: every file's hash is verified before it is read."""
        return cls(open_version(reference))

    def query(self, data: bytes) -> Query:
        """The query for an image file's bytes. Raises RejectedImage with the reason for what cannot be decoded."""
        return self._query(decode(data, self.model.recipe, QUERY_LIMITS).pixels)

    def _query(self, pixels: np.ndarray) -> Query:
        output = self.model.forward(pixels[None].copy())  # a decoder's array may be read-only, which torch warns of
        vector = embeddings(output, self.model.centring)[self.shards.facts["embedding"]][0].numpy()
        scores = torch.sigmoid(output.joint_PBC.mean(0)[0]).tolist()
        x, y, w, h = output.boxes_B4[0].tolist()
        digest = hashlib.sha256(pixels.tobytes()).digest()
        return Query(pixels, vector, (x, y, w, h), dict(zip(self.model.findings, scores, strict=True)), digest)

    def search(
        self, query: Query, k: int = 8, *, exclude_patient: str | None = None, exclude_own: bool = True
    ) -> Answer:
        """The k nearest images. `exclude_own` leaves out the patient of the indexed image that the query is, if any;
        `exclude_patient` names a patient, as the index knows them, to leave out too."""
        known = self._known(query)
        if exclude_patient is not None and not any((patients == exclude_patient).any() for patients in self._patients):
            raise UserError(f"patient {exclude_patient!r} is not in this index: name a patient as the index knows them")
        left_out = [known.patient] if known and exclude_own else []
        left_out += [exclude_patient] if exclude_patient is not None else []
        allowed = [~np.isin(patients, left_out) for patients in self._patients]
        (hits,) = self.shards.search(query.vector[None], k, allowed)
        cases = tuple(self._case(rank, hit.distance, hit.shard, hit.row) for rank, hit in enumerate(hits, start=1))
        far = self.shards.facts["proof"]["far_distance"]
        return Answer(cases, not cases or cases[0].distance > far, known)

    def thumbnail(self, case: SimilarCase) -> bytes:
        """JPEG of a hit's image."""
        return self.shards.thumbnail(case.shard, case.row)

    def _known(self, query: Query) -> SimilarCase | None:
        for shard, table in enumerate(self._sidecars):
            row = table["pixel_sha256"].index(query.pixel_sha256).as_py()
            if row >= 0:
                return self._case(0, 0.0, shard, row)
        return None

    def _case(self, rank: int, distance: float, shard: int, row: int) -> SimilarCase:
        facts: dict[str, Any] = self._sidecars[shard].slice(row, 1).to_pylist()[0]
        x, y, w, h = facts["crop"]
        return SimilarCase(
            rank=rank,
            distance=distance,
            image_id=facts["image_id"],
            patient=facts["patient"],
            study_date=facts["study_date"].isoformat() if facts["study_date"] else None,
            view=facts["view"],
            sex=facts["sex"],
            age_years=facts["age_years"],
            findings=tuple(facts["findings"]),
            crop=(x, y, w, h),
            source=facts["source"],
            shard=shard,
            row=row,
        )


MODEL_PATH, WEIGHTS_PATH = f"model/{MODEL_FILE}", f"model/{WEIGHTS_FILE}"


def shared(case: SimilarCase, findings: Sequence[str]) -> tuple[str, ...]:
    """Findings that a hit has in common with the query's, in the order of the hit's."""
    return tuple(name for name in case.findings if name in findings)
