"""Promises of the whole path on object storage, through a proxy that breaks requests and a server that is killed."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster.object_store import ObjectStore
from cxr_retrieval import storage
from cxr_retrieval.artifacts import Artifact
from cxr_retrieval.config import CorpusSettings, EmbeddingSettings, IndexSettings, NetworkSettings
from cxr_retrieval.corpus.parts import ROWS_FILE
from cxr_retrieval.corpus.preparation import prepare
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.embedding.stream import embed, read_part
from cxr_retrieval.errors import UserError
from cxr_retrieval.index import cache
from cxr_retrieval.index.build import build_index
from cxr_retrieval.index.search import Retriever
from cxr_retrieval.index.source import Source
from cxr_retrieval.index.versions import publish, resolve, verify
from cxr_retrieval.privacy import Pseudonyms
from cxr_retrieval.training.model import Model
from tests import proxy
from tests.commands import done, job
from tests.indexes import untrained_model
from tests.proxy import FaultProxy

SIZE = 64
SMALL = [f"corpus.size={SIZE}", "corpus.partition_images=16", "corpus.row_group_images=16"]
DOWN_S = 2.0

pytestmark = pytest.mark.usefixtures("ray_session", "faults")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))


def upload(folder: Path, uri: str) -> str:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.write_bytes(f"{uri}/{path.relative_to(folder)}", path.read_bytes())
    return uri


def settings(archive: str) -> CorpusSettings:
    return CorpusSettings(archive=archive, size=SIZE, partition_images=16, row_group_images=16, validation_share=0.25)


def rows(corpus: Artifact) -> list[dict[str, Any]]:
    """What was prepared, without where each image came from."""
    found = []
    for uri in corpus.part_uris:
        with storage.arrow_reader(f"{uri}/{ROWS_FILE}") as file:
            found += pq.read_table(file).drop_columns("source_uri").to_pylist()
    return found


def test_archive_and_workspace_may_lie_in_different_places(phantom_archive: Path, s3: str, tmp_path: Path) -> None:
    archive = upload(phantom_archive, f"{s3}/archive")
    from_s3 = prepare(settings(archive), str(tmp_path / "workspace"))[0]
    to_s3 = prepare(settings(str(phantom_archive)), f"{s3}/workspace")[0]
    assert from_s3.counts == to_s3.counts
    assert rows(from_s3) == rows(to_s3)


class Restarted:
    """Kills the server when something has been reached, and starts it again after a while."""

    def __init__(self, store: ObjectStore, reached: Callable[[], bool]) -> None:
        self._store, self._reached = store, reached
        self.happened = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Restarted":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            if self._reached():
                self._store.kill()
                time.sleep(DOWN_S)
                self._store.start()
                self.happened = True
                return


def told(work: Callable[[], Any]) -> Any:
    """What `work` returns, or None where it ended with one line for a person."""
    try:
        return work()
    except UserError:
        return None


def finished_in_spite_of(store: ObjectStore, reached: Callable[[], bool], work: Callable[[], Any]) -> Any:
    """`work` with the server killed and started again in its middle; run again where it ended with one clear line."""
    with Restarted(store, reached) as restarted, ThreadPoolExecutor(1) as pool:
        result = pool.submit(told, work).result(timeout=120)
    assert restarted.happened, "the work was over before the server was killed"
    return result if result is not None else work()


def stored(faults: FaultProxy, what: str) -> Callable[[], bool]:
    """Whether a file of that ending has been written since."""
    return lambda: any(method == "PUT" and path.partition("?")[0].endswith(what) for method, path in faults.seen)


@pytest.fixture
def model(phantom_archive: Path, tmp_path: Path) -> tuple[Corpus, Artifact]:
    corpus = Corpus(prepare(settings(str(phantom_archive)), str(tmp_path / "local"))[0])
    return corpus, untrained_model(str(tmp_path / "local"), corpus, NetworkSettings(dimensions=16))


def test_a_server_that_is_killed_amid_prepare_loses_no_row(
    phantom_archive: Path, s3: str, tmp_path: Path, object_store: ObjectStore, faults: FaultProxy
) -> None:
    undisturbed = prepare(settings(str(phantom_archive)), str(tmp_path / "local"))[0]
    faults.seen.clear()
    corpus, _ = finished_in_spite_of(
        object_store,
        stored(faults, "/manifest.json"),  # of the first part
        lambda: prepare(settings(str(phantom_archive)), f"{s3}/workspace"),
    )
    assert corpus.input_id == undisturbed.input_id
    assert corpus.manifest["content_id"] == undisturbed.manifest["content_id"]


def test_a_server_that_is_killed_amid_embed_and_publish_loses_nothing(
    s3: str, model: tuple[Corpus, Artifact], object_store: ObjectStore, faults: FaultProxy
) -> None:
    corpus, trained = model
    there = upload(Path(trained.uri), f"{s3}/workspace/models/{trained.input_id}")
    faults.seen.clear()
    embedded, _ = finished_in_spite_of(
        object_store,
        stored(faults, "/manifest.json"),
        lambda: embed(EmbeddingSettings(batch_size=16, workers=1), f"{s3}/workspace", there, corpus),
    )
    assert embedded.counts["embedded"] == corpus.rows
    read = [read_part(embedded, corpus, part, Model.open(there), []) for part in range(len(corpus.files))]
    assert sum(part.facts.num_rows for part in read) == corpus.rows  # and each row is its image's: read_part compares
    source = Source(corpus, embedded, there, "combined")
    build, _ = build_index(IndexSettings(shard_rows=40), f"{s3}/workspace", source, Pseudonyms(None))
    to = f"{s3}/published"
    faults.seen.clear()
    finished_in_spite_of(
        object_store,
        lambda: sum(method == "PUT" and "/published/objects/" in path for method, path in faults.seen) >= 3,
        lambda: publish(build, to, "latest"),
    )
    version = resolve(to, "latest")
    assert verify(to, version.id) == []
    retriever = Retriever.open(f"{to}@latest")
    assert retriever.holders.group.rows() == corpus.rows


def test_a_step_that_is_cut_off_for_good_says_so_in_one_line_and_goes_on_later(
    phantom_archive: Path, s3: str, faults: FaultProxy
) -> None:
    faults.inject(proxy.DENIED, 10_000, lambda method, path: method == "PUT" and "/parts/" in path)
    outcome = job("prepare", f"corpus.archive={phantom_archive}", f"workspace={s3}/workspace", *SMALL)
    assert outcome.code == 1
    assert "no right to it: cluster/iam-policy.json" in outcome.error
    states = json.loads(done("status", f"workspace={s3}/workspace", "--json"))
    assert [(state["step"], state["state"]) for state in states] == [("prepare", "failed")]
    assert "no right to it" in states[0]["error"]
    faults.reset()
    done("prepare", f"corpus.archive={phantom_archive}", f"workspace={s3}/workspace", *SMALL)


def test_preparing_through_a_bad_network_gives_the_same_corpus(
    phantom_archive: Path, s3: str, tmp_path: Path, faults: FaultProxy
) -> None:
    some = iter(range(1_000_000))
    kinds = [proxy.LOST_ANSWER, proxy.CUT, proxy.SLOW, proxy.HALF_ANSWER]
    for kind in kinds:
        faults.inject(kind, 4, lambda *_: next(some) % 7 == 0)
    corpus = prepare(settings(str(phantom_archive)), f"{s3}/workspace")[0]
    assert faults.injected >= 12
    undisturbed = prepare(settings(str(phantom_archive)), str(tmp_path / "local"))[0]
    assert corpus.manifest["content_id"] == undisturbed.manifest["content_id"]
