"""Promises of searching a published index: filters hold inside the search, and an answer says what it is worth."""

import copy
import datetime
import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cxr_retrieval.corpus.findings import FINDINGS, NO_FINDING
from cxr_retrieval.corpus.limits import RejectedImage
from cxr_retrieval.corpus.phantom.radiographs import draw_patient
from cxr_retrieval.errors import UserError
from cxr_retrieval.index import cache, filters, groups, search
from cxr_retrieval.index.filters import EVERYTHING, Filters
from cxr_retrieval.index.groups import ShardsAway
from cxr_retrieval.index.quantizer import Lists
from cxr_retrieval.index.search import Retriever, UnknownImage
from cxr_retrieval.index.shards import Passing, exact_distances
from tests.dicoms import dataset, ramp, written
from tests.indexes import FILM, Film, build, films, model_files, published

COUNT = 60


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cache.VARIABLE, str(folder / "cache"))
        images = films(COUNT)
        yield folder, images, model_files(folder, images)


@pytest.fixture(scope="module")
def images(world) -> list[Film]:
    return world[1]


@pytest.fixture(scope="module", params=[0, 8], ids=["flat", "ivf"])
def retriever(world, request: pytest.FixtureRequest) -> Retriever:
    folder, images, files = world
    return Retriever.open(published(folder, build(folder, images, files, lists=request.param), f"a{request.param}"))


@pytest.fixture(scope="module")
def flat(world) -> Retriever:
    folder, images, files = world
    return Retriever.open(published(folder, build(folder, images, files)))


def passes(facts, asked: Filters) -> bool:
    """The meaning of a filter, image by image."""

    def has(name: str) -> bool:
        return not facts["findings"] and not facts["unknown"] if name == NO_FINDING else name in facts["findings"]

    def lacks(name: str) -> bool:
        return bool(facts["findings"]) if name == NO_FINDING else name not in facts["findings"] + facts["unknown"]

    def within(value, first, last) -> bool:
        if first is None and last is None:
            return True
        return value is not None and (first is None or value >= first) and (last is None or value <= last)

    return (
        (not asked.views or facts["view"] in asked.views)
        and (asked.sex is None or facts["sex"] == asked.sex)
        and within(facts["age_years"], asked.age_from, asked.age_to)
        and within(facts["study_date"], asked.date_from, asked.date_to)
        and (not asked.any_of or any(has(name) for name in asked.any_of))
        and all(has(name) for name in asked.all_of)
        and all(lacks(name) for name in asked.none_of)
    )


names = st.lists(st.sampled_from([*FINDINGS, NO_FINDING]), max_size=2, unique=True).map(tuple)
ages = st.none() | st.integers(0, 95)
dates = st.none() | st.integers(0, 700).map(lambda days: datetime.date(2020, 1, 1) + datetime.timedelta(days))
asked_for = st.builds(
    Filters,
    views=st.lists(st.sampled_from(["PA", "AP"]), max_size=2, unique=True).map(tuple),
    sex=st.sampled_from([None, "F", "M"]),
    age_from=ages,
    age_to=ages,
    date_from=dates,
    date_to=dates,
    any_of=names,
    all_of=names.map(lambda found: found[:1]),
    none_of=names,
).filter(
    lambda asked: (
        (asked.age_from is None or asked.age_to is None or asked.age_from <= asked.age_to)
        and (asked.date_from is None or asked.date_to is None or asked.date_from <= asked.date_to)
    )
)


@settings(max_examples=60)
@given(asked=asked_for, k=st.integers(1, 20), skip=st.integers(0, 10), number=st.integers(0, COUNT - 1))
def test_k_hits_come_wherever_k_images_pass_and_they_are_the_nearest_of_these(
    retriever: Retriever, images: list[Film], asked: Filters, k: int, skip: int, number: int
) -> None:
    query = retriever.query_of(images[number].facts["image_id"])
    stored = np.concatenate([shard.rows_ND for shard in retriever.holders.group.shards.shards])
    far_N = exact_distances(query.vector, stored)
    passing = [n for n, film in enumerate(images) if passes(film.facts, asked)]
    assume(len(passing) < COUNT or not retriever.facts["lists"])  # among all, lists find the nearest only mostly
    nearest = sorted(passing, key=lambda n: (far_N[n], images[n].facts["id"]))
    answer = retriever.search(query, k, asked, skip=skip, exclude_own=False)
    assert [case.image_id for case in answer.cases] == [images[n].facts["image_id"] for n in nearest[skip : skip + k]]
    assert [case.rank for case in answer.cases] == list(range(skip + 1, skip + 1 + len(answer.cases)))
    assert answer.passing == len(passing)
    own = images[number].facts["findings"]
    assert all(case.shared == tuple(name for name in case.findings if name in own) for case in answer.cases)


