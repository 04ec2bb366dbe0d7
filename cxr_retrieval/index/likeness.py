"""Whether a picture looks like the images of an index at all, by its pixels.

Distances of embeddings do not tell: a network that has seen nothing but chest X-rays puts noise or a grey square as
near to them as they lie to each other (docs/serving.md has figures). Plain pixels do: reduced to a few, an upright
chest X-ray is like some other one.

N images, E numbers of a reduced image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SIDE = 16  # pixels of a reduced image
SAMPLE, GROUPS = 256, 16  # images, and the row groups of thumbnails that they are read from
UNLIKE_QUANTILE = 0.01  # of the images themselves, so many are called unlike


@dataclass(frozen=True)
class Likeness:
    """An even sample of an index, reduced, and the correlation below which a picture is unlike all of it."""

    sample_NE: np.ndarray
    least: float

    @classmethod
    def of(cls, thumbnails: Sequence[Path], patients: Sequence[pa.ChunkedArray]) -> "Likeness":
        """From each shard's thumbnails and the patient of each of its rows.

        The threshold is what 99 in 100 images of the sample reach with another patient's.
        """
        files = [pq.ParquetFile(path) for path in thumbnails]
        groups = [(shard, group) for shard, file in enumerate(files) for group in range(file.num_row_groups)]
        places = np.unique(np.linspace(0, len(groups) - 1, min(GROUPS, len(groups))).astype(int))
        reduced, owners = [], []
        for shard, group in (groups[place] for place in places):
            metadata = files[shard].metadata
            first = sum(metadata.row_group(before).num_rows for before in range(group))
            pictures = files[shard].read_row_group(group)["jpeg"]
            count = min(len(pictures), SAMPLE // len(places))
            for row in np.linspace(0, len(pictures) - 1, count).astype(int).tolist():
                grey = cv2.imdecode(np.frombuffer(pictures[row].as_py(), np.uint8), cv2.IMREAD_GRAYSCALE)
                assert grey is not None, "a thumbnail is a JPEG that the build wrote"
                reduced.append(_reduced(grey))
                owners.append(patients[shard][first + row].as_py())
        sample_NE, owner_N = np.stack(reduced), np.asarray(owners, dtype=object)
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
