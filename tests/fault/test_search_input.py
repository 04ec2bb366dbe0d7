"""Whatever is given to a search that is no query, or damaged in the index, is answered in one line and no traceback."""

import contextlib
import io
import json
import os
import runpy
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import faiss
import numpy as np
import pytest
import torch

from cxr_retrieval import storage
from cxr_retrieval.artifacts import CorruptArtifact, Draft
from cxr_retrieval.config import CorpusSettings, EmbeddingSettings, IndexSettings, NetworkSettings
from cxr_retrieval.corpus.decoding import Recipe
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.corpus.preparation import prepare
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.embedding.stream import embed
from cxr_retrieval.index import cache
from cxr_retrieval.index.build import build_index
from cxr_retrieval.index.search import Retriever
from cxr_retrieval.index.source import Source
from cxr_retrieval.index.versions import publish, resolve
from cxr_retrieval.network.progressive import uncentred
from cxr_retrieval.privacy import Pseudonyms
from cxr_retrieval.training.model import KIND as MODEL_KIND
from cxr_retrieval.training.model import build_network, normalised, write_model

pytestmark = pytest.mark.usefixtures("ray_session", "cache_folder")


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cache.VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def index(phantom_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A published index by a model with fresh weights."""
    workspace = str(tmp_path_factory.mktemp("search") / "workspace")
    corpus = Corpus(prepare(CorpusSettings(archive=str(phantom_archive), size=64, partition_images=48), workspace)[0])
    settings, recipe = NetworkSettings(dimensions=16), Recipe(64, "letterbox")
    torch.manual_seed(0)
    network = build_network(settings, len(FINDINGS)).eval()
    with torch.inference_mode():
        noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64), dtype=np.uint8)
        centring = {name: vector.mean(0) for name, vector in uncentred(network(normalised(noise, recipe))).items()}
    facts = {"network": settings.model_dump(), "findings": list(FINDINGS), "chosen": "combined"}
    draft = Draft(storage.join(workspace, "models", "fresh"), MODEL_KIND, {}, ()).begin()
    facts["decode_recipe"] = recipe.to_json()
    model = write_model(draft, facts, network.state_dict(), centring, torch.zeros(6, 15, 16), {"steps": 0})
    embedded, _ = embed(EmbeddingSettings(), workspace, model.uri, corpus)
    source = Source(corpus, embedded, model.uri, "combined")
    build, _ = build_index(IndexSettings(shard_rows=50), workspace, source, Pseudonyms(None))
    to = storage.join(workspace, "published")
    publish(build, to, "latest")
    return to


def search(*words: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `python -m jobs.search WORDS`, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["jobs.search", *words])
        patch.delitem(sys.modules, "jobs.search", raising=False)
        try:
            runpy.run_module("jobs.search", run_name="__main__")
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, out.getvalue(), err.getvalue()


def refusal(*words: str) -> str:
    code, out, err = search(*words)
    assert (code, out) == (1, ""), err
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def image(phantom_archive: Path) -> str:
    return str(min((phantom_archive / "images").iterdir()))


# ---- queries


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), png_chunk(b"IDAT", data or zlib.compress(b"\0")), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def film(side: int, ending: str = ".png") -> bytes:
    return bytes(cv2.imencode(ending, np.full((side, side), 90, np.uint8))[1])


BAD = {
    "tiny": (film(8), "too_small: 8 x 8 pixels"),
    "huge header": (png(200_000, 200_000), "too_large: 200000 x 200000 pixels"),
    "largest header": (png(2**31 - 1, 2**31 - 1), "too_large|damaged"),
    "no pixels": (png(0, 0), "damaged|not_an_image|too_small"),
    "pixels cut off": (png(64, 64, zlib.compress(b"\0" * 100)), "damaged"),
    "file cut off": (film(512)[:200], "damaged"),
    "jpeg cut off": (film(256, ".jpg")[:300], "damaged"),
    "empty": (b"", "not_an_image: .*an empty file"),
    "text": (b"Dear colleague, please find attached", "not_an_image"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
    "gif": (b"GIF89a" + bytes(64), "not_an_image"),
    "signature only": (b"\x89PNG\r\n\x1a\n", "damaged|not_an_image"),
    "jpeg start only": (b"\xff\xd8\xff\xe0", "damaged|not_an_image"),
    "dicom without an image": (bytes(128) + b"DICM" + bytes(64), "damaged"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_query_is_refused_in_one_line_that_names_the_file(kind: str, index: str, tmp_path: Path) -> None:
    data, reason = BAD[kind]
    path = tmp_path / "query.png"
    path.write_bytes(data)
    line = refusal(str(path), "--index", index)
    assert str(path) in line
    assert any(alternative.split(": .*")[0] in line for alternative in reason.split("|")), line
    assert "an empty file" in line or kind != "empty"


def test_a_file_that_is_not_there_or_a_folder_is_refused_in_one_line(index: str, tmp_path: Path) -> None:
    assert "there is no such file" in refusal(str(tmp_path / "none.png"), "--index", index)
    assert "of a folder, name the images in it" in refusal(str(tmp_path), "--index", index)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused_in_one_line(index: str, tmp_path: Path) -> None:
    path = tmp_path / "query.png"
    path.write_bytes(film(64))
    path.chmod(0)
    assert "permission denied" in refusal(str(path), "--index", index)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--region", "1,2", "'1,2' is no box: write X,Y,W,H in pixels of IMAGE"),
        ("--region", "a,b,c,d", "'a,b,c,d' is no box: write X,Y,W,H in pixels of IMAGE"),
        ("--date-from", "1.2.2020", "'1.2.2020' is no date: write YYYY-MM-DD"),
        ("--date-to", "2020", "'2020' is no date: write YYYY-MM-DD"),
    ],
)
def test_an_option_that_is_written_otherwise_says_how_to_write_it(
    option: str, value: str, said: str, index: str, image: str
) -> None:
    code, out, err = search(image, "--index", index, option, value)
    assert (code, out) == (2, "")
    assert f"argument {option}: {said}" in err


def test_a_bad_image_among_good_ones_is_named(index: str, image: str, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert "bad.png cannot be searched with" in refusal(image, str(tmp_path / "bad.png"), "--index", index)


def test_a_picture_that_looks_like_nothing_is_answered_and_said_to_be_unlike(index: str, tmp_path: Path) -> None:
    path = tmp_path / "query.png"
    path.write_bytes(film(64))
    code, out, _ = search(str(path), "--index", index, "--json")
    assert code == 0
    (found,) = json.loads(out)
    assert len(found["hits"]) == 8
    assert found["known_as"] is None
    assert found["passing"] >= 8
    assert found["nothing_similar"] is True
    assert "nothing similar" in found["warning"]


def test_an_image_far_from_everything_is_answered_with_a_warning(
    index: str, image: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened = Retriever.open

    def strict(reference: str) -> Retriever:
        retriever = opened(reference)
        retriever.facts["proof"]["far_distance"] = 0.0
        return retriever

    monkeypatch.setattr(Retriever, "open", strict)
    page = tmp_path / "out.html"
    code, _, err = search(image, "--index", index, "--gallery", str(page))
    assert code == 0
    assert "nothing similar in this index" in err
    assert "Nothing similar" in page.read_text()


def test_the_process_ends_with_status_one_and_one_line(index: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.search", str(tmp_path / "none.png"), "--index", index]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert (ended.returncode, ended.stdout) == (1, "")
    (line,) = ended.stderr.splitlines()
    assert line == f"error: {tmp_path / 'none.png'}: there is no such file; of a folder, name the images in it"


# ---- damaged indexes


@pytest.mark.parametrize(
    "name", ["shards/00001.faiss", "shards/00000.parquet", "index.json", "model/weights.safetensors"]
)
def test_a_flipped_byte_in_an_object_is_refused_before_anything_is_read(
    name: str, index: str, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert search(image, "--index", index)[0] == 0  # every object has its receipt now
    version = resolve(index, "latest")
    path = Path(version.object_uri(version.files[name]))
    whole = path.read_bytes()
    times = path.stat()
    read: list[str] = []
    monkeypatch.setattr(faiss, "read_index", lambda path, *_: read.append(path))
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    try:
        path.write_bytes(damaged)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if nobody had touched it
        assert "the bytes are not those that its name promises" in refusal(image, "--index", index)
        with pytest.raises(CorruptArtifact):
            Retriever.open(index)
    finally:
        path.write_bytes(whole)
    assert read == []


def test_an_object_that_is_gone_is_refused_in_one_line(index: str, image: str) -> None:
    version = resolve(index, "latest")
    path = Path(version.object_uri(version.files["shards/00000.rows.npy"]))
    path.rename(path.with_suffix(".away"))
    try:
        assert "the object is missing" in refusal(image, "--index", index)
    finally:
        path.with_suffix(".away").rename(path)


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("@nonsense", "there is no alias 'nonsense'; it has latest"),
        ("@" + "0" * 20, f"there is no version {'0' * 20}; it has latest"),
        ("@../../etc", "nothing is published there"),
        ("/deeper", "nothing is published there"),
        ("@", "write URI@alias or URI@version"),
    ],
)
def test_a_reference_to_nothing_says_what_there_is(reference: str, said: str, index: str, image: str) -> None:
    assert said in refusal(image, "--index", index + reference)


def test_a_store_that_this_project_does_not_know_is_refused(image: str) -> None:
    assert "only local paths, file:// and s3://" in refusal(image, "--index", "https://example.org/index@latest")
