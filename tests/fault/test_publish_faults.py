"""Every request that a publish makes to S3 is broken in turn, and so are those that move, drop and purge versions.

A real S3 server lies behind a proxy that breaks the n-th request, once or from then on, for every n that the whole
work has. Readers see one whole version whatever happens, nothing that was published is deleted or changed, and the
same work again ends.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.object_store import BUCKET, ObjectStore
from cxr_retrieval import artifacts, storage
from cxr_retrieval import s3 as s3_door
from cxr_retrieval.artifacts import Artifact, Draft
from cxr_retrieval.errors import UserError
from cxr_retrieval.index import cache
from cxr_retrieval.index.lifecycle import collect, drop_version, promote, rollback
from cxr_retrieval.index.removal import published_holdings, purge
from cxr_retrieval.index.versions import open_version, publish, resolve, verify
from cxr_retrieval.privacy import Pseudonyms
from cxr_retrieval.tombstones import remove
from tests import proxy
from tests.proxy import FaultProxy

PATIENT = "a patient who was removed"
FOREVER = 1_000_000
Objects = dict[str, bytes]
Stored = dict[str, str]
ALIAS = "aliases/latest.json"


def files(name: str, *patients: str) -> Objects:
    """The files of a version; `model.json` is common to all."""
    sidecar = io.BytesIO()
    pq.write_table(pa.table({"patient": [f"patient of {name}", *patients]}), sidecar)
    return {
        "index.json": name.encode(),
        "model.json": b"model",
        "shards/00000.faiss": name.encode() * 5000,
        "shards/00000.parquet": sidecar.getvalue(),
    }


OLD, NEW, SPARE = files("old", PATIENT), files("new"), files("spare")
NEW_IN_TWO = {name: NEW[name] for name in ("index.json", "model.json", "shards/00000.faiss")}  # fewer requests


def objects_of(content: Objects) -> set[str]:
    """The keys of a version's objects."""
    return {f"objects/{hashlib.sha256(data).hexdigest()}" for data in content.values()}


def build(uri: str, content: Objects) -> Artifact:
    draft = Draft(uri, "index", {"index": content["index.json"].decode()}, ()).begin()
    return draft.finish([draft.write(path, data) for path, data in content.items()], {})


@dataclass(frozen=True)
class Published:
    """What was published in peace: all objects, by their keys, and the versions by their ids."""

    objects: Objects
    old: str
    new: str
    spare: str
    new_in_two: str
    contents: dict[str, Objects]


class Bucket:
    """The server's bucket as nobody disturbs it: no request of it passes through the proxy."""

    def __init__(self, store: ObjectStore) -> None:
        self._s3 = boto3.session.Session().client(
            "s3",
            endpoint_url=store.variables["AWS_ENDPOINT_URL"],
            aws_access_key_id=store.key,
            aws_secret_access_key=store.secret,
            region_name="us-east-1",
        )

    def put(self, to: str, objects: Objects) -> None:
        for key, data in objects.items():
            self._s3.put_object(Bucket=BUCKET, Key=self._key(to, key), Body=data)

    def get(self, to: str, key: str) -> bytes:
        return bytes(self._s3.get_object(Bucket=BUCKET, Key=self._key(to, key))["Body"].read())

    def stored(self, to: str) -> Stored:
        """What is there, and the tags of its bytes."""
        found = self._s3.list_objects_v2(Bucket=BUCKET, Prefix=self._key(to, ""))
        assert not found["IsTruncated"]
        start = len(self._key(to, ""))
        return {entry["Key"][start:]: entry["ETag"] for entry in found.get("Contents", [])}

    def _key(self, to: str, key: str) -> str:
        return f"{to}/{key}".removeprefix(f"s3://{BUCKET}/")


@pytest.fixture(scope="module")
def bucket(object_store: ObjectStore) -> Bucket:
    return Bucket(object_store)


