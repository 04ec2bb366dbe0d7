"""Promises of what a task of prepare costs, and of what it does with a file that it cannot read."""

import errno
import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import botocore.exceptions
import cv2
import numpy as np
import pytest

from cxr_retrieval import s3
from cxr_retrieval.artifacts import PLAN, Draft
from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.corpus import preparation
from cxr_retrieval.corpus.files import is_readable, read_listed
from cxr_retrieval.corpus.limits import RejectedImage
from cxr_retrieval.corpus.manifest import MANIFEST_FILE, ManifestWriter
from cxr_retrieval.corpus.parts import DECODING, PART_KIND, prepare_part
from cxr_retrieval.corpus.rows import ARCHIVE
from cxr_retrieval.errors import UserError
from tests.unit.test_archive import Folder, line

DECODES = """
import re, sys
from cxr_retrieval.corpus.decoding import Recipe, decode
from cxr_retrieval.corpus.limits import Limits
def held():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = held()
decode(open(sys.argv[1], "rb").read(), Recipe(256, "letterbox"), Limits(32, 10**8))
print(held() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the highest memory of a process is told by Linux")
@pytest.mark.parametrize(("kind", "channels"), [(np.uint16, 1), (np.uint16, 3), (np.uint8, 4)])
def test_decoding_takes_no_more_memory_than_a_task_is_given(kind: type, channels: int, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, np.iinfo(kind).max, (3000, 3000, channels), kind)
    assert cv2.imwrite(str(tmp_path / "film.png"), noise, [cv2.IMWRITE_PNG_COMPRESSION, 0])
    process = [sys.executable, "-c", DECODES, str(tmp_path / "film.png")]
    taken = int(subprocess.run(process, check=True, capture_output=True, text=True).stdout)
    assert 2 * 3000**2 < taken < DECODING * 3000**2


class Bucket:
    """Answers a GET of an object by one code of S3, but of good.png by its bytes."""

    meta = SimpleNamespace(endpoint_url="http://storage")

    def __init__(self, code: str) -> None:
        self._code = code

    def get_object(self, Key: str, **_: Any) -> dict[str, Any]:
        if Key.endswith("good.png"):
            return {"Body": io.BytesIO(b"bytes")}
        raise botocore.exceptions.ClientError({"Error": {"Code": self._code}}, "GetObject")


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("AccessDenied", "no right to it"),
        ("InvalidObjectState", "restore it"),
        ("NoSuchKey", "no such object any more"),
    ],
)
def test_one_object_that_cannot_be_read_is_quarantined_and_told_why(
    code: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "client", lambda *_: Bucket(code))
    monkeypatch.setattr(s3.RETRIES, "pause", lambda _: None)
    with pytest.raises(RejectedImage, match=told) as caught:
        read_listed("s3://films/Doe^John/1.png", 5)
    assert caught.value.reason == "unreadable"
    assert "Doe" not in caught.value.text
    assert "goes on" not in caught.value.text
    assert not is_readable("s3://films/Doe^John/1.png")
    assert read_listed("s3://films/Doe^John/good.png", 5) == b"bytes"


@pytest.mark.parametrize("code", ["ExpiredToken", "SlowDown", "InvalidAccessKeyId", "NoSuchBucket", "Whatever"])
def test_a_bucket_that_cannot_be_read_ends_the_job_without_the_name_of_an_image(
    code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "client", lambda *_: Bucket(code))
    with pytest.raises(UserError, match=r"^s3://films: ") as caught:
        read_listed("s3://films/Doe^John/1.png", 5)
    assert "Doe" not in str(caught.value)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT])
def test_a_file_whose_disk_fails_is_quarantined_alone_and_tried_again(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(tmp_path / "archive").images("a.png", "b.png").table(line("a.png"), line("b.png"))
    (rows,) = folder.read().partitions()
    opened = Path.open

    def fails(path: Path, *how: Any, **rest: Any) -> Any:
        if path.name == "a.png":
            raise OSError(number, "the disk fails", str(path))
        return opened(path, *how, **rest)

    monkeypatch.setattr(Path, "open", fails)
    settings = CorpusSettings(archive=str(folder.path))
    part = prepare_part(Draft(str(tmp_path / "part"), PART_KIND, {}, ()).begin(), rows, settings)
    assert part.manifest["quarantine_reasons"] == {"unreadable": 1, "not_an_image": 1}


@pytest.mark.parametrize("names", [False, True])
def test_a_process_that_dies_at_every_try_names_the_partitions_that_it_may_have_died_of(
    names: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "nodes_cpus", lambda: [4.0])
    draft = Draft(str(tmp_path / "corpus"), "corpus", {}, ())
    parts = [Draft(str(tmp_path / "parts" / str(number)), PART_KIND, {"n": number}, ()) for number in range(4)]
    Path(draft.uri).mkdir()
    with open(f"{draft.uri}/{MANIFEST_FILE}", "wb") as file, ManifestWriter.to(file) as writer:
        for number in range(4):
            uris = [f"/archive/Doe{number}/{image}.png" for image in "abc"]
            writer.write(preparation.pa.Table.from_pylist([{"source_uri": uri} for uri in uris], schema=ARCHIVE))
    for number in (0, 2):
        parts[number].begin()
        assert Path(parts[number].uri, PLAN).exists()
    told = preparation._death_told(draft, parts, [1, 2, 3], names)
    place = "/archive/Doe2/a.png to /archive/Doe2/c.png" if names else parts[2].uri
    assert f"died at every try: 2 ({place}); an image in it" in told
    assert ("Doe" in told) == names
    assert told.endswith("run the same command again, it goes on")
