"""Promises of the one door to files on object storage: a real S3 server, and a proxy that breaks what passes."""

import contextlib
import gzip
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.object_store import BUCKET, ObjectStore
from cxr_retrieval import s3 as s3_door
from cxr_retrieval import storage
from cxr_retrieval.errors import UserError
from tests import proxy
from tests.commands import job
from tests.proxy import FaultProxy


@pytest.fixture(autouse=True)
def fresh_clients() -> Iterator[None]:
    storage.forget_clients()
    yield
    storage.forget_clients()


@contextlib.contextmanager
def variables(monkeypatch: pytest.MonkeyPatch, **values: str | None) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for name, value in values.items():
            patch.delenv(name, raising=False) if value is None else patch.setenv(name, value)
        storage.forget_clients()
        yield
    storage.forget_clients()


pytestmark = pytest.mark.usefixtures("faults")


def one_line(uri: str) -> str:
    with pytest.raises(UserError) as caught:
        storage.check(uri)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_written_is_read_listed_and_there(s3: str) -> None:
    names = ["b", "a/z", "a.b", ".git/config", "a-b/c", "a/sub/y", "\u00e9", "a0"]
    for name in names:
        storage.write_bytes(f"{s3}/{name}", name.encode())
    files = list(storage.list_files(s3))
    assert sorted(file.path for file in files) == sorted(name for name in names if not name.startswith("."))
    assert all(storage.read_bytes(file.uri) == file.path.encode() for file in files)
    assert all(file.size == len(file.path.encode()) for file in files)
    assert all(abs(file.modified - time.time()) < 600 for file in files)
    assert storage.exists(f"{s3}/a/z")
    assert not storage.exists(f"{s3}/a")
    doors = [storage.read_bytes, storage.arrow_reader, lambda uri: storage.open_text(uri).__enter__()]
    for door in (*doors, lambda uri: storage.read_beginning(uri, 9)):
        with pytest.raises(FileNotFoundError):
            door(f"{s3}/none")
    assert storage.read_tagged(f"{s3}/none") is None
    for file in files:
        storage.delete(file.uri)
    assert list(storage.list_files(s3)) == []
    storage.delete(f"{s3}/b")  # nothing is there any more, which is what was asked for


def test_what_lies_right_in_a_folder_is_told_as_a_listing_of_all_tells_it(s3: str) -> None:
    for path in ("table.csv", "lists.txt", ".hidden.csv", "images/a.png", "images/b.csv"):
        storage.write_bytes(f"{s3}/{path}", path.encode())
    every = {file.path: file for file in storage.list_files(s3)}
    assert list(storage.list_top(s3, lambda name: name.endswith(".csv"))) == [every["table.csv"]]
    assert [file.path for file in storage.list_top(s3, lambda _: True)] == ["lists.txt", "table.csv"]


def test_an_object_of_other_bytes_has_another_version_and_of_the_same_bytes_the_same(s3: str) -> None:
    versions = []
    for data in (b"one", b"two", b"one"):
        storage.write_bytes(f"{s3}/a", data)
        (file,) = storage.list_files(s3)
        versions.append(file.version)
    assert versions[0] == versions[2] != versions[1]


def test_the_beginning_of_an_object_is_read_alone_and_again_where_it_is_cut(s3: str, faults: FaultProxy) -> None:
    storage.write_bytes(f"{s3}/long", bytes(range(250)) * 4000)
    storage.write_bytes(f"{s3}/empty", b"")
    faults.inject(proxy.HALF_ANSWER, 2)
    assert storage.read_beginning(f"{s3}/long", 300) == (bytes(range(250)) * 2)[:300]
    assert storage.read_beginning(f"{s3}/long", 10**7) == bytes(range(250)) * 4000
    assert storage.read_beginning(f"{s3}/empty", 300) == b""


def test_a_write_that_fails_leaves_the_old_object(s3: str) -> None:
    storage.write_bytes(f"{s3}/x", b"old")
    with contextlib.suppress(RuntimeError), storage.staged(f"{s3}/x") as path:
        path.write_bytes(b"half")
        raise RuntimeError
    assert storage.read_bytes(f"{s3}/x") == b"old"