@pytest.fixture(scope="module")
def in_peace(bucket: Bucket, proxy_of_session: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> Published:
    """`latest` serves the new version and served the old one before; a third one is not served."""
    proxy_of_session.reset()
    storage.forget_clients()
    folder = tmp_path_factory.mktemp("in-peace")
    to = f"s3://{BUCKET}/{folder.name}"
    contents = {}
    for content in (SPARE, OLD, NEW):
        name = content["index.json"].decode()
        contents[publish(build(str(folder / name), content), to, "latest").version] = content
    spare, old, new = contents
    objects = {key: bucket.get(to, key) for key in bucket.stored(to)}
    in_two = publish(build(str(folder / "in two"), NEW_IN_TWO), f"{to}-in-two", "latest").version
    return Published(objects, old, new, spare, in_two, contents | {in_two: NEW_IN_TWO})


@pytest.fixture(scope="module")
def outcomes() -> Iterator[Counter[tuple[str, str, str]]]:
    """How works ended, by the fault and by the work; shown by `pytest -s`."""
    counted: Counter[tuple[str, str, str]] = Counter()
    yield counted
    for (work, fault, ended), count in sorted(counted.items()):
        print(f"{work:10} {fault:28} {ended:8} {count:4}")


@pytest.fixture(autouse=True)
def one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Requests in one order, so that the n-th is the same one every time."""
    monkeypatch.setattr(cache, "THREADS", 1)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    storage.forget_clients()
    yield
    storage.forget_clients()


@dataclass(frozen=True)
class Place:
    """A prefix with versions in it, and what stood there before."""

    to: str
    bucket: Bucket
    before: Stored
    contents: dict[str, Objects]

    def serves(self) -> str:
        return str(json.loads(self.bucket.get(self.to, ALIAS))["version"])

    def check(self, *served: str, doomed: tuple[str, ...] = (), half: str | None = None) -> None:
        """Whatever happened: one whole version is served, every other is whole, and nothing else changed."""
        now = self.bucket.stored(self.to)
        for key, tag in self.before.items():
            assert key == ALIAS or now.get(key) == tag or (key in doomed and key not in now), key
        for version in self.contents:
            if f"versions/{version}.json" in now and version != half:
                assert objects_of(self.contents[version]) <= set(now), version
        if now == self.before:
            return  # every byte is as it was when it was published
        opened = open_version(self.to)
        assert opened.version.id in served
        assert {name: path.read_bytes() for name, path in opened.paths.items()} == self.contents[opened.version.id]
        if now[ALIAS] != self.before.get(ALIAS):
            assert verify(self.to, opened.version.id) == []


class Places:
    """Prefixes, each with the same in it."""

    def __init__(self, root: str, bucket: Bucket, objects: Objects, contents: dict[str, Objects]) -> None:
        self._root, self._bucket, self._objects, self._contents = root, bucket, objects, contents
        self._numbers = itertools.count()

    def next(self) -> Place:
        s3_door.keeps_versions.cache_clear()  # asked by every work, as by a job of its own
        to = f"{self._root}/{next(self._numbers)}"
        self._bucket.put(to, self._objects)
        return Place(to, self._bucket, self._bucket.stored(to), self._contents)


def told(work: Callable[[], Any]) -> Any:
    """What `work` returns, or the line for a person that it ended with; everything else that is raised is a bug."""
    try:
        return work()
    except UserError as error:
        ended = error
    assert "\n" not in str(ended)
    return ended


@contextlib.contextmanager
def broken(faults: FaultProxy, fault: str, number: int, stays: bool) -> Iterator[None]:
    """Break the request of that number, or all from it on; who tries again does not wait."""
    faults.reset()
    numbers = itertools.count()
    faults.inject(fault, FOREVER if stays else 1, lambda *_: next(numbers) >= number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", lambda _: None)
        yield
    assert faults.injected
    faults.reset()


@contextlib.contextmanager
def impatient(tries: int) -> Iterator[None]:
    """A client that waits for no answer long, and asks so many times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3_door, "READ_TIMEOUT_S", 0.4)
        patch.setattr(s3_door, "TRIES", tries)
        make = s3_door.client.__wrapped__
        patch.setattr(s3_door, "client", functools.cache(lambda asked=tries: make(asked)))
        s3_door.filesystem.cache_clear()
        yield
    storage.forget_clients()


def old_alone(in_peace: Published) -> Objects:
    """What is there when only the old version was published."""
    manifest = f"versions/{in_peace.old}.json"
    alias = {"generation": 1, "moved_at": "", "predecessor": None, "publish_id": "0" * 32, "version": in_peace.old}
    kept = {key: in_peace.objects[key] for key in (manifest, *objects_of(OLD))}
    return kept | {ALIAS: json.dumps(alias).encode()}


# ---- publish

ENDS_BY_ITSELF = [
    proxy.CUT,
    proxy.HALF_REQUEST,
    proxy.LOST_ANSWER,
    proxy.HALF_ANSWER,
    proxy.SLOW,
    proxy.DENIED,
    proxy.CONFLICT,
    proxy.STALL,
]

UNANSWERED = (proxy.LOST_ANSWER, proxy.HALF_ANSWER)  # what was asked is done


