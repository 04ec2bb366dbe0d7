"""What a large archive costs before its first partition is prepared: seconds, memory of the driver, temporary disk.

  python -m benchmarks.listing

The listing is simulated: names, sizes and versions of files that are not there, told as fast as they are asked for,
beside a real label table of as many rows. A real one adds the time of its requests, one for every thousand objects on
S3. What a name means (twice in the archive, no label row) is known only when all are listed; the first partition is
prepared before that, by what the beginning tells, and its films are real. Runs that list all of it are processes of
their own, and end where they would hand the partitions to Ray.
"""

import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import ray

from benchmarks.archive import phantom_archive
from benchmarks.claim import Claim, publish
from cxr_retrieval import storage
from cxr_retrieval.artifacts import MANIFEST
from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.corpus import preparation
from cxr_retrieval.corpus.formats.nih import COLUMNS, SEX
from cxr_retrieval.runtime import start_ray

IMAGES, TIMES, ROUNDS = 1_000_000, 8, 3
PART, SIDE, DRAWN = 1024, 1024, 64  # of the first partition: films, their side, and how many differ
# What is meant to be enough: until the first images are out, until all are listed, of temporary disk for an image.
FIRST_SECONDS, SECONDS, BYTES = 30, 60, 500
TABLE = "Data_Entry_2017.csv"


class Listed(Exception):
    """All is listed, and every partition could start now."""


def listing(folder: str, images: int, sizes: Sequence[int] = ()) -> Iterator[storage.StoredFile]:
    """What storage.list_files is to tell of an archive whose first films have these `sizes`."""
    yield storage.StoredFile(TABLE, f"{folder}/{TABLE}", os.path.getsize(f"{folder}/{TABLE}"), 0.0)
    for number in range(images):
        path = f"images/{name(number)}"
        version = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big", signed=True)
        size = sizes[number] if number < len(sizes) else 400_000 + number % 1000
        yield storage.StoredFile(path, f"{folder}/{path}", size, 0.0, version)


@contextmanager
def simulated(folder: str, images: int, sizes: Sequence[int] = ()) -> Iterator[None]:
    """`prepare` of the archive in `folder` sees this listing, and ends in Listed when it has it."""
    real = storage.list_files

    def told(uri: str, *rest: Any) -> Iterator[storage.StoredFile]:
        return listing(uri, images, sizes) if uri == folder else real(uri, *rest)

    def listed(_: Any, __: Any, begun: Any, *___: Any, **____: Any) -> None:
        if begun is not None:
            assert not ray.get(begun)["error"]
        raise Listed

    with (
        mock.patch.object(storage, "list_files", told),
        mock.patch.object(preparation, "_prepare_parts", listed),
    ):
        yield


def name(number: int) -> str:
    return f"{number // 4:08d}_{number % 4:03d}.png"


def write_table(folder: str, images: int) -> None:
    """A label table of four images a patient."""
    with Path(folder, TABLE).open("w") as table:
        table.write(",".join((*COLUMNS, SEX[-1])) + "\n")
        for number in range(images):
            patient, follow_up = divmod(number, 4)
            found = "No Finding" if number % 2 else "Effusion|Cardiomegaly"
            table.write(f"{name(number)},{found},{follow_up},{patient},{20 + patient % 60},PA,{'FM'[patient % 2]}\n")


def unnamed_bytes() -> int:
    """Bytes on disk of the files that this process has open and that have no name."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            if os.readlink(entry).endswith(" (deleted)"):
                total += os.stat(entry).st_blocks * 512
    return total


def until_all_is_listed(images: int) -> tuple[float, float, float]:
    """Seconds, highest resident MiB of this process, highest bytes of temporary files an image."""
    highest, ended = 0, threading.Event()

    def look() -> None:
        nonlocal highest
        while not ended.wait(0.1):
            highest = max(highest, unnamed_bytes())

    with tempfile.TemporaryDirectory() as folder:
        write_table(folder, images)
        looking = threading.Thread(target=look, daemon=True)
        # Without its head start, which takes Ray: what the driver holds for the listing is asked here.
        with simulated(folder, images), mock.patch.object(preparation.HeadStart, "of", return_value=nullcontext()):
            looking.start()
            began = time.perf_counter()
            with suppress(Listed):
                preparation.prepare(CorpusSettings(archive=folder), f"{folder}/workspace")
            seconds = time.perf_counter() - began
        ended.set()
        looking.join()
    status = Path("/proc/self/status").read_text().splitlines()
    resident = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    return seconds, resident / 1024, max(highest, 1) / images


def fresh(images: int) -> tuple[float, float, float]:
    """The same in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(until_all_is_listed, images).result()


def until_the_first_images() -> float:
    """Seconds until the first PART images are decoded and written, Ray running. The listing goes on meanwhile."""
    start_ray()
    drawn = sorted(Path(phantom_archive(min(PART, DRAWN), SIDE), "images").iterdir())
    with tempfile.TemporaryDirectory(dir=drawn[0].parents[2]) as folder:
        write_table(folder, IMAGES)
        Path(folder, "images").mkdir()
        films = [drawn[number % len(drawn)] for number in range(PART)]
        for number, film in enumerate(films):
            os.link(film, Path(folder, "images", name(number)))

        def prepared() -> None:
            with suppress(Listed):
                preparation.prepare(CorpusSettings(archive=folder, partition_images=PART), f"{folder}/workspace")

        def out() -> list[Path]:
            return list(Path(folder, "workspace").glob(f"corpora/*/parts/*/{MANIFEST}"))

        with simulated(folder, IMAGES, [film.stat().st_size for film in films]):
            began = time.perf_counter()
            with ThreadPoolExecutor(1) as thread:
                at_work = thread.submit(prepared)
                while not (at_work.done() or out()):
                    time.sleep(0.02)
                seconds = time.perf_counter() - began
                at_work.result()
        assert len(out()) == 1, "the first partition is prepared, and no other"
    return seconds


def main() -> None:
    first = until_the_first_images()
    found = [[fresh(images) for images in (IMAGES, IMAGES // TIMES)] for _ in range(ROUNDS)]
    (seconds, peak, disk), (_, less_peak, _) = np.median(found, axis=0)
    publish(
        "listing",
        [
            Claim.of(
                f"seconds until the first {PART:,} of {IMAGES:,} images are prepared, {SIDE} x {SIDE}",
                f"{FIRST_SECONDS} s",
                1,
                [FIRST_SECONDS / first],
                seconds=first,
            ),
            Claim.of(
                f"seconds until {IMAGES:,} images are listed and joined with their labels",
                f"{SECONDS} s",
                1,
                [SECONDS / whole[0] for whole, _ in found],
                seconds=float(seconds),
            ),
            Claim.of(
                f"peak memory of the driver, {IMAGES // TIMES:,} images listed",
                f"of {TIMES} times as many",
                0.9,
                [less[1] / whole[1] for whole, less in found],
                MiB=float(less_peak),
                MiB_of_more=float(peak),
            ),
            Claim.of(
                "temporary disk for an image that is listed",
                f"{BYTES} bytes",
                1,
                [BYTES / whole[2] for whole, _ in found],
                bytes=float(disk),
            ),
        ],
    )


if __name__ == "__main__":
    main()
