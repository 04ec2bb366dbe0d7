"""Promises of the one door to files, on local folders; S3's own promises are tested against a server."""

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cxr_retrieval import storage
from cxr_retrieval.errors import UserError

RACERS = 16

# Forked from one fresh process that has no threads: sixteen interpreters would spend seconds on imports.
RACE = """
import os, sys
from pathlib import Path
from cxr_retrieval import storage

folder, racers = Path(sys.argv[1]), int(sys.argv[2])

def race(work):
    gate, start = os.pipe()
    children = []
    for racer in range(racers):
        child = os.fork()
        if not child:
            os.close(start)
            os.read(gate, 1)  # returns for all at once when the parent closes its end
            os._exit(10 if work(racer) else 11)
        children.append(child)
    os.close(gate)
    os.close(start)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(codes) <= {10, 11}, codes
    return [racer for racer, code in enumerate(codes) if code == 10]

for racer in range(racers):
    (folder / f"source{racer}").write_bytes(b"%d " % racer * 50_000)
for round in range(2):
    target = str(folder / "created" / str(round))
    winners = race(lambda racer: storage.create(target, folder / f"source{racer}"))
    assert len(winners) == 1, winners
    assert storage.read_bytes(target) == b"%d " % winners[0] * 50_000

alias = str(folder / "alias")
for generation in range(2):
    found = storage.read_tagged(alias)
    tag = found[1] if found else None
    winners = race(lambda racer: storage.replace(alias, b"%d of %d" % (racer, generation), tag))
    assert len(winners) == 1, winners
    assert storage.read_bytes(alias) == b"%d of %d" % (winners[0], generation)
print("ok")
"""