@pytest.mark.parametrize("stays", [False, True], ids=["once", "stays"])
@pytest.mark.parametrize("fault", [*ENDS_BY_ITSELF, proxy.LOST_RACE])
def test_any_request_of_a_publish_may_break_and_readers_see_one_whole_version(
    fault: str,
    stays: bool,
    s3: str,
    faults: FaultProxy,
    bucket: Bucket,
    in_peace: Published,
    outcomes: Counter[tuple[str, str, str]],
    tmp_path: Path,
) -> None:
    places = Places(s3, bucket, old_alone(in_peace), in_peace.contents)
    # Of a build that lies on S3 too, reads are broken as well as writes; where each costs a timeout, writes will do.
    source = str(tmp_path / "build") if fault == proxy.STALL and stays else f"{s3}/build"
    build(source, NEW_IN_TWO)

    def work(place: Place) -> Any:
        return told(lambda: publish(artifacts.load(source, "index"), place.to, "latest"))

    faults.reset()
    whole = work(places.next())
    requests = len(faults.seen)
    assert (whole.version, whole.uploaded, whole.reused) == (in_peace.new_in_two, 2, 1)
    assert requests == (10 if fault == proxy.STALL and stays else 15)

    for number in range(requests):
        place = places.next()
        patience = impatient(2 if stays else s3_door.TRIES) if fault == proxy.STALL else contextlib.nullcontext()
        with patience, broken(faults, fault, number, stays):
            ended = work(place)
        where = f"{fault}, request {number}: {ended}"
        failed = isinstance(ended, UserError)
        outcomes["publish", f"{fault}, {'stays' if stays else 'once'}", "told" if failed else "done"] += 1
        if not stays and fault in ENDS_BY_ITSELF:
            assert not failed, where
        half = in_peace.new_in_two if fault == proxy.LOST_RACE and failed else None
        place.check(in_peace.old, in_peace.new_in_two, half=half)
        now = bucket.stored(place.to)
        moved = now[ALIAS] != place.before[ALIAS]
        assert moved or failed, where
        if failed:
            # The alias moves by the last request but two; then its version and the objects are looked for once more.
            assert not moved or number >= requests - 2 or (number == requests - 3 and fault in UNANSWERED), where
            missing = objects_of(NEW_IN_TWO) - set(now)
            again = work(place)
            assert again.version == in_peace.new_in_two, where
            assert (again.moved, again.uploaded) == (not moved, len(missing)), where
            place.check(in_peace.new_in_two)


@pytest.mark.parametrize("stays", [False, True], ids=["once", "stays"])
@pytest.mark.parametrize("fault", [proxy.CUT, proxy.LOST_ANSWER, proxy.DENIED])
def test_no_request_that_breaks_lets_a_publish_show_who_was_removed_from_its_workspace(
    fault: str,
    stays: bool,
    s3: str,
    faults: FaultProxy,
    bucket: Bucket,
    in_peace: Published,
    outcomes: Counter[tuple[str, str, str]],
    tmp_path: Path,
) -> None:
    places, workspace = Places(s3, bucket, old_alone(in_peace), in_peace.contents), f"{s3}/workspace"
    remove(workspace, PATIENT, Pseudonyms(None))
    (stone,) = bucket.stored(workspace)
    built = build(str(tmp_path / "build"), NEW_IN_TWO)

    def work(place: Place) -> Any:
        return told(lambda: publish(built, place.to, "latest", workspace=workspace))

    faults.reset()
    work(places.next())
    carrying = [number for number, (_, path) in enumerate(faults.seen) if "tombstones" in path]
    assert len(carrying) >= 3  # both places are listed, and what is missing is written
    for number in carrying:
        place = places.next()
        with broken(faults, fault, number, stays):
            ended = work(place)
        failed = isinstance(ended, UserError)
        outcomes["publish", f"{fault}, {'stays' if stays else 'once'}", "told" if failed else "done"] += 1
        assert failed == stays, f"{fault}, request {number}: {ended}"
        place.check(in_peace.old, in_peace.new_in_two)
        if place.serves() == in_peace.new_in_two:
            assert stone in bucket.stored(place.to)
        if failed:
            work(place)
            assert (place.serves(), stone in bucket.stored(place.to)) == (in_peace.new_in_two, True)


# ---- a publish whose process is killed

# One process imports, and forks a child for each publish that is killed: an import each would take minutes.
DRIVER = """
import os, sys
from cxr_retrieval import artifacts, s3
from cxr_retrieval.index import versions

build = artifacts.load(sys.argv[1], "index")
s3.client()
for line in iter(sys.stdin.readline, ""):
    wait, go = os.pipe()
    child = os.fork()
    if not child:
        os.read(wait, 1)
        versions.publish(build, line.strip(), "latest")
        os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()  # the other side knows whom to kill
    os.write(go, b"!")
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    os.close(wait)
    os.close(go)
"""


