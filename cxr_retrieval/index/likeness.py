"""Whether a picture looks like the images of an index at all, by its pixels.

Distances of embeddings do not tell: a network that has seen nothing but chest X-rays puts noise or a grey square as
near to them as they lie to each other (docs/serving.md has figures). Plain pixels do: reduced to a few, an upright
chest X-ray is like some other one.

N images, E numbers of a reduced image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SIDE = 16  # pixels of a reduced image
SAMPLE, GROUPS = 256, 16  # images, and the row groups of thumbnails that they are read from
UNLIKE_QUANTILE = 0.01  # of the images themselves, so many are called unlike


class Sample(NamedTuple):
    """Some images, reduced, and the patient of each."""

    reduced_NE: np.ndarray
    patients: list[str]


def row_groups(thumbnails: Path) -> int:
    """How many row groups a shard's thumbnails lie in."""
    return int(pq.ParquetFile(thumbnails).num_row_groups)


def even(groups: Sequence[int]) -> list[tuple[int, int]]:
    """A few row groups, spread evenly over shards that have so many: shard and row group."""
    everywhere = [(shard, group) for shard, count in enumerate(groups) for group in range(count)]
    places = np.unique(np.linspace(0, len(everywhere) - 1, min(GROUPS, len(everywhere))).astype(int))
    return [everywhere[place] for place in places]


def sample(thumbnails: Path, patients: pa.ChunkedArray, group: int, most: int) -> Sample:
    """Up to so many images of one row group of a shard's thumbnails; `patients` are those of the shard's rows."""
    file = pq.ParquetFile(thumbnails)
    first = sum(file.metadata.row_group(before).num_rows for before in range(group))
    pictures = file.read_row_group(group)["jpeg"]
    rows = np.linspace(0, len(pictures) - 1, min(len(pictures), most)).astype(int).tolist()
    reduced = []
    for row in rows:
        grey = cv2.imdecode(np.frombuffer(pictures[row].as_py(), np.uint8), cv2.IMREAD_GRAYSCALE)
        assert grey is not None, "a thumbnail is a JPEG that the build wrote"
        reduced.append(_reduced(grey))
    return Sample(np.stack(reduced), [patients[first + row].as_py() for row in rows])


@dataclass(frozen=True)
class Likeness:
    """An even sample of an index, reduced, and the correlation below which a picture is unlike all of it."""

    sample_NE: np.ndarray
    least: float

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Likeness":
        """The threshold is what 99 in 100 images of the sample reach with another patient's."""
        sample_NE = np.concatenate([part.reduced_NE for part in samples])
        owner_N = np.asarray([patient for part in samples for patient in part.patients], dtype=object)
        alike_NN = np.where(owner_N[:, None] == owner_N[None], -1.0, sample_NE @ sample_NE.T)
        return cls(sample_NE, float(np.quantile(alike_NN.max(1), UNLIKE_QUANTILE)))

    def unlike(self, pixels: np.ndarray) -> bool:
        """Whether prepared pixels uint8 [S, S] look like no image of the sample."""
        return float((self.sample_NE @ _reduced(pixels)).max()) < self.least


def _reduced(pixels: np.ndarray) -> np.ndarray:
    """Few pixels of mean 0 and unit length, float32 [E], so that a product is a correlation; zeros for one grey."""
    small = cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA).reshape(-1).astype(np.float32)
    small -= small.mean()
    reduced: np.ndarray = small / max(float(np.linalg.norm(small)), 1e-6)
    return reduced
