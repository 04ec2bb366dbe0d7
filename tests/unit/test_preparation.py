"""Promises of what a task of prepare costs, and of what it does with a file that it cannot read."""

import contextlib
import errno
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import botocore.exceptions
import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from cxr_retrieval import s3
from cxr_retrieval.artifacts import MANIFEST, PLAN, AccountingError, Artifact, Draft
from cxr_retrieval.config import CorpusSettings, PrivacySettings
from cxr_retrieval.corpus import preparation
from cxr_retrieval.corpus.exclusions import Exclusions
from cxr_retrieval.corpus.files import is_readable, read_listed
from cxr_retrieval.corpus.limits import RejectedImage
from cxr_retrieval.corpus.manifest import MANIFEST_FILE, ManifestWriter
from cxr_retrieval.corpus.parts import DECODING, PART_KIND, ROWS_FILE, part_of, prepare_part, shaping_of
from cxr_retrieval.corpus.rows import ARCHIVE
from cxr_retrieval.errors import UserError
from cxr_retrieval.index.removal import purge, workspace_holdings
from cxr_retrieval.privacy import Pseudonyms
from cxr_retrieval.tombstones import RemovedPatients, remove
from tests.dicoms import dataset, ramp, written
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
            return {"Body": io.BytesIO(b"bytes"), "ETag": "tag"}
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


def flagged(tmp_path: Path, **changes: Any) -> tuple[Any, list[dict[str, Any]]]:
    """A part of three images and its rows: of a PNG, and of DICOM whose header says NO and YES of burned-in text."""
    folder = Folder(tmp_path / "archive").images("png.png", "no.dcm", "yes.dcm")
    folder.table(line("png.png"), line("no.dcm"), line("yes.dcm"))
    assert cv2.imwrite(str(folder.path / "png.png"), np.full((70, 90), 7, np.uint8))
    for said in ("NO", "YES"):
        film = written(dataset(ramp(), BurnedInAnnotation=said))
        (folder.path / f"{said.lower()}.dcm").write_bytes(film)
    settings = CorpusSettings(archive=str(folder.path), **changes)
    (rows,) = folder.read().partitions()
    part = prepare_part(part_of(str(tmp_path), rows, shaping_of(settings)).begin(), rows, settings)
    return part, pq.read_table(f"{part.uri}/{ROWS_FILE}", columns=["image_id", "burned_in"]).to_pylist()


def test_every_row_tells_whether_its_header_says_that_text_is_burned_in(tmp_path: Path) -> None:
    part, rows = flagged(tmp_path)
    assert {row["image_id"]: row["burned_in"] for row in rows} == {"png.png": False, "no.dcm": False, "yes.dcm": True}
    assert part.manifest["burned_in"] == 1


def test_films_with_burned_in_text_are_left_out_by_their_rule_in_parts_of_their_own(tmp_path: Path) -> None:
    kept, _ = flagged(tmp_path / "kept")
    part, rows = flagged(tmp_path / "without", burned_in="exclude")
    assert {row["image_id"] for row in rows} == {"png.png", "no.dcm"}
    assert part.manifest["exclusion_rules"] == {"burned_in": 1}
    assert part.manifest["burned_in"] == 0
    assert part.input_id != kept.input_id


def test_what_was_prepared_before_burned_in_text_could_be_left_out_is_found_again() -> None:
    assert "burned_in" not in shaping_of(CorpusSettings())


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


SMALL = {"size": 64, "partition_images": 8, "row_group_images": 8, "max_quarantined": 1.0}
PUBLIC = PrivacySettings(pseudonymise=False)


class Killed(BaseException):
    """What ends a run whatever it is doing."""