class Driver:
    """Publishes in a process that can be killed."""

    def __init__(self, source: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)

    def publish(self, to: str, faults: FaultProxy) -> int:
        """The exit code of a publish; a strike of the proxy kills it."""
        pid = int(self._told(to))
        faults.strike = lambda: os.kill(pid, signal.SIGKILL)
        return int(self._told("go"))

    def _told(self, word: str) -> str:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


@pytest.mark.parametrize("published_before", [True, False])
def test_a_publish_to_s3_that_is_killed_between_any_two_requests_can_be_run_again(
    published_before: bool,
    s3: str,
    faults: FaultProxy,
    bucket: Bucket,
    in_peace: Published,
    outcomes: Counter[tuple[str, str, str]],
    tmp_path: Path,
) -> None:
    places = Places(s3, bucket, old_alone(in_peace) if published_before else {}, in_peace.contents)
    built = build(str(tmp_path / "build"), NEW_IN_TWO)
    with Driver(built.uri) as driver:
        faults.reset()
        assert driver.publish(places.next().to, faults) == 0
        requests = len(faults.seen)
        assert requests == (10 if published_before else 14)  # once how conditions are heeded is tried
        for number, fault in itertools.product(range(requests), [proxy.STRIKE_BEFORE, proxy.STRIKE_AFTER]):
            place = places.next()
            with broken(faults, fault, number, stays=False):
                assert driver.publish(place.to, faults) == -signal.SIGKILL
            where = f"{fault}, request {number}"
            outcomes["publish", f"SIGKILL, {fault}", "killed"] += 1
            now = bucket.stored(place.to)
            moved = now.get(ALIAS) != place.before.get(ALIAS)
            assert moved == (number >= requests - 2 or (number, fault) == (requests - 3, proxy.STRIKE_AFTER)), where
            if published_before or moved:
                place.check(in_peace.old, in_peace.new_in_two)
            else:
                with pytest.raises(UserError, match="there is no alias 'latest'"):
                    resolve(place.to, "latest")
            missing = objects_of(NEW_IN_TWO) - set(now)
            again = publish(built, place.to, "latest")
            assert (again.version, again.moved) == (in_peace.new_in_two, not moved), where
            assert again.uploaded <= len(missing), where  # what was on its way when the process died may still arrive
            place.check(in_peace.new_in_two)


# ---- a publish whose server is killed


@pytest.mark.parametrize(
    ("fault", "what"),
    [(proxy.STRIKE_BEFORE, "/objects/"), (proxy.STRIKE_BEFORE, "/aliases/"), (proxy.STRIKE_AFTER, "/aliases/")],
)
def test_a_server_that_is_killed_amid_a_publish_loses_nothing(
    fault: str,
    what: str,
    s3: str,
    faults: FaultProxy,
    bucket: Bucket,
    object_store: ObjectStore,
    in_peace: Published,
    outcomes: Counter[tuple[str, str, str]],
    tmp_path: Path,
) -> None:
    place = Places(s3, bucket, old_alone(in_peace), in_peace.contents).next()
    built = build(str(tmp_path / "build"), NEW_IN_TWO)
    back = threading.Thread(target=object_store.start)

    def strike() -> None:
        object_store.kill()
        back.start()

    faults.strike = strike
    faults.inject(fault, 1, lambda method, path: method == "PUT" and what in path)
    ended = told(lambda: publish(built, place.to, "latest"))
    assert faults.injected == 1
    back.join()
    failed = isinstance(ended, UserError)
    outcomes["publish", f"server killed, {fault} {what}", "told" if failed else "done"] += 1
    place.check(in_peace.old, in_peace.new_in_two)
    if failed:
        publish(built, place.to, "latest")
    assert place.serves() == in_peace.new_in_two
    place.check(in_peace.new_in_two)


# ---- what moves, drops and deletes


@dataclass(frozen=True)
class Work:
    """A work on what is published: what it does, what `latest` serves when it is done, and what it deletes."""

    run: Callable[[str, Published], object]
    serves: Callable[[Published], str]
    deletes: Callable[[Published], set[str]] = lambda _: set()


ORPHAN = {f"objects/{'a' * 64}": b"of a publish that", f"objects/{'b' * 64}": b"never ended"}


def only_old(published: Published) -> set[str]:
    """The manifest of the old version, and the objects that no other version has."""
    return {f"versions/{published.old}.json", *(objects_of(OLD) - objects_of(NEW))}


