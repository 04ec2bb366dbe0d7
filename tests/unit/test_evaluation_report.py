"""Promises of the evaluation page: plots where the numbers are, nothing hidden, absent sections left out."""

import json
import re

import numpy as np
import pytest

from cxr_retrieval.report.charts import Figure, Series, axis, forest
from cxr_retrieval.report.evaluation import write_evaluation
from cxr_retrieval.report.gallery import Case

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


def difference(value):
    return {"difference": value, "low": value - 0.01, "high": value + 0.01, "standard_error": 0.01, "detectable": 0.028}


def boxes(count, crop=0.7, control=0.4):
    keys = ("centre_in_crop", "iobb", "iou")
    return {
        "boxes": count,
        "patients": count // 2,
        "crop_share": 0.25,
        "crop": dict.fromkeys(keys, cell(crop, crop - 0.05, crop + 0.05)),
        "centred_crop": dict.fromkeys(keys, cell(control, control - 0.05, control + 0.05)),
        "difference": dict.fromkeys(keys, difference(crop - control)),
    }


LOCALISATION = {**boxes(210), "findings": {"Mass": boxes(12, crop=0.6), "Pleural_Thickening": boxes(198, crop=0.8)}}
SAME_PATIENT = {
    "combined": {"recall_at": {"1": cell(0.42, 0.40, 0.44, chance=0.01), "8": cell(0.61, chance=0.05)}, "queries": 900},
    "pixels": {"recall_at": {"1": cell(0.2), "8": cell(0.3)}, "queries": 900},
}
BY_GROUP = {
    "combined": {
        "view": {"AP": {**table(0.3), "patients": 80}, "PA": {**table(0.5), "patients": 300}},
        "sex": {"F": {**table(0.4), "queries": 11, "patients": 9}, "M": {**table(0.4), "queries": 0, "patients": 0}},
    }
}


def case(row, findings, name=None):
    pixels = np.full((16, 16), row, np.uint8)
    return Case(name and f"img_{row}", findings, "PA", 61, "F", name, None, pixels, (2, 4, 8, 4), 64)


def look(row, **facts):
    return {"row": row, "crop": [2, 4, 8, 4], **facts}


def examples(**changes):
    figures = {"precision": 0.5, "chance_precision": 0.25, "ap": 0.6, "chance_ap": 0.125}
    hits = [look(8, distance=0.25), look(9, distance=0.75)]
    kinds = {kind: [look(row, hits=hits, **figures)] for row, kind in enumerate(("best", "typical", "worst"))}
    return kinds | changes


def films(**names):
    own = {row: case(row, ("Mass", "Edema"), **names) for row in range(3)}
    return own | {8: case(8, ("Edema", "Pleural_Thickening"), **names), 9: case(9, (), **names)}


def text(html):
    return re.sub(r"\s+", " ", re.sub(r"<style.*?</style>|<[^>]*>", " ", html, flags=re.S))


def test_the_page_is_offline_and_says_that_it_is_no_medical_device():
    html = write_evaluation(evaluation())
    assert not re.search(r"https?://|@import|url\(|<link|<script", html)
    assert "Research system, no medical device" in html


def test_plots_come_before_tables():
    html = write_evaluation(evaluation())
    assert html.rindex("</svg>") < html.index("<table")
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


@pytest.mark.parametrize(("floor", "standing"), [(0.40, "above"), (0.545, "level with"), (0.80, "below")])
def test_the_chosen_embedding_is_held_against_its_strongest_rival(floor, standing):
    page = text(
        write_evaluation(
            evaluation(
                embeddings={"combined": {"findings": table(0.55)}}, floors={"pixels": {"findings": table(floor)}}
            )
        )
    )
    assert f"{standing} the best of floors and chance: pixels alone" in page


