"""Promises of the server: what it takes and gives, what it refuses and how, and that it follows its alias."""

import base64
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from fastapi.testclient import TestClient

from cxr_retrieval.config import ServeSettings
from cxr_retrieval.errors import UserError
from cxr_retrieval.index import cache
from cxr_retrieval.index.filters import Filters
from cxr_retrieval.index.search import Query, Retriever, Seen
from cxr_retrieval.serve import access, api, live
from cxr_retrieval.serve.api import create_app
from cxr_retrieval.serve.live import LiveIndex
from cxr_retrieval.serve.looking import MOST, Looking
from cxr_retrieval.tombstones import Tombstones
from jobs.serve import listening
from tests.indexes import Film, build, films, model_files, published
from tests.servers import serving, until

HERE = "http://127.0.0.1"
TOKEN = "a token of sixteen or more"
FIRST = "00000001_000.png"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Film], tuple[bytes, bytes]]]:
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cache.VARIABLE, str(folder / "cache"))
        images = films(50)
        yield folder, images, model_files(folder, images)


@pytest.fixture(scope="module")
def opened(world) -> Iterator[LiveIndex]:
    folder, images, files = world
    with LiveIndex(published(folder, build(folder, images, files), "served"), 3600) as found:
        yield found


@pytest.fixture(scope="module")
def client(opened: LiveIndex) -> TestClient:
    return TestClient(create_app(opened, ServeSettings(upload_mb=1)), base_url=HERE)


def asked(client: TestClient, data: bytes, **fields: Any) -> Any:
    return client.post("/v1/search", files={"image": ("film.png", data)}, data=fields)


def refusal(answer: Any, status: int) -> str:
    """The one sentence of a refusal."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"detail"}
    text: str = answer.json()["detail"]
    assert "\n" not in text
    return text


# ---- searching


class Slow:
    """An opened index whose network is busy until it is let go; it counts the images of every batch."""

    def __init__(self, retriever: Retriever) -> None:
        self.retriever, self.batches, self.free = retriever, [], threading.Event()
        self.waiting = threading.Semaphore(0)

    def decode(self, data: bytes, region: Any = None) -> Seen:
        seen = self.retriever.decode(data, region)
        self.waiting.release()
        return seen

    def look(self, images: Sequence[Seen]) -> list[Query]:
        self.batches.append(len(images))
        assert self.free.wait(30)
        return self.retriever.look(images)


def at_once(slow: Slow, asked: Sequence[tuple[bytes, Any]]) -> list[Future[Query]]:
    """Queries of as many threads, of which all but the first wait while the network is busy with that one's."""
    looking = Looking()
    with ThreadPoolExecutor(len(asked)) as threads:
        found = [threads.submit(looking.query, slow, *asked[0])]
        while not slow.batches:
            time.sleep(0.01)
        found += [threads.submit(looking.query, slow, *each) for each in asked[1:]]
        for _ in asked:
            assert slow.waiting.acquire(timeout=30)
        while len(looking._waiting) < len(asked) - 1:
            time.sleep(0.01)
        slow.free.set()
    return found


def test_who_asks_while_the_network_is_busy_is_looked_at_together_and_gets_their_own(opened: LiveIndex, world) -> None:
    images = world[1]
    asked = [(film.png, (10, 20, 60, 60) if n % 3 == 1 else None) for n, film in enumerate(images[: MOST + 4])]
    found = at_once(slow := Slow(opened.retriever), asked)
    assert slow.batches == [1, MOST, 3]
    for (data, region), each in zip(asked, found, strict=True):
        query, alone = each.result(), opened.retriever.query(data, region)
        assert (query.crop, query.pixel_sha256) == (alone.crop, alone.pixel_sha256)
        np.testing.assert_allclose(query.vector, alone.vector, atol=1e-5)
        assert query.scores == pytest.approx(alone.scores, abs=1e-5)


