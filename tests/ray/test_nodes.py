"""Promises on several nodes: one that is lost in the middle costs no row.

The nodes are Ray nodes of one machine: what they share is its disk, what they do not share is their processes.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from cxr_retrieval import artifacts
from cxr_retrieval.artifacts import Artifact
from cxr_retrieval.errors import UserError
from cxr_retrieval.index.files import files_of, shard_files
from cxr_retrieval.privacy import row_id
from cxr_retrieval.runtime import refuse_unshared
from tests.indexes import build, films, model_files, published
from tests.processes import ROOT, TIMEOUT_S, job, ray_workers, wait_until

TINY = [
    "corpus.size=64",
    "corpus.partition_images=8",
    "corpus.row_group_images=8",
    "corpus.validation_share=0.25",
    "network.dimensions=16",
    "training.workers=2",
    "training.cpus_per_worker=0.7",  # more than half of a node: no node holds two workers
    "training.lanes=2",
    "training.epochs=2",
    "training.batch_size=16",
    "index.shard_rows=16",
    "evaluation.draws=100",
    "search.queries=1",
    "embedding.workers=2",
    "privacy.pseudonymise=false",
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that offers no core, two nodes of one each. A lost node is noticed in seconds, not in half a minute."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("period_ms", 1000), ("timeout_ms", 2000), ("failure_threshold", 2)):
            patch.setenv(f"RAY_health_check_{name}", str(value))
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            found.add_node(num_cpus=1)
        found.wait_for_nodes()
        yield found
        found.shutdown()


def hosts(cluster: Cluster, title: str) -> set[int]:
    """Process ids of the cluster's nodes (their raylets) that run a worker of that name now."""
    return set(ray_workers(title).values()) & {raylet(node) for node in cluster.list_all_nodes()}


def lose_one(cluster: Cluster, seen: set[int]) -> None:
    """Take a node away at once, as a power cut would: one that has been seen at the work."""
    at_work = [node for node in cluster.worker_nodes if raylet(node) in seen]
    assert at_work, "only the head has worked so far"
    cluster.remove_node(at_work[0], allow_graceful=False)


def raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def manifests(folder: Path, kind: str) -> list[Artifact]:
    found = [artifacts.find(str(path.parent)) for path in sorted(folder.rglob("manifest.json"))]
    return [artifact for artifact in found if artifact and artifact.manifest["kind"] == kind]


