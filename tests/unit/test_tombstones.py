"""Promises of tombstones: they name nobody, are honoured at once, and never bring anybody back."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cxr_retrieval import storage
from cxr_retrieval.config import PrivacySettings
from cxr_retrieval.errors import UserError
from cxr_retrieval.index.filters import Filters
from cxr_retrieval.index.groups import ShardGroup
from cxr_retrieval.index.search import Retriever
from cxr_retrieval.privacy import KEY_VARIABLE, Pseudonyms
from cxr_retrieval.serve import live as live_module
from cxr_retrieval.serve.live import LiveIndex
from cxr_retrieval.tombstones import FOLDER, NOBODY, RemovedPatients, Tombstones, carry, remove
from tests.indexes import build, films, model_files, published
from tests.servers import until

KEY = "a key of sixteen bytes or more"


def test_a_tombstone_names_nobody_and_is_put_once(tmp_path: Path) -> None:
    assert not Tombstones.at(str(tmp_path))
    assert remove(str(tmp_path), "Patient-7", Pseudonyms(None))
    (stone,) = (tmp_path / FOLDER).iterdir()
    assert "Patient" not in stone.name + stone.read_text()
    assert set(json.loads(stone.read_text())) == {"removed_at", "key_id"}
    before = stone.read_bytes()
    assert not remove(str(tmp_path), "Patient-7", Pseudonyms(None))
    assert stone.read_bytes() == before


def test_rows_of_removed_patients_are_told_from_others(tmp_path: Path) -> None:
    remove(str(tmp_path), "b", Pseudonyms(None))
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
    remove(workspace, "7", Pseudonyms(KEY.encode()))
    with pytest.raises(UserError, match="there is no key"):
        RemovedPatients.of(workspace, PrivacySettings())
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    removed = RemovedPatients.of(workspace, PrivacySettings())
    assert ("7" in removed, "8" in removed) == (True, False)


@pytest.mark.parametrize(
    ("then", "now", "told"),
    [
        (
            KEY,
            "another key of sixteen bytes",
            r"removed from it under privacy key \w{12} and .* under privacy key \w{12}:",
        ),
        (KEY, None, r"removed from it under privacy key \w{12} and would come back under their own names"),
        (None, KEY, r"removed from it under their own names .* and would come back under privacy key \w{12}:"),
    ],
    ids=["another key", "no key any more", "a key since"],
)
def test_nobody_comes_back_under_another_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str | None, now: str | None, told: str
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, now or KEY)
    remove(str(tmp_path), "7", Pseudonyms(then.encode() if then else None))
    remove(str(tmp_path), "8", Pseudonyms(now.encode() if now else None))
    with pytest.raises(UserError, match=told) as refused:
        RemovedPatients.of(str(tmp_path), PrivacySettings(pseudonymise=now is not None))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]"])
def test_a_damaged_tombstone_is_told_by_its_name(tmp_path: Path, data: bytes) -> None:
    remove(str(tmp_path), "7", Pseudonyms(None))
    (stone,) = (tmp_path / FOLDER).iterdir()
    stone.write_bytes(data)
    with pytest.raises(UserError, match=f"{stone}: a damaged tombstone"):
        RemovedPatients.of(str(tmp_path), PrivacySettings(pseudonymise=False))


def test_a_tombstone_that_tells_no_key_counts_as_made_by_the_one_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    remove(str(tmp_path), "7", Pseudonyms(KEY.encode()))
    (stone,) = (tmp_path / FOLDER).iterdir()
    stone.write_text(json.dumps({"removed_at": "2024-01-01T00:00:00+00:00"}))
    assert "7" in RemovedPatients.of(str(tmp_path), PrivacySettings())


def test_tombstones_that_are_carried_hide_the_same_patients_and_are_put_once(tmp_path: Path) -> None:
    source, to = f"{tmp_path}/workspace", f"{tmp_path}/published"
    remove(source, "a", Pseudonyms(None))
    remove(to, "b", Pseudonyms(None))
    carry(source, to)
    assert ("a" in Tombstones.at(to), "b" in Tombstones.at(to)) == (True, True)
    before = {stone: stone.stat().st_mtime_ns for stone in (tmp_path / "published" / FOLDER).iterdir()}
    carry(source, to)
    assert {stone: stone.stat().st_mtime_ns for stone in (tmp_path / "published" / FOLDER).iterdir()} == before


def test_a_server_that_runs_shows_nobody_who_was_removed_when_it_looks_next(tmp_path: Path) -> None:
    images = films(24)
    reference = published(tmp_path, build(tmp_path, images, model_files(tmp_path, images)))
    live = LiveIndex(reference, 1000.0)
    patient = images[0].facts["patient"]
    theirs = sum(film.facts["patient"] == patient for film in images)
    assert live.retriever.images == 24
    query = live.retriever.query(images[0].png)
    assert live.retriever.search(query, exclude_own=False).cases[0].patient == patient
    remove(live.to, patient, Pseudonyms(None))
    live.look()
    assert live.retriever.images == 24 - theirs
    found = live.retriever.search(query, k=24, exclude_own=False)
    assert found.known is None
    assert len(found.cases) == 24 - theirs
    assert patient not in {case.patient for case in found.cases}


def test_filters_name_nothing_that_only_a_removed_patient_had(tmp_path: Path) -> None:
    images = films(24)
    patient = images[0].facts["patient"]
    theirs = {"view": "LL", "findings": ["Situs inversus"]}
    images = [
        replace(film, facts={**film.facts, **theirs}) if film.facts["patient"] == patient else film for film in images
    ]
    retriever = Retriever.open(published(tmp_path, build(tmp_path, images, model_files(tmp_path, images))))
    assert "LL" in retriever.vocabulary.views
    assert "Situs inversus" in retriever.vocabulary.findings
    remove(retriever.version.version.to, patient, Pseudonyms(None))
    retriever.honour(Tombstones.at(retriever.version.version.to))
    assert "LL" not in retriever.vocabulary.views
    assert "Situs inversus" not in retriever.vocabulary.findings
    with pytest.raises(UserError, match="no image of this index has view 'LL'"):
        retriever.search(retriever.query(images[-1].png), filters=Filters(views=("LL",)))


class Moving:
    """A server's index of 24 images whose alias has moved to a version of 20; `open` opens it."""

    def __init__(self, folder: Path, poll_seconds: float) -> None:
        images = films(24)
        files = model_files(folder, images)
        self.open: Any = Retriever.open
        self.live = LiveIndex(
            published(folder, build(folder, images, files)), poll_seconds, lambda reference: self.open(reference)
        )
        published(folder, build(folder, images[:20], files))
        self.patient: str = images[0].facts["patient"]
        self.theirs = sum(film.facts["patient"] == self.patient for film in images)
        assert self.theirs == sum(film.facts["patient"] == self.patient for film in images[:20])


