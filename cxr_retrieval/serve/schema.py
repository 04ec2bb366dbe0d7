"""What the HTTP API takes and gives; the OpenAPI description is made of these."""

import datetime
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import UploadFile
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from cxr_retrieval.index.filters import OLDEST, Filters
from cxr_retrieval.index.search import Answer, Query, Retriever, SimilarCase, Why
from cxr_retrieval.serve.live import LiveIndex

MOST_HITS = 1000  # k and skip together
FILTERS = set(Filters.__dataclass_fields__)


def _box(text: str) -> str:
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().replace(".", "", 1).isdecimal() for part in parts):
        raise ValueError("write x,y,width,height in pixels of the image")
    return text


Region = Annotated[str, AfterValidator(_box), Field(description="x,y,width,height of a box, in pixels of the image")]


class Asked(BaseModel):
    """How many hits, and what they must be. Filters are applied inside the search."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    k: int = Field(8, ge=1, le=100, description="hits of one page")
    skip: int = Field(0, ge=0, le=MOST_HITS - 100, description="hits before the first of this page")
    view: list[str] = Field([], description="one of these views")
    sex: str | None = Field(None, description="this sex")
    age_from: int | None = Field(None, ge=0, le=OLDEST, description="at least so many years")
    age_to: int | None = Field(None, ge=0, le=OLDEST, description="at most so many years")
    date_from: datetime.date | None = Field(None, description="a study of this date or later")
    date_to: datetime.date | None = Field(None, description="a study of this date or earlier")
    any_of: list[str] = Field([], description="at least one of these findings")
    all_of: list[str] = Field([], description="each of these findings")
    none_of: list[str] = Field([], description="none of these findings, and none of them unknown")
    own_patient: bool = Field(False, description="find images of the query's own patient too")
    without_patient: str | None = Field(None, description="no image of this patient, named as the index does")
    one_per_patient: bool = Field(False, description="find patients, each by the nearest of their images")

    @property
    def filters(self) -> Filters:
        values = {name: value for name, value in self.model_dump().items() if name in FILTERS}
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return Filters(views=tuple(self.view), **{**values, **lists})


class Upload(BaseModel):
    """An image, and the part of it to look at closely."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    image: UploadFile = Field(description="a PNG, JPEG or DICOM file")
    region: Region | None = None

    @property
    def box(self) -> tuple[float, float, float, float] | None:
        if self.region is None:
            return None
        x, y, w, h = map(float, self.region.split(","))
        return x, y, w, h


class AskedWhy(BaseModel):
    """Which other image an indexed one is compared with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    query: str = Field(description="its id")


class Search(Upload, Asked):
    """A search with an image."""


class Problem(BaseModel):
    """What is wrong, in one sentence."""

    detail: str


class Hit(BaseModel):
    """A similar case. `crop` is (x, y, w, h) of where the network looked, in an image of `image_side` pixels a side."""

    rank: int
    distance: float = Field(description="0 (the same) to 2")
    image_id: str
    patient: str
    study_date: str | None
    view: str | None
    sex: str | None
    age_years: int | None
    findings: list[str]
    shared: list[str] = Field(description="findings that the query has too, where it is an indexed image")
    crop: tuple[int, int, int, int]
    source: str

    @classmethod
    def of(cls, case: SimilarCase) -> "Hit":
        return cls(**{name: value for name, value in asdict(case).items() if name in cls.model_fields})


class Asking(BaseModel):
    """The query as the network saw it."""

    known_as: Hit | None = Field(description="the indexed image that it is, pixel for pixel")
    crop: tuple[int, int, int, int] = Field(description="where the network looked, in an image of `image_side`")
    source_crop: tuple[float, float, float, float] | None = Field(description="the same in pixels of the upload")
    scores: dict[str, float] = Field(description="finding probabilities of the model; no diagnosis")


class Found(BaseModel):
    """The answer to a search. `warning` is set where nothing similar was found; the hits are then the least unlike."""

    version: str
    query: Asking
    image_side: int
    passing: int = Field(description="images that pass the filters")
    warning: str | None
    hits: list[Hit]

    @classmethod
    def of(cls, retriever: Retriever, query: Query, answer: Answer) -> "Found":
        return cls(
            version=retriever.version.version.id,
            query=Asking(
                known_as=Hit.of(answer.known) if answer.known else None,
                crop=query.crop,
                source_crop=retriever.source_crop(query),
                scores={name: round(score, 4) for name, score in query.scores.items()},
            ),
            image_side=retriever.model.recipe.size,
            passing=answer.passing,
            warning=answer.warning,
            hits=[Hit.of(case) for case in answer.cases],
        )


class Reason(BaseModel):
    """Why a hit is near: its distance to the query in each embedding (the steps first), and both crops."""

    distances: dict[str, float]
    query_crop: tuple[int, int, int, int]
    hit_crop: tuple[int, int, int, int]
    image_side: int

    @classmethod
    def of(cls, retriever: Retriever, why: Why) -> "Reason":
        return cls(**asdict(why), image_side=retriever.model.recipe.size)


class IndexFacts(BaseModel):
    """The index that is being served, and what its filters may name."""

    name: str
    alias: str
    version: str
    images: int
    embedding: str
    regions: bool = Field(description="whether a search by region is possible")
    views: list[str]
    sexes: list[str]
    findings: list[str]
    dated: bool = Field(description="whether images have study dates")
    upload_bytes: int

    @classmethod
    def of(cls, live: LiveIndex, upload_bytes: int) -> "IndexFacts":
        retriever = live.retriever
        known = retriever.vocabulary
        return cls(
            name=live.to.rstrip("/").rpartition("/")[2],
            alias=live.name,
            version=retriever.version.version.id,
            images=retriever.images,
            embedding=retriever.facts["embedding"],
            regions=retriever.knows_regions,
            views=list(known.views),
            sexes=list(known.sexes),
            findings=list(known.findings),
            dated=known.dated,
            upload_bytes=upload_bytes,
        )


class Ready(BaseModel):
    """Whether a version is open, and its alias and removals are looked at; shards may be away all the same. `trouble`
    is what keeps the alias or removed patients from being looked at."""

    ready: bool
    version: str
    images: int
    trouble: str | None


def sentence(errors: list[Any]) -> str:
    """What is wrong with a request, in one sentence, from the list that validation gives."""
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"{place}: there is no such field"
    if "UploadFile" in message:
        return f"{place}: it must be a file"
    if first["type"] == "missing":
        return f"{place or 'body'}: it is missing"
    return f"{place}: {message[:1].lower()}{message[1:]}" if place else message
