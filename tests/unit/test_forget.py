"""Promises of removing patients by name: it says what that hides, and a name that nothing has is refused."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from cxr_retrieval.config import Settings
from cxr_retrieval.corpus.manifest import MANIFEST_FILE, ManifestWriter
from cxr_retrieval.corpus.rows import ARCHIVE
from cxr_retrieval.errors import UserError
from cxr_retrieval.privacy import KEY_VARIABLE, Pseudonyms
from cxr_retrieval.tombstones import Tombstones
from jobs.forget import run
from tests.indexes import build, films, model_files, published

KEY = "a key of sixteen bytes or more"


def forget(settings: Settings, *patients: str, anyway: bool = False) -> None:
    run(settings, Namespace(rest=list(patients), anyway=anyway))


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
        to, _, _ = published(tmp_path, build(tmp_path, images, model, shards=shards)).rpartition("@")
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
