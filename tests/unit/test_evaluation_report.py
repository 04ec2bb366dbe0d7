"""Promises of the evaluation page: plots where the numbers are, nothing hidden, absent sections left out."""

import json
import re

import pytest

from cxr_retrieval.report.charts import Figure, Series, axis, forest
from cxr_retrieval.report.evaluation import write_evaluation

HOSTILE = "</svg><script>alert(1)</script>"


def cell(value, low=None, high=None, chance=0.3):
    return {"value": value, "low": low, "high": high, "standard_error": 0.01, "chance": chance}


def table(value, width=0.02, chance=0.3):
    figure = cell(value, value - width, value + width, chance)
    return {
        "recall_at": dict.fromkeys(("2", "4", "6", "8"), figure),
        "precision_at": {"2": figure, "8": figure},
        "ndcg_at": {"8": figure},
        "map": figure,
        "queries": 1200,
        "excluded_queries": 3,
        "candidates_mean": 1520.4,
        "answers": {"distinct": 1432, "most": 0.0125},
    }


def evaluation(**changes):
    return {
        "queries": 1200,
        "patients": 400,
        "corpus": "nih/1a2b",
        "model": "m-1",
        "chosen": "combined",
        "embeddings": {
            "global": {"all": table(0.41), "findings": table(0.51)},
            "combined": {"all": table(0.45), "findings": table(0.55)},
        },
        "floors": {"pixels": {"all": table(0.32)}, "metadata": {"all": table(0.37), "findings": table(0.545)}},
        **changes,
    }


def text(html):
    return re.sub(r"\s+", " ", re.sub(r"<style.*?</style>|<[^>]*>", " ", html, flags=re.S))


def test_the_page_is_offline_and_says_that_it_is_no_medical_device():
    html = write_evaluation(evaluation())
    assert not re.search(r"https?://|@import|url\(|<link|<script", html)
    assert "Research system, no medical device" in html


def test_plots_come_before_tables():
    html = write_evaluation(evaluation())
    assert html.rindex("</svg>") < html.index("<table>")
    # Two plots a gallery, of Recall@k and of the figures that decide.
    assert html.count('role="img"') == 4


def test_galleries_stand_in_the_order_of_the_protocol():
    assert re.findall(r"<h2>Gallery: (\w+)", write_evaluation(evaluation())) == ["findings", "all"]


def test_every_figure_has_its_interval_chance_and_floors():
    page = text(write_evaluation(evaluation()))
    assert "Recall@2 Recall@4 Recall@6 Recall@8 Precision@8 mAP nDCG@8" in page
    assert "45.0 43.0 to 47.0" in page
    assert "pixels alone (floor) 32.0" in page
    assert "view, sex and age alone (floor) 37.0" in page
    assert "chance 30.0 30.0" in page


@pytest.mark.parametrize(("floor", "standing"), [(0.40, "above"), (0.545, "its interval holds"), (0.80, "below")])
def test_the_chosen_embedding_is_held_against_its_strongest_rival(floor, standing):
    page = text(
        write_evaluation(
            evaluation(
                embeddings={"combined": {"findings": table(0.55)}}, floors={"pixels": {"findings": table(floor)}}
            )
        )
    )
    assert f"{standing} the best of floors and chance: pixels alone" in page


def test_chance_is_a_rival_where_it_beats_the_floors():
    page = text(write_evaluation(evaluation(floors={}, embeddings={"combined": {"all": table(0.31, chance=0.4)}})))
    assert "below the best of floors and chance: chance, 40.0%" in page


def test_chance_stands_in_each_cell_where_rows_differ():
    embeddings = {"global": {"all": table(0.4, chance=0.2)}, "combined": {"all": table(0.4, chance=0.3)}}
    page = text(write_evaluation(evaluation(embeddings=embeddings, floors={})))
    assert "chance 20.0" in page
    assert "chance 30.0" in page


def test_figures_without_value_are_shown_as_such():
    empty = dict.fromkeys(("value", "low", "high", "chance"))
    bare = {"recall_at": {"8": empty}, "precision_at": {"8": cell(0.4)}, "map": empty, "queries": 0}
    page = text(write_evaluation(evaluation(embeddings={"combined": {"all": bare}}, floors={})))
    assert "n/a" in page
    assert "nan" not in re.split(r"\W+", page.lower())