def test_text_is_streamed_and_decompressed(s3: str) -> None:
    storage.write_bytes(f"{s3}/t.csv.gz", gzip.compress("\ufeffa,b\n\u00e9,2\n".encode()))
    with storage.open_text(f"{s3}/t.csv.gz") as lines:
        assert list(lines) == ["a,b\n", "\u00e9,2\n"]


def test_parquet_is_read_by_ranges(s3: str) -> None:
    table = pa.table({"n": list(range(50_000)), "text": ["x" * 40] * 50_000})
    with storage.staged(f"{s3}/t.parquet") as path:
        pq.write_table(table, path, row_group_size=1000, compression="none")
    with storage.arrow_reader(f"{s3}/t.parquet") as file:
        assert pq.ParquetFile(file).read_row_group(7)["n"].to_pylist() == list(range(7000, 8000))
    with storage.arrow_reader(f"{s3}/t.parquet") as file:
        assert pq.read_table(file) == table


def test_of_racing_writers_one_creates_and_one_replaces(s3: str, tmp_path: Path) -> None:
    for racer in range(8):
        (tmp_path / str(racer)).write_bytes(b"%d" % racer)

    def race(work: Callable[[int], bool]) -> list[int]:
        with ThreadPoolExecutor(8) as pool:
            return [racer for racer, won in enumerate(pool.map(work, range(8))) if won]

    (winner,) = race(lambda racer: storage.create(f"{s3}/object", tmp_path / str(racer)))
    assert storage.read_bytes(f"{s3}/object") == b"%d" % winner
    tag = None
    for generation in range(3):
        (winner,) = race(lambda racer: storage.replace(f"{s3}/alias", b"%d of %d" % (racer, generation), tag))  # noqa: B023
        data, tag = storage.read_tagged(f"{s3}/alias") or (b"", None)
        assert data == b"%d of %d" % (winner, generation)


