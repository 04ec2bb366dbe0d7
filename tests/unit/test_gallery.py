"""Promises of the gallery page: whole, offline, escaped, and true about what is shared and where the model looked."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from cxr_retrieval.report.films import LONGEST_SIDE, data_uri
from cxr_retrieval.report.gallery import Case, Hit, PageFacts, QueryResult, write_gallery

HOSTILE = "\"><script>alert('x')</script><img src=x onerror=alert(1)>{{ 7 * 7 }}"


def film(seed=0, side=32):
    noise = np.random.default_rng(seed).integers(0, 255, (side, side), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 4)


def case(name="img_a", findings=("Mass", "Pleural_Thickening"), **changes):
    known = Case(name, findings, "PA", 61, "F", f"p_{name}", "2019-03-02", film(), (10, 20, 100, 50), 320)
    return replace(known, **changes)


def result(**changes):
    hits = (
        Hit(case("img_b", ("Mass", "Edema")), 1, 0.12345, ("Mass",)),
        Hit(case("img_c", (), crop=None), 2, 0.5, ()),
    )
    return replace(QueryResult("First question", case(), hits), **changes)


class Page(HTMLParser):
    """Every element with its attributes, and the text that a reader sees."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self._silent = [], "", False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._silent = tag in ("script", "style")

    def handle_endtag(self, _tag):
        self._silent = False

    def handle_data(self, data):
        self.text += "" if self._silent else data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def test_the_page_says_first_that_it_is_no_medical_device():
    text = Page(write_gallery([result()])).text
    assert text.index("Research system, no medical device") < text.index("First question")


def test_every_image_is_inline_and_nothing_is_fetched():
    html = write_gallery([result(), result(title="Second")], PageFacts("nih", "v1", "latest", "combined", 1234567))
    page = Page(html)
    assert len(page.all("img")) == 6
    assert all(
        image["src"].startswith(("data:image/jpeg;base64,", "data:image/png;base64,")) for image in page.all("img")
    )
    assert not re.search(r"https?://|@import|url\(|<link", html)
    assert "1,234,567" in page.text


def test_facts_that_are_not_known_are_left_out():
    assert "Alias" not in Page(write_gallery([result()], PageFacts(index="nih"))).text


@pytest.mark.parametrize("field", ["image_id", "view", "sex", "patient", "study_date"])
def test_a_hostile_name_of_a_case_stays_text(field):
    page = Page(write_gallery([result(case=case(**{field: HOSTILE}))]))
    assert HOSTILE in page.text
    assert len(page.all("script")) == 1
    assert not any("onerror" in attrs for _, attrs in page.elements)


def test_hostile_titles_findings_scores_warnings_and_facts_stay_text():
    query = result(
        title=HOSTILE,
        warning=HOSTILE,
        scores={HOSTILE: 0.5},
        case=case(findings=(HOSTILE,)),
        hits=(Hit(case(findings=(HOSTILE,)), 1, 0.1, (HOSTILE,)),),
    )
    page = Page(write_gallery([query], PageFacts(*[HOSTILE] * 4, 1, HOSTILE, HOSTILE)))
    assert len(page.all("script")) == 1
    assert len(page.all("img")) == 2
    assert not any("onerror" in attrs for _, attrs in page.elements)


def test_a_crop_box_is_drawn_in_the_pixels_it_was_given_in():
    page = Page(write_gallery([result(hits=())]))
    boxes = page.all("rect")
    assert [svg["viewbox"] for svg in page.all("svg")] == ["0 0 320 320"]
    assert {tuple(box[name] for name in ("x", "y", "width", "height")) for box in boxes} == {("10", "20", "100", "50")}


def test_an_image_without_crop_has_no_box():
    assert not Page(write_gallery([result(case=case(crop=None), hits=())])).all("rect")


def test_shared_findings_are_marked_by_more_than_colour():
    html = write_gallery([result()])
    (shared,) = re.findall(r'<li class="chip shared">(.*?)</li>', html)
    assert "&#10003;" in shared
    assert "Mass" in shared
    assert "(shared with the query)" in shared
    assert '<li class="chip">Edema</li>' in html
    assert "1 of them shares a finding" in html


def test_a_query_without_findings_makes_no_claim_about_sharing():
    assert "of them" not in Page(write_gallery([result(case=case(findings=()))])).text


def test_every_image_has_a_description_with_its_findings():
    alts = [image["alt"] for image in Page(write_gallery([result()])).all("img")]
    assert alts[0] == (
        "Query: chest X-ray, PA, 61 years, female. Findings: Mass, Pleural Thickening."
        " The model's crop covers 5% of the image."
    )
    assert alts[1].startswith("Hit 1: ")
    assert alts[2].endswith("Findings: none recorded.")


def test_a_warning_is_shown_with_and_without_hits():
    for hits in (result().hits, ()):
        assert "Warning: Nothing similar" in Page(write_gallery([result(warning="Nothing similar", hits=hits)])).text
    assert "Warning" not in Page(write_gallery([result()])).text


def test_scores_are_sorted_and_the_recorded_ones_marked():
    html = write_gallery([result(scores={"Edema": 0.2, "Mass": 0.91, "Hernia": 1.5})])
    assert re.findall(r"<li( class=\"known\")?><span>(\w+)", html) == [
        ("", "Hernia"),
        (' class="known"', "Mass"),
        ("", "Edema"),
    ]
    assert "width: 100.0%" in html
    assert "width: 150" not in html


def test_nothing_known_of_a_person_is_said():
    page = Page(write_gallery([result(case=case(view=None, age_years=None, sex=None, study_date=None), hits=())]))
    assert "View, age and sex unknown" in page.text
    assert "None" not in page.text


def test_the_same_cases_give_the_same_page():
    assert write_gallery([result()]) == write_gallery([result()])


def test_no_query_gives_a_page_that_says_so():
    assert "No query was asked" in Page(write_gallery([])).text


def test_pixels_survive_encoding_within_what_the_eye_sees():
    pixels = film(side=256)
    kind, encoded = data_uri(pixels).split(",")
    assert kind in ("data:image/png;base64", "data:image/jpeg;base64")
    decoded = cv2.imdecode(np.frombuffer(base64.b64decode(encoded), np.uint8), cv2.IMREAD_GRAYSCALE)
    assert np.abs(decoded.astype(int) - pixels).mean() < 3


def test_the_smaller_encoding_is_taken():
    assert data_uri(np.zeros((64, 64), np.uint8)).startswith("data:image/png")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    assert data_uri(noise).startswith("data:image/jpeg")


def test_large_pixels_are_reduced():
    encoded = base64.b64decode(data_uri(np.zeros((2000, 2000), np.uint8)).split(",")[1])
    assert cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_GRAYSCALE).shape == (LONGEST_SIDE,) * 2


def test_an_encoded_file_is_passed_on_unchanged():
    encoded = cv2.imencode(".png", film())[1].tobytes()
    assert data_uri(encoded) == "data:image/png;base64," + base64.b64encode(encoded).decode()


@pytest.mark.parametrize(
    "pixels", [b"<svg onload=alert(1)>", np.zeros((4, 5), np.uint8), np.zeros((4, 4)), np.zeros((0, 0), np.uint8)]
)
def test_what_is_no_image_is_refused(pixels):
    with pytest.raises(ValueError):
        data_uri(pixels)


@pytest.mark.parametrize("crop", [(0, 0, 0, 5), (0, 0, float("nan"), 5), (0, 0, 5)])
def test_a_crop_without_area_is_refused(crop):
    with pytest.raises(ValueError, match="crop"):
        case(crop=crop)
