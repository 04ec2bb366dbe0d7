"""What a large archive costs before its first partition is prepared: seconds, memory of the driver, temporary disk.

  python -m benchmarks.listing

The listing is simulated: names, sizes and versions of files that are not there, told as fast as they are asked for,
beside a real label table of as many rows. A real one adds the time of its requests, one for every thousand objects on
S3. What a name means (twice in the archive, no label row) is known only when all are listed, so no partition starts
before. Every run is a process of its own, and ends where it would hand the first partition to Ray.
"""

import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.claim import Claim, publish
from cxr_retrieval import storage
from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.corpus import preparation
from cxr_retrieval.corpus.formats.nih import COLUMNS, SEX

IMAGES, TIMES, ROUNDS = 1_000_000, 8, 3
SECONDS, BYTES = 60, 500  # what is meant to be enough: in all, and of the temporary folder for an image
TABLE = "Data_Entry_2017.csv"


class FirstPartition(Exception):
    """The first partition could start now."""


def listing(folder: str, images: int) -> Iterator[storage.StoredFile]:
    """What storage.list_files is to tell of an archive."""
    yield storage.StoredFile(TABLE, f"{folder}/{TABLE}", os.path.getsize(f"{folder}/{TABLE}"), 0.0)
    for number in range(images):
        path = f"images/{name(number)}"
        version = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big", signed=True)
        yield storage.StoredFile(path, f"{folder}/{path}", 400_000 + number % 1000, 0.0, version)


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


def until_the_first_partition(images: int) -> tuple[float, float, float]:
    """Seconds, highest resident MiB of this process, highest bytes of temporary files an image."""
    highest, ended = 0, threading.Event()

    def look() -> None:
        nonlocal highest
        while not ended.wait(0.1):
            highest = max(highest, unnamed_bytes())

    def first(*_: Any, **__: Any) -> None:
        raise FirstPartition

    real = storage.list_files
    with tempfile.TemporaryDirectory() as folder:
        write_table(folder, images)
        looking = threading.Thread(target=look, daemon=True)
        with (
            mock.patch.object(
                storage, "list_files", lambda uri, *rest: listing(uri, images) if uri == folder else real(uri, *rest)
            ),
            mock.patch.object(preparation, "_prepare_parts", first),
        ):
            looking.start()
            began = time.perf_counter()
            with suppress(FirstPartition):
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
        return process.submit(until_the_first_partition, images).result()


def main() -> None:
    found = [[fresh(images) for images in (IMAGES, IMAGES // TIMES)] for _ in range(ROUNDS)]
    (seconds, peak, disk), (_, less_peak, _) = np.median(found, axis=0)
    publish(
        "listing",
        [
            Claim.of(
                f"seconds until the first of {IMAGES:,} images may be decoded",
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