def test_the_few_that_pass_a_filter_are_compared_without_looking_lists_up(
    world, monkeypatch: pytest.MonkeyPatch, images: list[Film]
) -> None:
    folder, _, files = world
    retriever = Retriever.open(published(folder, build(folder, images, files, lists=8), "few"))
    query, exact = retriever.query(images[0].png), retriever.holders.group.shards.exact
    asked = Filters(sex="F")
    mask = [Passing.of(asked.mask(table)) for table in retriever.holders.group._sidecars]
    expected = [hit.distance for hit in exact(query.vector[None], COUNT, mask)[0]]
    monkeypatch.setattr(Lists, "nearest", None)  # a graph of many lists takes a second for all of them
    assert [case.distance for case in retriever.search(query, COUNT, asked, exclude_own=False).cases] == expected


@pytest.mark.parametrize("k", [1, 8, COUNT])
def test_more_that_pass_are_looked_for_in_lists_and_in_all_where_these_hold_too_few(
    world, monkeypatch: pytest.MonkeyPatch, images: list[Film], k: int
) -> None:
    folder, _, files = world
    monkeypatch.setattr(search, "EXACT_BELOW", 0)
    retriever = Retriever.open(published(folder, build(folder, images, files, lists=8), "more"))
    answer = retriever.search(retriever.query(images[0].png), k, Filters(sex="F"), exclude_own=False)
    assert len(answer.cases) == min(k, answer.passing)
    assert {case.sex for case in answer.cases} == {"F"}


def test_patients_and_images_are_told_apart_where_their_hashes_begin_alike(
    world, monkeypatch: pytest.MonkeyPatch, images: list[Film]
) -> None:
    folder, _, files = world
    reference = published(folder, build(folder, images, files, lists=8), "alike")
    patient = images[40].facts["patient"]

    def answers(retriever: Retriever) -> list[search.Answer]:
        queries = [retriever.query_of(film.facts["image_id"]) for film in images[:20]]
        return [retriever.search(query, COUNT, exclude_patient=patient) for query in queries]

    expected = answers(Retriever.open(reference))
    monkeypatch.setattr(groups, "hash", lambda _: 7, raising=False)
    monkeypatch.setattr(groups, "_beginning", lambda _: 7)
    monkeypatch.setattr(groups, "_beginnings", lambda column: np.full(len(column), 7, np.uint64))
    alike = Retriever.open(reference)
    assert answers(alike) == expected
    with pytest.raises(UserError, match="is not in this index"):
        alike.search(alike.query(images[0].png), exclude_patient="nobody")


@pytest.mark.parametrize("kind", [pa.binary(32), pa.binary(), pa.large_binary()])
def test_hashes_of_pixels_are_read_from_any_column_that_may_hold_them(kind: pa.DataType) -> None:
    values = [hashlib.sha256(bytes([number])).digest() for number in range(50)]
    expected = [int.from_bytes(value[:8], "big") for value in values]
    column = pa.array(values, kind)
    assert groups._beginnings(column).tolist() == expected
    assert groups._beginnings(column.slice(3, 40)).tolist() == expected[3:43]
    pieces = pa.table({"hash": pa.chunked_array([column.slice(0, 7), column.slice(7), column.slice(0, 0)])})
    assert groups._beginnings(groups._in_one_piece(pieces)["hash"]).tolist() == expected


