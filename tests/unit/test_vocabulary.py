"""Promises of the table of finding names: each is read as the table says, and the page shows the table as it is."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.corpus.findings import ABSENT, FINDINGS, PRESENT, UNKNOWN
from cxr_retrieval.corpus.formats.vocabulary import CHEXPERT, PADCHEST, VINDR, VOCABULARIES, Vocabulary

PAGE = Path(__file__).parents[2] / "docs" / "archives.md"
NAMES = sorted({name for vocabulary in VOCABULARIES.values() for name in vocabulary.meanings} | {"gout"})


def test_a_name_that_may_be_either_makes_both_unknown_where_present_and_absent_where_absent() -> None:
    for name, vocabulary in (("Lung Lesion", CHEXPERT), ("Nodule/Mass", VINDR)):
        present, absent = (vocabulary.read({name: state}, ABSENT) for state in (PRESENT, ABSENT))
        assert {"Mass", "Nodule"} <= set(present.unknown)
        assert not {"Mass", "Nodule"} & {*absent.unknown, *absent.findings}
        assert present.findings == present.other == absent.other == []


def test_a_name_may_mean_two_findings_at_once() -> None:
    assert PADCHEST.read({"hydropneumothorax": PRESENT}, ABSENT).findings == ["Effusion", "Pneumothorax"]


def test_a_sure_name_decides_beside_one_that_may_be_it() -> None:
    told = PADCHEST.read({"lung metastasis": PRESENT, "nodule": PRESENT}, ABSENT)
    assert (told.findings, told.unknown) == (["Nodule"], ["Mass"])


def test_what_an_archive_never_labels_is_unknown_whatever_the_rest_is() -> None:
    told = CHEXPERT.read({}, ABSENT)
    assert told == ([], ["Infiltration", "Emphysema", "Fibrosis", "Hernia"], [])
    assert VINDR.read({}, ABSENT).unknown == ["Hernia"]


def test_what_is_none_of_the_findings_is_kept_in_the_archives_own_words_where_it_is_present() -> None:
    states = {"Fracture": PRESENT, "Support Devices": ABSENT, "Lung Opacity": UNKNOWN, "gout": PRESENT}
    assert CHEXPERT.read(states, ABSENT).other == ["Fracture", "gout"]


@pytest.mark.parametrize("meaning", ["Gout", "Mass Gout?", "mass"])
def test_a_meaning_that_is_no_finding_is_a_mistake_of_the_table(meaning: str) -> None:
    with pytest.raises(ValueError, match="none of FINDINGS"):
        Vocabulary({"x": meaning})


@given(
    st.sampled_from(list(VOCABULARIES.values())),
    st.dictionaries(st.sampled_from(NAMES), st.sampled_from([PRESENT, ABSENT, UNKNOWN])),
    st.sampled_from([ABSENT, UNKNOWN]),
)
def test_whatever_is_stated_no_finding_is_in_two_states(
    vocabulary: Vocabulary, states: dict[str, int], rest: int
) -> None:
    told = vocabulary.read(states, rest)
    assert not set(told.findings) & set(told.unknown)
    assert {*told.findings, *told.unknown} <= set(FINDINGS)
    assert set(FINDINGS) - vocabulary.labelled <= set(told.unknown)
    assert all(states[name] == PRESENT for name in told.other)


def test_the_page_shows_the_table_as_it_is() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for archive, vocabulary in VOCABULARIES.items():
        shown = page.split(f"### {archive}\n", 1)[1].split("\n#", 1)[0]
        rows = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in shown.splitlines() if line[:1] == "|"]
        assert rows[2:] == list(vocabulary.meanings.items())
