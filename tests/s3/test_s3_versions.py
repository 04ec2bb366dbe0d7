"""Promises of removing from a bucket that keeps versions: what is purged is readable by no version id."""

import secrets
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import botocore.exceptions
import pyarrow as pa
import pytest

from cxr_retrieval import s3 as s3_door
from cxr_retrieval import storage
from cxr_retrieval.config import Settings
from cxr_retrieval.corpus.manifest import MANIFEST_FILE, ManifestWriter
from cxr_retrieval.corpus.rows import ARCHIVE
from cxr_retrieval.errors import UserError
from cxr_retrieval.index import cache
from cxr_retrieval.index.versions import publish, resolve, verify
from cxr_retrieval.privacy import Pseudonyms
from cxr_retrieval.tombstones import remove
from jobs import versions as job
from tests import proxy
from tests.indexes import build, films, model_files
from tests.proxy import FaultProxy

pytestmark = pytest.mark.usefixtures("faults")

Stored = dict[tuple[str, str], bytes | None]
"""What a bucket keeps, by key and version id; None of a delete marker."""


@pytest.fixture(autouse=True)
def fresh_clients() -> Iterator[None]:
    storage.forget_clients()
    yield
    storage.forget_clients()


@pytest.fixture
def bucket(faults: FaultProxy) -> str:  # noqa: ARG001  # the door to the server
    """A bucket of its own that keeps versions."""
    name = f"cxr-{secrets.token_hex(8)}"
    s3_door.client().create_bucket(Bucket=name)
    version(name, "Enabled")
    return f"s3://{name}"


def version(name: str, status: str) -> None:
    s3_door.client().put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": status})


def name_of(bucket: str) -> str:
    return bucket.removeprefix("s3://")


def stored(bucket: str) -> Stored:
    client = s3_door.client()
    page = client.list_object_versions(Bucket=name_of(bucket))
    assert not page["IsTruncated"]
    found: Stored = {(each["Key"], each["VersionId"]): None for each in page.get("DeleteMarkers", [])}
    for each in page.get("Versions", []):
        place = {"Bucket": name_of(bucket), "Key": each["Key"], "VersionId": each["VersionId"]}
        found[each["Key"], each["VersionId"]] = client.get_object(**place)["Body"].read()
    return found


def unreadable(bucket: str, what: Stored) -> bool:
    """Whether each of some versions is one that no request reads any more."""
    for key, version_id in what:
        try:
            s3_door.client().get_object(Bucket=name_of(bucket), Key=key, VersionId=version_id)
        except botocore.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                continue
        return False
    return True


@pytest.mark.parametrize("suspended", [False, True])
def test_what_is_deleted_for_good_is_readable_by_no_version_id_and_its_neighbours_stay(
    bucket: str, suspended: bool, faults: FaultProxy
) -> None:
    for data in (b"one", b"two"):
        storage.write_bytes(f"{bucket}/a/x", data)
    storage.delete(f"{bucket}/a/x")
    for neighbour in ("a/x.json", "a/x/y", "a/", "b"):
        s3_door.client().put_object(Bucket=name_of(bucket), Key=neighbour, Body=b"of another key")
    if suspended:
        version(name_of(bucket), "Suspended")
    storage.write_bytes(f"{bucket}/a/x", b"three")
    theirs = {place: data for place, data in stored(bucket).items() if place[0] == "a/x"}
    assert sorted(data or b"" for data in theirs.values()) == [b"", b"one", b"three", b"two"]
    others = {place: data for place, data in stored(bucket).items() if place not in theirs}
    faults.reset()
    storage.delete_for_good(f"{bucket}/a/x")
    storage.delete_for_good(f"{bucket}/a/x")  # nothing is there any more, which is what was asked for
    assert sum("versioning" in path for _, path in faults.seen) == 1
    assert stored(bucket) == others
    assert unreadable(bucket, theirs)


def test_a_plain_delete_leaves_what_a_bucket_keeps(bucket: str) -> None:
    storage.write_bytes(f"{bucket}/x", b"one")
    storage.delete(f"{bucket}/x")
    assert sorted(data or b"" for data in stored(bucket).values()) == [b"", b"one"]
    assert not storage.exists(f"{bucket}/x")


def test_a_bucket_without_versions_is_asked_once_and_deleted_from_as_before(s3: str, faults: FaultProxy) -> None:
    for name in "ab":
        storage.write_bytes(f"{s3}/{name}", b"x")
    faults.reset()
    for name in "ab":
        storage.delete_for_good(f"{s3}/{name}")
    assert storage.versioned_bucket(s3) is None
    assert [method for method, _ in faults.seen] == ["GET", "DELETE", "DELETE"]
    assert not list(storage.list_files(s3))