class Prepared:
    """An archive of films that is prepared in this process, partition by partition, and may be killed after some."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.archive, self.workspace, self._patch = Folder(folder / "archive"), str(folder / "work"), monkeypatch
        self.names: list[str] = []

    def film(self, name: str, patient: str = "1", content: bytes | None = None) -> None:
        """Put a film into the archive, or a file of that content under a film's name."""
        self.names.append(line(name, patient=patient))
        pixels = np.random.default_rng(len(self.names)).integers(0, 256, (64, 64), np.uint8)
        self.archive.images(name).table(*self.names)
        (self.archive.path / name).write_bytes(content or cv2.imencode(".png", pixels)[1].tobytes())

    def settings(self, **changes: Any) -> CorpusSettings:
        return CorpusSettings(archive=str(self.archive.path), **(SMALL | changes))

    def run(self, most: int = 10**9, **changes: Any) -> Artifact:
        """Prepare it; killed after `most` partitions."""
        settings = self.settings(**changes)

        def results(plan: preparation.CorpusPlan, missing: list[int], *_: Any) -> Iterator[dict[str, Any]]:
            task = preparation._task_of(plan.draft, plan.parts[0], settings)
            for done, number in enumerate(missing):
                if done == most:
                    raise Killed
                yield task({"partition": number, "uri": plan.parts[number].uri})

        with self._patch.context() as patched:
            patched.setattr(preparation.HeadStart, "of", lambda *_: contextlib.nullcontext())
            patched.setattr(preparation, "_results", results)
            return preparation.prepare(settings, self.workspace, PUBLIC)[0]

    def killed_after(self, most: int, **changes: Any) -> set[str]:
        """The partitions that a run had finished when it was killed."""
        with pytest.raises(Killed):
            self.run(most, **changes)
        return self.finished()

    def finished(self) -> set[str]:
        return {path.parent.name for path in Path(self.workspace).glob(f"corpora/chest/parts/*/{MANIFEST}")}

    def planned(self, **changes: Any) -> list[str]:
        """The ids of the partitions that a run would prepare now."""
        return list(preparation.plan_corpus(self.settings(**changes), self.workspace, PUBLIC).draft.inputs)


