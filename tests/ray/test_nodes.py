"""Promises on several nodes: one that is lost in the middle costs no row.

The nodes are Ray nodes of one machine: what they share is its disk, what they do not share is their processes.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from cxr_retrieval import artifacts
from cxr_retrieval.artifacts import Artifact
from cxr_retrieval.errors import UserError
from cxr_retrieval.runtime import refuse_unshared
from tests.processes import TIMEOUT_S, job, wait_until

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
    "privacy.pseudonymise=false",
]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head and two more nodes, a core each. A lost node is noticed in seconds, not in half a minute."""
    for name, value in (("period_ms", 1000), ("timeout_ms", 2000), ("failure_threshold", 2)):
        monkeypatch.setenv(f"RAY_health_check_{name}", str(value))
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        found.add_node(num_cpus=1)
    found.wait_for_nodes()
    yield found
    found.shutdown()


def hosts(cluster: Cluster, title: str) -> set[int]:
    """Process ids of the cluster's nodes (their raylets) that run a worker of that name now."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cmdline").read_bytes().startswith(f"ray::{title}".encode()):
                found.add(int((process / "stat").read_text().rpartition(")")[2].split()[1]))
    return found & {raylet(node) for node in cluster.list_all_nodes()}


def lose_one(cluster: Cluster, title: str) -> None:
    """Take a node away at once, as a power cut would: one that runs a worker of that name, if there is one."""
    busy = hosts(cluster, title)
    nodes = sorted(cluster.worker_nodes, key=lambda node: raylet(node) not in busy)
    cluster.remove_node(nodes[0], allow_graceful=False)


def raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def manifests(folder: Path, kind: str) -> list[Artifact]:
    found = [artifacts.find(str(path.parent)) for path in sorted(folder.rglob("manifest.json"))]
    return [artifact for artifact in found if artifact and artifact.manifest["kind"] == kind]


def test_a_node_lost_amid_prepare_train_embed_and_build_costs_nothing(
    cluster: Cluster, phantom_archive: Path, tmp_path: Path
) -> None:
    workspace, log = tmp_path / "workspace", tmp_path / "log"
    words = [f"workspace={workspace}", f"corpus.archive={phantom_archive}", *TINY]
    begun = {
        "Map(_PartTask)": "corpora/*/parts/*/manifest.json",
        "RayTrainWorker": "runs/*/checkpoint_*",
        "MapWorker(Map(_Embedder))": "embeddings/parts/*/manifest.json",
        "_build_shard": "indexes/*/builds/*/shards/*",
    }
    spread: dict[str, int] = {}
    # The driver's folder and environment are its own: the nodes were started elsewhere, without them.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with job("pipeline", *words, log=log, cwd=elsewhere, RAY_ADDRESS=cluster.address, ONLY_THE_DRIVER="1") as process:
        for title, pattern in begun.items():
            wait_until(lambda: any(workspace.glob(pattern)), process, log)  # noqa: B023
            spread[title] = len(hosts(cluster, title))
            lose_one(cluster, title)
            cluster.add_node(num_cpus=1)
        assert process.wait(TIMEOUT_S) == 0, log.read_text()

    assert spread["RayTrainWorker"] == 2, "a worker on each of two nodes"
    assert spread["MapWorker(Map(_Embedder))"] >= 2
    (corpus,) = manifests(workspace, "corpus")
    assert corpus.counts["prepared"] == corpus.counts["archive"] == 96
    (model,) = manifests(workspace, "model")
    facts: dict[str, Any] = json.loads(model.read("model.json"))
    assert [epoch["epoch"] for epoch in facts["history"]] == [0, 1]
    assert not facts["history"][-1]["centres_collapsed"]
    (index,) = manifests(workspace / "indexes", "index")
    assert index.counts == {"embedded": 96, "indexed": 96, "id_collisions": 0}
    assert index.manifest["recall"] == 1.0


def test_a_folder_that_another_node_does_not_see_is_refused_by_its_name() -> None:
    refuse_unshared([], {"workspace": "/data/w"})
    with pytest.raises(UserError, match=r"corpus\.archive=/data/a lies on this node's own disk.*s3://bucket/prefix"):
        refuse_unshared(["corpus.archive"], {"workspace": "/data/w", "corpus.archive": "/data/a"})
