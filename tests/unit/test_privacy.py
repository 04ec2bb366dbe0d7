"""Promises of pseudonyms: no name leaves without the key's mark, and the key never leaves."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.config import PrivacySettings
from cxr_retrieval.errors import UserError
from cxr_retrieval.privacy import KEY_VARIABLE, LEAST_KEY_BYTES, LEAST_KEY_VARIETY, Pseudonyms, row_id

KEY, OTHER = b"a key for tests, long enough", b"another key for tests, long enough"
VARIED = "abcdefghijklmnopqrstuvwxyz"
names = st.text(min_size=1, max_size=40)


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def refused(settings: PrivacySettings) -> str:
    with pytest.raises(UserError) as caught:
        Pseudonyms.of(settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pseudonyms_are_wanted_unless_told_otherwise_and_need_a_key() -> None:
    message = refused(PrivacySettings())
    assert KEY_VARIABLE in message
    assert "privacy.key_file" in message
    assert "privacy.pseudonymise=false" in message


@pytest.mark.parametrize("key", ["", "short", VARIED[: LEAST_KEY_BYTES - 1], " " * 40 + "\n", "a" * 64, "0123456" * 9])
@pytest.mark.parametrize("door", ["file", "variable"])
def test_a_key_that_can_be_guessed_is_refused_and_not_repeated(
    door: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    file.write_text(key)
    if door == "variable":
        monkeypatch.setenv(KEY_VARIABLE, key)
    message = refused(PrivacySettings(key_file=str(file) if door == "file" else None))
    assert f"no key of {LEAST_KEY_BYTES} bytes or more, {LEAST_KEY_VARIETY} of them different" in message
    assert "openssl rand -hex 32" in message
    assert not key.strip() or key not in message


def test_a_key_of_the_least_length_and_variety_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    key = VARIED[:LEAST_KEY_VARIETY] * (LEAST_KEY_BYTES // LEAST_KEY_VARIETY)
    monkeypatch.setenv(KEY_VARIABLE, key)
    assert Pseudonyms.of(PrivacySettings()) == Pseudonyms(key.encode())


def test_a_key_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert refused(PrivacySettings(key_file=str(missing))).startswith(f"privacy.key_file={missing} cannot be read")
    assert refused(PrivacySettings(key_file=str(tmp_path))).startswith(f"privacy.key_file={tmp_path} cannot be read")


def test_the_key_comes_from_the_variable_or_the_file_and_the_file_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, f"{KEY.decode()}\r\n")  # as a secret that is kept as a file gives it
    assert Pseudonyms.of(PrivacySettings()) == Pseudonyms(KEY)
    (tmp_path / "key").write_bytes(OTHER + b"\n")  # as an editor leaves it
    assert Pseudonyms.of(PrivacySettings(key_file=str(tmp_path / "key"))) == Pseudonyms(OTHER)


def test_the_key_is_in_no_representation_of_it() -> None:
    pseudonyms = Pseudonyms(KEY)
    for text in (repr(pseudonyms), str(pseudonyms), f"{[pseudonyms]}", pseudonyms.key_id or ""):
        assert KEY.decode() not in text
        assert KEY.hex() not in text


@given(name=names)
def test_a_pseudonym_is_stable_by_key_and_differs_between_keys_and_kinds(name: str) -> None:
    patient = Pseudonyms(KEY).name("patient", name)
    assert patient == Pseudonyms(bytes(KEY)).name("patient", name)
    assert patient != Pseudonyms(OTHER).name("patient", name)
    assert patient != Pseudonyms(KEY).name("image", name)
    assert len(patient) == 20
    assert set(patient) <= set("0123456789abcdef")


def test_a_pseudonym_is_what_it_has_always_been() -> None:
    """Published indexes know patients by it."""
    assert Pseudonyms(KEY).name("patient", "1338") == "c3fb5d01f09164787267"
    assert row_id("00001338_000.png") == 6956512590824303639


def test_keys_are_told_apart_by_their_ids() -> None:
    assert Pseudonyms(KEY).key_id == Pseudonyms(KEY).key_id != Pseudonyms(OTHER).key_id


@given(name=names)
def test_turned_off_names_stay_as_they_are_and_no_key_is_needed(name: str) -> None:
    pseudonyms = Pseudonyms.of(PrivacySettings(pseudonymise=False))
    assert pseudonyms.name("patient", name) == name
    assert pseudonyms.key_id is None


@given(name=names)
def test_a_row_id_is_a_stable_positive_number_of_63_bits(name: str) -> None:
    assert 0 <= row_id(name) < 1 << 63
    assert row_id(name) == row_id(name)