def test_a_network_that_fails_is_told_to_all_who_wait_and_works_again(opened: LiveIndex, world, monkeypatch) -> None:
    images, slow = world[1], Slow(opened.retriever)
    monkeypatch.setattr(opened.retriever.__class__, "look", broken := Broken())
    for each in at_once(slow, [(film.png, None) for film in images[:4]]):
        with pytest.raises(RuntimeError, match="no memory left"):
            each.result()
    assert broken.asked == 2
    monkeypatch.undo()
    assert Looking().query(opened.retriever, images[0].png, None).crop


class Broken:
    asked = 0

    def __call__(self, *_: Any) -> list[Query]:
        self.asked += 1
        raise RuntimeError("no memory left")


def test_an_upload_is_answered_as_the_library_answers(client: TestClient, opened: LiveIndex, world) -> None:
    images = world[1]
    retriever = opened.retriever
    answer = asked(client, images[0].png, k=5, view=["PA", "AP"], none_of="Hernia", region="10,20,60,60").json()
    query = retriever.query(images[0].png, (10, 20, 60, 60))
    expected = retriever.search(query, 5, Filters(views=("PA", "AP"), none_of=("Hernia",)))
    assert [hit["image_id"] for hit in answer["hits"]] == [case.image_id for case in expected.cases]
    assert [hit["distance"] for hit in answer["hits"]] == [case.distance for case in expected.cases]
    assert [hit["shared"] for hit in answer["hits"]] == [list(case.shared) for case in expected.cases]
    assert answer["passing"] == expected.passing
    assert answer["query"]["source_crop"] == [10, 20, 60, 60]
    assert answer["query"]["known_as"]["image_id"] == FIRST
    assert answer["version"] == retriever.version.version.id
    assert set(answer["query"]["scores"]) == set(retriever.model.findings)


def test_pages_follow_one_another_without_gap_or_repetition(client: TestClient) -> None:
    def page(skip: int, k: int) -> list[str]:
        found = client.get(f"/v1/images/{FIRST}/similar", params={"k": k, "skip": skip, "own_patient": "true"})
        return [hit["image_id"] for hit in found.json()["hits"]]

    everything = page(0, 100)
    assert everything[0] == FIRST
    assert len(everything) == len(set(everything)) == 50
    assert page(0, 20) + page(20, 20) + page(40, 20) == everything


def test_the_own_patient_is_found_only_when_asked_for(client: TestClient, world) -> None:
    for own, count in ((False, 0), (True, sum(film.facts["patient"] == "1" for film in world[1]))):
        hits = asked(client, world[1][0].png, k=100, own_patient=own).json()["hits"]
        assert sum(hit["patient"] == "1" for hit in hits) == count


def test_a_patient_whom_the_query_names_is_left_out_and_not_told_to_the_audit(
    client: TestClient, world, capsys: pytest.CaptureFixture[str]
) -> None:
    query = world[1][0].png
    nearest = asked(client, query).json()["hits"][0]["patient"]
    capsys.readouterr()
    hits = asked(client, query, k=100, without_patient=nearest).json()["hits"]
    assert len(hits) >= 10
    assert nearest not in {hit["patient"] for hit in hits}
    (line,) = audit_lines(capsys)
    assert line["asked"] == {"k": 100}
    assert "is not in this index" in asked(client, query, without_patient="nobody").json()["detail"]


def test_each_patient_is_found_once_when_asked_for(client: TestClient, world) -> None:
    patients = {film.facts["patient"] for film in world[1]}
    hits = asked(client, world[1][0].png, k=100, own_patient=True, one_per_patient=True).json()["hits"]
    assert len(hits) == len(patients) < len(world[1])
    assert {hit["patient"] for hit in hits} == patients


def test_a_hit_leads_to_its_picture_and_its_reasons(client: TestClient, world) -> None:
    picture = client.get(f"/v1/images/{FIRST}/thumbnail")
    assert (picture.headers["content-type"], picture.headers["cache-control"]) == ("image/jpeg", "no-store")
    assert cv2.imdecode(np.frombuffer(picture.content, np.uint8), 0).shape == (64, 64)
    uploaded = client.post("/v1/images/00000002_000.png/why", files={"image": world[1][0].png}).json()
    stored = client.get("/v1/images/00000002_000.png/why", params={"query": FIRST}).json()
    assert list(uploaded["distances"])[:3] == ["step1", "step2", "step3"]
    assert uploaded["query_crop"] == stored["query_crop"]
    assert uploaded["distances"]["combined"] == pytest.approx(stored["distances"]["combined"], abs=0.1)


