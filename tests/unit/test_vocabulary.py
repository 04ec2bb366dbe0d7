"""Promises of the table of finding names: each is read as the table says, and the page shows the table as it is."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.corpus.findings import ABSENT, FINDINGS, PRESENT, UNKNOWN
from cxr_retrieval.corpus.formats.vocabulary import CHEXPERT, PADCHEST, VINDR, VOCABULARIES, Vocabulary, in_our_words

# PadChest's own tree, where a word of it means one of FINDINGS: the words right below each. Bustos et al. 2020 show it,
# auriml/Rx-thorax-automatic-captioning has it whole.
PADCHEST_TREE = {
    "granuloma": ["calcified granuloma"],
    "nodule": ["multiple nodules"],
    "pseudonodule": ["nipple shadow", "end on vessel"],
    "pneumothorax": ["hydropneumothorax"],
    "infiltrates": ["interstitial pattern", "alveolar pattern"],
    "interstitial pattern": [
        "ground glass pattern",
        "reticular interstitial pattern",
        "reticulonodular interstitial pattern",
        "miliary opacities",
    ],
    "alveolar pattern": ["consolidation", "air bronchogram"],
    "consolidation": ["air bronchogram"],
    "atelectasis": [
        "total atelectasis",
        "lobar atelectasis",
        "segmental atelectasis",
        "laminar atelectasis",
        "round atelectasis",
        "atelectasis basal",
    ],
    "fissure thickening": ["minor fissure thickening", "major fissure thickening", "loculated fissural effusion"],
    "pleural thickening": ["apical pleural thickening", "calcified pleural thickening"],
    "pleural plaques": ["calcified pleural plaques"],
    "pleural effusion": [
        "loculated pleural effusion",
        "loculated fissural effusion",
        "hydropneumothorax",
        "empyema",
        "hemothorax",
    ],
    "mass": ["mediastinal mass", "breast mass", "pleural mass", "pulmonary mass", "soft tissue mass"],
    "pneumonia": ["atypical pneumonia"],
    "tuberculosis": ["tuberculosis sequelae"],
    "pulmonary fibrosis": ["post radiotherapy changes", "asbestosis signs"],
}
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


@pytest.mark.parametrize("parent", PADCHEST_TREE)
def test_what_a_word_of_padchest_means_every_word_below_it_in_padchests_tree_means_too(parent: str) -> None:
    broad = PADCHEST.read({parent: PRESENT}, ABSENT)
    assert broad.findings or broad.unknown
    for child in PADCHEST_TREE[parent]:
        narrow = PADCHEST.read({child: PRESENT}, ABSENT)
        assert set(broad.findings) <= set(narrow.findings), child
        assert set(broad.unknown) <= {*narrow.findings, *narrow.unknown}, child


@pytest.mark.parametrize("word", ["hypoexpansion", "hypoexpansion basal", "volume loss"])
def test_a_lung_that_holds_less_air_leaves_atelectasis_open(word: str) -> None:
    assert PADCHEST.read({word: PRESENT}, ABSENT).unknown == ["Atelectasis"]


def test_a_table_tells_nothing_of_findings_that_none_of_its_names_mean() -> None:
    told = VINDR.among(["Cardiomegaly", "ILD", "something new"]).read({"something new": PRESENT}, ABSENT)
    assert told.unknown == [name for name in FINDINGS if name not in ("Cardiomegaly", "Infiltration", "Fibrosis")]
    assert told.other == ["something new"]


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


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("pleural_thickening", "Pleural_Thickening"),
        ("Infiltrate", "Infiltration"),
        ("PLEURAL EFFUSION", "Effusion"),
        ("Pulmonary_Fibrosis", "Fibrosis"),
        ("no_finding", "No Finding"),
        ("round atelectasis", "round atelectasis"),
        ("Nodule/Mass", "Nodule/Mass"),
        ("Fracture", "Fracture"),
    ],
)
def test_another_archives_name_is_read_where_it_is_as_broad_as_one_finding_and_surely_that(
    name: str, ours: str
) -> None:
    assert in_our_words(name) == ours


def test_the_page_shows_the_table_as_it_is() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for archive, vocabulary in VOCABULARIES.items():
        shown = page.split(f"### {archive}\n", 1)[1].split("\n#", 1)[0]
        rows = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in shown.splitlines() if line[:1] == "|"]
        assert rows[2:] == list(vocabulary.meanings.items())