def test_what_passes_a_filter_is_found_out_once_whatever_patients_are_left_out(
    world, monkeypatch: pytest.MonkeyPatch, images: list[Film]
) -> None:
    folder, _, files = world
    retriever = Retriever.open(published(folder, build(folder, images, files, lists=8), "once"))
    asked, found_out = Filters(views=("PA",)), []
    mask = Filters.mask
    monkeypatch.setattr(Filters, "mask", lambda self, table: found_out.append(self) or mask(self, table))
    for film in images:
        answer = retriever.search(retriever.query_of(film.facts["image_id"]), COUNT, asked)
        others = [other for other in images if other.facts["patient"] != film.facts["patient"]]
        assert answer.passing == len(answer.cases) == sum(other.facts["view"] == "PA" for other in others)
    assert found_out == [asked] * 2  # once for each of two shards


def test_the_own_patient_is_left_out_inside_the_search_too(retriever: Retriever, images: list[Film]) -> None:
    patient = images[0].facts["patient"]
    others = [film for film in images if film.facts["patient"] != patient]
    answer = retriever.search(retriever.query(images[0].png), COUNT)
    assert answer.known is not None
    assert answer.known.image_id == images[0].facts["image_id"]
    assert {case.image_id for case in answer.cases} == {film.facts["image_id"] for film in others}


def test_a_value_that_a_filter_names_many_times_costs_and_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    once, often = Filters(any_of=("Mass", "Nodule")), Filters(any_of=("Nodule", "Mass") * 500)
    assert (once, hash(once)) == (often, hash(often))
    looked: list[str] = []

    def present(_: pa.Table, name: str) -> np.ndarray:
        looked.append(name)
        return np.array([name == "Mass", name == "Nodule", False])

    monkeypatch.setattr(filters, "_present", present)
    assert often.mask(pa.table({"findings": [[], [], []]})).tolist() == [True, True, False]
    assert looked == ["Mass", "Nodule"]


@pytest.mark.parametrize(("k", "skip"), [(1, 0), (4, 0), (4, 3), (COUNT, 0)])
@pytest.mark.parametrize("asked", [EVERYTHING, Filters(sex="F")])
def test_every_hit_is_another_patient_by_the_nearest_of_their_images_where_one_of_each_is_asked_for(
    retriever: Retriever, images: list[Film], asked: Filters, k: int, skip: int
) -> None:
    query = retriever.query(images[0].png)
    every = retriever.search(query, COUNT, asked).cases
    nearest = {case.patient: case for case in reversed(every)}  # the first of each wins
    expected = sorted(nearest.values(), key=lambda case: case.rank)
    assert len(expected) < len(every)
    found = retriever.search(query, k, asked, skip=skip, one_per_patient=True).cases
    assert [case.image_id for case in found] == [case.image_id for case in expected[skip : skip + k]]
    assert [case.rank for case in found] == list(range(skip + 1, skip + 1 + len(found)))


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (Filters(views=("XX",)), "view 'XX': it has AP, PA"),
        (Filters(sex="f"), "sex 'f'"),
        (Filters(none_of=("Efusion",)), "did you mean 'Effusion'"),
        (Filters(age_from=60, age_to=50), "ages from 60 to 50 hold none"),
        (Filters(date_from=datetime.date(2021, 1, 2), date_to=datetime.date(2021, 1, 1)), "dates from 2021-01-02"),
    ],
)
def test_a_filter_that_nothing_can_pass_is_refused_in_one_line(flat: Retriever, asked: Filters, text: str) -> None:
    with pytest.raises(UserError) as refused:
        flat.search(flat.query_of("00000001_000.png"), 3, asked)
    assert text in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("k", "skip"), [(0, 0), (-3, 0), (8, -2)])
def test_a_page_that_is_none_is_refused(flat: Retriever, images: list[Film], k: int, skip: int) -> None:
    with pytest.raises(UserError, match=f"k is {k} and skip is {skip}: k must be at least 1 and skip at least 0"):
        flat.search(flat.query_of(images[0].facts["image_id"]), k, skip=skip)


@pytest.mark.parametrize("age", [-1, 151, 10**20])
def test_an_age_that_nobody_has_is_refused_in_one_line(flat: Retriever, age: int) -> None:
    for asked in (Filters(age_from=age), Filters(age_to=age)):
        with pytest.raises(UserError, match=f"an age of {age} years: give one from 0 to 150"):
            flat.vocabulary.check(asked)


