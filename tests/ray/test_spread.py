"""Promises of shards that a cluster holds: the same answers as in one process, and nothing lost with a holder."""

import asyncio
import os
import re
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray
from fastapi.testclient import TestClient
from ray import serve

from cxr_retrieval.config import ServeSettings
from cxr_retrieval.errors import UserError
from cxr_retrieval.index import cache, spread
from cxr_retrieval.index.filters import EVERYTHING, Filters
from cxr_retrieval.index.groups import InProcess, ShardGroup, ShardsAway
from cxr_retrieval.index.search import Retriever, UnknownImage
from cxr_retrieval.index.spread import ShardHolder, Spread
from cxr_retrieval.index.versions import resolve, split_reference
from cxr_retrieval.privacy import Pseudonyms
from cxr_retrieval.serve.api import create_app
from cxr_retrieval.serve.live import LiveIndex
from cxr_retrieval.tombstones import Tombstones, remove
from jobs.serve import opener
from tests.indexes import Film, build, films, model_files, published
from tests.processes import TIMEOUT_S, job, ray_workers, wait_until

COUNT, SHARDS = 60, 5

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Film], tuple[bytes, bytes]]]:
    folder = tmp_path_factory.mktemp("spread")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cache.VARIABLE, str(folder / "cache"))
        images = films(COUNT)
        yield folder, images, model_files(folder, images)


@pytest.fixture
def fresh(world, tmp_path: Path) -> Callable[[int], str]:
    """Publishes so many of the films where nothing else is published; the reference of the alias."""
    _, images, files = world
    return lambda count: published(tmp_path, build(tmp_path, images[:count], files, shards=SHARDS))


def spread_over(reference: str, groups: int = 2, replicas: int = 1) -> Retriever:
    return Retriever.open(reference, partial(Spread, groups=groups, replicas=replicas))


def pids(retriever: Retriever) -> list[int]:
    """Of the replicas, group by group."""
    assert isinstance(retriever.holders, Spread)
    return [pid for app in retriever.holders.apps for pid in sorted(ray_workers(f"ServeReplica:{app}:"))]