def test_a_removed_patient_is_hidden_also_while_the_new_version_cannot_be_opened(tmp_path: Path) -> None:
    moving = Moving(tmp_path, 1000.0)

    def damaged(_: str) -> Retriever:
        raise UserError("the new version is damaged")

    moving.open = damaged
    remove(moving.live.to, moving.patient, Pseudonyms(None))
    moving.live.look()
    assert (moving.live.retriever.images, moving.live.moves) == (24 - moving.theirs, 0)
    assert moving.live.trouble == "alias latest: the new version is damaged"


def test_a_removed_patient_is_hidden_while_a_new_version_is_being_opened_and_does_not_come_back_with_it(
    tmp_path: Path,
) -> None:
    moving = Moving(tmp_path, 0.02)
    opening, go_on = threading.Event(), threading.Event()

    def slow(reference: str) -> Retriever:
        found = Retriever.open(reference)
        opening.set()
        assert go_on.wait(60)
        return found

    moving.open = slow
    with moving.live as live:
        assert opening.wait(60)
        remove(live.to, moving.patient, Pseudonyms(None))
        until(lambda: live.retriever.images < 24)
        assert (live.retriever.images, live.moves) == (24 - moving.theirs, 0)
        go_on.set()
        until(lambda: live.moves == 1)
        assert live.retriever.images == 20 - moving.theirs


def test_a_version_that_takes_long_to_be_opened_is_no_look_without_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moving = Moving(tmp_path, 0.02)
    opening, go_on = threading.Event(), threading.Event()

    def slow(reference: str) -> Retriever:
        opening.set()
        assert go_on.wait(60)
        return Retriever.open(reference)

    moving.open = slow
    with moving.live as live:
        assert opening.wait(60)
        with monkeypatch.context() as patch:
            patch.setattr(live_module, "LATE_SECONDS", 0.0)
            time.sleep(0.1)
            assert "alias" not in (live.trouble or "")
        go_on.set()
        until(lambda: live.moves == 1)


def test_a_removed_patient_does_not_come_back_while_the_folder_of_tombstones_is_away(tmp_path: Path) -> None:
    moving = Moving(tmp_path, 1000.0)
    live, newest = moving.live, moving.open

    def closed(_: str) -> Retriever:
        raise UserError("not now")

    moving.open = closed
    remove(live.to, moving.patient, Pseudonyms(None))
    live.look()
    Path(live.to, "tombstones").rename(tmp_path / "away")
    live.look()
    assert live.retriever.images == 24 - moving.theirs
    moving.open = newest
    live.look()
    assert (live.moves, live.retriever.images) == (1, 20 - moving.theirs)


def test_a_version_that_may_show_who_was_removed_is_not_put_in_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moving = Moving(tmp_path, 1000.0)

    def away(_: Any, __: Any) -> None:
        raise UserError("shards are away")

    with monkeypatch.context() as patch:
        patch.setattr(Retriever, "honour", away)
        moving.live.look()
    assert moving.live.moves == 0
    assert moving.live.trouble == "removed patients: shards are away; alias latest: shards are away"
    moving.live.look()
    assert (moving.live.trouble, moving.live.moves) == (None, 1)


@pytest.mark.parametrize("step", ["candidates", "facts"])
def test_a_search_under_way_shows_nobody_who_is_removed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    images = films(24)
    live = LiveIndex(published(tmp_path, build(tmp_path, images, model_files(tmp_path, images))), 1000.0)
    patient = images[0].facts["patient"]
    theirs = sum(film.facts["patient"] == patient for film in images)
    query = live.retriever.query(images[0].png)
    remove(live.to, patient, Pseudonyms(None))
    done = getattr(ShardGroup, step)

    def removed_before(*asked: Any) -> Any:
        live.look()
        return done(*asked)

    monkeypatch.setattr(ShardGroup, step, removed_before)
    cases = live.retriever.search(query, k=24, exclude_own=False).cases
    assert patient not in {case.patient for case in cases}
    assert [case.rank for case in cases] == list(range(1, 24 - theirs + 1))