def test_a_version_whose_files_are_deleted_under_its_reader_is_told_to_be_away(tmp_path: Path) -> None:
    images = films(4)
    made = build(tmp_path, images, model_files(tmp_path, images))
    retriever = Retriever.open(published(tmp_path, made))
    shutil.rmtree(tmp_path / "indexes")
    with pytest.raises(ShardsAway, match="the files of this version are gone: open the one that the alias names now"):
        retriever.query_of(images[0].facts["image_id"])


def test_a_date_is_refused_where_no_image_has_one(world) -> None:
    folder, images, files = world
    undated = [replace(film, facts={**film.facts, "study_date": None}) for film in images[:20]]
    retriever = Retriever.open(published(folder, build(folder, undated, files), "undated"))
    with pytest.raises(UserError, match="no image of this index has a study date"):
        retriever.search(retriever.query(images[0].png), 3, replace(EVERYTHING, date_from=datetime.date(2020, 1, 1)))


# ---- queries


def test_no_probability_is_told_of_a_finding_that_training_never_saw(flat: Retriever, images: list[Film]) -> None:
    assert list(flat.query(images[0].png).scores) == list(FINDINGS)
    taught = copy.copy(flat)
    taught.model = replace(flat.model, facts={**flat.model.facts, "learnt": ["Mass", "Effusion", "No Finding"]})
    assert set(taught.query(images[0].png).scores) == {"Mass", "Effusion"}


def test_an_indexed_image_is_searched_by_its_id_as_by_its_file(flat: Retriever, images: list[Film]) -> None:
    by_file = flat.search(flat.query(images[5].png), 10)
    by_id = flat.search(flat.query_of(images[5].facts["image_id"]), 10)
    assert [case.image_id for case in by_id.cases] == [case.image_id for case in by_file.cases]
    assert by_id.known == by_file.known
    with pytest.raises(UnknownImage, match=r"image 'nobody\.png' is not in this index"):
        flat.query_of("nobody.png")


def test_an_image_that_corpora_leave_out_is_refused_as_a_query(flat: Retriever) -> None:
    raw = written(dataset(ramp(), PresentationIntentType="FOR PROCESSING"))
    with pytest.raises(RejectedImage, match="unsupported: corpora leave such images out by the rule for_processing"):
        flat.query(raw)


def test_a_region_in_source_pixels_is_what_the_network_looks_at(flat: Retriever, images: list[Film]) -> None:
    whole = flat.query(images[0].png)
    region = flat.query(images[0].png, (20, 40, 60, 50))
    assert region.crop == (10, 20, 30, 25)  # the film has twice the side of a prepared image
    assert flat.source_crop(region) == (20, 40, 60, 50)
    assert not np.allclose(region.vector, whole.vector)
    same = tuple(float(side * FILM / 64) for side in whole.crop)
    np.testing.assert_allclose(flat.query(images[0].png, same).vector, whole.vector, atol=1e-5)


def test_a_region_of_an_oblong_image_is_found_behind_its_black_margins(flat: Retriever, images: list[Film]) -> None:
    done, oblong = cv2.imencode(".png", cv2.imdecode(np.frombuffer(images[0].png, np.uint8), 0)[:64])
    assert done
    query = flat.query(bytes(oblong), (0, 0, 128, 64))
    assert query.crop == (0, 16, 64, 32)
    assert flat.source_crop(query) == (0, 0, 128, 64)


@pytest.mark.parametrize(
    ("region", "text"),
    [
        ((100, 0, 29, 50), "does not lie in the image of 128 x 128 pixels"),
        ((-1, 0, 29, 50), "does not lie"),
        ((0, 0, 0, 50), "does not lie"),
        ((0, 0, float("nan"), 50), "does not lie"),
        ((0, 0, 10, 50), "is too small"),
    ],
)
def test_a_region_in_which_nothing_can_be_seen_is_refused(flat: Retriever, images, region, text: str) -> None:
    with pytest.raises(UserError, match=text):
        flat.query(images[0].png, region)


