"""Promises of what looks like an index's images by its pixels, on real X-rays."""

import csv
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr_retrieval.index.likeness import SAMPLE, Likeness, even, row_groups, sample

SIZE, SHARDS = 128, 3


@pytest.fixture(scope="module")
def xrays(nih_sample: Path) -> tuple[list[np.ndarray], list[str]]:
    """1,600 X-rays and their patients."""
    rows = list(csv.DictReader((nih_sample / "dev" / "Data_Entry_2017_v2020.csv").read_text().splitlines()))
    rows = sorted(rows, key=lambda row: row["Image Index"])[:1600]
    films = [cv2.imread(str(nih_sample / "dev" / "images" / row["Image Index"]), cv2.IMREAD_GRAYSCALE) for row in rows]
    return [cv2.resize(film, (SIZE, SIZE), interpolation=cv2.INTER_AREA) for film in films if film is not None], [
        row["Patient ID"] for row in rows
    ]


def chosen(patients: list[str]) -> np.ndarray:
    """Every other patient's images, bool [N]."""
    return np.isin(patients, sorted(set(patients))[::2])


def likeness(thumbnails: list[Path], owners: list[pa.ChunkedArray]) -> Likeness:
    places = even([row_groups(path) for path in thumbnails])
    most = SAMPLE // len(places)
    return Likeness.of([sample(thumbnails[shard], owners[shard], group, most) for shard, group in places])


@pytest.fixture(scope="module")
def indexed(xrays: tuple[list[np.ndarray], list[str]], tmp_path_factory: pytest.TempPathFactory) -> Likeness:
    """Those of every other patient, in shards of several row groups."""
    folder, (films, patients) = tmp_path_factory.mktemp("shards"), xrays
    paths, owners = [], []
    for number, part in enumerate(np.array_split(np.flatnonzero(chosen(patients)), SHARDS)):
        pictures = [bytes(cv2.imencode(".jpg", films[n])[1]) for n in part]
        paths.append(folder / f"{number}.parquet")
        pq.write_table(pa.table({"jpeg": pictures}), paths[-1], row_group_size=64)
        owners.append(pa.chunked_array([[patients[n] for n in part]]))
    return likeness(paths, owners)


def test_x_rays_of_other_patients_are_like_the_index_all_but_a_few(xrays, indexed: Likeness) -> None:
    films, patients = xrays
    others = [film for film, mine in zip(films, chosen(patients), strict=True) if not mine]
    assert len(others) > 600
    assert np.mean([indexed.unlike(film) for film in others]) < 0.03  # the images of a patient are much alike


@pytest.mark.parametrize(
    ("spoil", "least"),
    [
        (lambda film: np.random.default_rng(int(film.sum())).integers(0, 255, film.shape, dtype=np.uint8), 1.0),
        (lambda film: np.full_like(film, int(film.mean())), 1.0),
        (lambda film: 255 - film, 0.95),
        (lambda film: film[::-1], 0.8),
        (lambda film: np.rot90(film), 0.6),
    ],
    ids=["noise", "one grey", "inverted", "upside down", "sideways"],
)
def test_what_is_no_upright_x_ray_is_unlike(
    xrays, indexed: Likeness, spoil: Callable[[np.ndarray], np.ndarray], least: float
) -> None:
    spoilt = [np.ascontiguousarray(spoil(film)) for film in xrays[0][:200]]
    assert np.mean([indexed.unlike(film) for film in spoilt]) >= least


def ramp() -> np.ndarray:
    """From black to white, corner to corner."""
    return (np.indices((SIZE, SIZE)).sum(0) // 2).astype(np.uint8)


def test_an_index_of_one_patient_calls_nothing_unlike(tmp_path: Path) -> None:
    pq.write_table(pa.table({"jpeg": [bytes(cv2.imencode(".jpg", ramp())[1])] * 3}), tmp_path / "0.parquet")
    alone = likeness([tmp_path / "0.parquet"], [pa.chunked_array([["p"] * 3])])
    assert not alone.unlike(255 - ramp())