def test_storage_that_knows_no_versions_is_deleted_from_as_before(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{s3}/a", b"x")

    def refuses(**_: str) -> None:
        raise botocore.exceptions.ClientError({"Error": {"Code": "NotImplemented"}}, "GetBucketVersioning")

    monkeypatch.setattr(s3_door.client(), "get_bucket_versioning", refuses)
    storage.delete_for_good(f"{s3}/a")
    assert not storage.exists(f"{s3}/a")


RIGHTS = {
    "s3:GetBucketVersioning": lambda method, path: method == "GET" and "versioning" in path,
    "s3:ListBucketVersions": lambda method, path: method == "GET" and "versions" in path,
    "s3:DeleteObjectVersion": lambda method, path: method == "DELETE" and "versionId" in path,
}


@pytest.mark.parametrize("right", RIGHTS)
def test_a_right_to_delete_versions_that_is_missing_is_named_and_nothing_is_deleted(
    right: str, bucket: str, faults: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{bucket}/x", b"one")
    before = stored(bucket)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    faults.inject(proxy.DENIED, 100, RIGHTS[right])
    with pytest.raises(UserError, match=rf"lack the right {right}.*cluster/iam-policy-removal\.json") as refused:
        storage.delete_for_good(f"{bucket}/x")
    assert "\n" not in str(refused.value)
    faults.reset()
    assert stored(bucket) == before


def test_what_readers_see_goes_last_so_that_a_purge_that_was_cut_off_finds_it_again(
    bucket: str, faults: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    for number in range(3):
        storage.write_bytes(f"{bucket}/x", b"%d" % number)
    for done in range(3):
        passed: list[str] = []

        def later(method: str, path: str, done: int = done, passed: list[str] = passed) -> bool:
            if method == "DELETE" and path not in passed:
                passed.append(path)
            return method == "DELETE" and len(passed) > min(done, 1)

        faults.inject(proxy.CUT, 1_000, later)
        with pytest.raises(UserError, match="no answer from"):
            storage.delete_for_good(f"{bucket}/x")
        faults.reset()
        assert storage.read_bytes(f"{bucket}/x") == b"2"
    faults.inject(proxy.LOST_ANSWER, 1, lambda method, _: method == "DELETE")
    storage.delete_for_good(f"{bucket}/x")
    assert stored(bucket) == {}


def test_storage_that_deletes_no_version_is_told_and_not_asked_for_ever(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{bucket}/x", b"one")
    monkeypatch.setattr(s3_door.client(), "delete_object", lambda **_: {})
    with pytest.raises(UserError, match="storage keeps versions that it said it deleted"):
        storage.delete_for_good(f"{bucket}/x")


# ---- the job


@pytest.fixture
def settings(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A workspace in a bucket: patient A is in a corpus and in a version that served before the one which does now."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    settings = Settings.model_validate({"workspace": f"{bucket}/w", "publish": {"to": f"{bucket}/w/indexes/chest"}})
    names = Pseudonyms.of(settings.privacy)
    with_a = films(12)
    with_a[0] = replace(with_a[0], facts={**with_a[0].facts, "patient": names.name("patient", "A")})
    for images in (with_a, films(12)):
        made = build(tmp_path, images, model_files(tmp_path, images), shards=1, pseudonymised=names.key_id)
        publish(made, settings.publish.to or "", "latest")
    corpus = storage.join(settings.workspace, "corpora", "chest", "0" * 20, MANIFEST_FILE)
    for _ in range(2):  # overwritten once
        with storage.staged(corpus) as local, local.open("wb") as file, ManifestWriter.to(file) as writer:
            writer.write(pa.Table.from_pylist([{"image_id": "1", "patient_id": "A"}], schema=ARCHIVE))
    remove(settings.workspace, "A", names)
    return settings


def purge(settings: Settings, delete: bool = True) -> None:
    options = {"index": settings.publish.to, "rest": ["gc"], "without_gate": False, "grace_days": 30.0}
    job.run(settings, Namespace(**options, delete=delete, purge=True))


def test_a_purge_leaves_no_version_of_what_it_deletes_and_says_what_a_bucket_keeps(
    settings: Settings, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = stored(bucket)
    purge(settings, delete=False)
    assert stored(bucket) == before
    capsys.readouterr()
    purge(settings)
    after = stored(bucket)
    gone = {place: data for place, data in before.items() if place not in after}
    assert after.items() <= before.items()
    keys = [key for key, _ in gone]
    assert keys.count(f"w/corpora/chest/{'0' * 20}/{MANIFEST_FILE}") == 2
    assert any(key.startswith("w/indexes/chest/objects/") for key in keys)
    assert any(key.startswith("w/indexes/chest/versions/") for key in keys)
    assert unreadable(bucket, gone)
    assert b"A" in b"".join(data or b"" for (key, _), data in gone.items() if key.endswith(MANIFEST_FILE))
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"{bucket}: ")]
    assert len(told) == 1
    assert "NoncurrentVersionExpiration" in told[0]
    assert not verify(settings.publish.to or "", resolve(settings.publish.to or "", "latest").id)


def test_a_purge_without_the_right_to_ask_for_versions_deletes_nothing_and_says_so(
    settings: Settings, bucket: str, faults: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stored(bucket)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    faults.inject(proxy.DENIED, 100, RIGHTS["s3:GetBucketVersioning"])
    with pytest.raises(UserError, match=f"{bucket}: these credentials lack the right s3:GetBucketVersioning"):
        purge(settings)
    faults.reset()
    assert stored(bucket) == before