WORKS = {
    "promote": Work(lambda to, _: promote(to, _.spare, "latest", None), lambda published: published.spare),
    "rollback": Work(lambda to, _: rollback(to, "latest"), lambda published: published.old),
    "drop": Work(
        lambda to, published: drop_version(to, published.spare),
        lambda published: published.new,
        lambda published: {f"versions/{published.spare}.json"},
    ),
    "collect": Work(lambda to, _: collect(to, 0), lambda published: published.new, lambda _: set(ORPHAN)),
    "purge": Work(lambda to, _: purge(published_holdings(to)), lambda published: published.new, only_old),
}


@pytest.mark.parametrize("stays", [False, True], ids=["once", "stays"])
@pytest.mark.parametrize("name", WORKS)
def test_any_request_that_moves_or_deletes_may_break_and_readers_see_one_whole_version(
    name: str,
    stays: bool,
    s3: str,
    faults: FaultProxy,
    bucket: Bucket,
    in_peace: Published,
    outcomes: Counter[tuple[str, str, str]],
) -> None:
    work = WORKS[name]
    objects = in_peace.objects | (ORPHAN if name == "collect" else {})
    if name == "purge":  # fewer versions are fewer requests
        spare = {f"versions/{in_peace.spare}.json", *(objects_of(SPARE) - objects_of(NEW))}
        objects = {key: data for key, data in objects.items() if key not in spare}
        remove(s3, PATIENT, Pseudonyms(None))
        objects |= dict.fromkeys(bucket.stored(s3), b"{}")
    places = Places(s3, bucket, objects, in_peace.contents)
    doomed = tuple(work.deletes(in_peace))

    place = places.next()
    faults.reset()
    work.run(place.to, in_peace)
    writes = [method in ("PUT", "DELETE") for method, _ in faults.seen]
    place.check(work.serves(in_peace), doomed=doomed)
    assert place.serves() == work.serves(in_peace)
    finally_there = set(place.before) - set(doomed)
    assert set(bucket.stored(place.to)) == finally_there

    for number, fault in itertools.product(range(len(writes)), [proxy.CUT, proxy.LOST_ANSWER]):
        if not writes[number] and fault == (proxy.LOST_ANSWER if stays else proxy.CUT):
            continue  # of a read, the server knows no difference
        place = places.next()
        with broken(faults, fault, number, stays):
            ended = told(lambda: work.run(place.to, in_peace))  # noqa: B023
        where = f"{fault}, request {number}: {ended}"
        failed = isinstance(ended, UserError)
        outcomes[name, f"{fault}, {'stays' if stays else 'once'}", "told" if failed else "done"] += 1
        place.check(in_peace.new, work.serves(in_peace), doomed=doomed)
        assert failed == stays, where
        if failed:
            done_already = place.serves() != in_peace.new
            if name == "rollback" and done_already:
                # The same again would go forth again.
                assert "is not known" in str(ended) or "serves version" in str(ended), where
                continue
            again = told(lambda: work.run(place.to, in_peace))  # noqa: B023
            if isinstance(again, UserError):
                assert name == "drop", where
                assert f"there is no version {in_peace.spare}" in str(again), where
            place.check(work.serves(in_peace), doomed=doomed)
        assert place.serves() == work.serves(in_peace), where
        assert set(bucket.stored(place.to)) == finally_there, where


# ---- a version that lost an object before its publish had ended


def test_a_version_whose_object_is_gone_is_never_put_in_front(s3: str, bucket: Bucket, in_peace: Published) -> None:
    objects = {key: data for key, data in in_peace.objects.items() if key not in objects_of(SPARE) - objects_of(NEW)}
    place = Places(s3, bucket, objects, in_peace.contents).next()
    remove(place.to, "somebody", Pseudonyms(None))
    for work in (
        lambda: promote(place.to, in_peace.spare, "latest", None),
        lambda: promote(place.to, in_peace.spare, "another", None),
        lambda: published_holdings(place.to),
    ):
        with pytest.raises(UserError, match=r"gone since it was uploaded; publish that version again"):
            work()
    assert place.serves() == in_peace.new
    place.check(in_peace.new, half=in_peace.spare)

    objects = {key: data for key, data in in_peace.objects.items() if key not in objects_of(OLD) - objects_of(NEW)}
    place = Places(f"{s3}-old", bucket, objects, in_peace.contents).next()
    with pytest.raises(UserError, match=r"gone since it was uploaded; publish that version again"):
        rollback(place.to, "latest")
    place.check(in_peace.new, half=in_peace.old)
