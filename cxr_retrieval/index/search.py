"""Searching a published index with an image: decode, embed, look up, and say what was found and why."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import torch

from cxr_retrieval.corpus.decoding import DecodedImage, Limits, decode
from cxr_retrieval.errors import UserError
from cxr_retrieval.index.files import shard_files
from cxr_retrieval.index.filters import EVERYTHING, Filters, Vocabulary, among
from cxr_retrieval.index.likeness import Likeness
from cxr_retrieval.index.shards import Found, Shards
from cxr_retrieval.index.versions import OpenVersion, open_version
from cxr_retrieval.network.progressive import embeddings
from cxr_retrieval.privacy import row_id
from cxr_retrieval.tombstones import Tombstones
from cxr_retrieval.training.model import MODEL_FILE, WEIGHTS_FILE, Model

QUERY_LIMITS = Limits(min_side=32, max_pixels=100_000_000)
MODEL_PATH, WEIGHTS_PATH = f"model/{MODEL_FILE}", f"model/{WEIGHTS_FILE}"
# Up to so many passing rows every list of an IVF index is searched: the few that pass may lie in any of them.
EXACT_BELOW = 20_000
LEAST_REGION = 8  # pixels a side, as the model sees the image
UNLIKE = (
    "nothing similar in this index: the picture does not look like its images, upright chest X-rays of its kind, so the"
    " hits mean nothing"
)
FAR = (
    "nothing similar in this index: the nearest image is farther than those of 999 in 1,000 held-out images are, so the"
    " hits are the least unlike, no more"
)
FAR_FILTERED = (
    "nothing similar among the images that pass the filter: the nearest is farther than those of 999 in 1,000 held-out"
    " images are without one"
)
NONE_PASSES = "no image of this index passes the filter: ask for less"


class UnknownImage(UserError):
    """An image id that is not in the index."""


@dataclass(frozen=True)
class Query:
    """An image as the model sees it.

    `pixels` are its prepared pixels uint8 [S, S], or a stored image's thumbnail, a JPEG; `vector` has unit length, [D];
    `crop` (x, y, w, h) is what the network looked at, in prepared pixels, or the region that it was told to look at.
    `scores` are finding probabilities, none for a stored image. `source_size` is (width, height) in pixels of the
    image that was given, and each of them is `source_aspect` times as high as wide.
    """

    pixels: np.ndarray | bytes
    vector: np.ndarray
    crop: tuple[int, int, int, int]
    scores: dict[str, float]
    pixel_sha256: bytes
    source_size: tuple[int, int] | None
    source_aspect: float = 1.0


@dataclass(frozen=True)
class SimilarCase:
    """One hit and what the index knows of it. `distance` is Euclidean between unit vectors, 0 to 2.

    `shared` are the findings that it has in common with the query, where the query is an indexed image.
    """

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
    shared: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What was found for one query.

    `known` is the indexed image that the query is, pixel for pixel, if it is one; `passing` is how many images the
    hits were chosen from. `warning` says in a sentence that nothing similar was found, if so.
    """

    cases: tuple[SimilarCase, ...]
    warning: str | None
    known: SimilarCase | None
    passing: int

    @property
    def nothing_similar(self) -> bool:
        return self.warning is not None


@dataclass(frozen=True)
class Why:
    """Why a hit is near: its distance to the query in every named embedding, each step alone first, and both crops."""

    distances: dict[str, float]
    query_crop: tuple[int, int, int, int]
    hit_crop: tuple[int, int, int, int]


