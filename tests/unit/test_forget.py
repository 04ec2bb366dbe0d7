"""Promises of removing patients by name: it says what that hides and where, and a name that nothing has is refused."""

import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr_retrieval.config import Settings
from cxr_retrieval.corpus.exclusions import EXCLUSIONS_FILE
from cxr_retrieval.corpus.manifest import MANIFEST_FILE, ManifestWriter
from cxr_retrieval.corpus.rows import ARCHIVE, EXCLUSIONS
from cxr_retrieval.errors import UserError
from cxr_retrieval.index.files import sidecars
from cxr_retrieval.index.lifecycle import drop_version, rollback
from cxr_retrieval.index.search import Retriever
from cxr_retrieval.index.versions import list_versions, publish, resolve
from cxr_retrieval.privacy import KEY_VARIABLE, Pseudonyms
from cxr_retrieval.tombstones import Tombstones, remove
from jobs import versions
from jobs.forget import run
from tests.indexes import build, films, model_files, published

KEY = "a key of sixteen bytes or more"


def forget(settings: Settings, *patients: str, anyway: bool = False) -> None:
    run(settings, Namespace(rest=list(patients), patient=[], anyway=anyway))


@pytest.fixture(params=[True, False], ids=["pseudonyms", "public"])
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Settings:
    """Patient A has two images in two published versions, and these and one more in a corpus; B is in that only."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    names = Pseudonyms(KEY.encode() if request.param else None)
    images = films(12)
    for n, image in enumerate(("1", "2")):
        named = {"patient": names.name("patient", "A"), "image_id": names.name("image", image)}
        images[n] = replace(images[n], facts={**images[n].facts, **named})
    model = model_files(tmp_path, images)
    for shards in (1, 2):
        made = build(tmp_path, images, model, shards=shards, pseudonymised=names.key_id)
        to, _, _ = published(tmp_path, made).rpartition("@")
    corpus = tmp_path / "corpora" / "chest" / ("0" * 20) / MANIFEST_FILE
    corpus.parent.mkdir(parents=True)
    named = zip("12345", ("A", "A", "A", "B", None), strict=True)
    with corpus.open("wb") as file, ManifestWriter.to(file) as writer:
        writer.write(pa.Table.from_pylist([{"image_id": i, "patient_id": p} for i, p in named], schema=ARCHIVE))
    return Settings.model_validate(
        {"workspace": str(tmp_path), "publish": {"to": to}, "privacy": {"pseudonymise": request.param}}
    )


def test_the_images_that_it_hides_are_counted_once_each(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    forget(settings, "A", "B")
    said = capsys.readouterr()
    assert "hides 3 images" in said.out + said.err
    assert "hides 1 images" in said.out + said.err
    assert len(Tombstones.at(settings.workspace).digests) == 2


def test_an_image_that_somebody_else_has_too_is_told_since_it_stays_under_the_other_name(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = Path(settings.workspace) / "corpora" / "chest" / ("0" * 20)
    pairs = [("4", "1", False), ("2", "1", True), ("5", "3", False)]
    rows = [{"image_id": a, "kept_image_id": b, "same_patient": same, "part": 0, "row": 0} for a, b, same in pairs]
    pq.write_table(pa.Table.from_pylist(rows, schema=EXCLUSIONS), corpus / EXCLUSIONS_FILE)
    told = f"of their images have the pixels of an image of somebody else, which stays.*{corpus / EXCLUSIONS_FILE}"
    forget(settings, "B")
    assert re.search(f"1 {told}", capsys.readouterr().err)
    forget(settings, "A", "B")
    assert re.search(f"1 {told}", capsys.readouterr().err)  # the image that they share goes with both
    forget(settings, "A")
    assert re.search(f"2 {told}", capsys.readouterr().err)


def test_a_name_with_an_equals_sign_is_given_by_an_option(settings: Settings) -> None:
    words = [f"workspace={settings.workspace}", f"privacy.pseudonymise={str(settings.privacy.pseudonymise).lower()}"]
    command = [sys.executable, "-m", "jobs.forget", "--patient", "QUI=", "--patient", "A=B", "--anyway", *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert [name in ended.stdout for name in ("QUI=", "A=B")] == [True, True]


def test_a_name_that_nothing_has_is_refused_before_anybody_is_removed(settings: Settings) -> None:
    with pytest.raises(UserError, match=r"patient 'a' has no image in .*--anyway") as refused:
        forget(settings, "B", "a")
    assert "\n" not in str(refused.value)
    assert settings.publish.to
    assert not Tombstones.at(settings.workspace)
    assert not Tombstones.at(settings.publish.to)


def test_a_patient_whose_images_are_yet_to_come_is_removed_when_told_so_and_once(settings: Settings) -> None:
    forget(settings, "later", anyway=True)
    forget(settings, "later")
    assert settings.publish.to
    assert Tombstones.at(settings.workspace) == Tombstones.at(settings.publish.to)
    assert len(Tombstones.at(settings.workspace).digests) == 1


# ---- several indexes


@pytest.fixture
def other(settings: Settings) -> str:
    """Another index of the workspace, of the same images."""
    place = f"{settings.workspace}/indexes/other"
    assert settings.publish.to
    images = films(12)
    names = Pseudonyms.of(settings.privacy)
    images[0] = replace(images[0], facts={**images[0].facts, "patient": names.name("patient", "A")})
    files = model_files(Path(settings.workspace), images)
    publish(build(Path(settings.workspace), images, files, shards=3, pseudonymised=names.key_id), place, "latest")
    return place


def test_a_removed_patient_is_found_in_no_index_of_the_workspace(
    settings: Settings, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Retriever.open(other).images == 12
    forget(settings, "A")
    said = capsys.readouterr().err
    assert Retriever.open(other).images == 11
    assert f"{settings.publish.to}: marked; of the 2 versions published there none shows them" in said
    assert f"{other}: marked; of the 1 versions published there none shows them" in said
    assert len(said.splitlines()) == 3


def test_it_says_when_nothing_is_published_where_the_settings_say(
    settings: Settings, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = f"{tmp_path}/elsewhere"
    forget(settings.model_copy(update={"publish": settings.publish.model_copy(update={"to": to})}), "A")
    assert f"{to}: marked, but nothing is published there" in capsys.readouterr().err
    assert Tombstones.at(to) == Tombstones.at(other) == Tombstones.at(settings.publish.to or "")


def purge(settings: Settings, index: str) -> None:
    options = Namespace(index=index, rest=["gc"], without_gate=False, delete=True, purge=True, grace_days=30.0)
    versions.run(settings, options)


def test_a_purge_of_one_index_names_the_others_that_hold_the_patient_too(
    settings: Settings, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remove(settings.workspace, "A", Pseudonyms.of(settings.privacy))  # in no index: as it was once
    images, key_id = films(12), Pseudonyms.of(settings.privacy).key_id
    publish(build(tmp_path, images, model_files(tmp_path, images), shards=1, pseudonymised=key_id), other, "latest")
    purge(settings, other)
    said = capsys.readouterr().err
    assert len(list_versions(other)) == 1, "who was removed from the workspace is purged from an index of it"
    assert f"{settings.publish.to}: 2 published versions hold removed patients too, and stay" in said
    assert f"--index {settings.publish.to}" in said
    assert len(list_versions(settings.publish.to or "")) == 2


def test_a_purge_takes_what_killed_writes_have_left_and_nothing_that_may_be_being_written(
    settings: Settings, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remove(settings.workspace, "A", Pseudonyms.of(settings.privacy))
    images = films(12)
    key_id = Pseudonyms.of(settings.privacy).key_id
    publish(build(tmp_path, images, model_files(tmp_path, images), shards=1, pseudonymised=key_id), other, "latest")
    folders = Path(settings.workspace, "embeddings", "one"), Path(other, "objects")
    left = {folder: [folder / f".rows.npy.0123abc{n}" for n in range(2)] for folder in folders}
    for folder, (killed, at_work) in left.items():
        folder.mkdir(parents=True, exist_ok=True)
        for file in (killed, at_work):
            file.write_bytes(b"half")
        os.utime(killed, (time.time() - 2 * 86_400,) * 2)
    purge(settings, other)
    assert [[file.exists() for file in files] for files in left.values()] == [[False, True]] * 2
    assert "stay, somebody may be writing them: 2 half-written files; purge again in a day" in capsys.readouterr().err


# ---- another key, and what is published meanwhile


def test_nobody_is_removed_under_another_key_than_those_before(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(settings, "A")
    monkeypatch.setenv(KEY_VARIABLE, "another key of sixteen bytes")
    keyed = settings.privacy.model_copy(update={"pseudonymise": True})
    with pytest.raises(UserError, match="would come back under privacy key"):
        forget(settings.model_copy(update={"privacy": keyed}), "B")
    assert len(Tombstones.at(settings.workspace).digests) == 1


def test_versions_of_another_key_are_named_and_never_said_to_hide_a_patient(
    settings: Settings, other: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "another key of sixteen bytes")
    later = settings.model_copy(update={"privacy": settings.privacy.model_copy(update={"pseudonymise": True})})
    forget(later, "A")
    said = capsys.readouterr().err
    assert "none shows them" not in said
    for place in (other, settings.publish.to or ""):
        (line,) = (line for line in said.splitlines() if line.startswith(f"{place}: "))
        assert "versions built under another privacy key may go on showing them" in line
        assert all(version in line for version in list_versions(place))
    purge(later, other)
    said = capsys.readouterr().err
    assert f"{other}: not looked into, built under another privacy key, and may hold removed patients" in said
    # What is said is done: a version of this key in front, and the others dropped.
    for to in (other, settings.publish.to or ""):
        old = list_versions(to)
        key_id, images = Pseudonyms.of(later.privacy).key_id, films(9)
        made = build(Path(to), images, model_files(Path(to), images), pseudonymised=key_id)
        publish(made, to, "latest")
        for version in old:
            versions.show_dropped(to, *drop_version(to, version))
        with pytest.raises(UserError, match="there is no"):
            rollback(to, "latest")
    capsys.readouterr()
    purge(later, other)
    assert "another privacy key" not in capsys.readouterr().err


def rot_footer(parquet: Path) -> None:
    """What tells where the columns are becomes nonsense; the file still ends as Parquet does."""
    data = bytearray(parquet.read_bytes())
    length = int.from_bytes(data[-8:-4], "little")
    data[-8 - length : -8] = b"\xff" * length
    parquet.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (Path.unlink, "gone since it was uploaded"),
        (lambda path: path.write_bytes(b"no Parquet"), "no longer what was uploaded"),
        (rot_footer, "no longer what was uploaded"),
    ],
)
def test_a_damaged_version_keeps_nobody_from_being_removed(
    damage: Callable[[Path], object], told: str, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    to = settings.publish.to or ""
    version = resolve(to, list_versions(to)[0])
    sidecar = Path(version.object_uri(version.files[next(sidecars(version.files))]))
    damage(sidecar)
    Path(to, "versions", f"{'a' * 20}.json").write_bytes(b"no JSON")
    forget(settings, "A", "whom nobody knows")
    said = capsys.readouterr().err
    assert len(Tombstones.at(to).digests) == len(Tombstones.at(settings.workspace).digests) == 2
    assert f"not looked into: {to}/versions/{'a' * 20}.json" in said
    assert f"not looked into: {sidecar}: {told}" in said


def test_who_is_removed_while_an_index_is_first_published_is_not_shown_by_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the tombstone lies in the workspace before the publish takes them along, or after."""
    workspace, images = Path(settings.workspace), films(12)
    names = Pseudonyms.of(settings.privacy)
    images[0] = replace(images[0], facts={**images[0].facts, "patient": names.name("patient", "A")})
    made = build(workspace, images, model_files(workspace, images), shards=3, pseudonymised=names.key_id)
    before = f"{workspace}/indexes/before"
    forget(settings, "A")
    publish(made, before, "latest", workspace=str(workspace))
    assert Retriever.open(before).images == 11

    removed, after = [], f"{workspace}/indexes/after"

    def slow(place: str, patient: str, pseudonyms: Pseudonyms) -> bool:
        if not removed:  # it has looked where indexes are, and there is nothing yet
            publish(made, after, "latest", workspace=str(workspace))
        removed.append(place)
        return remove(place, patient, pseudonyms)

    for stone in (workspace / "tombstones").iterdir():
        stone.unlink()
    monkeypatch.setattr("jobs.forget.remove", slow)
    forget(settings, "A")
    assert Retriever.open(after).images == 11