@pytest.mark.parametrize(("low", "high", "standing"), [(0.01, 0.03, "above"), (-0.01, 0.03, "level with")])
def test_a_floor_is_held_against_by_the_difference_over_the_same_patients(low, high, standing):
    found = {"difference": 0.02, "low": low, "high": high, "standard_error": 0.01, "detectable": 0.03}
    less = {"precision_at": {"8": found}, "map": found, "recall_at": {"8": found}, "ndcg_at": {"8": found}}
    page = text(
        write_evaluation(
            evaluation(
                embeddings={"combined": {"findings": table(0.55)}},
                floors={"pixels": {"findings": table(0.53)}},
                chosen_minus_floor={"pixels": {"findings": less}},
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
        ("by_group", "By view, sex and age"),
        ("localisation", "Where the model looked"),
        ("same_patient", "Embeddings are personal data"),
        ("unseen", "Findings that training never saw"),
        ("seen", "Findings that training saw, each by itself"),
    ],
)
def test_a_section_without_data_is_left_out(key, heading):
    content = {
        "per_finding": {"combined": {"Mass": {"support": 5, "recall_at_8": 0.5, "precision_at_8": 0.2, "map": 0.1}}},
        "by_group": BY_GROUP,
        "localisation": LOCALISATION,
        "same_patient": SAME_PATIENT,
        "unseen": {"Hernia": {"combined": {"mAP": cell(0.2)}}},
        "seen": {"Hernia": {"combined": {"mAP": cell(0.2)}}},
    }
    assert heading not in write_evaluation(evaluation())
    assert heading in write_evaluation(evaluation(**{key: content[key]}))


def test_findings_stand_by_support_with_rare_ones_marked_and_a_mean_over_those_that_have_figures():
    findings = {
        "Hernia": {"support": 0, "recall_at_8": None, "precision_at_8": None, "map": None},
        "Mass": {"support": 19, "recall_at_8": 0.5, "precision_at_8": 0.2, "map": 0.1},
        "Pleural_Thickening": {"support": 60, "recall_at_8": 0.7, "precision_at_8": 0.4, "map": 0.3},
    }
    macro = {"combined": {"recall_at_8": cell(0.6), "precision_at_8": cell(0.3, 0.25, 0.35), "map": cell(0.2)}}
    html = write_evaluation(evaluation(per_finding={"global": findings, "combined": findings}, macro=macro))
    assert re.findall(r'<tr class="(few)?[^>]*><th scope="row">([^<]+)', html.split("combined (chosen)</summary>")[1])[
        :3
    ] == [("", "Pleural Thickening"), ("few", "Mass"), ("few", "Hernia")]
    assert "Mean over findings 60.0 chance 30.0 30.0 25.0 to 35.0 chance 30.0 20.0" in text(html)
    assert html.index("combined (chosen)</summary>") < html.index("global</summary>")


def test_what_the_pixels_alone_give_stands_beside_every_figure_of_a_finding_and_of_a_group():
    def one(value):
        return {"Mass": {"support": 19, "recall_at_8": value, "precision_at_8": value, "map": value}}

    tables = {"pixels": one(0.123), "global": one(0.5), "combined": one(0.6)}
    macro = {name: dict.fromkeys(("recall_at_8", "precision_at_8", "map"), cell(0.234)) for name in tables}
    by_group = BY_GROUP | {"pixels": {"view": {"AP": table(0.17), "PA": table(0.19)}}}
    html = write_evaluation(evaluation(per_finding=tables, macro=macro, by_group=by_group))
    page = text(html)
    assert page.count("pixels 12.3") == page.count("pixels 23.4") == 6, "three figures of two embeddings"
    assert page.count("pixels 17.0") == page.count("pixels 19.0") == 3
    assert "<summary>pixels" not in html


def test_nested_tables_are_flattened_with_their_counts():
    unseen = {"Hernia": {"combined": {"mAP": {**cell(0.42, chance=0.01), "queries": 900}}}}
    assert re.search(r"Hernia, combined, mAP 42\.0 1\.0 900", text(write_evaluation(evaluation(unseen=unseen))))


def test_groups_are_shown_with_their_number_interval_and_chance():
    html = write_evaluation(evaluation(by_group=BY_GROUP))
    page = text(html)
    assert html.count('role="img"') == 5
    assert "view AP 1,200 80 30.0 28.0 to 32.0 chance 30.0" in page
    assert re.search(r'class="few"><th scope="row">sex F', html)
    assert "sex M" not in page  # no query of theirs counts


def test_crops_are_held_against_centred_ones_by_finding():
    html = write_evaluation(evaluation(localisation=LOCALISATION))
    rows = re.findall(r'<th scope="row">(all findings|Mass|Pleural Thickening)</th><td>(\d+)', html)
    assert rows == [("all findings", "210"), ("Pleural Thickening", "198"), ("Mass", "12")]
    page = text(html)
    assert "covers 25% of the image" in page
    assert "70.0 65.0 to 75.0 40.0 35.0 to 45.0 +30.0 +29.0 to +31.0" in page
    assert "a centred crop of the same size" in page


def test_reidentification_is_shown_at_every_cutoff_beside_floors_and_chance():
    page = text(write_evaluation(evaluation(same_patient=SAME_PATIENT)))
    assert "combined 900 42.0 40.0 to 44.0 chance 1.0 61.0 chance 5.0" in page
    assert "pixels alone (floor) 900 20.0" in page


def test_the_difference_to_each_floor_says_what_it_could_have_detected():
    cells = {"precision_at": {"8": difference(0.05)}, "map": difference(-0.02), "recall_at": {"8": difference(0.0)}}
    page = text(write_evaluation(evaluation(chosen_minus_floor={"pixels": {"all": cells}})))
    assert "pixels alone +5.0 +4.0 to +6.0 detectable 2.8 -2.0 -3.0 to -1.0 detectable 2.8" in page


def test_example_queries_stand_with_their_crops_and_hits_the_worst_too():
    html = write_evaluation(evaluation(examples=examples()), films())
    assert re.findall(r'data-kind="(\w+)"', html) == ["best", "typical", "worst"]
    assert "what fails is not hidden" in html
    assert html.count('data-role="query"') == 3
    assert html.count('data-role="hit"') == 6
    assert html.count("<image ") == html.count("data:image/") == 5  # an image that answers three queries is there once
    assert html.count('href="#film-8"') == 6  # whole and crop, in each of three rows
    assert html.count('viewBox="2 4 8 4" style="width: 100.0%"') == 9
    assert html.count('<rect x="2" y="4" width="8" height="4"/>') == 9
    page = text(html)
    assert (
        "1 of the first 2 hits shares a finding: precision 50.0%, by chance 25.0%; average precision 60.0%, by"
        " chance 12.5%"
    ) in page
    assert "Rank 1 distance 0.250 &#10003; Edema (shared with the query) Pleural Thickening" in page
    assert "Rank 2 distance 0.750 No finding recorded" in page
    assert html.rindex("</svg>") < html.index("<table")


def test_names_are_told_only_where_they_may_be():
    told = text(write_evaluation(evaluation(examples=examples()), films(name="p_17")))
    assert "patient p_17" in told
    assert "img_8" in told
    untold = text(write_evaluation(evaluation(examples=examples()), films()))
    assert not re.search(r"p_17|img_|None|patient p", untold)


def test_kinds_without_a_query_and_pages_without_images_show_no_examples():
    assert "Queries and their first hits" not in write_evaluation(evaluation(examples=examples()))
    nothing = {"best": [], "typical": [], "worst": []}
    assert "Queries and their first hits" not in write_evaluation(evaluation(examples=nothing), films())
    few = write_evaluation(evaluation(examples=examples(best=[], typical=[])), films())
    assert re.findall(r"<h3>(\w+) queries", few) == ["Worst"]


def test_hostile_names_stay_text():
    hostile = evaluation(
        embeddings={HOSTILE: {HOSTILE: table(0.4)}},
        floors={HOSTILE: {HOSTILE: table(0.3)}},
        chosen=HOSTILE,
        corpus=HOSTILE,
        per_finding={HOSTILE: {HOSTILE: {"support": 1, "map": 0.1}}},
        same_patient={HOSTILE: {"recall_at": {"1": cell(0.1)}, "queries": 3}},
        by_group={HOSTILE: {HOSTILE: {HOSTILE: {**table(0.4), "patients": 3}}}},
        localisation={**boxes(4), "findings": {HOSTILE: boxes(4)}},
        examples=examples(),
    )
    html = write_evaluation(hostile, films(name=HOSTILE) | {8: case(8, (HOSTILE,), HOSTILE)})
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