class Retriever:
    """A published index, opened for searching, without the patients who were removed by then. Threads may share it.

    >>> retriever = Retriever.open("s3://bucket/indexes/chest@latest")
    >>> query = retriever.query(open("film.png", "rb").read())
    >>> for case in retriever.search(query, k=8).cases:
    ...     print(case.distance, case.findings)
    """

    def __init__(self, version: OpenVersion) -> None:
        self.version = version
        self.shards = Shards.open(version.path)
        self.model = Model.parse(version.path(MODEL_PATH).read_bytes(), version.path(WEIGHTS_PATH).read_bytes())
        _check_model(self.model, self.shards.facts)
        numbers = range(len(self.shards.shards))
        self._sidecars = [self.shards.sidecar(number) for number in numbers]
        self._removed = Tombstones()
        self._there = [np.ones(len(shard.ids_N), bool) for shard in self.shards.shards]
        self.honour(Tombstones.at(version.version.to))
        self._likeness = Likeness.of(
            [version.path(shard_files(number)["thumbnails"]) for number in numbers],
            [table["patient"] for table in self._sidecars],
        )

    @classmethod
    def open(cls, reference: str) -> "Retriever":
        """Open `URI@alias` or `URI@version`: every file's hash is verified before it is read."""
        return cls(open_version(reference))

    @property
    def images(self) -> int:
        """How many images can be found: those of patients who were removed cannot."""
        return sum(int(there.sum()) for there in self._there)

    def honour(self, tombstones: Tombstones) -> None:
        """From now on, nothing of the patients who were removed is found, shown or told."""
        if tombstones != self._removed:
            self._there = [~tombstones.mask(table["patient"]) for table in self._sidecars]
            self._removed = tombstones

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What filters may name."""
        return Vocabulary.of(self._sidecars, self.shards.facts["findings"])

    @property
    def knows_regions(self) -> bool:
        """Whether a region changes the vector of a query: it does where pass 2 of the network has a part in it."""
        name = self.shards.facts["embedding"]
        return not (name == "global" or name.startswith("step"))

    def query(self, data: bytes, region: tuple[float, float, float, float] | None = None) -> Query:
        """The query for an image file's bytes. Raises RejectedImage with the reason for what cannot be decoded.

        `region` (x, y, w, h in pixels of that image) is looked at closely in place of the network's own crop; the
        whole image still counts. Raises UserError for a region outside the image or too small to see anything in, and
        where the index holds an embedding of whole images only.
        """
        image = decode(data, self.model.recipe, QUERY_LIMITS)
        box = None if region is None else self._prepared_region(region, image)
        output = self.model.forward(image.pixels[None].copy(), None if box is None else torch.tensor([box]))
        vector = embeddings(output, self.model.centring)[self.shards.facts["embedding"]][0].numpy()
        scores = torch.sigmoid(output.joint_PBC.mean(0)[0]).tolist()
        x, y, w, h = output.boxes_B4[0].tolist()
        return Query(
            image.pixels,
            vector,
            (x, y, w, h),
            dict(zip(self.model.findings, scores, strict=True)),
            hashlib.sha256(image.pixels.tobytes()).digest(),
            (image.width, image.height),
            image.aspect,
        )

    def query_of(self, image_id: str) -> Query:
        """The query that an indexed image is, by its stored vector. Raises UnknownImage."""
        case = self.case(image_id)
        vector = np.asarray(self.shards.shards[case.shard].rows_ND[case.row], np.float32)
        digest = self._sidecars[case.shard]["pixel_sha256"][case.row].as_py()
        return Query(self.thumbnail(case), vector, case.crop, {}, digest, None)

    def case(self, image_id: str) -> SimilarCase:
        """What the index knows of one of its images. Raises UnknownImage."""
        wanted = row_id(image_id)
        for number, shard in enumerate(self.shards.shards):
            for row in np.flatnonzero(shard.ids_N == wanted).tolist():
                if self._there[number][row] and self._sidecars[number]["image_id"][row].as_py() == image_id:
                    return self._case(Found(number, row, wanted, 0.0))
        raise UnknownImage(f"image {image_id!r} is not in this index: name an image as the index knows it")

    def search(
        self,
        query: Query,
        k: int = 8,
        filters: Filters = EVERYTHING,
        *,
        skip: int = 0,
        exclude_patient: str | None = None,
        exclude_own: bool = True,
    ) -> Answer:
        """The k nearest images of those that pass, after the nearest `skip`: k of them wherever so many pass.

        `exclude_own` leaves out the patient of the indexed image that the query is, if any; `exclude_patient` names a
        patient, as the index knows them, to leave out too. Raises UserError for a filter that names what no image has.
        """
        known = self._known(query)
        self.vocabulary.check(filters)
        there = self._there
        if exclude_patient is not None and not any(
            (among(table["patient"], [exclude_patient]) & mask).any()
            for table, mask in zip(self._sidecars, there, strict=True)
        ):
            raise UserError(f"patient {exclude_patient!r} is not in this index: name a patient as the index knows them")
        left_out = [known.patient] if known and exclude_own else []
        left_out += [exclude_patient] if exclude_patient is not None else []
        allowed = [
            filters.mask(table) & ~among(table["patient"], left_out) & mask
            for table, mask in zip(self._sidecars, there, strict=True)
        ]
        passing = sum(int(mask.sum()) for mask in allowed)
        found = self._nearest(query.vector, min(skip + k, passing), allowed, passing)
        findings = known.findings if known else ()
        cases = tuple(self._case(hit, rank, findings) for rank, hit in enumerate(found, start=1))
        return Answer(cases[skip:], self._warning(query, found, filters), known, passing)

    def why(self, query: Query, case: SimilarCase) -> Why:
        """Why a hit of `search` is near. The hit is seen by its thumbnail, so figures of large images are near ones."""
        pixels = np.stack([self._pixels(query.pixels), self._pixels(self.thumbnail(case))])
        output = self.model.forward(pixels, torch.tensor([query.crop, case.crop]))
        named = embeddings(output, self.model.centring)
        distances = {name: float(torch.dist(vectors[0], vectors[1])) for name, vectors in named.items()}
        return Why(distances, query.crop, case.crop)

    def thumbnail(self, case: SimilarCase) -> bytes:
        """JPEG of a hit's image."""
        return self.shards.thumbnail(case.shard, case.row)

    def source_crop(self, query: Query) -> tuple[float, ...] | None:
        """What the network looked at in pixels of the image that was given; None for a stored image."""
        if query.source_size is None:
            return None
        width, height = query.source_size
        x, y, w, h = self.model.recipe.to_source(query.crop, width, height, query.source_aspect)
        left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
        return left, top, right - left, bottom - top

    def _nearest(self, vector_D: np.ndarray, k: int, allowed: list[np.ndarray], passing: int) -> list[Found]:
        if k < 1:
            return []
        lists = self.shards.facts["lists"]
        filtered = passing < self.shards.rows
        masks = allowed if filtered else None
        probes = lists if filtered and passing <= EXACT_BELOW else None
        (found,) = self.shards.search(vector_D[None], k, masks, probes or None)
        if len(found) < k and lists:  # the lists that were probed hold too few of the rows that pass
            (found,) = self.shards.search(vector_D[None], k, masks, lists)
        return found

    def _warning(self, query: Query, found: list[Found], filters: Filters) -> str | None:
        if not found:
            return NONE_PASSES
        if isinstance(query.pixels, np.ndarray) and self._likeness.unlike(query.pixels):
            return UNLIKE
        if found[0].distance <= self.shards.facts["proof"]["far_distance"]:
            return None
        return FAR if filters == EVERYTHING else FAR_FILTERED

    def _prepared_region(self, region: tuple[float, float, float, float], image: DecodedImage) -> list[int]:
        """A region of an image in prepared pixels, whole ones, [x, y, w, h]."""
        x, y, w, h = region
        width, height = image.width, image.height
        if not self.knows_regions:
            raise UserError(
                f"this index holds {self.shards.facts['embedding']!r}, an embedding of whole images, which a region"
                " does not change: index 'combined' or 'local' to search by region"
            )
        if not (x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= width and y + h <= height):
            raise UserError(f"region {x:g},{y:g},{w:g},{h:g} does not lie in the image of {width} x {height} pixels")
        size = self.model.recipe.size
        left, top, wide, high = self.model.recipe.to_prepared(region, width, height, image.aspect)
        first_x, first_y = max(0, int(left)), max(0, int(top))
        last_x, last_y = min(size, round(left + wide)), min(size, round(top + high))
        if min(last_x - first_x, last_y - first_y) < LEAST_REGION:
            raise UserError(
                f"region {x:g},{y:g},{w:g},{h:g} is too small: the model sees the image of {width} x {height} pixels at"
                f" {size} x {size}, and needs {LEAST_REGION} a side"
            )
        return [first_x, first_y, last_x - first_x, last_y - first_y]

    def _pixels(self, picture: np.ndarray | bytes) -> np.ndarray:
        """A picture of the whole prepared image as prepared pixels, uint8 [S, S]."""
        if not isinstance(picture, bytes):
            return picture
        size = self.model.recipe.size
        grey = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_GRAYSCALE)
        assert grey is not None, "a thumbnail is a JPEG that the build wrote"
        return cv2.resize(grey, (size, size), interpolation=cv2.INTER_LINEAR)

    def _known(self, query: Query) -> SimilarCase | None:
        for shard, table in enumerate(self._sidecars):
            row = table["pixel_sha256"].index(query.pixel_sha256).as_py()
            if row >= 0 and self._there[shard][row]:
                return self._case(Found(shard, row, 0, 0.0))
        return None

    def _case(self, found: Found, rank: int = 0, findings: tuple[str, ...] = ()) -> SimilarCase:
        facts: dict[str, Any] = self._sidecars[found.shard].slice(found.row, 1).to_pylist()[0]
        x, y, w, h = facts["crop"]
        return SimilarCase(
            rank=rank,
            distance=found.distance,
            image_id=facts["image_id"],
            patient=facts["patient"],
            study_date=facts["study_date"].isoformat() if facts["study_date"] else None,
            view=facts["view"],
            sex=facts["sex"],
            age_years=facts["age_years"],
            findings=tuple(facts["findings"]),
            crop=(x, y, w, h),
            source=facts["source"],
            shard=found.shard,
            row=found.row,
            shared=tuple(name for name in facts["findings"] if name in findings),
        )


def _check_model(model: Model, facts: Any) -> None:
    """The version's model is the one that its index was made with. Raises UserError."""
    if model.recipe.id != facts["decode_recipe_id"]:
        what = f"decodes by recipe {model.recipe.id} and the index by {facts['decode_recipe_id']}"
    elif model.findings != list(facts["findings"]):
        what = "names other findings than the index"
    elif model.embedding_sizes.get(facts["embedding"]) != facts["dimensions"]:
        what = f"has no embedding {facts['embedding']!r} of {facts['dimensions']} numbers, which the index holds"
    else:
        return
    raise UserError(f"the model of this version {what}: build the index again and publish it")
