"""Promises of tombstones: they name nobody, are honoured at once, and never bring anybody back."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cxr_retrieval import storage
from cxr_retrieval.config import PrivacySettings
from cxr_retrieval.errors import UserError
from cxr_retrieval.index.groups import ShardGroup
from cxr_retrieval.privacy import KEY_VARIABLE, Pseudonyms
from cxr_retrieval.serve.live import LiveIndex
from cxr_retrieval.tombstones import FOLDER, NOBODY, RemovedPatients, Tombstones, remove
from tests.indexes import build, films, model_files, published

KEY = "a key of sixteen bytes or more"


def test_a_tombstone_names_nobody_and_is_put_once(tmp_path: Path) -> None:
    assert not Tombstones.at(str(tmp_path))
    assert remove(str(tmp_path), "Patient-7")
    (stone,) = (tmp_path / FOLDER).iterdir()
    assert "Patient" not in stone.name + stone.read_text()
    assert set(json.loads(stone.read_text())) == {"removed_at"}
    before = stone.read_bytes()
    assert not remove(str(tmp_path), "Patient-7")
    assert stone.read_bytes() == before


def test_rows_of_removed_patients_are_told_from_others(tmp_path: Path) -> None:
    remove(str(tmp_path), "b")
    stones = Tombstones.at(str(tmp_path))
    names = pa.chunked_array([["a", "b", None], ["b", "c"]], pa.string())
    assert stones.mask(names).tolist() == [False, True, False, True, False]
    assert Tombstones().mask(names).tolist() == [False] * 5
    assert ("b" in stones, "c" in stones, None in stones) == (True, False, False)


def test_other_files_in_the_folder_are_no_tombstones(tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/{FOLDER}/README.md", b"what is this?")
    assert not Tombstones.at(str(tmp_path))


def test_patients_are_known_by_their_pseudonyms_and_not_without_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    workspace = str(tmp_path)
    assert RemovedPatients.of(workspace, PrivacySettings()) is NOBODY  # nobody was removed: no key is needed
    remove(workspace, Pseudonyms(KEY.encode()).name("patient", "7"))
    with pytest.raises(UserError, match="there is no key"):
        RemovedPatients.of(workspace, PrivacySettings())
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    removed = RemovedPatients.of(workspace, PrivacySettings())
    assert ("7" in removed, "8" in removed) == (True, False)
    assert "7" not in RemovedPatients.of(workspace, PrivacySettings(pseudonymise=False))


def test_a_server_that_runs_shows_nobody_who_was_removed_when_it_looks_next(tmp_path: Path) -> None:
    images = films(24)
    reference = published(tmp_path, build(tmp_path, images, model_files(tmp_path, images)))
    live = LiveIndex(reference, 1000.0)
    patient = images[0].facts["patient"]
    theirs = sum(film.facts["patient"] == patient for film in images)
    assert live.retriever.images == 24
    query = live.retriever.query(images[0].png)
    assert live.retriever.search(query, exclude_own=False).cases[0].patient == patient
    remove(live.to, patient)
    live.look()
    assert live.retriever.images == 24 - theirs
    found = live.retriever.search(query, k=24, exclude_own=False)
    assert found.known is None
    assert len(found.cases) == 24 - theirs
    assert patient not in {case.patient for case in found.cases}


@pytest.mark.parametrize("step", ["candidates", "facts"])
def test_a_search_under_way_shows_nobody_who_is_removed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    images = films(24)
    live = LiveIndex(published(tmp_path, build(tmp_path, images, model_files(tmp_path, images))), 1000.0)
    patient = images[0].facts["patient"]
    theirs = sum(film.facts["patient"] == patient for film in images)
    query = live.retriever.query(images[0].png)
    remove(live.to, patient)
    done = getattr(ShardGroup, step)

    def removed_before(*asked: Any) -> Any:
        live.look()
        return done(*asked)

    monkeypatch.setattr(ShardGroup, step, removed_before)
    cases = live.retriever.search(query, k=24, exclude_own=False).cases
    assert patient not in {case.patient for case in cases}
    assert [case.rank for case in cases] == list(range(1, 24 - theirs + 1))
