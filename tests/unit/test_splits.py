"""Promises of the split: it belongs to a patient, not to the archive that the patient is in."""

import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.corpus.archive import Archive
from cxr_retrieval.corpus.splits import (
    TEST,
    TRAIN,
    TRAIN_OR_VALIDATION,
    VALIDATION,
    hash_split,
    listed_split,
    patient_position,
)

names = st.text(min_size=1, max_size=12)
shares = st.floats(0.01, 0.4)


@given(films=st.lists(st.integers(1, 30), min_size=1, max_size=40), seed=st.integers(0, 1000), test=shares)
@settings(max_examples=25)
def test_a_patient_is_in_one_split_whatever_else_is_in_the_archive(films: list[int], seed: int, test: float) -> None:
    """`films` are the patients of the films, in their order in the archive."""
    with tempfile.TemporaryDirectory() as folder:
        lines = ["Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"]
        for number, patient in enumerate(films):
            (Path(folder) / f"{number:03d}.png").touch()
            lines.append(f"{number:03d}.png,No Finding,0,{patient},50,F,PA")
        (Path(folder) / "Data_Entry_2017.csv").write_text("\n".join(lines))
        (rows,) = Archive(CorpusSettings(archive=folder, split_seed=seed, test_share=test)).partitions()
    found = set(zip(rows["patient_id"].to_pylist(), rows["split"].to_pylist(), strict=True))
    assert found == {(str(patient), hash_split(str(patient), seed, 0.1, test)) for patient in films}


@given(patient=names, seed=st.integers(0, 1000), validation=shares, test=shares, more=st.floats(0, 0.1))
def test_a_larger_test_share_takes_no_patient_out_of_test(
    patient: str, seed: int, validation: float, test: float, more: float
) -> None:
    if hash_split(patient, seed, validation, test) == TEST:
        assert hash_split(patient, seed, validation, test + more) == TEST


@pytest.mark.parametrize(("validation", "test"), [(0.1, 0.2), (0.3, 0.05)])
def test_shares_are_kept_over_5000_patients(validation: float, test: float) -> None:
    counts = Counter(hash_split(str(patient), 0, validation, test) for patient in range(5000))
    expected = {VALIDATION: validation, TEST: test, TRAIN: 1 - validation - test}
    for split, share in expected.items():
        deviation = (share * (1 - share) / 5000) ** 0.5
        assert abs(counts[split] / 5000 - share) < 4 * deviation, split


def test_another_seed_moves_as_many_patients_as_chance_does() -> None:
    patients = [str(patient) for patient in range(5000)]
    one, two = ([hash_split(patient, seed, 0.1, 0.2) for patient in patients] for seed in (0, 1))
    agreement = sum(a == b for a, b in zip(one, two, strict=True)) / len(patients)
    assert abs(agreement - (0.1**2 + 0.2**2 + 0.7**2)) < 0.03


def test_the_place_of_a_patient_is_what_it_has_always_been() -> None:
    """A changed hash would move patients of corpora that exist from train to test."""
    positions = [patient_position(patient, 0) for patient in "123"]
    assert positions == pytest.approx([0.933888385559881, 0.5748392260636982, 0.46416872343894333], abs=1e-12)


def test_the_official_list_is_test_and_validation_comes_from_the_others() -> None:
    others = Counter(listed_split(TRAIN_OR_VALIDATION, str(patient), 0, 0.1) for patient in range(5000))
    assert {listed_split(TEST, str(patient), 0, 0.1) for patient in range(100)} == {TEST}
    assert set(others) == {TRAIN, VALIDATION}
    assert abs(others[VALIDATION] / 5000 - 0.1) < 0.02