@pytest.mark.parametrize(
    ("key", "heading"),
    [
        ("per_finding", "Finding by finding"),
        ("localisation", "Where the model looked"),
        ("same_patient_nearest", "Embeddings are personal data"),
    ],
)
def test_a_section_without_data_is_left_out(key, heading):
    content = {
        "per_finding": {"combined": {"Mass": {"support": 5, "recall_at_8": 0.5, "precision_at_8": 0.2, "map": 0.1}}},
        "localisation": {"boxes": 210, "crop": {"centre_in_crop": cell(0.7), "iobb": 0.625}},
        "same_patient_nearest": {"combined": {"all": {**cell(0.42), "queries": 900}}},
    }
    assert heading not in write_evaluation(evaluation())
    assert heading in write_evaluation(evaluation(**{key: content[key]}))


def test_findings_stand_by_support_with_rare_ones_marked_and_a_mean_over_those_that_have_figures():
    findings = {
        "Hernia": {"support": 0, "recall_at_8": None, "precision_at_8": None, "map": None},
        "Mass": {"support": 19, "recall_at_8": 0.5, "precision_at_8": 0.2, "map": 0.1},
        "Pleural_Thickening": {"support": 60, "recall_at_8": 0.7, "precision_at_8": 0.4, "map": 0.3},
    }
    html = write_evaluation(evaluation(per_finding={"global": findings, "combined": findings}))
    assert re.findall(r'<tr class="(few)?[^>]*><th scope="row">([^<]+)', html.split("combined (chosen)</summary>")[1])[
        :3
    ] == [("", "Pleural Thickening"), ("few", "Mass"), ("few", "Hernia")]
    assert "Mean over findings 60.0 30.0 20.0" in text(html)
    assert html.index("combined (chosen)</summary>") < html.index("global</summary>")


def test_nested_tables_are_flattened_with_their_counts():
    page = text(
        write_evaluation(
            evaluation(
                localisation={"boxes": 210, "crop": {"iobb": 0.625}},
                same_patient_nearest={"combined": {"same_view": {**cell(0.42, chance=0.01), "queries": 900}}},
            )
        )
    )
    assert re.search(r"boxes 210 .*crop, iobb 62\.5", page)
    assert re.search(r"combined, same view 42\.0 1\.0 900", page)


def test_hostile_names_stay_text():
    hostile = evaluation(
        embeddings={HOSTILE: {HOSTILE: table(0.4)}},
        floors={HOSTILE: {HOSTILE: table(0.3)}},
        chosen=HOSTILE,
        corpus=HOSTILE,
        per_finding={HOSTILE: {HOSTILE: {"support": 1, "map": 0.1}}},
        same_patient_nearest={HOSTILE: cell(0.1)},
    )
    html = write_evaluation(hostile)
    assert "<script" not in html
    assert html.count("<svg") == html.count("</svg>")


def test_what_was_read_from_json_gives_the_same_page():
    assert write_evaluation(json.loads(json.dumps(evaluation()))) == write_evaluation(evaluation())


def test_an_evaluation_without_figures_says_so():
    assert "holds no figures" in write_evaluation({"embeddings": {}})


@pytest.mark.parametrize("values", [[0.3], [0.0, 1.0], [0.612, 0.655], [0.1 * 3, 0.9], []])
def test_an_axis_holds_its_values_in_a_few_round_steps(values):
    low, high, step = axis(values)
    assert 0 <= low < high <= 1.0 + 1e-9
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in values)
    assert 1 <= round((high - low) / step) <= 5


def test_marks_lie_where_their_numbers_are():
    rows = [
        Series("a", (Figure(0.4, 0.3, 0.5, 0.2), Figure(0.1))),
        Series("b", (Figure(0.6, None, 0.7, 0.2), Figure(None))),
    ]
    plot = forest(rows, ["Recall@2", "mAP"])
    first, second = plot.panels
    a, b = first.marks
    assert first.left <= a.chance < a.low < a.x < a.high < b.x <= first.right < second.left
    # Half way between its ends is half way between their places.
    assert a.x == pytest.approx((a.low + a.high) / 2, abs=0.02)
    assert (b.low, b.high) == (None, None)
    assert (second.marks[1].x, second.marks[1].text) == (None, "n/a")
    ticks = {tick.text: tick.x for tick in first.ticks}
    assert ticks["40"] == a.x
    assert ticks["60"] == b.x


def test_a_plot_tells_whether_its_axis_is_cut():
    assert forest([Series("a", (Figure(0.81, 0.80, 0.82),))], ["mAP"]).cut
    assert not forest([Series("a", (Figure(0.81, chance=0.0),))], ["mAP"]).cut
    assert "not all from zero" in write_evaluation(evaluation())


def test_the_page_says_whether_all_queries_are_answered_by_the_same_images():
    told = text(write_evaluation(evaluation()))
    assert "first 8 hits of all queries are 1,432 different images; the most frequent one answers 1.2%" in told