def test_a_region_is_refused_where_it_would_change_nothing(world) -> None:
    folder, images, files = world
    retriever = Retriever.open(published(folder, build(folder, images[:20], files, embedding="global"), "whole"))
    assert not retriever.knows_regions
    with pytest.raises(UserError, match="this index holds 'global', an embedding of whole images"):
        retriever.query(images[0].png, (0, 0, 64, 64))


# ---- what an answer is worth


def test_nothing_similar_is_said_from_the_recorded_distance_on_and_not_below(world) -> None:
    folder, images, files = world
    query = (plain := Retriever.open(published(folder, build(folder, images, files)))).query(images[0].png)
    nearest = plain.search(query).cases[0].distance
    for far, said in ((nearest * 1.001, False), (nearest * 0.999, True)):
        index = build(folder, images, files, proof={"far_distance": far})
        retriever = Retriever.open(published(folder, index, "far"))
        answer = retriever.search(query)
        assert answer.nothing_similar is said
        assert len(answer.cases) == 8  # shown all the same: a person judges
    # A filter that passes only what is farther is told apart: it says nothing of the index as a whole.
    assert "the images that pass the filter" in (retriever.search(query, 3, Filters(sex="F")).warning or "")


def pictures_of_nothing() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    film = cv2.imdecode(np.frombuffer(films(1)[0].png, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert film is not None
    return {
        "noise": rng.integers(0, 255, (FILM, FILM), dtype=np.uint8),
        "one grey": np.full((FILM, FILM), 128, np.uint8),
        "clouds": cv2.GaussianBlur(rng.integers(0, 255, (FILM, FILM), dtype=np.uint8), (0, 0), 12),
        "inverted": 255 - film,
        "upside down": film[::-1],
        "sideways": np.rot90(film),
    }


@pytest.mark.parametrize("kind", list(pictures_of_nothing()))
def test_a_picture_that_is_no_upright_chest_film_is_said_to_be_like_nothing(flat: Retriever, kind: str) -> None:
    done, data = cv2.imencode(".png", np.ascontiguousarray(pictures_of_nothing()[kind]))
    assert done
    answer = flat.search(flat.query(bytes(data)))
    assert answer.warning is not None
    assert "does not look like its images" in answer.warning


def test_films_of_patients_that_the_index_has_never_seen_are_like_its_images(flat: Retriever) -> None:
    said = []
    for patient in range(900, 930):
        done, data = cv2.imencode(".png", draw_patient(patient, 0, FILM)[0].pixels)
        assert done
        said.append(flat.search(flat.query(bytes(data))).warning)
    # Of a large index one in a hundred; this one has 50 images, and bodies, breath and framing of phantoms vary.
    assert sum(warning is not None for warning in said) <= 6


def test_a_filter_that_no_image_passes_has_an_answer_of_its_own(flat: Retriever, images: list[Film]) -> None:
    answer = flat.search(flat.query(images[0].png), 8, Filters(all_of=FINDINGS))
    assert (answer.cases, answer.passing) == ((), 0)
    assert answer.warning == "no image of this index passes the filter: ask for less"


def test_why_a_hit_is_near_is_told_step_by_step_with_both_crops(flat: Retriever, images: list[Film]) -> None:
    query = flat.query(images[0].png)
    case = flat.search(query, 1).cases[0]
    why = flat.why(query, case)
    assert list(why.distances) == list(flat.model.embedding_names)
    assert why.distances["combined"] == pytest.approx(case.distance, abs=1e-3), "as the search told it"
    assert (why.query_crop, why.hit_crop) == (query.crop, case.crop)
    itself = flat.why(flat.query_of(images[0].facts["image_id"]), flat.case(images[0].facts["image_id"]))
    assert max(itself.distances.values()) < 1e-3


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({"decode_recipe_id": "0" * 12}, "decodes by recipe"),
        ({"findings": ["Mass"]}, "names other findings"),
        ({"dimensions": 95}, "has no embedding 'combined' of 95 numbers"),
    ],
)
def test_a_model_that_is_not_the_indexs_is_refused(world, facts, text: str) -> None:
    folder, images, files = world
    with pytest.raises(UserError, match=text):
        Retriever.open(published(folder, build(folder, images[:20], files, **facts), "bad"))