def test_of_racing_processes_one_creates_and_one_replaces(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACE, str(tmp_path), str(RACERS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "ok", done.stderr
    assert not [path for path in (tmp_path / "created").iterdir() if path.name.startswith(".")]


def race_threads(work: Callable[[int], bool]) -> list[int]:
    barrier = threading.Barrier(RACERS)

    def run(racer: int) -> bool:
        barrier.wait()
        return work(racer)

    with ThreadPoolExecutor(RACERS) as pool:
        return [racer for racer, won in enumerate(pool.map(run, range(RACERS))) if won]


def no_links(*_: Any) -> None:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


@pytest.mark.parametrize("links", [True, False], ids=["links", "a file system without links"])
def test_of_racing_threads_one_creates(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    for racer in range(RACERS):
        (tmp_path / f"source{racer}").write_bytes(bytes([racer]) * 10_000)
    target = str(tmp_path / "new" / "folder" / "object")
    winners = race_threads(lambda racer: storage.create(target, tmp_path / f"source{racer}"))
    assert len(winners) == 1
    assert storage.read_bytes(target) == bytes([winners[0]]) * 10_000


def test_of_racing_threads_one_replaces_each_generation(tmp_path: Path) -> None:
    alias = str(tmp_path / "aliases" / "latest.json")
    tag = None
    for generation in range(4):
        winners = race_threads(lambda racer: storage.replace(alias, b"%d/%d" % (generation, racer), tag))  # noqa: B023
        assert len(winners) == 1
        data, tag = storage.read_tagged(alias) or (b"", None)
        assert data == b"%d/%d" % (generation, winners[0])


def test_create_leaves_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"new")
    target = tmp_path / "target"
    target.write_bytes(b"old")
    assert not storage.create(str(target), tmp_path / "source")
    assert target.read_bytes() == b"old"


def test_replace_wants_the_tag_that_is_there(tmp_path: Path) -> None:
    uri = str(tmp_path / "alias")
    assert storage.read_tagged(uri) is None
    assert not storage.replace(uri, b"x", "some tag")
    assert storage.replace(uri, b"one", None)
    assert not storage.replace(uri, b"two", None)
    data, tag = storage.read_tagged(uri) or (b"", "")
    assert (data, storage.replace(uri, b"two", tag), storage.replace(uri, b"three", tag)) == (b"one", True, False)
    assert storage.read_bytes(uri) == b"two"


def test_a_staged_write_that_fails_leaves_the_old_file_and_no_scratch(tmp_path: Path) -> None:
    uri = str(tmp_path / "file")
    storage.write_bytes(uri, b"old")
    with contextlib.suppress(RuntimeError), storage.staged(uri) as path:
        path.write_bytes(b"half")
        raise RuntimeError
    assert storage.read_bytes(uri) == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_staged_write_that_is_killed_leaves_the_old_file(tmp_path: Path) -> None:
    uri = str(tmp_path / "file")
    storage.write_bytes(uri, b"old")
    code = (
        "import os, signal, sys\nfrom cxr_retrieval import storage\n"
        "with storage.staged(sys.argv[1]) as path:\n"
        "    path.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, uri], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert storage.read_bytes(uri) == b"old"
    # What the killed process left is scratch: nothing else lists it, and the next write is not in its way.
    (left,) = storage.list_scratch(str(tmp_path))
    assert Path(left.uri).read_bytes() == b"half"
    assert [file.path for file in storage.list_files(str(tmp_path))] == ["file"]
    storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"new"


def test_a_file_of_other_bytes_has_another_version_though_its_size_is_the_same(tmp_path: Path) -> None:
    def version() -> int:
        (file,) = storage.list_files(str(tmp_path))
        return file.version

    (tmp_path / "a").write_bytes(b"one")
    one = version()
    assert version() == one
    os.utime(tmp_path / "a", ns=(one, one + 1))  # a time of floating seconds would not tell these
    assert version() != one


def test_what_lies_right_in_a_folder_is_told_as_a_listing_of_all_tells_it(tmp_path: Path) -> None:
    for path in ("table.csv", "lists.txt", ".hidden.csv", "images/a.png", "images/b.csv", "folder.csv/c"):
        storage.write_bytes(str(tmp_path / path), path.encode())
    every = {file.path: file for file in storage.list_files(str(tmp_path))}
    assert list(storage.list_top(str(tmp_path), lambda name: name.endswith(".csv"))) == [every["table.csv"]]
    assert [file.path for file in storage.list_top(str(tmp_path), lambda _: True)] == ["lists.txt", "table.csv"]
    with pytest.raises(FileNotFoundError):
        list(storage.list_top(str(tmp_path / "none"), lambda _: True))


def test_listing_is_in_the_order_of_paths_and_without_dot_names(tmp_path: Path) -> None:
    names = ["b", "a/z", "a.b", "a/.hidden", ".git/config", "a-b/c", "a/sub/y", "B", "\u00e9", ".dot", "a0"]
    for name in names:
        storage.write_bytes(str(tmp_path / name), name.encode())
    found = list(storage.list_files(str(tmp_path)))
    shown = sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))
    assert [file.path for file in found] == shown
    assert all(storage.read_bytes(file.uri) == file.path.encode() for file in found)
    assert all(file.size == len(file.path.encode()) for file in found)


@pytest.mark.parametrize("uri", ["gs://bucket/x", "http://host/x", "hdfs://x"])
def test_an_unknown_scheme_is_refused_by_every_door(uri: str, tmp_path: Path) -> None:
    (tmp_path / "source").touch()
    doors: list[Callable[[], object]] = [
        lambda: storage.exists(uri),
        lambda: storage.read_bytes(uri),
        lambda: list(storage.list_files(uri)),
        lambda: storage.write_bytes(uri, b""),
        lambda: storage.create(uri, tmp_path / "source"),
        lambda: storage.replace(uri, b"", None),
        lambda: storage.read_tagged(uri),
        lambda: storage.open_text(uri).__enter__(),
        lambda: storage.arrow_reader(uri),
    ]
    for door in doors:
        with pytest.raises(UserError, match="only local paths, file:// and s3://"):
            door()


def test_file_uris_and_plain_paths_are_one(tmp_path: Path) -> None:
    storage.write_bytes(f"file://{tmp_path}/x", b"x")
    assert storage.read_bytes(str(tmp_path / "x")) == b"x"
    assert storage.canonical(f"file://{tmp_path}/x/") == storage.canonical(f"{tmp_path}/x") == str(tmp_path / "x")
    assert storage.canonical("s3://bucket/key/") == "s3://bucket/key"


def test_a_folder_that_may_not_be_read_is_refused_without_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(str(tmp_path / "Doe^John" / "1.png"), b"x")
    real = os.scandir

    def denied(folder: str) -> Any:
        if folder.endswith("John"):
            raise PermissionError(errno.EACCES, "denied", folder)
        return real(folder)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match=f"^{tmp_path}, 1 folder below it: permission denied: ") as caught:
        list(storage.list_files(str(tmp_path)))
    assert "Doe" not in str(caught.value)
    assert f"`find {tmp_path} -type d ! -readable`" in str(caught.value)


