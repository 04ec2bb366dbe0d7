"""A publish that is killed anywhere leaves the old alias serving, and running it again finishes it.

A driver process kills its forked children with SIGKILL before or after their n-th storage operation or system call
that makes a write visible, for every n that a whole publish has.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cxr_retrieval import artifacts
from cxr_retrieval.artifacts import Draft
from cxr_retrieval.errors import UserError
from cxr_retrieval.index.aliases import list_aliases
from cxr_retrieval.index.versions import list_versions, open_version, publish, resolve, verify
from cxr_retrieval.privacy import Pseudonyms
from cxr_retrieval.tombstones import Tombstones, remove

OLD = {"index.json": b"old", "model.json": b"model", "shards/0.faiss": b"old vectors" * 5000}
NEW = {"index.json": b"new", "model.json": b"model", "shards/0.faiss": b"new vectors" * 5000}

# One process imports and then forks a child for each place to die at: an import each would take minutes.
DRIVER = """
import itertools, json, os, shutil, signal, sys, threading
from cxr_retrieval import artifacts, storage
from cxr_retrieval.index import cache, versions

start, root, build, workspace = sys.argv[1:]
cache.THREADS = 2
lock = threading.Lock()
calls = []
die_at, die_when = None, ""

def counted(module, name):
    plain = getattr(module, name)
    def call(*arguments, **options):
        with lock:
            number = len(calls)
            calls.append(name if module is storage else "os." + name)
        if (number, die_when) == (die_at, "before"):
            os.kill(os.getpid(), signal.SIGKILL)
        result = plain(*arguments, **options)
        if (number, die_when) == (die_at, "after"):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(module, name, call)

for name in ("create", "replace", "write_bytes"):
    counted(storage, name)
for name in ("link", "replace", "fsync"):
    counted(os, name)

def run(to, number, when):
    global die_at, die_when
    if os.path.isdir(start):
        shutil.copytree(start, to)
    child = os.fork()
    if not child:
        die_at, die_when = number, when
        versions.publish(artifacts.load(build, "index"), to, "latest", workspace=workspace)
        with open(to + ".calls", "w") as file:
            json.dump(calls, file)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

deaths = []
for number in itertools.count():
    for when in ("before", "after"):
        to = f"{root}/{number}-{when}"
        code = run(to, number, when)
        if code != -signal.SIGKILL:
            assert code == 0, code
            print(json.dumps({"deaths": deaths, "calls": json.load(open(to + ".calls"))}))
            sys.exit()
        deaths.append([to, number, when])
"""


def build(folder: Path, files: dict[str, bytes]) -> artifacts.Artifact:
    draft = Draft(str(folder), "index", {"index": files["index.json"].decode()}, ()).begin()
    return draft.finish([draft.write(path, data) for path, data in files.items()], {})


def contents(reference: str, cache: Path) -> dict[str, bytes]:
    opened = open_version(reference, cache=str(cache))
    return {name: path.read_bytes() for name, path in opened.paths.items()}


@pytest.mark.parametrize("published_before", [True, False])
def test_a_publish_killed_at_any_operation_can_be_run_again(published_before: bool, tmp_path: Path) -> None:
    start, root, cache, workspace = (tmp_path / name for name in ("start", "killed", "cache", "workspace"))
    root.mkdir()
    remove(str(workspace), "somebody", Pseudonyms(None))
    removed = Tombstones.at(str(workspace)).digests
    old, new = build(tmp_path / "old", OLD), build(tmp_path / "new", NEW)
    old_version = publish(old, str(start), "latest").version if published_before else None
    command = [sys.executable, "-c", DRIVER, str(start), str(root), new.uri, str(workspace)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    calls = report["calls"]
    # The last operations are the alias's, in order: replace, and within it the write that becomes visible at once.
    alias_calls = ["replace", "write_bytes", "os.fsync", "os.replace", "os.fsync"]
    assert calls[-len(alias_calls) :] == alias_calls
    assert calls.count("create") == len(NEW) + 1 - published_before  # model.json was there already
    assert len(report["deaths"]) == 2 * len(calls)
    covering = {"replace", "write_bytes", "os.replace"}  # calls that return once the new alias can be seen
    assert calls.count("write_bytes") == 2  # the first is of the tombstone
    assert all(calls[-len(alias_calls) :].count(name) == 1 for name in covering)
    reference_version = None
    for to, number, when in report["deaths"]:
        of_alias = number >= len(calls) - len(alias_calls)
        moved = number == len(calls) - 1 or (when == "after" and of_alias and calls[number] in covering)
        where = f"killed {when} call {number}, {calls[number]}"
        if moved:
            assert contents(to, cache) == NEW, where
            assert Tombstones.at(to).digests == removed, where  # no new version is seen that shows somebody removed
        elif published_before:
            assert resolve(to, "latest").id == old_version, where
            assert contents(to, cache) == OLD, where
            assert verify(to, "latest") == [], where
        else:
            with pytest.raises(UserError, match="there is no alias 'latest'"):
                resolve(to, "latest")
        again = publish(new, to, "latest", workspace=str(workspace))
        reference_version = reference_version or again.version
        assert again.version == reference_version, where
        assert again.moved != moved, where
        assert contents(to, cache) == NEW, where
        assert Tombstones.at(to).digests == removed, where
        assert list_aliases(to)["latest"].predecessor == old_version, where
        assert list_versions(to) == sorted(filter(None, [old_version, again.version])), where
        for path in (Path(to) / "objects").iterdir():  # whole or not at all; scratch of the killed has a dot
            assert path.name.startswith(".") or hashlib.sha256(path.read_bytes()).hexdigest() == path.name, where
        shutil.rmtree(to)