def test_a_folder_that_another_node_does_not_see_is_refused_by_its_name(
    cluster: Cluster, phantom_archive: Path, tmp_path: Path
) -> None:
    """What the driver mounts is seen by nobody else, as a disk of its node's own is."""
    folder = tmp_path / "mine"
    folder.mkdir()
    command = [sys.executable, "-m", "jobs.prepare", f"workspace={folder}/w", f"corpus.archive={phantom_archive}"]
    mounting = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*mounting, f"mount -t tmpfs none {folder}"]).returncode:
        pytest.skip("this machine gives no process mounts of its own")
    told = subprocess.run(
        [*mounting, f"mount -t tmpfs none {folder} && exec {shlex.join(command)}"],
        **{"capture_output": True, "text": True, "cwd": ROOT, "timeout": TIMEOUT_S},
        env=os.environ | {"RAY_ADDRESS": cluster.address},
    )
    assert told.returncode == 1, told.stderr
    (error,) = [line for line in told.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: workspace={folder}/w lies on this node's own disk")
    assert "give s3://bucket/prefix, or a folder that every node mounts" in error


def test_a_node_lost_amid_prepare_train_embed_and_build_costs_nothing(
    cluster: Cluster, large_archive: Path, tmp_path: Path
) -> None:
    workspace, log = tmp_path / "workspace", tmp_path / "log"
    words = [f"workspace={workspace}", f"corpus.archive={large_archive}", *TINY]
    begun = {
        "Map(PartTask)": "corpora/*/parts/*/manifest.json",
        "RayTrainWorker": "runs/*/checkpoint_*",
        "MapWorker(Map(_Embedder))": "embeddings/parts/*/manifest.json",
        "_build_shard": "indexes/*/builds/parts/*/rows.npy",
    }
    seen: dict[str, set[int]] = {title: set() for title in begun}

    def spread(title: str) -> bool:
        """Whether work of that name has been seen on two nodes."""
        seen[title] |= hosts(cluster, title)
        return len(seen[title]) >= 2

    # The driver's folder is its own: the nodes were started elsewhere.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with job("pipeline", *words, log=log, cwd=elsewhere, RAY_ADDRESS=cluster.address) as process:
        for title, pattern in begun.items():
            wait_until(lambda: spread(title) and any(workspace.glob(pattern)), process, log)  # noqa: B023
            lose_one(cluster, seen[title])
            cluster.add_node(num_cpus=1)
        assert process.wait(TIMEOUT_S) == 0, log.read_text()

    assert all(len(nodes) >= 2 for nodes in seen.values()), "all of it ran on two nodes or more"
    (corpus,) = manifests(workspace, "corpus")
    assert corpus.counts["prepared"] == corpus.counts["archive"] == 96
    (model,) = manifests(workspace, "model")
    facts: dict[str, Any] = json.loads(model.read("model.json"))
    assert [epoch["epoch"] for epoch in facts["history"]] == [0, 1]
    assert not facts["history"][-1]["centres_collapsed"]
    undisturbed = tmp_path / "undisturbed"
    with job("train", f"workspace={undisturbed}", *words[1:], log=log, RAY_ADDRESS=cluster.address) as process:
        assert process.wait(TIMEOUT_S) == 0, log.read_text()
    (straight,) = manifests(undisturbed, "model")
    losses = [[epoch["loss"] for epoch in json.loads(run.read("model.json"))["history"]] for run in (model, straight)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    (index,) = manifests(workspace / "indexes", "index")
    assert index.counts == {"embedded": 96, "indexed": 96, "id_collisions": 0}
    assert index.manifest["recall"] == 1.0
    files = files_of(index)
    sidecars = [files[shard_files(number)["sidecar"]].uri for number in range(index.manifest["shards"])]
    ids = [row for path in sidecars for row in pq.read_table(path, columns=["id"])["id"].to_pylist()]
    assert ids == [row_id(path.name) for path in sorted((large_archive / "images").iterdir())]


def test_a_node_lost_with_the_shards_that_it_holds_costs_the_server_nothing(cluster: Cluster, tmp_path: Path) -> None:
    images = films(30)
    index = build(tmp_path, images, model_files(tmp_path, images), shards=4)
    words, log = ["--index", published(tmp_path, index), "serve.port=0"], tmp_path / "log"
    with job("serve", *words, log=log, RAY_ADDRESS=cluster.address) as process:
        wait_until(lambda: "search page: " in log.read_text(), process, log)
        page = re.search(r"search page: (\S+)/", log.read_text())
        assert page is not None
        address = f"{page[1]}/v1/images/00000001_000.png/similar?k=30"
        before = json.loads(urllib.request.urlopen(address).read())
        assert len(before["hits"]) + 1 <= before["passing"] + 1 <= 30
        holding = hosts(cluster, "ServeReplica")
        assert holding == {raylet(node) for node in cluster.worker_nodes}
        lose_one(cluster, holding)
        assert json.loads(urllib.request.urlopen(address).read()) == before
    cluster.add_node(num_cpus=1)


def test_an_archive_that_another_node_does_not_see_is_named() -> None:
    refuse_unshared([], {"workspace": "/data/w"})
    with pytest.raises(UserError, match=r"corpus\.archive=/data/a lies on this node's own disk.*s3://bucket/prefix"):
        refuse_unshared(["corpus.archive"], {"workspace": "/data/w", "corpus.archive": "/data/a"})
