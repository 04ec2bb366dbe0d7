"""What the jobs around a model say of it: its figures, what it learnt, and whether it is tested on what it knows."""

import hashlib
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from cxr_retrieval import storage
from cxr_retrieval.config import Settings, load_settings
from cxr_retrieval.training.run import learnt_from
from jobs import train
from jobs.evaluate import warn_of_overlap
from tests.unit.test_training_report import model as facts_of
from tests.unit.test_training_report import record

ARCHIVE, TABLES = "/archives/chest", ["aa", "bb"]


def corpus(archive: str = ARCHIVE, tables: list[str] = TABLES) -> Any:
    return SimpleNamespace(artifact=SimpleNamespace(manifest={"archive_uri": archive}), label_tables=tables)


def model(facts: dict[str, Any], **files: bytes) -> Any:
    files["model.json"] = json.dumps(facts).encode()
    return SimpleNamespace(
        read=files.__getitem__, uri="models/1", input_id="1", counts={}, manifest={"chosen": facts.get("chosen")}
    )


def settings(*words: str) -> Settings:
    return load_settings((), ["corpus.split_seed=3", "corpus.test_share=0.3", *words])


def warned(capsys: pytest.CaptureFixture[str], given: Settings, here: Any, **facts: Any) -> bool:
    warn_of_overlap(given, model(learnt_from(settings().corpus, corpus()) | facts), here)
    return "warning: the model was trained on this very archive by another split" in capsys.readouterr().err


GROWN = {
    "the same": corpus(),
    "one table more": corpus(tables=["aa", "bb", "cc"], archive="/elsewhere"),
    "a row more": corpus(tables=["dd", "bb"], archive="/elsewhere"),
    "every table anew": corpus(tables=["dd", "ee"]),
    "no tables": corpus(tables=[]),
}


@pytest.mark.parametrize("here", GROWN.values(), ids=GROWN)
@pytest.mark.parametrize(
    "word", ["corpus.split=all_test", "corpus.split=official", "corpus.split_seed=4", "corpus.test_share=0.2"]
)
def test_a_model_tested_on_its_archive_by_another_split_is_warned_of_however_that_archive_has_grown(
    here: Any, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert warned(capsys, settings(word), here)
    assert not warned(capsys, settings(), here), "by the same split no patient changes sides"


def test_another_archive_is_not_warned_of_and_a_setting_that_the_split_does_not_use_is_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert not warned(capsys, settings("corpus.split=all_test"), corpus("/elsewhere", ["dd"]))
    official = settings("corpus.split=official")
    facts = learnt_from(official.corpus, corpus())
    assert not warned(capsys, settings("corpus.split=official", "corpus.test_share=0.1"), corpus(), **facts)
    fewer = "corpus.validation_share=0.05"
    assert not warned(capsys, settings(fewer), corpus()), "who tests is decided before who validates"
    assert warned(capsys, settings(fewer, "evaluation.split=validation"), corpus())


def test_a_model_that_does_not_know_its_split_is_warned_of_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_overlap(settings(), model({"label_tables": TABLES}), corpus())
    assert "warning" in capsys.readouterr().err


def test_a_model_keeps_no_path_of_the_archive_that_it_learnt_from() -> None:
    kept = learnt_from(settings().corpus, corpus())
    assert ARCHIVE not in json.dumps(kept)
    assert kept["archive"] == hashlib.sha256(ARCHIVE.encode()).hexdigest()


def test_training_ends_with_the_figures_of_the_chosen_embedding_beside_chance(
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = {"map": 0.412, "precision_at_8": 0.377, "recall_at_8": 0.868}
    chance = {"chance_map": 0.201, "chance_precision_at_8": 0.199, "chance_recall_at_8": 0.733}
    for known, told in ((figures | chance, "20.1 19.9 73.3"), (figures | {"chance_map": 0.201}, "20.1 - -")):
        found = model({"chosen": "combined", "validation": {"combined": known}})
        found.counts = {"train_images": 1, "validation_images": 1, "steps": 1}
        train.show_model(found, worked=True)
        shown = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
        assert "combined 41.2 37.7 86.8" in shown
        assert f"chance {told}" in shown


def test_the_page_of_a_training_leaves_out_the_centres_of_findings_that_it_did_not_learn(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "example_places", lambda *_: [])
    centres = np.eye(3, 8, dtype=np.float32)[None].repeat(4, 0)
    facts = facts_of([record(0)], findings=["Mass", "Hernia", "Edema"])
    for learnt, cells in ((None, 9), (["Mass", "Edema"], 4), (["Mass"], 0)):
        kept = facts | ({"learnt": learnt} if learnt else {})
        weights = {"weights.safetensors": safetensors.numpy.save({"centres": centres})}
        page = train.training_report(Settings(workspace=str(tmp_path)), model(kept, **weights), corpus())
        html = storage.read_bytes(page).decode()
        assert html.count(" degrees, distance ") == cells
        assert ("Hernia" in html) == (learnt is None)
