"""The pipeline of `make demo`, killed with all of its Ray, ends as if it had never been killed."""

import contextlib
import csv
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq

from cxr_retrieval.index import cache
from cxr_retrieval.index.versions import resolve, verify
from cxr_retrieval.privacy import row_id
from tests.processes import MARK, ROOT, kill_all

IMAGES = 96
STEPS = {"step1", "step2", "step3", "global", "local", "combined", "profile"}
CUTOFFS = {"2", "4", "6", "8"}
TIMEOUT_S = 600
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
    "training.checkpoint_steps=1",
    "index.shard_rows=40",
    "evaluation.draws=100",
    "search.queries=2",
]


def demo_commands() -> list[list[str]]:
    """What `make demo` runs after the install, with this interpreter."""
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    shown = subprocess.run(
        ["make", "-n", "-o", ".venv/.ready", "demo"], cwd=ROOT, env=outside, check=True, stdout=subprocess.PIPE
    )
    words = [shlex.split(line) for line in shown.stdout.decode().splitlines()]
    assert all(word[0] == ".venv/bin/python" for word in words)
    return [[sys.executable, *word[1:]] for word in words]


class Pipeline:
    def __init__(self, folder: Path) -> None:
        self.archive, self.workspace = folder / "archive", folder / "workspace"
        self._folder, self._mark = folder, folder.as_posix()
        words = [f"workspace={self.workspace}", f"corpus.archive={self.archive}", f"phantom.out={self.archive}", *WORDS]
        draw, pipeline = demo_commands()
        subprocess.run([*draw, *words], cwd=ROOT, check=True, timeout=TIMEOUT_S)
        self._command = [*pipeline, *words]
        self._environment = os.environ | {MARK: self._mark, cache.VARIABLE: str(folder / "cache"), "RAY_ADDRESS": ""}

    @contextlib.contextmanager
    def started(self) -> Iterator[subprocess.Popen[bytes]]:
        with (self._folder / "log").open("ab") as log:
            process = subprocess.Popen(
                self._command, cwd=ROOT, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )
            try:
                yield process
            finally:
                kill_all(self._mark)
                process.wait()

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text(errors="replace")

    def kill_when(self, reached: Callable[[], bool]) -> None:
        with self.started() as process:
            deadline = time.monotonic() + TIMEOUT_S
            while not reached():
                assert process.poll() is None, f"ended before it could be killed:\n{self.log}"
                assert time.monotonic() < deadline, f"not reached in time:\n{self.log}"
                time.sleep(0.01)
            assert kill_all(self._mark) > 2  # Ray's processes too

    def run(self) -> None:
        with self.started() as process:
            assert process.wait(TIMEOUT_S) == 0, self.log

    def has(self, pattern: str) -> bool:
        return next(self.workspace.glob(pattern), None) is not None

    def finished(self) -> dict[str, str]:
        """Every finished artifact by folder, with its content id; each file of it is what the manifest says."""
        found = {}
        for path in self.workspace.rglob("manifest.json"):
            manifest = json.loads(path.read_bytes())
            for entry in manifest["files"]:
                data = (path.parent / entry["path"]).read_bytes()
                assert hashlib.sha256(data).hexdigest() == entry["sha256"], path
            found[str(path.parent)] = manifest["content_id"]
        return found


def test_a_demo_killed_after_its_model_ends_with_every_row_and_does_nothing_twice(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    pipeline.kill_when(lambda: pipeline.has("embeddings/parts/*/manifest.json"))
    kept = pipeline.finished()
    assert pipeline.has("models/*/manifest.json")
    assert not pipeline.has("summary.json")
    assert not pipeline.has("indexes/*/aliases/*.json")
    pipeline.run()
    assert kept.items() <= pipeline.finished().items(), "what was finished was done again"

    summary = json.loads((pipeline.workspace / "summary.json").read_bytes())
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
    (table,) = pipeline.archive.glob("Data_Entry*.csv")
    names = [row["Image Index"] for row in csv.DictReader(table.read_text().splitlines())]
    (build,) = (pipeline.workspace / "indexes" / "phantoms" / "builds").iterdir()
    ids = [
        row_id
        for number in range(summary["shards"])
        for row_id in pq.read_table(build / f"shards/{number:05d}.parquet", columns=["id"])["id"].to_pylist()
    ]
    assert ids == [row_id(name) for name in sorted(names)]
    to = str(pipeline.workspace / "indexes" / "phantoms")
    assert resolve(to, "latest").id == summary["version"]
    assert verify(to, "latest") == []
