"""What index to build for how many rows: pure arithmetic, tested without any data.

Only kinds whose filters FAISS applies inside the search: flat, and IVF whose lists hold the vectors as they are.
"""

import math
from dataclasses import dataclass

FLOAT_BYTES, ID_BYTES = 4, 8
TRAIN_PER_LIST = 64  # FAISS warns below 39 training vectors a list


@dataclass(frozen=True)
class Shard:
    """Rows `start` to `stop` of the embedded corpus."""

    number: int
    start: int
    stop: int


@dataclass(frozen=True)
class IndexPlan:
    """`lists` 0 is a flat index: exact. Otherwise IVF with one coarse quantizer shared by all shards."""

    rows: int
    dimensions: int
    lists: int
    training_rows: int
    shards: tuple[Shard, ...]

    @property
    def factory(self) -> str:
        """The FAISS factory string."""
        return f"IVF{self.lists},Flat" if self.lists else "Flat"

    @property
    def bytes(self) -> int:
        """Size of all FAISS files."""
        per_row = FLOAT_BYTES * self.dimensions + (ID_BYTES if self.lists else 0)
        return self.rows * per_row + self.lists * self.dimensions * FLOAT_BYTES


def plan_index(rows: int, dimensions: int, shard_rows: int, exact_rows: int) -> IndexPlan:
    """Plan an index of `rows` vectors: exact up to `exact_rows`, shards of at most `shard_rows`, evenly filled.

    The number of lists is 4 sqrt(rows), rounded to a power of two, or the largest one that can be trained.
    Raises ValueError for a number below 1.
    """
    if min(rows, dimensions, shard_rows) < 1:
        raise ValueError(f"rows, dimensions and shard_rows must be at least 1, got {rows}, {dimensions}, {shard_rows}")
    count = -(-rows // shard_rows)
    edges = [rows * number // count for number in range(count + 1)]
    shards = tuple(Shard(n, edges[n], edges[n + 1]) for n in range(count))
    if rows <= exact_rows:
        return IndexPlan(rows, dimensions, 0, 0, shards)
    trainable = max(1, rows // TRAIN_PER_LIST).bit_length() - 1
    lists = 2 ** min(round(math.log2(4 * math.sqrt(rows))), trainable)
    return IndexPlan(rows, dimensions, lists, min(rows, lists * TRAIN_PER_LIST), shards)


def plan_probes(lists: int) -> list[int]:
    """Numbers of lists to search that the proof tries, up to all of them; a flat index has the one setting 1."""
    return [2**power for power in range(lists.bit_length())] if lists else [1]