@pytest.fixture
def films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    """32 of them, in four partitions, of 16 patients."""
    made = Prepared(tmp_path, monkeypatch)
    for number in range(32):
        made.film(f"{number:02d}.png", patient=str(number // 2))
    return made


def a_film_comes_first(films: Prepared) -> None:
    films.film("00 before.png")


def the_first_film_goes(films: Prepared) -> None:
    (films.archive.path / "00.png").unlink()


def films_come_and_go(films: Prepared) -> None:
    films.film("00 before.png")
    films.film("09 behind.png")
    (films.archive.path / "01.png").unlink()


@pytest.mark.parametrize(
    ("change", "again"), [(a_film_comes_first, 0), (the_first_film_goes, 1), (films_come_and_go, 1)]
)
def test_a_run_that_was_killed_keeps_its_partitions_whatever_comes_and_goes(
    change: Callable[[Prepared], None], again: int, films: Prepared
) -> None:
    done = films.killed_after(3)
    assert len(done) == 3
    change(films)
    assert len(done & set(films.planned())) == 3 - again
    made = films.run()
    assert len(done & set(made.manifest["inputs"])) == 3 - again
    assert len(films.finished()) == len(made.part_uris) + again, "nothing was prepared for nothing"
    assert films.run().input_id == made.input_id


def test_a_run_that_ends_on_bad_images_goes_on_behind_the_one_that_is_taken_away(films: Prepared) -> None:
    for name in ("00 bad.png", "10 bad.png"):
        films.film(name, content=b"no image")
    with pytest.raises(UserError, match=r"2 so far of 34 images are quarantined.* mend the archive or raise the limit"):
        films.run(max_quarantined=0.04)
    done = films.finished()
    assert len(done) == 2
    (films.archive.path / "00 bad.png").unlink()
    assert len(done & set(films.run(max_quarantined=0.04).manifest["inputs"])) == 1


def test_the_same_archive_has_the_same_partitions_whether_a_run_was_killed_or_not(films: Prepared) -> None:
    planned = films.planned()
    films.killed_after(2)
    assert films.planned() == planned
    assert list(films.run().manifest["inputs"]) == planned == films.planned()


def test_an_archive_that_is_again_as_it_was_prepared_makes_no_work_though_a_run_was_killed_meanwhile(
    films: Prepared,
) -> None:
    made = films.run()
    film, away = films.archive.path / "03.png", films.archive.path / "03.away"
    film.rename(away)
    films.killed_after(0)
    away.rename(film)
    assert films.run(0).input_id == made.input_id


def test_a_file_that_could_still_not_be_read_when_a_run_was_killed_makes_no_work(films: Prepared) -> None:
    films.film("zz.png")
    (films.archive.path / "zz.png").unlink()
    (films.archive.path / "zz.png").symlink_to("nothing")
    made = films.run()
    films.film("00 before.png")
    films.killed_after(0)
    assert films.planned()[:-1] == list(made.manifest["inputs"])


def test_a_run_that_was_killed_says_nothing_of_one_that_is_cut_otherwise(films: Prepared) -> None:
    smaller = films.planned(partition_images=16)
    films.killed_after(2)
    assert films.planned(partition_images=16) == smaller
    films.killed_after(1, partition_images=16)
    films.film("00 before.png")
    assert len(films.finished() & set(films.planned())) == 2
    assert len(films.finished() & set(films.planned(partition_images=16))) == 1


def test_a_patient_who_is_removed_after_a_run_was_killed_costs_the_partition_that_holds_her(films: Prepared) -> None:
    done = films.killed_after(3)
    remove(films.workspace, "0", Pseudonyms(None))
    films.film("00 before.png")
    assert len(done & set(films.planned())) == 2
    purge(workspace_holdings(films.workspace, RemovedPatients.of(films.workspace, PUBLIC)))
    assert len(films.finished()) == 2
    assert films.run().manifest["exclusion_rules"] == {"removed": 2}, "the manifest of the killed run is gone"


def test_a_head_start_is_of_an_archive_that_was_never_begun(films: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Draft] = []
    monkeypatch.setattr(preparation.HeadStart, "_at_work", classmethod(lambda _, draft, *__: begun.append(draft)))
    for _ in range(2):
        with preparation.HeadStart.of(films.settings(), films.workspace, PUBLIC):
            assert len(begun) == 1
        films.killed_after(0)


def a_row_is_lost(part: str) -> None:
    """Of the rows of a part; its manifest stays."""
    pq.write_table(pq.read_table(file := f"{part}/{ROWS_FILE}").slice(1), file)


def test_a_part_that_has_lost_rows_ends_the_job_in_one_line_that_names_it(films: Prepared) -> None:
    films.killed_after(3)
    damaged = next(Path(films.workspace).glob(f"corpora/chest/parts/*/{MANIFEST}"))
    a_row_is_lost(str(damaged.parent))
    with pytest.raises(UserError) as caught:
        films.run()
    assert str(caught.value).startswith(f"{damaged.parent}/{ROWS_FILE}: 7 rows, and 8 by the part's manifest: ")
    assert str(caught.value).endswith(
        "delete that manifest.json and run the same command again, which prepares this part anew"
    )
    damaged.unlink()
    assert films.run().counts["prepared"] == 32


def test_an_image_that_was_listed_and_is_in_no_part_is_never_shipped(films: Prepared) -> None:
    films.killed_after(3)
    manifest = next(Path(films.workspace).glob(f"corpora/chest/parts/*/{MANIFEST}"))
    a_row_is_lost(str(manifest.parent))
    told = json.loads(manifest.read_text())
    for name in ("archive", "prepared"):
        told["counts"][name] -= 1
    manifest.write_text(json.dumps(told))
    with pytest.raises(AccountingError, match=r"archive 32 = prepared 31 \+ quarantined 0"):
        films.run()


def test_a_duplicate_that_readers_would_see_is_never_shipped(films: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    films.film("99.png", content=(films.archive.path / "03.png").read_bytes())
    nothing = Exclusions(np.empty(0, np.int32), np.empty(0, np.int32))
    with monkeypatch.context() as patched:
        patched.setattr(Exclusions, "read", lambda _: nothing)
        with pytest.raises(AccountingError, match=r"rows do not add up: prepared 32 = train \d+"):
            films.run()
    assert films.run().counts["duplicates"] == 1
