"""Searching a published index with an image: decode, embed, look up, and say what was found and why."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import torch

from cxr_retrieval.corpus.decoding import DecodedImage, decode
from cxr_retrieval.corpus.limits import ExcludedImage, Limits, RejectedImage
from cxr_retrieval.errors import UserError
from cxr_retrieval.index.files import MODEL, SHARDS
from cxr_retrieval.index.filters import EVERYTHING, Filters, Vocabulary
from cxr_retrieval.index.groups import Facts, Holders, InProcess, ShardGroup
from cxr_retrieval.index.likeness import Likeness, even
from cxr_retrieval.index.quantizer import Lists
from cxr_retrieval.index.shards import EXACT_BELOW, Candidates, Found, first, read_facts
from cxr_retrieval.index.versions import OpenVersion, Version, open_files, resolve, split_reference
from cxr_retrieval.network.progressive import embeddings
from cxr_retrieval.tombstones import Tombstones
from cxr_retrieval.training.model import MODEL_FILE, WEIGHTS_FILE, Model

QUERY_LIMITS = Limits(min_side=32, max_pixels=100_000_000)
MODEL_PATH, WEIGHTS_PATH = f"{MODEL}{MODEL_FILE}", f"{MODEL}{WEIGHTS_FILE}"
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
class Seen:
    """A decoded image that has not been through the network yet; `box` is the region of it to look at closely, if one
    was told, [x, y, w, h] in prepared pixels."""

    image: DecodedImage
    box: list[int] | None


@dataclass(frozen=True)
class Query:
    """An image as the model sees it.

    `pixels` are its prepared pixels uint8 [S, S], or a stored image's thumbnail, a JPEG; `vector` has unit length, [D];
    `crop` (x, y, w, h) is what the network looked at, in prepared pixels, or the region that it was told to look at.
    `scores` are probabilities of the findings that training saw, none for a stored image. `source_size` is (width,
    height) in pixels of the image that was given, and each of them is `source_aspect` times as high as wide.
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

    It knows the model, the lists and what an answer says; what is stored of the images, `holders` are asked for.

    >>> retriever = Retriever.open("s3://bucket/indexes/chest@latest")
    >>> query = retriever.query(open("film.png", "rb").read())
    >>> for case in retriever.search(query, k=8).cases:
    ...     print(case.distance, case.findings)
    """

    def __init__(self, version: OpenVersion, holders: Holders) -> None:
        self.version, self.holders = version, holders
        self.facts = read_facts(version.path)
        self.model = Model.parse(version.path(MODEL_PATH).read_bytes(), version.path(WEIGHTS_PATH).read_bytes())
        _check_model(self.model, self.facts)
        self._lists = Lists(self.facts, version.path)
        self.removed = Tombstones.at(version.version.to)
        self.images = self._left(self.removed)
        self._rows = sum(holders.each(ShardGroup.rows))
        places = even([count for counts in holders.each(ShardGroup.thumbnail_groups) for count in counts])
        self._likeness = Likeness.of([part for parts in holders.each(ShardGroup.samples, places) for part in parts])

    @classmethod
    def open(cls, reference: str, hold: Callable[[Version, int], Holders] = InProcess) -> "Retriever":
        """Open `URI@alias` or `URI@version`: every file's hash is verified before it is read.

        `hold` opens the shards of a version, so many, and so decides where they are held: in this process.
        """
        version = resolve(*split_reference(reference))
        own = open_files(version, [name for name in version.files if not name.startswith(SHARDS)])
        return cls(own, hold(version, read_facts(own.path)["shards"]))

    def honour(self, tombstones: Tombstones) -> None:
        """From now on, nothing of these patients is found, shown or told, nor of those who were removed before: nobody
        comes back where a folder of tombstones is away for a while."""
        if (removed := self.removed | tombstones) != self.removed:
            self.images = self._left(removed)
            self.removed = removed
            self.__dict__.pop("vocabulary", None)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What filters may name."""
        return Vocabulary.joined(self.holders.each(ShardGroup.vocabulary), self.facts["findings"])

    @property
    def knows_regions(self) -> bool:
        """Whether a region changes the vector of a query: it does where pass 2 of the network has a part in it."""
        name = self.facts["embedding"]
        return not (name == "global" or name.startswith("step"))

    def query(self, data: bytes, region: tuple[float, float, float, float] | None = None) -> Query:
        """The query for an image file's bytes. Raises RejectedImage with the reason for what cannot be decoded.

        `region` (x, y, w, h in pixels of that image) is looked at closely in place of the network's own crop; the
        whole image still counts. Raises UserError for a region outside the image or too small to see anything in, and
        where the index holds an embedding of whole images only.
        """
        (query,) = self.look([self.decode(data, region)])
        return query

    def decode(self, data: bytes, region: tuple[float, float, float, float] | None = None) -> Seen:
        """The first half of `query`, without the network. Raises what it raises."""
        try:
            image = decode(data, self.model.recipe, QUERY_LIMITS)
        except ExcludedImage as left_out:
            raise RejectedImage("unsupported", f"corpora leave such images out by the rule {left_out.rule}") from None
        return Seen(image, None if region is None else self._prepared_region(region, image))

    def look(self, images: Sequence[Seen]) -> list[Query]:
        """The second half of `query`, the network, for several images at once, in their order."""
        found: dict[int, Query] = {}
        for told in (False, True):  # the network crops all images of a batch itself, or none
            numbers = [number for number, seen in enumerate(images) if (seen.box is not None) == told]
            if numbers:
                batch = [images[number] for number in numbers]
                found |= zip(numbers, self._queries(batch, told), strict=True)
        return [found[number] for number in range(len(images))]

    def _queries(self, batch: Sequence[Seen], told: bool) -> Iterator[Query]:
        boxes = torch.tensor([seen.box for seen in batch]) if told else None
        output = self.model.forward(np.stack([seen.image.pixels for seen in batch]), boxes)
        vectors = embeddings(output, self.model.centring)[self.facts["embedding"]].numpy()
        scores = torch.sigmoid(output.joint_PBC.mean(0)).tolist()
        learnt = set(self.model.findings) - set(self.model.unseen)
        looked = zip(batch, vectors, scores, output.boxes_B4.tolist(), strict=True)
        for seen, vector, mine, (x, y, w, h) in looked:
            image = seen.image
            yield Query(
                image.pixels,
                vector,
                (x, y, w, h),
                {name: score for name, score in zip(self.model.findings, mine, strict=True) if name in learnt},
                hashlib.sha256(image.pixels.tobytes()).digest(),
                (image.width, image.height),
                image.aspect,
            )

    def query_of(self, image_id: str) -> Query:
        """The query that an indexed image is, by its stored vector. Raises UnknownImage."""
        facts = self._find(image_id)
        case = _case(facts)
        vector = self.holders.of(case.shard, ShardGroup.vector, case.shard, case.row)
        return Query(self.thumbnail(case), vector, case.crop, {}, facts["pixel_sha256"], None)

    def case(self, image_id: str) -> SimilarCase:
        """What the index knows of one of its images. Raises UnknownImage."""
        return _case(self._find(image_id))

    def search(
        self,
        query: Query,
        k: int = 8,
        filters: Filters = EVERYTHING,
        *,
        skip: int = 0,
        exclude_patient: str | None = None,
        exclude_own: bool = True,
        one_per_patient: bool = False,
    ) -> Answer:
        """The k nearest images of those that pass, after the nearest `skip`: k of them wherever so many pass, but for
        those of a patient who is removed meanwhile. With `one_per_patient` the k nearest patients, each by the nearest
        of their images.

        `exclude_own` leaves out the patient of the indexed image that the query is, if any; `exclude_patient` names a
        patient, as the index knows them, to leave out too. Raises UserError for a filter that names what no image has,
        a `k` below 1 and a `skip` below 0.
        """
        if k < 1 or skip < 0:
            raise UserError(f"k is {k} and skip is {skip}: k must be at least 1 and skip at least 0")
        same = _any(self.holders.each(ShardGroup.find_pixels, query.pixel_sha256))
        known = _case(same) if same else None
        self.vocabulary.check(filters)
        if exclude_patient is not None and not any(self.holders.each(ShardGroup.has_patient, exclude_patient)):
            raise UserError(f"patient {exclude_patient!r} is not in this index: name a patient as the index knows them")
        left_out = [known.patient] if known and exclude_own else []
        left_out += [exclude_patient] if exclude_patient is not None else []
        asked = filters, tuple(left_out)
        passing = sum(self.holders.each(ShardGroup.passing, *asked))
        nearest = self._nearest_patients if one_per_patient else self._nearest
        found = nearest(query.vector, min(skip + k, passing), asked, passing)
        known_of = self._known(found[skip:])
        # Whose patient was removed since they were found is not known any more.
        shown = [hit for hit in found[skip:] if (hit.shard, hit.row) in known_of]
        findings = known.findings if known else ()
        cases = tuple(
            _case(known_of[hit.shard, hit.row], hit.distance, rank, findings)
            for rank, hit in enumerate(shown, start=skip + 1)
        )
        return Answer(cases, self._warning(query, found, filters), known, passing)

    def why(self, query: Query, case: SimilarCase) -> Why:
        """Why a hit of `search` is near. In the index's own embedding it is the distance that a search tells; in the
        others the hit is seen by its thumbnail, so figures of large images are near ones."""
        pixels = np.stack([self._pixels(query.pixels), self._pixels(self.thumbnail(case))])
        output = self.model.forward(pixels, torch.tensor([query.crop, case.crop]))
        named = embeddings(output, self.model.centring)
        distances = {name: float(torch.dist(vectors[0], vectors[1])) for name, vectors in named.items()}
        stored = self.holders.of(case.shard, ShardGroup.vector, case.shard, case.row)
        distances[self.facts["embedding"]] = float(np.linalg.norm(query.vector - stored))
        return Why(distances, query.crop, case.crop)

    def thumbnail(self, case: SimilarCase) -> bytes:
        """JPEG of a hit's image."""
        return self.holders.of(case.shard, ShardGroup.thumbnail, case.shard, case.row)

    def source_crop(self, query: Query) -> tuple[float, ...] | None:
        """What the network looked at in pixels of the image that was given; None for a stored image."""
        if query.source_size is None:
            return None
        width, height = query.source_size
        x, y, w, h = self.model.recipe.to_source(query.crop, width, height, query.source_aspect)
        left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
        return left, top, right - left, bottom - top

    def _left(self, removed: Tombstones) -> int:
        """How many images are left, where these patients were removed."""
        self.holders.honour(removed)
        return sum(self.holders.each(ShardGroup.images))

    def _find(self, image_id: str) -> Facts:
        facts = _any(self.holders.each(ShardGroup.find, image_id))
        if facts is None:
            raise UnknownImage(f"image {image_id!r} is not in this index: name an image as the index knows it")
        return facts

    def _known(self, hits: list[Found]) -> dict[tuple[int, int], Facts]:
        """What is known of some hits by their places, of nobody who was removed."""
        known: dict[tuple[int, int], Facts] = {}
        for facts in self.holders.each(ShardGroup.facts, [(hit.shard, hit.row) for hit in hits]):
            known |= facts
        return known

    def _nearest_patients(
        self, vector_D: np.ndarray, count: int, asked: tuple[Filters, tuple[str, ...]], passing: int
    ) -> list[Found]:
        """The nearest image of each of the nearest patients, so many of them wherever so many have one that passes."""
        reach = count
        while True:
            found = self._nearest(vector_D, reach, asked, passing)
            known, of_patient = self._known(found), dict[str, Found]()
            for hit in found:
                if facts := known.get((hit.shard, hit.row)):
                    of_patient.setdefault(facts["patient"], hit)
            if len(of_patient) >= count or reach == passing:
                return list(of_patient.values())[:count]
            reach = min(4 * reach, passing)

    def _nearest(
        self, vector_D: np.ndarray, k: int, asked: tuple[Filters, tuple[str, ...]], passing: int
    ) -> list[Found]:
        if k < 1:
            return []
        vector_D, share = np.ascontiguousarray(vector_D, np.float32), passing / self._rows
        filtered, lists = share < 1, self.facts["lists"]
        if lists and filtered and passing <= EXACT_BELOW:
            return first([hit for hits in self.holders.each(ShardGroup.exact, vector_D, k, asked) for hit in hits], k)
        wanted = k * self.facts["candidates"]

        def searched(probes: int | None) -> list[Found]:
            nearest = self._lists.nearest(vector_D[None], share, probes)
            parts = self.holders.each(ShardGroup.candidates, vector_D, wanted, nearest, asked if filtered else None)
            return Candidates.joined(parts).first(wanted, k)

        found = searched(None)
        if len(found) < k and lists:  # the lists that were probed hold too few of the rows that pass
            found = searched(lists)
        return found

    def _warning(self, query: Query, found: list[Found], filters: Filters) -> str | None:
        if not found:
            return NONE_PASSES
        if isinstance(query.pixels, np.ndarray) and self._likeness.unlike(query.pixels):
            return UNLIKE
        if found[0].distance <= self.facts["proof"]["far_distance"]:
            return None
        return FAR if filters == EVERYTHING else FAR_FILTERED

    def _prepared_region(self, region: tuple[float, float, float, float], image: DecodedImage) -> list[int]:
        """A region of an image in prepared pixels, whole ones, [x, y, w, h]."""
        x, y, w, h = region
        width, height = image.width, image.height
        if not self.knows_regions:
            raise UserError(
                f"this index holds {self.facts['embedding']!r}, an embedding of whole images, which a region"
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


def _any(answers: Iterable[Facts | None]) -> Facts | None:
    return next((facts for facts in answers if facts is not None), None)


def _case(facts: Facts, distance: float = 0.0, rank: int = 0, findings: tuple[str, ...] = ()) -> SimilarCase:
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
        shard=facts["shard"],
        row=facts["row"],
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
