"""The pipeline of `make demo`, killed with all of its Ray, ends as if it had never been killed."""

import csv
import hashlib
import json
import os
import shlex
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cxr_retrieval.index import cache
from cxr_retrieval.index.versions import resolve, verify
from cxr_retrieval.privacy import row_id
from tests.commands import done
from tests.processes import ROOT, job, wait_until

IMAGES = 96
STEPS = {"step1", "step2", "step3", "global", "local", "combined", "profile"}
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


def finished(workspace: Path) -> dict[str, str]:
    """Every finished artifact by folder, with its content id; each file of it is what the manifest says."""
    found = {}
    for path in workspace.rglob("manifest.json"):
        manifest = json.loads(path.read_bytes())
        for entry in manifest["files"]:
            data = (path.parent / entry["path"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == entry["sha256"], path
        found[str(path.parent)] = manifest["content_id"]
    return found


@pytest.mark.usefixtures("ray_session")
def test_a_demo_killed_after_its_model_ends_with_every_row_and_does_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    archive, workspace, log = tmp_path / "archive", tmp_path / "workspace", tmp_path / "log"
    words = [f"workspace={workspace}", f"corpus.archive={archive}", f"phantom.out={archive}", *WORDS]
    draw, pipeline = ([*command, *words] for command in demo_commands())
    done(*draw)
    with job(*pipeline, log=log) as process:
        wait_until(lambda: any(workspace.glob("embeddings/parts/*/manifest.json")), process, log)
    kept = finished(workspace)
    assert any(workspace.glob("models/*/manifest.json"))
    assert not (workspace / "summary.json").exists()
    assert not any(workspace.glob("indexes/*/aliases/*.json"))
    done(*pipeline)
    assert kept.items() <= finished(workspace).items(), "what was finished was done again"

    summary = json.loads((workspace / "summary.json").read_bytes())
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
    assert "<html" in Path(summary["gallery"]).read_text()[:200].lower()

    # The ids are those of the archive's images, whatever happened on the way; each image is there once.
    (table,) = archive.glob("Data_Entry*.csv")
    names = [row["Image Index"] for row in csv.DictReader(table.read_text().splitlines())]
    (build,) = (workspace / "indexes" / "phantoms" / "builds").iterdir()
    ids = [
        row_id
        for number in range(summary["shards"])
        for row_id in pq.read_table(build / f"shards/{number:05d}.parquet", columns=["id"])["id"].to_pylist()
    ]
    assert ids == [row_id(name) for name in sorted(names)]
    to = str(workspace / "indexes" / "phantoms")
    assert resolve(to, "latest").id == summary["version"]
    assert verify(to, "latest") == []