def alive(pid: int) -> bool:
    """Whether it still runs: one that ended stays listed until Ray has noticed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def wait_for_the_end(processes: list[int]) -> None:
    wait_for(lambda: not any(map(alive, processes)))


@pytest.mark.parametrize(("lists", "groups"), [(0, 2), (8, 50)], ids=["flat", "ivf"])
def test_spread_shards_answer_as_one_process_does(world, lists: int, groups: int) -> None:
    folder, images, files = world
    reference = published(folder, build(folder, images, files, lists=lists, shards=SHARDS), f"as-one-{lists}")
    here, there = Retriever.open(reference), spread_over(reference, groups)
    assert isinstance(there.holders, Spread)
    assert [len(group) for group in there.holders.groups] == ([2, 3] if groups == 2 else [1] * SHARDS)
    assert (there.images, there.vocabulary, there.knows_regions) == (here.images, here.vocabulary, here.knows_regions)
    ids = [film.facts["image_id"] for film in images]
    for number, (asked, words) in enumerate(
        [
            (EVERYTHING, {}),
            (EVERYTHING, {"k": 5, "skip": 7}),
            (EVERYTHING, {"k": COUNT, "exclude_own": False}),
            (EVERYTHING, {"exclude_patient": images[30].facts["patient"]}),
            (Filters(sex="F", age_from=30), {"k": 4}),
            (Filters(views=("PA",), none_of=("Effusion",)), {"k": 20, "skip": 2, "exclude_own": False}),
            (Filters(any_of=("Mass", "Nodule")), {"k": COUNT}),
        ]
    ):
        image = images[11 * number % COUNT]
        for query in (here.query(image.png), here.query_of(image.facts["image_id"])):
            assert there.search(query, filters=asked, **words) == here.search(query, filters=asked, **words)
        mine = there.query_of(image.facts["image_id"])
        np.testing.assert_array_equal(mine.vector, here.query_of(image.facts["image_id"]).vector)
    noise = here.query(images[0].png)
    noise = replace(noise, pixels=np.random.default_rng(0).integers(0, 255, noise.pixels.shape, dtype=np.uint8))
    assert there.search(noise).warning == here.search(noise).warning is not None
    for image_id in (ids[0], ids[-1]):
        assert there.case(image_id) == here.case(image_id)
        assert there.thumbnail(there.case(image_id)) == here.thumbnail(here.case(image_id))
    with pytest.raises(UnknownImage):
        there.query_of("nobody.png")
    with pytest.raises(UserError, match="is not in this index"):
        there.search(mine, exclude_patient="nobody")
    with pytest.raises(UserError, match="it has AP, PA"):
        there.search(mine, filters=Filters(views=("XX",)))


def test_who_asks_opens_no_file_of_a_shard_and_a_holder_only_its_own(world) -> None:
    folder, images, files = world
    reference = published(folder, build(folder, images, files, shards=SHARDS), "own")
    retriever = spread_over(reference)
    assert not [name for name in retriever.version.paths if name.startswith("shards/")]
    shards = [name for name in retriever.version.version.files if name.startswith("shards/000")]
    assert len(shards) == 4 * SHARDS
    # A damaged shard is noticed by the holder that opens it, and by nobody else.
    version = resolve(*split_reference(reference))
    damaged = Path(version.object_uri(version.files["shards/00004.parquet"]))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1])
    try:
        ShardGroup(version, range(2))
        with pytest.raises(UserError, match="the bytes are not those that its name promises"):
            spread_over(reference)
    finally:
        damaged.write_bytes(whole)


def test_a_search_whose_holder_is_killed_is_answered_as_if_it_were_not(fresh) -> None:
    retriever = spread_over(fresh(COUNT))
    query = retriever.query_of("00000001_000.png")
    before = retriever.search(query, k=COUNT)
    first, second = pids(retriever)
    os.kill(second, signal.SIGKILL)
    assert retriever.search(query, k=COUNT) == before
    assert pids(retriever)[0] == first
    assert pids(retriever)[1] != second


def test_with_two_replicas_no_search_waits_for_one_that_died_or_hangs(fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    retriever = spread_over(fresh(COUNT), groups=1, replicas=2)
    query = retriever.query_of("00000001_000.png")
    before = retriever.search(query, k=COUNT)
    first, second = pids(retriever)
    monkeypatch.setattr(spread, "PATIENCE", 1.0)  # a process that starts again takes longer
    for pid in (first, second):
        os.kill(pid, signal.SIGKILL)
        for _ in range(5):
            assert retriever.search(query, k=COUNT) == before
        wait_for(lambda pid=pid: len(set(pids(retriever)) - {pid}) == 2)
    monkeypatch.undo()
    monkeypatch.setattr(spread, "ATTEMPT", 0.5)
    hung, _ = pids(retriever)
    os.kill(hung, signal.SIGSTOP)
    try:
        began = time.monotonic()
        for _ in range(5):
            assert retriever.search(query, k=COUNT) == before
        assert time.monotonic() - began < spread.PATIENCE
    finally:
        os.kill(hung, signal.SIGCONT)


def test_shards_that_do_not_answer_are_told_in_one_sentence_and_asked_again_later(
    fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LiveIndex(fresh(COUNT), 3600, spread_over) as live:
        client = TestClient(create_app(live, ServeSettings()), base_url="http://127.0.0.1")
        address = "/v1/images/00000001_000.png/similar"
        assert client.get(address).status_code == 200
        (_, second) = pids(live.retriever)
        os.kill(second, signal.SIGSTOP)
        try:
            monkeypatch.setattr(spread, "PATIENCE", 0.3)
            away = client.get(address)
        finally:
            os.kill(second, signal.SIGCONT)
        assert away.status_code == 503
        assert "the process that holds them is being started again" in away.json()["detail"]
        monkeypatch.setattr(spread, "PATIENCE", 30.0)
        assert client.get(address).status_code == 200


def test_a_holder_whose_shards_cannot_be_opened_again_says_why_until_they_can(fresh) -> None:
    reference = fresh(COUNT)
    retriever = spread_over(reference)
    query = retriever.query_of("00000001_000.png")
    before = retriever.search(query)
    version = retriever.version.version
    lost = Path(version.object_uri(version.files["shards/00004.parquet"]))
    aside = lost.rename(lost.with_name("aside"))
    os.kill(pids(retriever)[1], signal.SIGKILL)
    with pytest.raises(ShardsAway, match="the object is missing"):
        retriever.search(query)
    aside.rename(lost)
    assert retriever.search(query) == before


def test_a_new_version_is_served_by_new_holders_and_the_old_ones_end_with_its_last_request(world, fresh) -> None:
    _, images, files = world
    reference = fresh(20)
    with LiveIndex(reference, 3600, spread_over) as live:
        under_way = live.retriever
        old = pids(under_way)
        to = Path(split_reference(reference)[0])
        published(to.parents[1], build(to.parents[1], images[:30], files, shards=SHARDS))
        live.look()
        assert (live.moves, live.trouble, live.retriever.images) == (1, None, 30)
        assert under_way.search(under_way.query_of("00000001_000.png"), 30, exclude_own=False).passing == 20
        new = pids(live.retriever)
        assert not set(old) & set(new)
        assert all(map(alive, old))
        del under_way
        wait_for_the_end(old)
        assert all(map(alive, new))


def test_a_removed_patient_is_found_by_no_holder_not_even_by_one_that_was_started_again(fresh) -> None:
    reference = fresh(COUNT)
    to = split_reference(reference)[0]
    retriever = spread_over(reference, groups=1, replicas=2)
    query = retriever.query_of("00000001_000.png")
    patient = retriever.case("00000001_000.png").patient
    theirs = COUNT - retriever.search(query, COUNT).passing
    assert theirs >= 1
    assert remove(to, patient, Pseudonyms(None))
    retriever.honour(Tombstones.at(to))

    def gone() -> None:
        assert retriever.images == COUNT - theirs
        for _ in range(10):  # of one replica or the other
            answer = retriever.search(query, COUNT)
            assert (answer.known, answer.passing, len(answer.cases)) == (None, COUNT - theirs, COUNT - theirs)
            assert patient not in {case.patient for case in answer.cases}
        with pytest.raises(UnknownImage):
            retriever.query_of("00000001_000.png")

    gone()
    for pid in pids(retriever):
        os.kill(pid, signal.SIGKILL)
    gone()


def test_the_server_spreads_shards_where_there_is_a_cluster(fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = fresh(COUNT)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert isinstance(opener(ServeSettings(), reference)(reference).holders, InProcess)
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    for groups, count in ((None, 1), (2, 2)):  # one for every node; as asked for
        found = opener(ServeSettings(groups=groups), reference)(reference).holders
        assert isinstance(found, Spread)
        assert len(found.groups) == count


def test_shards_that_somebody_ends_under_a_server_are_opened_again_at_its_next_look(fresh) -> None:
    with LiveIndex(fresh(COUNT), 3600, partial(spread_over, groups=1)) as live:
        client = TestClient(create_app(live, ServeSettings()), base_url="http://127.0.0.1")
        address = "/v1/images/00000001_000.png/similar"
        before = client.get(address).json()
        assert isinstance(live.retriever.holders, Spread)
        serve.delete(live.retriever.holders.apps[0])
        away = client.get(address)
        assert (away.status_code, client.get("/readyz").status_code) == (503, 503)
        assert "somebody has ended what Ray Serve held" in away.json()["detail"]
        live.look()
        assert client.get("/readyz").status_code == 200
        assert client.get(address).json() == before


def test_an_opening_that_fails_says_so_and_leaves_nothing_on_the_cluster(
    fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(serve.status().applications)
    monkeypatch.setattr(spread, "ShardHolder", DiesAtItsStart)
    with pytest.raises(ShardsAway, match="Ray Serve could not start what holds the shards of this index"):
        spread_over(fresh(COUNT), groups=1)
    wait_for(lambda: set(serve.status().applications) <= before)


def test_a_replica_of_another_environment_than_the_servers_answers_nothing(fresh) -> None:
    version = resolve(*split_reference(fresh(COUNT)))
    same, other = (
        ShardHolder("nobody", environment, version.to, version.id, range(SHARDS))
        for environment in ({}, {"working_dir": "gcs://another.zip"})
    )
    assert asyncio.run(same.ask([], "rows", (), {})) == COUNT
    with pytest.raises(UserError, match="started by a job of another runtime environment"):
        asyncio.run(other.ask([], "rows", (), {}))


class DiesAtItsStart:
    def __init__(self, *_: object) -> None:
        os._exit(1)


def holders_now() -> set[int]:
    """Process ids of the shard holders of this session's Ray: another session's tests may have some too."""
    raylet = ray.get(ray.remote(num_cpus=0)(lambda: os.getppid()).remote())
    return {pid for pid, parent in ray_workers("ServeReplica:").items() if parent == raylet}


def test_the_job_asks_holders_on_the_cluster_and_they_end_with_it_however_it_ends(fresh, tmp_path: Path) -> None:
    address, log, before = ray.get_runtime_context().gcs_address, tmp_path / "log", holders_now()
    words = ["--index", fresh(COUNT), "serve.port=0", "serve.groups=2"]
    with job("serve", *words, log=log, RAY_ADDRESS=address) as process:
        wait_until(lambda: "search page: " in log.read_text(), process, log)
        page = re.search(r"search page: (\S+)/", log.read_text())
        assert page is not None
        with urllib.request.urlopen(f"{page[1]}/v1/images/00000001_000.png/similar?k=3") as answer:
            assert answer.read().count(b'"image_id"') == 4  # the query and three hits
        mine = holders_now() - before
        assert len(mine) == 2
        process.kill()
        wait_for_the_end(sorted(mine))
