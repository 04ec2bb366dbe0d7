"""The archives that benchmarks run on: phantoms in NIH's layout, drawn once under benchmarks/results."""

import csv
import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np

from benchmarks.claim import RESULTS
from cxr_retrieval import storage
from cxr_retrieval.config import PhantomSettings
from cxr_retrieval.corpus.phantom.archive import IMAGES, TABLE_FILE, write_phantom_archive

DRAWN = 256  # drawing takes tens of times as long as preparing: a large archive has these in many places


def phantom_archive(images: int, size: int) -> str:
    """URI of an archive of so many phantoms of `size` pixels a side; needs Ray."""
    out = str(RESULTS / f"phantoms-{images}-{size}")
    return write_phantom_archive(PhantomSettings(images=images, size=size, out=out))[0].uri


def png(grey_HW: np.ndarray) -> bytes:
    return cv2.imencode(".png", grey_HW)[1].tobytes()


def large_archive(
    images: int,
    size: int,
    encoded: Callable[[np.ndarray], bytes] = png,
    ending: str = ".png",
    name: str = "films-png",
    alike: int = 1,
) -> str:
    """URI of an archive of so many films of `size` pixels a side, each a file of what `encoded` gives; needs Ray.

    Phantoms are moved sideways, by other pixels for every time that they are taken, and each time of another patient:
    `alike` films have the same pixels, by default no two. The archives of a `name` lie together; one that is there is
    taken.
    """
    folder = RESULTS / f"{name}-{images}-{size}"
    if not (folder / TABLE_FILE).exists():
        drawn = Path(phantom_archive(min(images, DRAWN), size))
        header, *rows = csv.reader((drawn / TABLE_FILE).read_text().splitlines())
        (folder / IMAGES).mkdir(parents=True, exist_ok=True)
        cores = os.cpu_count() or 1
        turns = [range(core, -(-images // len(rows)), cores) for core in range(cores)]
        with ProcessPoolExecutor(cores, get_context("spawn")) as processes:
            shares = [(drawn, folder, [row[0] for row in rows], images, turn, encoded, ending, alike) for turn in turns]
            list(processes.map(_write_films, *zip(*shares, strict=True)))
        table = io.StringIO()
        csv.writer(table).writerows([header, *_table_rows(rows, images, ending)])
        storage.write_bytes(str(folder / TABLE_FILE), table.getvalue().encode())  # last: an archive with it is whole
    return str(folder)


def _table_rows(rows: list[list[str]], images: int, ending: str) -> Iterator[list[str]]:
    for number in range(images):
        turn, row = number // len(rows), rows[number % len(rows)]
        yield [_film_name(turn, row[0], ending), *row[1:3], f"{turn}-{row[3]}", *row[4:]]


def _film_name(turn: int, name: str, ending: str) -> str:
    return f"{turn}_{name.removesuffix('.png')}{ending}"


def _write_films(
    drawn: Path,
    folder: Path,
    names: list[str],
    images: int,
    turns: range,
    encoded: Callable[[np.ndarray], bytes],
    ending: str,
    alike: int,
) -> None:
    """Write all phantoms once a turn, moved by a pixel every `alike` turns, as far as the archive has so many films."""
    for place, name in enumerate(names):
        grey_HW = cv2.imread(str(drawn / IMAGES / name), cv2.IMREAD_GRAYSCALE)
        for turn in turns:
            if turn * len(names) + place < images:
                film_HW = np.ascontiguousarray(np.roll(grey_HW, turn // alike, axis=1))
                (folder / IMAGES / _film_name(turn, name, ending)).write_bytes(encoded(film_HW))