@pytest.mark.parametrize("what", ["1.png", "more"])
def test_what_is_deleted_while_its_folder_is_listed_is_not_there(what: str, tmp_path: Path) -> None:
    for name in ("0.png", "1.png", "more/2.png", "z.png"):
        storage.write_bytes(str(tmp_path / "Doe^John" / name), b"x")
    found = storage.list_files(str(tmp_path))
    listed = [next(found).path]
    gone = tmp_path / "Doe^John" / what
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    listed += [file.path for file in found]
    there = {"Doe^John/0.png", "Doe^John/1.png", "Doe^John/more/2.png", "Doe^John/z.png"}
    assert listed == sorted(path for path in there if what not in path)


def test_a_disk_that_fails_while_it_is_listed_is_told_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(str(tmp_path / "Doe^John" / "1.png"), b"x")
    real = os.stat

    def failing(path: str, **options: Any) -> os.stat_result:
        if str(path).endswith("1.png"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return real(path, **options)

    monkeypatch.setattr(os, "stat", failing)
    with pytest.raises(UserError, match=f"^{tmp_path}, 1 folder below it: it cannot be listed: ") as caught:
        list(storage.list_files(str(tmp_path)))
    assert "Doe" not in str(caught.value)


def test_folders_without_end_in_folders_are_refused_in_one_line(tmp_path: Path) -> None:
    deep = tmp_path
    for _ in range(storage.DEEPEST + 1):
        deep = deep / "d"
    storage.write_bytes(str(deep.parent.parent / "1.png"), b"x")
    assert len(list(storage.list_files(str(tmp_path)))) == 1
    storage.write_bytes(str(deep / "2.png"), b"x")
    with pytest.raises(UserError, match=f"^{tmp_path}: folders that lie more than 100 deep: move them up$"):
        list(storage.list_files(str(tmp_path)))


def test_links_within_a_folder_are_listed_and_one_in_a_circle_is_refused(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "set" / "a.png"), b"a")
    (tmp_path / "again").symlink_to(tmp_path / "set")
    (tmp_path / "b.png").symlink_to("set/a.png")
    found = list(storage.list_files(str(tmp_path)))
    assert [file.path for file in found] == ["again/a.png", "b.png", "set/a.png"]
    assert [file.size for file in found] == [1, 1, 1]
    (tmp_path / "set" / "back").symlink_to(tmp_path)
    with pytest.raises(UserError, match=f"^{tmp_path}: a link 1 folder below it leads to a folder that it lies in"):
        list(storage.list_files(str(tmp_path)))
    (tmp_path / "set" / "back").unlink()
    (tmp_path / "x").symlink_to("y")
    (tmp_path / "y").symlink_to("x")
    with pytest.raises(UserError, match=f"^{tmp_path}: a link in it leads in a circle: remove it"):
        list(storage.list_files(str(tmp_path)))


@pytest.mark.parametrize("target", ["elsewhere", "elsewhere/a.png", "archive-2", "elsewhere/none"])
@pytest.mark.parametrize(
    ("place", "told"),
    [("link.png", "in it"), ("deep/link.png", "1 folder below it"), ("deep/er/link.png", "2 folders below it")],
)
def test_a_link_that_leads_out_of_a_folder_is_refused_without_the_names_on_its_way(
    target: str, place: str, told: str, tmp_path: Path
) -> None:
    for name in ("archive/deep/er/b.png", "elsewhere/a.png", "archive-2/c.png"):
        storage.write_bytes(str(tmp_path / name), b"x")
    (tmp_path / "archive" / place).symlink_to(tmp_path / target)
    archive = tmp_path / "archive"
    with pytest.raises(UserError, match=f"^{archive}: a link {told} leads out of it, ") as caught:
        list(storage.list_files(str(archive)))
    assert f"`find {archive} -type l`" in str(caught.value)
    assert not {"deep", "link.png"} & set(re.split(r"[/\s:,`]", str(caught.value)))
    (tmp_path / "door").symlink_to(tmp_path / target)
    if target == "elsewhere":  # the folder that is listed may itself be a link
        assert [file.path for file in storage.list_files(str(tmp_path / "door"))] == ["a.png"]


