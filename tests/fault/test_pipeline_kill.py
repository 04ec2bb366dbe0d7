"""The pipeline of `make demo` on object storage, killed with all of its Ray, ends as if it had never been killed."""

import csv
import hashlib
import json
import os
import shlex
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cxr_retrieval import artifacts, storage
from cxr_retrieval.index import cache
from cxr_retrieval.index.files import files_of, shard_files
from cxr_retrieval.index.versions import resolve, verify
from cxr_retrieval.privacy import row_id
from tests import proxy
from tests.commands import done
from tests.processes import ROOT, job, wait_until
from tests.proxy import FaultProxy

IMAGES = 96
STEPS = {"step1", "step2", "step3", "global", "local", "combined", "profile", "global_profile"}
CUTOFFS = {"2", "4", "6", "8"}
# So small that the walk takes seconds; the demo's own settings stay in force beside them.
WORDS = [
    f"phantom.images={IMAGES}",
    "phantom.size=128",
    "corpus.size=64",
    "corpus.partition_images=32",
    "corpus.row_group_images=16",
    "corpus.validation_share=0.25",
    "network.dimensions=16",
    "training.epochs=1",
    "training.batch_size=16",
    "training.lanes=2",
    "training.workers=1",
    "embedding.workers=1",
    "training.checkpoint_steps=1",
    "index.shard_rows=40",
    "evaluation.draws=100",
    "search.queries=2",
]


def demo_commands() -> list[list[str]]:
    """The job and the words of each line that `make demo` runs after the install."""
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    shown = subprocess.run(
        ["make", "-n", "-o", ".venv/.ready", "demo"], cwd=ROOT, env=outside, check=True, stdout=subprocess.PIPE
    )
    lines = [shlex.split(line) for line in shown.stdout.decode().splitlines()]
    assert all(line[:2] == [".venv/bin/python", "-m"] for line in lines)
    return [[line[2].removeprefix("jobs."), *line[3:]] for line in lines]


def stored(uri: str, ending: str = "") -> list[str]:
    try:
        return [file.uri for file in storage.list_files(uri) if file.path.endswith(ending)]
    except FileNotFoundError:
        return []


def finished(workspace: str) -> dict[str, str]:
    """Every finished artifact by folder, with its content id; each file of it is what the manifest says."""
    found = {}
    for uri in stored(workspace, "manifest.json"):
        manifest = json.loads(storage.read_bytes(uri))
        for entry in manifest["files"]:
            path = storage.join(storage.parent(uri), entry["path"])
            assert hashlib.sha256(storage.read_bytes(path)).hexdigest() == entry["sha256"], path
        found[storage.parent(uri)] = manifest["content_id"]
    return found


@pytest.mark.usefixtures("ray_session")
def test_a_demo_on_object_storage_killed_after_its_model_ends_with_every_row_and_does_nothing_twice(
    s3: str, faults: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    archive, workspace, log = f"{s3}/archive", f"{s3}/workspace", tmp_path / "log"
    parts = f"{workspace}/embeddings/parts"
    words = [f"workspace={workspace}", f"corpus.archive={archive}", f"phantom.out={archive}", *WORDS]
    draw, pipeline = ([*command, *words] for command in demo_commands())
    done(*draw)
    faults.inject(proxy.SLOW, 5, lambda method, path: method == "GET" and "/archive/images/" in path)
    faults.inject(proxy.CUT, 3, lambda method, path: method == "PUT" and "/corpora/" in path)
    with job(*pipeline, log=log) as process:
        wait_until(lambda: embedding_has_begun(faults) and bool(stored(parts, "manifest.json")), process, log)
    kept = finished(workspace)
    assert any("/models/" in uri for uri in kept)
    assert any("/embeddings/parts/" in uri for uri in kept)
    assert not storage.exists(f"{workspace}/summary.json")
    assert not stored(f"{workspace}/indexes", "latest.json")
    faults.inject(proxy.CUT, 2, lambda method, path: method == "PUT" and "/indexes/" in path)
    printed = done(*pipeline)
    assert kept.items() <= finished(workspace).items(), "what was finished was done again"
    assert printed.count("finished before") >= 2
    states = json.loads(done("status", f"workspace={workspace}", "--json"))
    assert {state["step"]: state["state"] for state in states} == dict.fromkeys(
        ("prepare", "train", "embed", "evaluate", "index", "publish"), "finished"
    )

    summary = json.loads(storage.read_bytes(f"{workspace}/summary.json"))
    assert summary["rows"] == {
        "archive": IMAGES,
        "prepared": IMAGES,
        "quarantined": 0,
        "excluded": 0,
        "duplicates": 0,
        "embedded": IMAGES,
        "indexed": IMAGES,
    }
    assert summary["shards"] == 3
    assert set(summary["recall_at"]) == STEPS
    assert all(set(figures) == CUTOFFS for figures in summary["recall_at"].values())
    assert set(summary["chance_at"]) == CUTOFFS
    assert summary["index_recall"] == 1.0
    steps = {"prepare", "train", "embed", "evaluate", "index", "publish", "search"}
    assert set(summary["seconds"]) == steps
    assert (summary["alias"], summary["chosen"] in STEPS) == ("latest", True)
    assert sum(summary["storage_retries"].values()) >= 2
    assert b"<html" in storage.read_bytes(summary["gallery"])[:200].lower()

    # The ids are those of the archive's images, whatever happened on the way; each image is there once.
    (table,) = [uri for uri in stored(archive, ".csv") if "Data_Entry" in uri]
    names = [row["Image Index"] for row in csv.DictReader(storage.read_bytes(table).decode().splitlines())]
    (made,) = [uri for uri in stored(f"{workspace}/indexes/phantoms/builds") if uri.endswith("/index.json")]
    files, ids = files_of(artifacts.load(storage.parent(made), "index")), []
    for number in range(summary["shards"]):
        with storage.arrow_reader(files[shard_files(number)["sidecar"]].uri) as file:
            ids += pq.read_table(file, columns=["id"])["id"].to_pylist()
    assert ids == [row_id(name) for name in sorted(names)]
    to = f"{workspace}/indexes/phantoms"
    assert resolve(to, "latest").id == summary["version"]
    assert verify(to, "latest") == []


def embedding_has_begun(faults: FaultProxy) -> bool:
    """Whether the manifest of a part of the embeddings has been written."""
    return any(
        method == "PUT" and "/embeddings/parts/" in path and path.partition("?")[0].endswith("manifest.json")
        for method, path in list(faults.seen)
    )
