"""The page of a training run: every curve, the centres, the crops; offline, escaped, and right with one epoch."""

import re

import numpy as np
import pytest

from cxr_retrieval.report.training import Example, write_training

STEPS, TABLES = 2, 4
NAMES = ("step1", "step2", "global", "local", "combined", "profile")


def record(epoch, crop=True, **changes):
    later = [0.6, 0.7] if crop else [None, None]
    return {
        "epoch": epoch,
        "loss": 0.7,
        "images_per_second": 100.0 + epoch,
        "validation": {
            name: {"map": 0.1 + 0.01 * epoch + 0.001 * n, "chance_map": 0.095} for n, name in enumerate(NAMES)
        },
        "cross_entropy_by_table": [0.5, 0.4, *later],
        "ccloss_by_table": [2.5, 2.4, *later],
        "centre_cosine": [0.1, 0.2, 0.3, 0.4],
        "centres_collapsed": False,
        "crops": [[0, 0, 32, 16], [8, 8, 16, 16]],
        **changes,
    }


def model(history, **changes):
    last = history[-1]
    return {
        "history": history,
        "best_epoch": len(history) - 1,
        "stopped_early": False,
        "chosen": "combined",
        "validation": last["validation"],
        "corpus": "nih/1a2b",
        **changes,
    }


def page(history, **changes):
    centres = np.random.default_rng(0).normal(size=(TABLES, 3, 8)).astype(np.float32)
    centres /= np.linalg.norm(centres, axis=2, keepdims=True)
    pixels = np.arange(32 * 32, dtype=np.uint8).reshape(32, 32)
    films = [
        Example(pixels, ["Pleural_Thickening"], [r["crops"][0] for r in history]),
        Example(pixels, ["<b>Mass</b>"], [r["crops"][1] for r in history]),
    ]
    return write_training(model(history, **changes), centres, ["Mass", "Hernia", "No Finding"], films)


def test_the_page_says_that_a_run_stopped_early():
    assert "1, stopped early" in page([record(0)], stopped_early=True)
    assert "stopped early" not in page([record(0)])


def test_the_page_is_offline_escaped_and_says_that_it_is_no_medical_device():
    html = page([record(0), record(1)])
    assert not re.search(r"https?://|@import|url\(|<link|<script", html)
    assert "no medical device" in html
    assert "<b>Mass" not in html
    assert "Pleural Thickening" in html


def test_every_embedding_step_and_pass_has_its_curve_and_a_pass_begins_where_it_is_seen():
    html = page([record(0, crop=False), record(1, crop=False), record(2), record(3)])
    retrieval, entropy, ccloss, cosines = re.findall(r'<figure class="chart">.*?</figure>', html, re.S)
    for name in (*NAMES, "chance"):
        assert f"<title>{name}</title>" in retrieval
    for chart in (entropy, ccloss, cosines):
        lines = dict(re.findall(r'points="([^"]*)"><title>([^<]*)', chart))
        assert set(lines.values()) == {f"{which}, step {n}" for which in ("whole image", "crop") for n in (1, 2)}
        epochs = {name: len(points.split()) for points, name in lines.items()}
        assert epochs["whole image, step 1"] == 4
        assert epochs["crop, step 2"] == (4 if chart is cosines else 2)
    facts = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", html))
    assert facts["Best epoch"] == "4"
    assert facts["Images a second"] == "102"
    assert facts["Its validation mAP, %"] == "13.4"
    assert facts["Chance, %"] == "9.5"


@pytest.mark.parametrize("epochs", [1, 2, 40])
def test_crops_are_followed_from_the_first_epoch_to_the_last(epochs):
    html = page([record(epoch) for epoch in range(epochs)])
    shown = [int(epoch) for epoch in re.findall(r"<figcaption>epoch (\d+)<", html)]
    assert len(shown) == 2 * min(4, epochs)
    assert (min(shown), max(shown)) == (1, epochs)
    assert html.count('<rect x="25.0" y="25.0" width="50.0" height="50.0"/>') == min(4, epochs)


def test_cosine_angle_and_distance_of_every_two_classes_are_shown():
    apart = r"cosine (-?\d\.\d\d), (\d+) degrees, distance (\d\.\d\d)"
    cells = re.findall(rf"<title>([^<]*?): {apart}</title>", page([record(0)]))
    assert len(cells) == 9
    by_pair = {pair: tuple(map(float, told)) for pair, *told in cells}
    assert by_pair["Mass, Mass"] == (1.0, 0.0, 0.0)
    assert by_pair["Mass, Hernia"] == by_pair["Hernia, Mass"]
    for cosine, angle, distance in by_pair.values():
        assert np.cos(np.radians(angle)) == pytest.approx(cosine, abs=0.02)
        assert np.sqrt(2 - 2 * cosine) == pytest.approx(distance, abs=0.02)


def test_centres_that_have_collapsed_are_said_first():
    assert "have collapsed onto one point (mean cosine above 0.9)" not in page([record(0)])
    assert "have collapsed onto one point (mean cosine above 0.9)" in page([record(0, centres_collapsed=True)])


def test_pretraining_has_a_curve_of_its_own_where_there_was_any():
    html = page([record(0)], pretraining=[{"epoch": epoch, "loss": 0.9 - 0.3 * epoch} for epoch in range(3)])
    *_, last = re.findall(r'<figure class="chart">.*?</figure>', html, re.S)
    assert "Pretraining without labels" in last
    (points,) = re.findall(r'points="([^"]*)"', last)
    assert len(points.split()) == 3
    assert dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", html))["Epochs without labels"] == "3"
    assert "without labels" not in page([record(0)], pretraining=[])


def test_a_pass_that_was_never_seen_has_no_curve():
    html = page([record(0, crop=False)])
    assert "crop, step 1" in html  # its centres are there
    _, entropy, *_ = re.findall(r'<figure class="chart">.*?</figure>', html, re.S)
    assert "crop, step 1" not in entropy
