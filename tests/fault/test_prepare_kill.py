"""A prepare whose every process is killed leaves nothing that reads as done, and run again it gives equal bytes."""

import json
import random
from pathlib import Path

import pytest

from cxr_retrieval import artifacts
from cxr_retrieval.artifacts import Artifact
from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.corpus.parts import PART_KIND
from cxr_retrieval.corpus.preparation import KIND, prepare
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.errors import UserError
from tests.commands import done
from tests.processes import job, wait_until

SETTINGS = {"size": 64, "partition_images": 8, "row_group_images": 8}
PARTS = 96 // 8


def finished_parts(workspace: Path) -> dict[str, int]:
    found = workspace.glob("corpora/*/parts/*/manifest.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in found}


def pixels(corpus: Artifact) -> list[tuple[str, bytes]]:
    reader = Corpus(corpus)
    tables = [table for n in range(PARTS) for table in reader.batches(n, 64, ["image_id", "pixels"])]
    return [(row["image_id"], row["pixels"]) for table in tables for row in table.to_pylist()]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds its processes by Linux's /proc")
@pytest.mark.usefixtures("ray_session")
def test_a_prepare_that_is_killed_goes_on_and_gives_equal_bytes(large_archive: Path, tmp_path: Path) -> None:
    undisturbed, _ = prepare(CorpusSettings(archive=str(large_archive), **SETTINGS), str(tmp_path / "undisturbed"))
    workspace = tmp_path / "killed"
    enough = random.randint(1, PARTS // 3)
    log = tmp_path / "log"
    words = [f"corpus.{name}={value}" for name, value in SETTINGS.items()]
    words += [f"corpus.archive={large_archive}", f"workspace={workspace}"]
    with job("prepare", *words, log=log) as process:
        wait_until(lambda: len(finished_parts(workspace)) >= enough, process, log)
    kept = finished_parts(workspace)
    moment = f"killed when {len(kept)} of {PARTS} parts were finished, {enough} were waited for"
    assert len(kept) >= enough, moment
    folder = workspace / "corpora" / "chest" / undisturbed.input_id
    assert artifacts.find(str(folder)) is None, moment
    with pytest.raises(UserError, match=r"no finished corpus at .* unfinished: run the job that writes it again"):
        Corpus.open(str(folder))
    for part in kept:
        whole = artifacts.load(str(workspace / "corpora" / "chest" / "parts" / part), PART_KIND)
        assert all(whole.read(entry.path) for entry in whole.files), moment

    assert "nothing to do" not in done("prepare", *words)
    assert kept.items() <= finished_parts(workspace).items(), moment
    resumed = artifacts.load(str(folder), KIND)
    assert resumed.input_id == undisturbed.input_id
    assert resumed.manifest["content_id"] == undisturbed.manifest["content_id"], moment
    assert json.dumps(resumed.manifest, sort_keys=True) == json.dumps(undisturbed.manifest, sort_keys=True)
    assert pixels(resumed) == pixels(undisturbed)
