"""Promises of the evaluation: every embedding and floor against every gallery, and never the query's own patient.

P passes, S steps, N images, D dimensions, C findings.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from cxr_retrieval.assessment import apart_rows, assess, example_crops, headline, localisation_rows
from cxr_retrieval.config import EvaluationSettings
from cxr_retrieval.corpus.decoding import Recipe
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.evaluation.retrieval import QueryFigures, retrieve
from cxr_retrieval.images import CASE_COLUMNS, FILM_SIDE, Images, read_cases
from cxr_retrieval.network.progressive import Output, ProgressiveNetwork, embedding_names, uncentred
from cxr_retrieval.report.evaluation import write_evaluation
from cxr_retrieval.training.model import Model

PASSES, STEPS, DIMENSIONS, SIZE = 2, 2, 8, 64
SETTINGS = EvaluationSettings(draws=100)
CUTOFFS = ("2", "4", "6", "8")
KEYS = {
    "queries",
    "patients",
    "images",
    "chosen",
    "embeddings",
    "floors",
    "by_group",
    "chosen_minus_floor",
    "per_finding",
    "macro",
    "same_patient",
    "examples",
}


def images(count: int, patients: int, seed: int, first_patient: int = 0) -> Images:
    """Images of `patients` patients with random labels; every third has no finding, some are boxed."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((count, len(FINDINGS))) < 0.15).astype(np.int8)
    labels[::3] = 0
    labels[1::3, 0] = 1
    labels[2::3, 1] = rng.choice([0, -1], len(labels[2::3]))
    x, y, w, h = rng.integers(4, 12, 4)
    return Images(
        1000 + np.arange(count),  # as if some images of the split had not been drawn
        F.normalize(torch.as_tensor(rng.normal(size=(PASSES, STEPS, count, DIMENSIONS)), dtype=torch.float32), dim=3),
        torch.as_tensor(rng.normal(size=(PASSES, count, len(FINDINGS))), dtype=torch.float32),
        rng.integers(10, 30, (count, 4)).astype(np.int32),
        torch.as_tensor(labels),
        [f"p{first_patient + number}" for number in rng.integers(patients, size=count)],
        {
            "view": [(None, "PA", "AP")[n] for n in rng.integers(3, size=count)],
            "sex": ["M", "F"] * (count // 2) + ["M"] * (count % 2),
            "age": [None] * count,
        },
        torch.as_tensor(rng.random((count, 32 * 32)), dtype=torch.float32),
        torch.as_tensor(rng.normal(size=(count, 5)), dtype=torch.float32),
        [[{"finding": "Mass", "x": x, "y": y, "w": w, "h": h}] * (n % 5 == 0) for n in range(count)],
    )


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    network = ProgressiveNetwork("resnet18_half", len(FINDINGS), STEPS, DIMENSIONS).eval()
    trained_on = images(50, 20, seed=9)
    empty = torch.zeros(0)
    vectors = uncentred(Output(trained_on.z_PSND, empty, trained_on.joint_PNC, empty, empty))
    facts = {"chosen": "combined", "findings": list(FINDINGS), "decode_recipe": Recipe(SIZE, "letterbox").to_json()}
    return Model(facts, network, {name: vector.mean(0) for name, vector in vectors.items()})


@pytest.fixture(scope="module")
def queries() -> Images:
    return images(60, 25, seed=1)


@pytest.fixture(scope="module")
def archive() -> Images:
    return images(80, 30, seed=2, first_patient=100)


@pytest.fixture(scope="module")
def figures(queries: Images, archive: Images, model: Model) -> dict[str, Any]:
    return assess(queries, archive, model, SETTINGS)


def taken(source: Images, rows: Sequence[int], **changed: Any) -> Images:
    """Some rows of `source`, with some fields replaced."""
    index = list(rows)
    fields: dict[str, Any] = {
        "z_PSND": source.z_PSND[:, :, index],
        "joint_PNC": source.joint_PNC[:, index],
        **{
            name: getattr(source, name)[index] for name in ("row_N", "crop_N4", "labels_NC", "pixels_NE", "metadata_NE")
        },
        **{name: [getattr(source, name)[row] for row in index] for name in ("patients", "boxes")},
        "groups": {name: [values[row] for row in index] for name, values in source.groups.items()},
    }
    return Images(**(fields | changed))


def codes(names: Sequence[str | None]) -> torch.Tensor:
    return torch.as_tensor(np.unique([name or "" for name in names], return_inverse=True)[1])


# ---- what is in it


def test_every_embedding_and_floor_stands_against_every_gallery(figures: dict[str, Any], queries: Images) -> None:
    assert set(figures) == KEYS | {"localisation"}
    assert set(figures["embeddings"]) == set(embedding_names(STEPS))
    assert set(figures["floors"]) == set(figures["chosen_minus_floor"]) == {"pixels", "metadata"}
    galleries = {"all", "findings", "same_view", "archive"}
    for tables in (*figures["embeddings"].values(), *figures["floors"].values()):
        assert set(tables) == galleries
        for table in tables.values():
            assert set(table["recall_at"]) == set(table["precision_at"]) == set(table["ndcg_at"]) == set(CUTOFFS)
    assert all(set(tables) == galleries for tables in figures["chosen_minus_floor"].values())
    assert set(figures["per_finding"]) == set(figures["macro"]) == {*embedding_names(STEPS), "pixels"}
    assert set(figures["by_group"]) == {"combined", "pixels"}
    assert set(figures["same_patient"]) == {"combined", "pixels", "metadata"}
    assert figures["images"] == 60
    asked = (queries.labels_NC == 1).any(1)
    assert figures["queries"] == int(asked.sum())
    assert figures["patients"] == len({queries.patients[place] for place in asked.nonzero()[:, 0].tolist()})
    assert figures["patients"] < len(set(queries.patients)), "some have nothing to ask for"
    assert figures["chosen"] == "combined"


def test_findings_that_training_never_saw_are_asked_for_each_by_itself(queries: Images, model: Model) -> None:
    index = FINDINGS.index("Hernia")
    labels_NC = queries.labels_NC.clone()
    labels_NC[:, index] = 0
    labels_NC[[3, 20, 41], index] = 1
    hidden = taken(queries, range(60), labels_NC=labels_NC)
    unseen = dataclasses.replace(model, facts={**model.facts, "unseen": ["Hernia", "Edema"]})
    learnt = [finding for finding in FINDINGS if finding not in ("Hernia", "Edema")]
    taught = dataclasses.replace(model, facts={**model.facts, "learnt": learnt})
    found = assess(hidden, None, unseen, SETTINGS)["unseen"]
    assert set(found) == {"Hernia", "Edema"}
    assert set(found["Hernia"]) == {*embedding_names(STEPS), "pixels", "metadata"}
    patients = codes(hidden.patients)
    vectors = hidden.embeddings(model)["combined"]
    hernia_N = labels_NC[:, index] == 1
    precisions = []
    for query in hernia_N.nonzero()[:, 0].tolist():
        others = [g for g in range(60) if patients[g] != patients[query]]
        ranked = sorted(others, key=lambda g, query=query: -float(vectors[query] @ vectors[g]))
        if any(hernia_N[g] for g in others):
            precisions.append(sum(bool(hernia_N[g]) for g in ranked[:8]) / 8)
    assert found["Hernia"]["combined"]["precision@8"]["value"] == pytest.approx(np.mean(precisions))
    assert found["Hernia"]["combined"]["precision@8"]["queries"] == len(precisions)
    assert "unseen" not in assess(hidden, None, model, SETTINGS)
    assert set(assess(hidden, None, taught, SETTINGS)["unseen"]) == {"Hernia", "Edema"}, "or of which it had none"
    told = [row for row in apart_rows(assess(hidden, None, unseen, SETTINGS)) if row[0] == "Hernia"]
    assert [row[:4] for row in told] == [
        ["Hernia", "unseen", len(precisions), "combined"],
        ["Hernia", "unseen", len(precisions), "pixels"],
    ]
    assert told[0][4] == pytest.approx(100 * np.mean(precisions))
    assert apart_rows(assess(hidden, None, model, SETTINGS)) == []
    compared = SETTINGS.model_copy(update={"apart": "all"})
    saw, saw_not = assess(hidden, None, model, compared), assess(hidden, None, unseen, compared)
    assert saw["seen"]["Hernia"] == saw_not["unseen"]["Hernia"] == found["Hernia"], "both are asked alike"
    assert set(saw["seen"]) == {*saw_not["seen"], *found} == {*FINDINGS}
    assert {(row[0], row[1]) for row in apart_rows(saw_not)} >= {("Hernia", "unseen"), ("Mass", "seen")}
    assert "Findings that training never saw" in write_evaluation(assess(hidden, None, unseen, SETTINGS))


def test_every_figure_has_its_chance_level_which_no_embedding_changes(figures: dict[str, Any]) -> None:
    for gallery in ("all", "findings", "same_view", "archive"):
        chances = []
        for tables in (*figures["embeddings"].values(), *figures["floors"].values()):
            table = tables[gallery]
            cells = [table["map"], *table["recall_at"].values(), *table["precision_at"].values()]
            assert all(0 < cell["chance"] <= 1 and 0 <= cell["value"] <= 1 for cell in cells)
            assert all(cell["low"] <= cell["value"] <= cell["high"] for cell in cells)
            chances.append([cell["chance"] for cell in cells])
        assert all(np.allclose(chance, chances[0], atol=1e-12) for chance in chances)


def test_figures_are_plain_json_and_make_a_page(figures: dict[str, Any]) -> None:
    again = json.loads(json.dumps(figures, allow_nan=False))
    assert again == figures
    page = write_evaluation(figures)
    assert "combined" in page
    assert "chance" in page.lower()


def test_a_headline_has_a_row_for_every_embedding_floor_and_chance(figures: dict[str, Any]) -> None:
    rows = headline(figures, "findings")
    assert [row[0] for row in rows] == [*embedding_names(STEPS), "pixels", "metadata", "chance"]
    table = figures["embeddings"]["combined"]["findings"]
    (combined,) = [row[1:] for row in rows if row[0] == "combined"]
    cells = [*(table["recall_at"][k] for k in CUTOFFS), table["precision_at"]["8"], table["map"]]
    assert combined == [100.0 * cell["value"] for cell in cells]
    assert rows[-1][1:] == pytest.approx([100.0 * cell["chance"] for cell in cells])


def test_without_training_patients_there_is_no_archive_gallery(queries: Images, model: Model) -> None:
    alone = assess(queries, None, model, SETTINGS)
    assert set(alone) == KEYS | {"localisation"}
    for tables in (*alone["embeddings"].values(), *alone["floors"].values(), *alone["chosen_minus_floor"].values()):
        assert set(tables) == {"all", "findings", "same_view"}


def test_localisation_is_left_out_where_no_image_has_a_box(queries: Images, archive: Images, model: Model) -> None:
    unboxed = taken(queries, range(60), boxes=[[]] * 60)
    assert set(assess(unboxed, archive, model, SETTINGS)) == KEYS


def test_localisation_counts_every_box_and_its_control(figures: dict[str, Any], queries: Images) -> None:
    found = figures["localisation"]
    assert found["boxes"] == found["findings"]["Mass"]["boxes"] == 12
    assert found["patients"] == len({queries.patients[n] for n in range(0, 60, 5)})
    assert set(found["crop"]) == set(found["centred_crop"]) == set(found["difference"])
    for name in ("crop", "centred_crop"):
        assert all(0 <= cell["low"] <= cell["value"] <= cell["high"] <= 1 for cell in found[name].values())


def test_rows_of_localisation_are_its_figures_in_percent(
    figures: dict[str, Any], queries: Images, model: Model
) -> None:
    whole, mass = localisation_rows(figures)
    found = figures["localisation"]
    assert whole[:3] == ["all", 12, found["patients"]]
    assert mass == ["Mass", *whole[1:]]
    cells = [
        found[which][measure]["value"] for measure in ("centre_in_crop", "iou") for which in ("crop", "centred_crop")
    ]
    assert [whole[3], whole[4], whole[6], whole[7]] == pytest.approx([100 * cell for cell in cells])
    assert float(whole[5].split(" (")[0]) == pytest.approx(whole[3] - whole[4], abs=0.05)
    unboxed = assess(taken(queries, range(60), boxes=[[]] * 60), None, model, SETTINGS)
    assert localisation_rows(unboxed) == []


# ---- what the figures mean


def assert_agrees(table: dict[str, Any], found: QueryFigures) -> None:
    for column, cutoff in enumerate(CUTOFFS):
        assert table["recall_at"][cutoff]["value"] == pytest.approx(float(found.recall[:, column].mean()), abs=1e-9)
        precision = float(found.precision[:, column].mean())
        assert table["precision_at"][cutoff]["value"] == pytest.approx(precision, abs=1e-9)
    assert table["map"]["value"] == pytest.approx(float(found.ap.mean()), abs=1e-9)
    assert table["queries"] == len(found.ap)
    assert table["candidates_mean"] == pytest.approx(float(found.candidates.double().mean()))


@pytest.mark.parametrize("name", ["step1", "combined", "profile"])
def test_figures_are_those_of_a_plain_retrieval(
    name: str, figures: dict[str, Any], queries: Images, archive: Images, model: Model
) -> None:
    vectors, trained = queries.embeddings(model)[name], archive.embeddings(model)[name]
    labels, patients, views = queries.labels_NC, codes(queries.patients), codes(queries.groups["view"])
    asked = (labels == 1).any(1)
    ask = vectors[asked], labels[asked], patients[asked]
    tables = figures["embeddings"][name]
    assert_agrees(tables["all"], retrieve(ask[0], vectors, ask[1], labels, ask[2], patients))
    assert_agrees(tables["findings"], retrieve(ask[0], ask[0], ask[1], ask[1], ask[2], ask[2]))
    others = codes(archive.patients) + 1000
    assert_agrees(tables["archive"], retrieve(ask[0], trained, ask[1], archive.labels_NC, ask[2], others))
    same = retrieve(
        *(ask[0], vectors, ask[1], labels, ask[2], patients), query_groups_Q=views[asked], gallery_groups_G=views
    )
    assert_agrees(tables["same_view"], same)


def test_floors_are_retrievals_by_pixels_around_their_mean_and_by_metadata(
    figures: dict[str, Any], queries: Images, archive: Images
) -> None:
    asked = (queries.labels_NC == 1).any(1)
    patients = codes(queries.patients)
    pixels = F.normalize(queries.pixels_NE - archive.pixels_NE.mean(0), dim=1)
    for name, vectors in (("pixels", pixels), ("metadata", F.normalize(queries.metadata_NE, dim=1))):
        labels = queries.labels_NC
        found = retrieve(vectors[asked], vectors, labels[asked], labels, patients[asked], patients)
        assert_agrees(figures["floors"][name]["all"], found)
        chosen, floor = figures["embeddings"]["combined"]["all"], figures["floors"][name]["all"]
        difference = figures["chosen_minus_floor"][name]["all"]["map"]["difference"]
        assert difference == pytest.approx(chosen["map"]["value"] - floor["map"]["value"])


def test_per_finding_counts_the_queries_that_have_it(figures: dict[str, Any], queries: Images) -> None:
    found = figures["per_finding"]["combined"]
    kept = figures["embeddings"]["combined"]["all"]["queries"]
    for name, cell in found.items():
        assert 0 < cell["support"] <= int((queries.labels_NC[:, FINDINGS.index(name)] == 1).sum())
    assert max(cell["support"] for cell in found.values()) <= kept


def test_figures_of_groups_and_findings_have_support_and_intervals(figures: dict[str, Any]) -> None:
    groups = figures["by_group"]["combined"]
    assert set(groups) == {"view", "sex", "age"}
    kept = figures["embeddings"]["combined"]["all"]["queries"]
    assert sum(table["queries"] for table in groups["sex"].values()) == kept
    for table in (table for tables in groups.values() for table in tables.values()):
        assert table["patients"] > 1
        assert all(cell["low"] <= cell["value"] <= cell["high"] for cell in (table["map"], table["precision_at"]["8"]))
    for name, table in figures["per_finding"].items():
        for cell in (cell for finding in table.values() for cell in (finding["map"], finding["precision_at_8"])):
            assert cell["low"] is None or cell["low"] <= cell["value"] <= cell["high"]
        values = [finding["map"]["value"] for finding in table.values()]
        assert figures["macro"][name]["map"]["value"] == pytest.approx(np.mean(values))


def test_example_queries_show_what_the_chosen_embedding_ranks_first(
    figures: dict[str, Any], queries: Images, model: Model
) -> None:
    vectors = queries.embeddings(model)["combined"].double()
    shown = [query for kind in ("best", "typical", "worst") for query in figures["examples"][kind]]
    patients = [queries.patients[query["row"] - 1000] for query in shown]
    assert len(shown) == len(set(patients)) == 12
    lifts = [query["precision"] - query["chance_precision"] for query in shown]
    assert min(lifts[:4]) >= max(lifts[4:8]) >= min(lifts[4:8]) >= max(lifts[8:])
    for query in shown:
        own = query["row"] - 1000
        assert query["crop"] == queries.crop_N4[own].tolist()
        hits = [hit["row"] - 1000 for hit in query["hits"]]
        assert len(hits) == 8
        assert queries.patients[own] not in {queries.patients[hit] for hit in hits}
        distances = [float((vectors[own] - vectors[hit]).norm()) for hit in hits]
        assert distances == sorted(distances)
        assert [hit["distance"] for hit in query["hits"]] == pytest.approx(distances)
        shared = [bool(((queries.labels_NC[own] == 1) & (queries.labels_NC[hit] == 1)).any()) for hit in hits]
        assert query["precision"] == pytest.approx(np.mean(shared))
    crops = example_crops(figures)
    assert len(crops) == 12
    assert all(len(images) == 9 for images in crops)
    assert crops[0][shown[0]["row"]] == shown[0]["crop"]


class Shelf:
    """A corpus of 600 x 600 pixels whose rows are known by their number; it notes how many were held at once."""

    recipe = Recipe(600, "letterbox")

    def __init__(self) -> None:
        self.taken: list[list[int]] = []

    def places(self, split: str) -> np.ndarray:
        assert split == "test"
        return np.arange(50)

    def take(self, places: np.ndarray, columns: Sequence[str]) -> pa.Table:
        self.taken.append(places.tolist())
        rows = [
            {
                "image_id": f"image {place}",
                "patient_id": f"patient {place}",
                "view": "PA",
                "sex": None,
                "age_years": int(place),
                "findings": ["Mass"] * int(place % 2),
                "pixels": bytes([int(place)]) * 600 * 600,
            }
            for place in places
        ]
        assert list(columns) == CASE_COLUMNS
        table = pa.Table.from_pylist(rows)
        return table.set_column(6, "pixels", table["pixels"].cast(pa.binary(600 * 600)))


@pytest.mark.parametrize("names", [True, False])
def test_cases_to_look_at_are_read_a_query_at_a_time_reduced_and_named_only_where_allowed(names: bool) -> None:
    shelf = Shelf()
    crops = [{7: [1, 2, 30, 40], 3: [0, 0, 600, 600]}, {9: [5, 5, 10, 10], 7: [1, 2, 30, 40]}]
    cases = read_cases(shelf, "test", crops, names)  # type: ignore[arg-type]
    assert shelf.taken == [[7, 3], [9, 7]]
    assert set(cases) == {3, 7, 9}
    for row, case in cases.items():
        assert case.pixels.shape == (FILM_SIDE, FILM_SIDE)
        assert (case.pixels == row).all()
        assert (case.age_years, case.image_size, case.findings) == (row, 600, ("Mass",))
        assert (case.image_id, case.patient) == ((f"image {row}", f"patient {row}") if names else (None, None))
    assert cases[7].crop == (1, 2, 30, 40)


def twins() -> Images:
    """Patients 0, 1, 2 with two equal images each; 0 and 1 share a finding, 2 shares none."""
    source = images(3, 3, seed=4)
    labels = torch.zeros(6, len(FINDINGS), dtype=torch.int8)
    labels[:4, 3] = 1
    labels[4:, 5] = 1
    names = ["a", "a", "b", "b", "c", "c"]
    groups = {"view": ["PA"] * 6, "sex": ["M"] * 6, "age": [None] * 6}
    return taken(source, [0, 0, 1, 1, 2, 2], labels_NC=labels, patients=names, groups=groups)


def test_the_own_patient_is_never_a_hit_however_near(model: Model) -> None:
    pairs = twins()
    tables = assess(pairs, pairs, model, SETTINGS)["embeddings"]["combined"]
    for name in ("all", "findings", "same_view", "archive"):  # here every archive image is of a query's patient
        table = tables[name]
        assert table["queries"] == 4, name
        assert table["excluded_queries"] == 2, name  # c: nobody else has its finding
        assert table["candidates_mean"] == 4, name
        assert table["relevant_mean"] == 2, name
    same = tables["all"]["same_patient"]
    assert (same["queries"], same["recall_at"]["1"]["value"]) == (6, 1.0)  # but how often it would be is reported


def test_an_evaluation_without_a_single_relevant_image_says_so_and_ends(model: Model) -> None:
    lonely = taken(twins(), [0, 1, 4, 5])
    figures = assess(lonely, None, model, SETTINGS)
    table = figures["embeddings"]["combined"]["all"]
    assert (table["queries"], table["excluded_queries"]) == (0, 4)
    assert table["map"]["value"] is None
    assert headline(figures)[0] == ["step1", *["-"] * 6]
    assert "combined" in write_evaluation(figures)