def test_the_api_describes_itself_and_what_may_be_asked_for(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/search", "/v1/images/{image_id}/similar", "/v1/images/{image_id}/thumbnail"} <= set(paths)
    facts = client.get("/v1/index").json()
    assert (facts["images"], facts["views"], facts["sexes"]) == (50, ["AP", "PA"], ["F", "M"])
    assert facts["findings"][-1] == "No Finding"
    assert (facts["dated"], facts["regions"], facts["upload_bytes"]) == (True, True, 1 << 20)


def test_the_page_fetches_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert not [word for word in ("https://", "@import", "<link") if word in page.text]
    assert page.text.count("http://") == 1  # the name of SVG's vocabulary


# ---- what is refused


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"no image", "neither PNG, JPEG nor DICOM: 8 bytes that begin with b'no image'"),
        (b"", "neither PNG, JPEG nor DICOM: an empty file"),
        (b"\x89PNG\r\n\x1a\n", "the header of a PNG or JPEG and no image"),
        (bytes(cv2.imencode(".png", np.zeros((8, 8), np.uint8))[1]), "8 x 8 pixels, a side under 32"),
        (bytes(cv2.imencode(".png", np.zeros((64, 64), np.uint8))[1])[:-30], "64 x 64 PNG: "),
    ],
)
def test_what_is_no_image_is_refused_in_one_sentence(client: TestClient, data: bytes, text: str) -> None:
    found = refusal(asked(client, data), 422)
    assert found.startswith("the image cannot be searched with: ")
    assert text in found


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"view": "XX"}, "no image of this index has view 'XX': it has AP, PA"),
        ({"any_of": "Efusion"}, "no image of this index has finding 'Efusion': did you mean 'Effusion'?"),
        ({"age_from": "60", "age_to": "50"}, "ages from 60 to 50 hold none: the first is after the last"),
        ({"age_from": "old"}, "age_from: input should be a valid integer"),
        ({"date_from": "yesterday"}, "date_from: input should be a valid date"),
        ({"k": "0"}, "k: input should be greater than or equal to 1"),
        ({"veiw": "PA"}, "veiw: there is no such field"),
        ({"region": "1,2,3"}, "region: write x,y,width,height in pixels of the image"),
        ({"region": "\u00b2,1,1,1"}, "region: write x,y,width,height in pixels of the image"),  # a digit, no number
        ({"region": "100,0,100,50"}, "region 100,0,100,50 does not lie in the image of 128 x 128 pixels"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_in_one_sentence(client: TestClient, world, fields, text: str) -> None:
    assert text in refusal(asked(client, world[1][0].png, **fields), 422)
    if "region" not in fields:
        assert text in refusal(client.get(f"/v1/images/{FIRST}/similar", params=fields), 422)


def test_a_form_without_a_file_is_refused_in_one_sentence(client: TestClient) -> None:
    assert refusal(client.post("/v1/search", data={"k": 3}), 422) == "image: it is missing"
    assert refusal(client.post("/v1/search", data={"image": "x"}), 422) == "image: it must be a file"
    rotten = client.post("/v1/search", content=b"x", headers={"content-type": "multipart/form-data"})
    assert refusal(rotten, 400) == "Missing boundary in multipart."


@pytest.mark.parametrize("path", ["/v1/search", f"/v1/images/{FIRST}/why"])
def test_a_filter_in_the_address_of_an_upload_is_refused_and_not_passed_over(
    client: TestClient, world, path: str
) -> None:
    answer = client.post(path, params={"sex": "F", "k": 3}, files={"image": world[1][0].png})
    assert refusal(answer, 422) == "send these as fields of the form, beside the image, not in the address: sex, k"


def test_what_a_question_why_does_not_know_is_refused(client: TestClient) -> None:
    asked_too = {"query": FIRST, "region": "1,2,3,4"}
    assert refusal(client.get(f"/v1/images/{FIRST}/why", params=asked_too), 422).startswith("region: ")


@pytest.mark.parametrize("kind", ["similar", "thumbnail", "why?query=" + FIRST])
def test_an_image_that_is_not_in_the_index_is_not_found(client: TestClient, kind: str) -> None:
    text = refusal(client.get(f"/v1/images/nobody/{kind}"), 404)
    assert text == "image 'nobody' is not in this index: name an image as the index knows it"


def test_an_upload_over_the_limit_is_refused_whether_or_not_its_length_is_told(client: TestClient) -> None:
    expected = "the upload is larger than 1 MB: reduce the image or raise serve.upload_mb"
    assert refusal(asked(client, bytes(2 << 20)), 413) == expected
    parts = [b'--x\r\nContent-Disposition: form-data; name="image"; filename="f"\r\n\r\n', *[bytes(1 << 20)] * 2]
    untold = client.post("/v1/search", content=iter(parts), headers={"content-type": "multipart/form-data; boundary=x"})
    assert refusal(untold, 413) == expected


def test_an_upload_that_stalls_gives_its_place_back(opened: LiveIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "STALLED_SECONDS", 0.2)
    with serving(create_app(opened, ServeSettings())) as address, stalled(address) as connection:
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))  # to the end of the connection
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the upload stood still for 0.2 seconds: send it again" in answer