def test_the_remedy_for_credentials_is_told_in_one_line(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"s3://{BUCKET}/x"
    storage.check(uri)
    with variables(monkeypatch, AWS_SECRET_ACCESS_KEY="wrong"):
        assert "check AWS_SECRET_ACCESS_KEY" in one_line(uri)
    with variables(monkeypatch, AWS_ACCESS_KEY_ID="UNKNOWN"):
        assert "check AWS_ACCESS_KEY_ID" in one_line(uri)
    with variables(monkeypatch, AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None):
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
        assert "no credentials: set AWS_ACCESS_KEY_ID" in one_line(uri)
    secret = object_store.secret
    assert secret not in one_line("s3://cxr-that-is-not-there/x")


def test_a_bucket_that_is_not_there_is_told() -> None:
    assert "there is no such bucket" in one_line("s3://cxr-that-is-not-there/x")


def test_no_route_is_told_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    with variables(monkeypatch, AWS_ENDPOINT_URL="http://127.0.0.1:9"):
        assert "no answer from http://127.0.0.1:9: check the network" in one_line(f"s3://{BUCKET}/x")
    assert time.monotonic() - began < 20


def test_rights_that_are_missing_are_told(object_store: ObjectStore, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{s3}/x", b"x")
    reader = {"AWS_ACCESS_KEY_ID": object_store.key[::-1], "AWS_SECRET_ACCESS_KEY": object_store.secret[::-1]}
    with variables(monkeypatch, **reader):
        assert storage.read_bytes(f"{s3}/x") == b"x"
        with pytest.raises(UserError, match=r"no right to it: cluster/iam-policy\.json"):
            storage.write_bytes(f"{s3}/x", b"y")
    assert storage.read_bytes(f"{s3}/x") == b"x"


@pytest.mark.parametrize(
    ("fault", "remedy"),
    [(proxy.EXPIRED, "the session token has expired"), (proxy.WRONG_REGION, "set AWS_REGION to")],
)
def test_an_expired_token_and_a_wrong_region_are_told(faults: FaultProxy, fault: str, remedy: str) -> None:
    faults.inject(fault, 10)
    assert remedy in one_line(f"s3://{BUCKET}/x")


PASSING = [proxy.SLOW, proxy.CUT, proxy.LOST_ANSWER, proxy.HALF_ANSWER]


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_by_itself_is_tried_again_and_counted(faults: FaultProxy, s3: str, fault: str) -> None:
    content = os.urandom(50_000)
    faults.inject(fault, 2, lambda method, path: method == "PUT" and "?" not in path)
    before = storage.retries()
    storage.write_bytes(f"{s3}/object", content)
    # Half an answer to a PUT has no body to be cut: nothing was lost, and nothing is sent again.
    assert storage.retries() - before == (0 if fault == proxy.HALF_ANSWER else 2)
    faults.inject(fault, 2, lambda method, _: method == "GET")
    before = storage.retries()
    assert storage.read_bytes(f"{s3}/object") == content
    assert storage.retries() - before == 2
    faults.inject(fault, 2, lambda method, _: method == "GET")
    before = storage.retries()
    with storage.arrow_reader(f"{s3}/object") as file:
        assert file.read() == content
    assert 1 <= storage.retries() - before <= 2  # a connection that was cut is opened once more below pyarrow, unseen
    assert len([request for request in faults.seen if request[0] == "GET"]) >= 5


@pytest.mark.parametrize("fault", [proxy.STALL, proxy.HALF_STALL])
def test_a_server_that_does_not_answer_in_time_is_asked_again(
    faults: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(s3_door, "READ_TIMEOUT_S", 0.5)
    storage.forget_clients()
    storage.write_bytes(f"{s3}/object", b"content")
    faults.inject(fault, 2, lambda method, _: method == "GET")
    before, began = storage.retries(), time.monotonic()
    assert storage.read_bytes(f"{s3}/object") == b"content"
    assert storage.retries() - before == 2
    assert time.monotonic() - began < 2 * proxy.STALL_S, "it waited until the server hung up"


@pytest.mark.parametrize(
    "ask",
    [
        storage.read_tagged,
        storage.exists,
        lambda uri: storage.read_beginning(uri, 4),
        lambda uri: storage.write_bytes(uri, b"x"),
        lambda uri: list(storage.list_files(uri)),
    ],
    ids=["read", "exists", "beginning", "write", "list"],
)
def test_a_server_that_never_answers_is_asked_eight_times_and_told_in_one_line(
    faults: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch, ask: Callable[[str], object]
) -> None:
    monkeypatch.setattr(s3_door, "READ_TIMEOUT_S", 0.2)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    storage.forget_clients()
    faults.inject(proxy.STALL, 1000)
    before = storage.retries()
    with pytest.raises(UserError, match=r"no answer from .*: check the network"):
        ask(f"{s3}/object")
    assert len(faults.seen) == 1 + storage.retries() - before == s3_door.TRIES


def test_the_region_that_a_bucket_is_in_is_named(faults: FaultProxy) -> None:
    faults.inject(proxy.ELSEWHERE, 1)
    assert "the bucket is in another region: set AWS_REGION to eu-west-3" in one_line(f"s3://{BUCKET}/x")


def test_an_answer_without_a_text_is_explained_all_the_same(faults: FaultProxy) -> None:
    faults.inject(proxy.EXPIRED, 50)
    with pytest.raises(UserError, match="the session token has expired"):
        storage.exists(f"s3://{BUCKET}/x")


def test_a_conflict_is_tried_again_and_a_lost_race_is_not(faults: FaultProxy, s3: str) -> None:
    faults.inject(proxy.CONFLICT, 2, lambda method, _: method == "PUT")
    before = storage.retries()
    assert storage.replace(f"{s3}/alias", b"one", None)
    assert storage.retries() - before == 2
    puts = len([method for method, _ in faults.seen if method == "PUT"])
    assert not storage.replace(f"{s3}/alias", b"two", None)  # 412: somebody else won
    assert len([method for method, _ in faults.seen if method == "PUT"]) == puts + 1
    assert storage.read_bytes(f"{s3}/alias") == b"one"


def test_storage_that_heeds_no_conditions_is_refused_before_anything_is_published(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = s3_door.put
    storage.require_conditions(s3)
    for deaf_to in ("IfNoneMatch", "IfMatch"):

        def heedless(uri: str, source: Path, _deaf_to: str = deaf_to, **conditions: str) -> bool:
            return put(uri, source, **{name: tag for name, tag in conditions.items() if name != _deaf_to})

        with monkeypatch.context() as patch:
            patch.setattr(s3_door, "put", heedless)
            with pytest.raises(UserError, match="writes over what is there though it is asked not to"):
                storage.require_conditions(s3)
    assert not list(storage.list_files(s3))


def test_conflicts_without_end_are_one_clear_line(faults: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    faults.inject(proxy.CONFLICT, 1000, lambda method, _: method == "PUT")
    with pytest.raises(UserError, match=f"{s3}/alias: storage answered ConditionalRequestConflict; run the same"):
        storage.replace(f"{s3}/alias", b"one", None)


def test_a_denial_that_passes_is_survived_and_one_that_stays_is_told(faults: FaultProxy, s3: str) -> None:
    storage.write_bytes(f"{s3}/x", b"x")
    faults.inject(proxy.DENIED, 2, lambda method, _: method == "GET")
    assert storage.read_bytes(f"{s3}/x") == b"x"
    faults.inject(proxy.DENIED, 10, lambda method, _: method == "GET")
    with pytest.raises(UserError, match="no right to it"):
        storage.read_bytes(f"{s3}/x")


def test_a_server_that_never_stops_refusing_is_told_in_one_line(
    faults: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    faults.inject(proxy.SLOW, 1000)
    with pytest.raises(UserError, match="still asks to slow down after 8 tries: run the same command again"):
        storage.read_bytes(f"{s3}/x")
    assert len(faults.seen) == s3_door.TRIES


def test_a_write_whose_answer_was_lost_is_not_written_twice(faults: FaultProxy, s3: str, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"content")
    faults.inject(proxy.LOST_ANSWER, 1, lambda method, _: method == "PUT")
    storage.create(f"{s3}/object", tmp_path / "source")  # either answer is true: it was ours, or it is there
    assert storage.read_bytes(f"{s3}/object") == b"content"


def test_a_server_that_was_killed_has_kept_everything(object_store: ObjectStore, s3: str) -> None:
    storage.write_bytes(f"{s3}/x", b"x" * 100_000)
    object_store.kill()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(storage.read_bytes, f"{s3}/x")  # asked while it is down, answered when it is back
        time.sleep(1.0)
        object_store.start()
        assert reading.result(timeout=60) == b"x" * 100_000


def test_a_job_says_what_is_wrong_before_it_starts_anything() -> None:
    command = [sys.executable, "-m", "jobs.prepare", f"corpus.archive=s3://{BUCKET}/none", f"workspace=s3://{BUCKET}/w"]
    environment = os.environ | {"AWS_SECRET_ACCESS_KEY": "wrong"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: s3://{BUCKET}/w: the secret does not belong to the access key: check AWS_SECRET_ACCESS_KEY"
    ]


def test_a_right_to_write_that_is_missing_is_told_before_the_work(
    object_store: ObjectStore, s3: str, phantom_archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = {"AWS_ACCESS_KEY_ID": object_store.key[::-1], "AWS_SECRET_ACCESS_KEY": object_store.secret[::-1]}
    with variables(monkeypatch, **reader):
        words = [f"workspace={s3}/workspace", f"corpus.archive={phantom_archive}"]
        assert "no right to it: cluster/iam-policy.json" in job("prepare", *words).error
    assert not list(storage.list_files(s3))


def test_a_listing_is_asked_again_page_by_page(faults: FaultProxy, s3: str) -> None:
    names = [f"{n:04d}" for n in range(3)]
    for name in names:
        storage.write_bytes(f"{s3}/{name}", name.encode())
    before = storage.retries()
    faults.inject(proxy.DENIED, 1, lambda method, path: method == "GET" and "list-type=2" in path)
    faults.inject(proxy.CUT, 1, lambda method, path: method == "GET" and "list-type=2" in path)
    assert [file.path for file in storage.list_files(s3)] == names
    assert storage.retries() - before == 2


def test_a_bucket_whose_name_cannot_be_is_told() -> None:
    for uri in ("s3://Bad_Name!/x", "s3:///x"):
        with pytest.raises(UserError, match="no name of a bucket and a prefix: write s3://bucket/prefix"):
            storage.check(uri)


LARGE = os.urandom(12 << 20)
KILLED_AMID = """
import sys
from cxr_retrieval import s3, storage
s3.MOST_BYTES, s3.PART_BYTES = 6 << 20, 5 << 20
storage.write_bytes(sys.argv[1], bytes(12 << 20))
"""


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of more than 6 MiB are too large for one request, and are sent in parts of the least size that S3 takes."""
    monkeypatch.setattr(s3_door, "MOST_BYTES", 6 << 20)
    monkeypatch.setattr(s3_door, "PART_BYTES", 5 << 20)


def parts(faults: FaultProxy) -> list[str]:
    return [path for method, path in faults.seen if method == "PUT" and "partNumber=" in path]


def half_written(uri: str) -> list[str]:
    """Keys below `uri` to which parts were sent and that were not ended."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    uploads = s3_door.client().list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads", [])
    return [upload["Key"] for upload in uploads]


@pytest.mark.usefixtures("in_parts")
def test_a_file_too_large_for_one_request_is_sent_in_parts_and_read_as_any(faults: FaultProxy, s3: str) -> None:
    storage.write_bytes(f"{s3}/small", LARGE[: 6 << 20])
    assert not parts(faults)
    storage.write_bytes(f"{s3}/large", LARGE)
    assert len(parts(faults)) == 3
    assert storage.read_bytes(f"{s3}/large") == LARGE
    with storage.arrow_reader(f"{s3}/large") as file:
        file.seek((5 << 20) - 7)
        assert file.read(14) == LARGE[(5 << 20) - 7 : (5 << 20) + 7]
    assert [(file.path, file.size) for file in storage.list_files(s3)] == [("large", 12 << 20), ("small", 6 << 20)]
    assert not half_written(s3)


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("of", ["POST uploads", "partNumber=2", "POST uploadId="])
@pytest.mark.parametrize("fault", [*PASSING, proxy.HALF_REQUEST, proxy.DENIED, proxy.CONFLICT, proxy.NO_UPLOAD])
def test_whatever_breaks_once_amid_a_file_sent_in_parts_it_is_written(
    faults: FaultProxy, s3: str, fault: str, of: str
) -> None:
    faults.inject(fault, 1, lambda method, path: of in f"{method} {path.partition('?')[2]}")
    before = storage.retries()
    storage.write_bytes(f"{s3}/large", LARGE)
    assert faults.injected == 1
    assert storage.retries() - before >= (fault != proxy.HALF_ANSWER)
    assert storage.read_bytes(f"{s3}/large") == LARGE


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("of", ["POST uploads", "partNumber=2", "POST uploadId="])
def test_a_file_sent_in_parts_that_fails_for_good_leaves_the_old_one_and_nothing_else(
    faults: FaultProxy, s3: str, of: str
) -> None:
    storage.write_bytes(f"{s3}/large", b"old")
    faults.inject(proxy.DENIED, 1000, lambda method, path: of in f"{method} {path.partition('?')[2]}")
    with pytest.raises(UserError, match="no right to it: cluster/iam-policy"):
        storage.write_bytes(f"{s3}/large", LARGE)
    assert storage.read_bytes(f"{s3}/large") == b"old"
    assert not half_written(s3)


@pytest.mark.usefixtures("in_parts")
def test_a_process_that_is_killed_amid_a_file_sent_in_parts_leaves_the_old_one(faults: FaultProxy, s3: str) -> None:
    storage.write_bytes(f"{s3}/large", b"old")
    with subprocess.Popen([sys.executable, "-c", KILLED_AMID, f"{s3}/large"]) as writer:
        faults.strike = writer.kill
        faults.inject(proxy.STRIKE_BEFORE, 1, lambda method, _: method == "POST" and len(parts(faults)) == 3)
    assert len(parts(faults)) == 3
    assert [(file.path, file.size) for file in storage.list_files(s3)] == [("large", 3)]
    assert storage.read_bytes(f"{s3}/large") == b"old"
    assert half_written(s3), "what it had sent stays until the bucket's rule deletes it"
    storage.write_bytes(f"{s3}/large", LARGE)
    assert storage.read_bytes(f"{s3}/large") == LARGE


@pytest.mark.usefixtures("in_parts")
def test_a_file_too_large_to_be_published_names_the_setting(s3: str, tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(LARGE)
    with pytest.raises(UserError, match=r"more than the 6,291,456 .*: lower index\.shard_rows and build"):
        storage.create(f"{s3}/shard", tmp_path / "shard")
    assert not storage.exists(f"{s3}/shard")