def test_a_pipe_a_folder_and_a_link_to_nothing_are_no_file_to_any_reader_and_nobody_waits(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nothing").symlink_to("none")
    (tmp_path / "folder").mkdir()
    assert [file.path for file in storage.list_files(str(tmp_path))] == ["nothing", "pipe"]
    doors: list[Callable[[str], object]] = [
        storage.read_bytes,
        storage.arrow_reader,
        lambda uri: storage.read_beginning(uri, 8),
        lambda uri: storage.open_text(uri).__enter__(),
    ]
    for uri in (str(tmp_path / "pipe"), str(tmp_path / "folder"), str(tmp_path / "nothing"), "/dev/zero"):
        for door in doors:
            with pytest.raises(FileNotFoundError):
                door(uri)


def test_what_is_missing_is_a_missing_file(tmp_path: Path) -> None:
    uri = str(tmp_path / "none")
    for door in (storage.read_bytes, storage.arrow_reader, lambda name: list(storage.list_files(name))):
        with pytest.raises(FileNotFoundError):
            door(uri)
    assert not storage.exists(uri)
    assert not storage.exists(str(tmp_path))  # a folder is no file


def test_written_files_have_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    (tmp_path / "source").touch()
    old = os.umask(0o027)
    try:
        storage.write_bytes(str(tmp_path / "written"), b"")
        storage.create(str(tmp_path / "created"), tmp_path / "source")
    finally:
        os.umask(old)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("written", "created")] == [0o640, 0o640]


def test_a_file_in_a_folders_place_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in ("file/below", "file/far/below"):
        with pytest.raises(UserError, match="a file stands where a folder is needed") as caught:
            storage.write_bytes(str(tmp_path / path), b"x")
        assert "\n" not in str(caught.value)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "tiny"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command: a full disk cannot be made here")
    if done.returncode:
        pytest.skip(f"a tiny disk cannot be mounted here: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_is_one_clear_line_and_keeps_the_old_file(tiny_disk: Path, tmp_path: Path) -> None:
    uri = str(tiny_disk / "file")
    (tmp_path / "large").write_bytes(bytes(200_000))
    storage.write_bytes(uri, b"old")
    tag = (storage.read_tagged(uri) or (b"", None))[1]
    writes: list[Callable[[], object]] = [
        lambda: storage.write_bytes(uri, bytes(200_000)),
        lambda: storage.create(str(tiny_disk / "new"), tmp_path / "large"),
        lambda: storage.replace(uri, bytes(200_000), tag),
    ]
    for write in writes:
        with pytest.raises(UserError, match="no space left: free some and run the same command again") as caught:
            write()
        assert "\n" not in str(caught.value)
        assert str(tiny_disk) in str(caught.value)
    assert storage.read_bytes(uri) == b"old"
    storage.write_bytes(uri, bytes(10_000))  # the failed tries left no scratch that fills the disk
    assert not storage.exists(str(tiny_disk / "new"))


def test_files_are_read_in_their_order_eight_at_a_time_however_slow_who_takes_them_is() -> None:
    begun: list[int] = []
    together = threading.Barrier(8, timeout=60)

    def read(number: int) -> int:
        begun.append(number)
        together.wait()
        return number

    read_ahead = storage.read_ahead(read, range(16))
    for number, found in enumerate(read_ahead):
        assert found == number
        assert len(begun) <= number + 8


def test_an_error_in_reading_is_raised_in_its_turn_and_what_has_not_begun_is_not_read() -> None:
    begun: list[int] = []

    def read(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise FileNotFoundError
        return number

    found: list[int] = []
    with pytest.raises(FileNotFoundError):
        found.extend(storage.read_ahead(read, range(1000)))
    assert found == [0, 1, 2]
    assert len(begun) <= 3 + 8