def test_an_upload_that_drips_gives_its_place_back(opened: LiveIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "SLOWEST_SECONDS", 0.5)
    with serving(create_app(opened, ServeSettings())) as address, stalled(address) as connection:
        connection.settimeout(0.05)
        answer, end = b"", time.monotonic() + 30
        while not answer.endswith(b"}") and time.monotonic() < end:
            connection.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                answer += connection.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the upload was not whole after 0.5 seconds: send it again" in answer


def test_a_server_that_is_told_to_stop_waits_for_no_upload_that_stalls(
    opened: LiveIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.serve.STOP_SECONDS", 1)
    with contextlib.ExitStack() as client:
        with serving(create_app(opened, ServeSettings())) as address:
            client.enter_context(stalled(address))
            time.sleep(0.5)  # it is being read
            began = time.monotonic()
        assert time.monotonic() - began < api.STALLED_SECONDS / 2


@contextlib.contextmanager
def stalled(address: str) -> Iterator[socket.socket]:
    """A client that has sent the first bytes of an upload, and sends no more."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST /v1/search HTTP/1.1\r\nHost: {host}\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        connection.sendall(f"{head}Content-Length: 1000\r\n\r\n--x\r\n".encode())
        yield connection


def test_a_bug_is_no_refusal(opened: LiveIndex, world, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Retriever, "look", broken)
    client = TestClient(create_app(opened, ServeSettings()), base_url=HERE, raise_server_exceptions=False)
    assert asked(client, world[1][0].png).status_code == 500


# ---- the alias


def test_a_moved_alias_is_followed_and_requests_under_way_end_on_the_old_version(world, monkeypatch) -> None:
    folder, images, files = world
    old, new = build(folder, images[:20], files), build(folder, images[:30], files)
    reference = published(folder, old, "moving")
    inside, go_on = threading.Event(), threading.Event()
    search = Retriever.search

    def slow(self: Retriever, *words: Any, **named: Any) -> Any:
        inside.set()
        assert go_on.wait(30)
        return search(self, *words, **named)

    with LiveIndex(reference, 0.02) as found:
        client = TestClient(create_app(found, ServeSettings()), base_url=HERE)
        first = found.retriever.version.version.id
        assert client.get("/readyz").json() == {"ready": True, "version": first, "images": 20, "trouble": None}
        answers: list[Any] = []
        with monkeypatch.context() as patch:
            patch.setattr(Retriever, "search", slow)
            under_way = threading.Thread(target=lambda: answers.append(asked(client, images[0].png, k=100).json()))
            under_way.start()
            assert inside.wait(30)
            published(folder, new, "moving")
            while found.moves == 0:
                assert under_way.is_alive()
            go_on.set()
            under_way.join()
        assert answers[0]["version"] == first
        assert answers[0]["passing"] <= 20
        after = asked(client, images[0].png, k=100, own_patient=True).json()
        assert after["version"] == client.get("/readyz").json()["version"] != first
        assert after["passing"] == 30


def test_while_the_alias_cannot_be_followed_the_old_version_serves_and_says_so(
    world, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, images, files = world
    found = LiveIndex(published(folder, build(folder, images[:20], files), "failing"), 3600)

    def away(*_: str) -> None:
        raise UserError("the store cannot be reached")

    with monkeypatch.context() as patch:
        patch.setattr(live, "named_version", away)
        found.look()
        found.look()
    assert (found.trouble, found.failures, found.moves) == ("alias failing: the store cannot be reached", 2, 0)
    assert capsys.readouterr().err.count("goes on serving") == 1  # not once a look
    assert len(found.retriever.search(found.retriever.query_of(FIRST), 3).cases) == 3
    found.look()
    assert found.trouble is None


@pytest.mark.parametrize("bug", [RuntimeError("Error in faiss"), MemoryError()], ids=["faiss", "memory"])
def test_a_bug_in_looking_at_the_alias_is_told_with_its_traceback_and_looking_goes_on(
    world, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bug: Exception
) -> None:
    folder, images, files = world
    with LiveIndex(published(folder, build(folder, images[:20], files), "bugged"), 0.02) as found:
        client = TestClient(create_app(found, ServeSettings()), base_url=HERE)

        def broken(*_: str) -> None:
            raise bug

        with monkeypatch.context() as patch:
            patch.setattr(live, "named_version", broken)
            until(lambda: found.failures > 2 or not found.watching)
            ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["trouble"]) == (200, f"alias bugged: {bug!r}")
        until(lambda: found.trouble is None)
    said = capsys.readouterr().err
    assert said.count("Traceback") == 1  # not once a look
    assert f"alias bugged: {bug!r}; version" in said


def test_an_alias_that_has_not_moved_is_looked_at_without_reading_its_manifest(world) -> None:
    folder, images, files = world
    found = LiveIndex(published(folder, build(folder, images[:20], files), "resting"), 3600)
    manifest = Path(found.to) / "versions" / f"{found.retriever.version.version.id}.json"
    away = manifest.rename(manifest.with_suffix(".away"))
    found.look()
    away.rename(manifest)
    assert found.trouble is None


def test_the_server_is_not_ready_when_nobody_looks_at_the_alias(world) -> None:
    folder, images, files = world
    found = LiveIndex(published(folder, build(folder, images[:20], files), "still"), 3600)
    client = TestClient(create_app(found, ServeSettings()), base_url=HERE)
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 503


@pytest.mark.parametrize("silent", ["removed patients", "alias silent"])
def test_a_look_that_is_not_answered_is_told_and_holds_up_neither_the_other_nor_its_count(
    world, monkeypatch: pytest.MonkeyPatch, silent: str
) -> None:
    folder, images, files = world
    monkeypatch.setattr(live, "LATE_SECONDS", 1.0)
    answered = threading.Event()

    def never(*_: str) -> None:
        assert answered.wait(60)
        raise UserError("the store is back")

    def away(*_: str) -> None:
        raise UserError("the store cannot be reached")

    with LiveIndex(published(folder, build(folder, images[:20], files), "silent"), 0.02) as found:
        client = TestClient(create_app(found, ServeSettings()), base_url=HERE)
        with monkeypatch.context() as patch:
            patch.setattr(Tombstones, "at", never if silent == "removed patients" else away)
            patch.setattr(live, "named_version", away if silent == "removed patients" else never)
            until(lambda: found.failures > 2 and not found.watching)
            ready = client.get("/readyz")
            assert (ready.status_code, ready.json()["ready"]) == (503, False)
            assert f"{silent}: no answer for " in ready.json()["trouble"]
            assert ready.json()["trouble"].count("the store cannot be reached") == 1
        answered.set()
        until(lambda: found.watching and found.trouble is None)
        assert client.get("/readyz").status_code == 200


def test_looks_that_fail_only_after_they_were_late_count_as_unanswered_until_one_ends_in_time(
    world, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, images, files = world
    found = LiveIndex(published(folder, build(folder, images[:20], files), "late"), 3600)
    monkeypatch.setattr(live, "LATE_SECONDS", 0.5)
    seconds = 0.6

    def away(*_: str) -> None:
        time.sleep(seconds)
        raise UserError("the store cannot be reached")

    with monkeypatch.context() as patch:
        patch.setattr(live, "named_version", away)
        found.look()
        assert str(found.trouble).startswith("alias late: no answer for ")
        seconds = 0.0
        found.look()
        assert found.trouble == "alias late: the store cannot be reached"
    found.look()
    assert found.trouble is None


# ---- who may ask, and what stays behind


def test_every_query_leaves_a_line_that_names_no_image_and_figures_that_name_none_either(
    client: TestClient, world, capsys: pytest.CaptureFixture[str]
) -> None:
    image, box = {"image": world[1][0].png}, "10,20,60,60"
    asked(client, world[1][0].png, k=3, sex="F", region=box)
    client.get(f"/v1/images/{FIRST}/similar")
    client.get(f"/v1/images/{FIRST}/thumbnail")
    client.post(f"/v1/images/{FIRST}/why", files=image, data={"region": box})
    client.get(f"/v1/images/{FIRST}/why", params={"query": FIRST})
    client.get("/v1/index")
    figures = client.get("/metrics").text
    lines = audit_lines(capsys)
    one = "/v1/images/{image_id:path}"
    assert [(line["method"], line["path"], line["asked"], line["hits"]) for line in lines] == [
        ("POST", "/v1/search", {"k": 3, "sex": "F", "region": box}, 3),
        ("GET", f"{one}/similar", {}, 8),
        ("GET", f"{one}/thumbnail", {}, None),
        ("POST", f"{one}/why", {"region": box}, None),
        ("GET", f"{one}/why", {}, None),
    ]
    assert {line["version"] for line in lines} == {client.get("/v1/index").json()["version"]}
    assert {line["status"] for line in lines} == {200}
    assert 'cxr_requests_total{method="POST",path="/v1/search",status="200"}' in figures
    assert 'cxr_index_images{version="' in figures
    assert FIRST not in json.dumps(lines) + figures


def test_a_query_that_was_refused_leaves_a_line_too(
    client: TestClient, opened: LiveIndex, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked(client, b"no image", view="PA")
    asked(client, b"no image", k=0)
    asked(client, bytes(2 << 20))
    client.get("/v1/images/nobody/thumbnail")
    monkeypatch.setattr(Retriever, "thumbnail", Broken())
    careless = TestClient(create_app(opened, ServeSettings()), base_url=HERE, raise_server_exceptions=False)
    careless.get(f"/v1/images/{FIRST}/thumbnail")
    monkeypatch.setenv(access.TOKEN_VARIABLE, TOKEN)
    guarded = ServeSettings(host="0.0.0.0", certificate="c", certificate_key="k")
    TestClient(create_app(opened, guarded), base_url=HERE).get(f"/v1/images/{FIRST}/similar")
    lines = audit_lines(capsys)
    version = opened.retriever.version.version.id
    assert [(line["status"], line["version"], line["asked"]) for line in lines] == [
        (422, version, {"view": ["PA"]}),
        (422, None, None),
        (413, None, None),
        (404, version, {}),
        (500, version, {}),
        (401, None, None),
    ]
    assert FIRST not in json.dumps(lines)


def test_methods_that_clients_make_up_are_one_series(client: TestClient) -> None:
    for method in ("BREW", "PROPFIND", "GETTING"):
        assert client.request(method, "/v1/index").status_code == 405
    figures = client.get("/metrics").text
    assert 'cxr_requests_total{method="other",path="/v1/index",status="405"} 3.0' in figures
    assert "BREW" not in figures


def audit_lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith('{"audit"')]


def test_a_browser_that_was_led_here_by_another_name_is_turned_away(client: TestClient) -> None:
    assert client.get("/v1/index", headers={"host": "elsewhere.example"}).status_code == 400


def test_a_page_from_elsewhere_cannot_show_or_probe_what_is_served(client: TestClient) -> None:
    for path in (f"/v1/images/{FIRST}/thumbnail", "/v1/images/nobody/thumbnail", "/", "/v1/index"):
        assert client.get(path).headers["cross-origin-resource-policy"] == "same-origin"


def test_more_requests_at_once_than_the_server_takes_are_told_to_come_again(
    opened: LiveIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "MOST_REQUESTS", 2)
    inside, free = threading.Semaphore(0), threading.Event()
    search = Retriever.search

    def slow(self: Retriever, *words: Any, **named: Any) -> Any:
        inside.release()
        assert free.wait(30)
        return search(self, *words, **named)

    monkeypatch.setattr(Retriever, "search", slow)
    with TestClient(create_app(opened, ServeSettings()), base_url=HERE) as client, ThreadPoolExecutor(2) as threads:
        similar = f"/v1/images/{FIRST}/similar"
        under_way = [threads.submit(client.get, similar) for _ in range(2)]
        for _ in under_way:
            assert inside.acquire(timeout=30)
        turned_away = client.get(similar)
        probes = [client.get(path).status_code for path in access.OPEN_PATHS]
        free.set()
        assert refusal(turned_away, 503) == "2 requests are under way: ask again in a moment"
        assert turned_away.headers["retry-after"] == "1"
        assert probes == [200, 200]
        assert [each.result().status_code for each in under_way] == [200, 200]
        assert client.get(similar).status_code == 200


def test_beyond_this_machine_a_token_is_asked_for(opened: LiveIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(access.TOKEN_VARIABLE, TOKEN)
    settings = ServeSettings(host="0.0.0.0", certificate="c.pem", certificate_key="k.pem")
    client = TestClient(create_app(opened, settings), base_url="https://anything.example")
    basic = base64.b64encode(f"doctor:{TOKEN}".encode()).decode()
    for words, status in (
        ({}, 401),
        ({"authorization": f"Bearer {TOKEN}x"}, 401),
        ({"authorization": f"Basic {basic[:-4]}"}, 401),
        ({"authorization": "Basic %%%"}, 401),
        ({"authorization": "Basic \xe9".encode("latin-1")}, 401),
        ({"authorization": f"Bearer {TOKEN}"}, 200),
        ({"authorization": f"Basic {basic}"}, 200),
    ):
        answer = client.get("/v1/index", headers=words)
        assert answer.status_code == status
    assert "Basic" in client.get("/").headers["www-authenticate"]
    assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "::", "somewhere.example"])
def test_the_server_listens_beyond_this_machine_only_with_token_and_tls(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(access.TOKEN_VARIABLE, raising=False)
    with pytest.raises(UserError, match="set CXR_SERVE_TOKEN"):
        access.token_for(ServeSettings(host=host))
    monkeypatch.setenv(access.TOKEN_VARIABLE, TOKEN)
    with pytest.raises(UserError, match=r"set serve\.certificate and serve\.certificate_key"):
        access.token_for(ServeSettings(host=host, certificate="c.pem"))
    assert access.token_for(ServeSettings(host=host, certificate="c.pem", certificate_key="k.pem")) == TOKEN


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_on_this_machine_nobody_is_asked_for_anything(host: str) -> None:
    assert access.token_for(ServeSettings(host=host)) is None


def test_a_port_that_is_taken_is_told_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"serve\.port={port}: cannot listen there \(Address already in use\)"):
            listening(ServeSettings(port=port))
