"""What index to build for how many rows: pure arithmetic, tested without any data.

From exact (every row is compared) over lists (IVF) of the rows as they are stored to lists of ever shorter codes, whose
first candidates are compared again by the stored float16 rows. All of them filter inside the search. A graph of
rows (HNSW) does not do that well: it loses most hits of a narrow filter, and graphs of shards are not the graph of all
rows. A graph finds the lists here, once there are so many that comparing a query with each takes long.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from cxr_retrieval import storage
from cxr_retrieval.config import IndexSettings

FLOAT_BYTES, HALF_BYTES, ID_BYTES, LINK_BYTES = 4, 2, 8, 4
GIB = 1 << 30
TRAIN_PER_LIST = 64  # FAISS warns below 39 training vectors a list
CODEBOOK_ROWS = 65_536  # enough for the 256 entries of a codebook, and for the ends of an 8-bit range
ITERATIONS = 10
GRAPH_LISTS = 1 << 16
GRAPH_LINKS = 32
# One core, measured as docs/index.md says. Elements: rows times dimensions.
ELEMENTS_PER_MS = 5e6
PRODUCTS_PER_MS = 2e7  # of a matrix product: training, and finding a row's list without a graph
GRAPH_MS, SHARD_MS, CANDIDATE_MS = 0.15, 0.06, 0.004
ROW_MS = 2.5  # reading a row and its image, thumbnail, sidecar
# Memory of building a shard: vectors as read, as taken and as floats; thumbnails and sidecar.
ROW_BYTES = 16_000
# Memory of searching, beside the codes: what is known of a row, and what finds it by its id, patient and pixels.
KNOWN_BYTES = 430
CODEBOOK = 256  # entries for every number of a vector, as floats: every shard holds its own copy


@dataclass(frozen=True)
class Code:
    """How an index keeps a vector: its FAISS name and size. Of a search for k, the first `candidates` * k by these
    codes are compared by the stored rows. `recall` is what that keeps, measured as docs/index.md says. `codebook` is
    the size of what every shard needs to read them."""

    name: str
    bytes: int
    candidates: int
    recall: float
    codebook: int = 0


@dataclass(frozen=True)
class IndexPlan:
    """`lists` 0 is exact: every row is compared. Otherwise IVF with one coarse quantizer shared by all shards.

    `shards` is how many there are where each is filled up to `shard_rows`; they are made of whole parts of the corpus.
    `probes` is a first guess that the proof replaces. `latency_ms` of one search and `build_hours` are estimates for
    one core. `machines` of the memory in the settings hold all codes and what is known of the rows. `why` explains
    every choice in a sentence.
    """

    rows: int
    dimensions: int
    lists: int
    code: Code
    probes: int
    training_rows: int
    shards: int
    shard_rows: int
    latency_ms: float
    build_hours: float
    machines: int
    why: dict[str, str]

    @property
    def factory(self) -> str:
        """The FAISS factory string."""
        return f"IVF{self.lists}{'_HNSW32' if self.graph else ''},{self.code.name}" if self.lists else self.code.name

    @property
    def graph(self) -> bool:
        """Whether a graph finds the lists."""
        return self.lists >= GRAPH_LISTS

    @property
    def bytes(self) -> int:
        """Size of all FAISS files."""
        return _bytes(self.rows, self.dimensions, self.lists, self.code, self.shards)

    @property
    def memory(self) -> int:
        """Bytes that all codes take, and what is known of the rows."""
        return _memory(self.rows, self.dimensions, self.lists, self.code, self.shards)


def plan_index(rows: int, dimensions: int, settings: IndexSettings) -> IndexPlan:
    """Plan an index of `rows` vectors. Raises ValueError for a number below 1."""
    if min(rows, dimensions) < 1:
        raise ValueError(f"rows and dimensions must be at least 1, got {rows}, {dimensions}")
    memory = settings.memory_gib * GIB
    shard_rows, why_shards = _shard_rows(dimensions, settings)
    shards = -(-rows // shard_rows)
    exact = Code("SQfp16", HALF_BYTES * dimensions, 1, 1.0)
    scan_ms = rows * dimensions / ELEMENTS_PER_MS + shards * SHARD_MS
    scan, aim = f"comparing all rows takes about {_ms(scan_ms)}", f"index.latency_ms={settings.latency_ms:g}"
    size, room = _memory(rows, dimensions, 0, exact, shards), f"index.memory_gib={settings.memory_gib:g}"
    if settings.recall_target == 1 or (size <= memory and scan_ms <= settings.latency_ms):
        lists, code, probes, training_rows = 0, exact, 1, 0
        reason = (
            "only an exact index promises index.recall_target=1"
            if settings.recall_target == 1
            else f"exact: {scan}, within {aim}"
        )
        why = {"kind": reason, "code": "the rows as they are stored, float16: nothing is lost"}
    else:
        lists, why_lists = _lists(rows, dimensions, memory)
        code, why_code = _code(rows, dimensions, lists, shards, settings)
        probes = min(lists, max(1, round(math.sqrt(lists) / 2)))
        training_rows = min(rows, max(lists * TRAIN_PER_LIST, CODEBOOK_ROWS))
        reason = (
            f"{scan}, over {aim}"
            if scan_ms > settings.latency_ms
            else f"all rows, and what is known of them, take {_size(size)}, over {room}"
        )
        why = {
            "kind": f"lists, of which a search reads a few: {reason}",
            "lists": why_lists,
            "code": why_code,
            "probes": "a first guess: the proof measures, and takes the fewest that reach index.recall_target",
        }
    latency = _latency_ms(rows, dimensions, lists, probes, shards, code) if lists else scan_ms
    size = _memory(rows, dimensions, lists, code, shards)
    machines = math.ceil(size / memory)
    if latency > settings.latency_ms:
        why["latency"] = f"a search takes about {_ms(latency)} on one core, over {aim}"
    if machines > 1:
        why["machines"] = (
            f"codes and what is known of the rows take {_size(size)}: spread over so many with {room} each"
            " (docs/serving.md); on one alone what is known must fit, and codes that do not are read from its disk,"
            " search by search"
        )
    why["shards"] = why_shards
    hours = _build_ms(rows, dimensions, lists, training_rows) / 3.6e6
    return IndexPlan(
        rows, dimensions, lists, code, probes, training_rows, shards, shard_rows, latency, hours, machines, why
    )


def whole_parts(sizes: Sequence[int], most: int) -> list[range]:
    """Neighbouring parts of a corpus by shards: a shard takes parts until the next would make it larger than `most`.

    What comes behind never changes what was taken, so a corpus that grows keeps its shards but the last. A part that is
    larger than `most` is a shard of its own.
    """
    edges, filled = [0], 0
    for part, size in enumerate(sizes):
        if part > edges[-1] and filled + size > most:
            edges.append(part)
            filled = 0
        filled += size
    return [range(*pair) for pair in pairwise([*edges, len(sizes)])]


def plan_probes(lists: int) -> list[int]:
    """Numbers of lists to search that the proof tries, ascending to all of them; an exact index has the one setting 1.

    Powers of two and the middle between two of them.
    """
    steps = (number for power in range(lists.bit_length()) for number in (2**power, 3 * 2**power // 2))
    return sorted({*(number for number in steps if number < lists), max(lists, 1)})


def _bytes(rows: int, dimensions: int, lists: int, code: Code, shards: int) -> int:
    graph = 2 * GRAPH_LINKS * LINK_BYTES if lists >= GRAPH_LISTS else 0
    return (
        rows * (code.bytes + (ID_BYTES if lists else 0))
        + lists * (dimensions * FLOAT_BYTES + graph)
        + shards * code.codebook
    )


def _memory(rows: int, dimensions: int, lists: int, code: Code, shards: int) -> int:
    return _bytes(rows, dimensions, lists, code, shards) + rows * KNOWN_BYTES


def _shard_rows(dimensions: int, settings: IndexSettings) -> tuple[int, str]:
    """Rows that a shard is filled up to: `shard_rows`, or as many as a machine has the memory to build."""
    in_memory = max(1, int(settings.memory_gib * GIB / shard_bytes(1, dimensions)))
    if settings.shard_rows <= in_memory:
        small = settings.shard_rows * max(ROW_BYTES, HALF_BYTES * dimensions) < storage.MOST_BYTES
        why = f"index.shard_rows={settings.shard_rows}, "
        why += "so that" if small else "where it is not sure that"
        why += " a file stays below the 5 GB that S3 takes at once"
    else:
        why = f"building {in_memory} rows takes all of index.memory_gib={settings.memory_gib:g}"
    return min(settings.shard_rows, in_memory), why


def shard_bytes(rows: int, dimensions: int) -> int:
    """About the memory that building a shard of so many rows takes."""
    return rows * (10 * dimensions + ROW_BYTES)


def _lists(rows: int, dimensions: int, memory: float) -> tuple[int, str]:
    """A power of two near 4 sqrt(rows), or the largest that the rows, or the memory for their sample, can train."""
    wanted = round(math.log2(4 * math.sqrt(rows)))
    by_rows = max(1, rows // TRAIN_PER_LIST).bit_length() - 1
    # The sample as floats, and what k-means holds beside it.
    by_memory = max(1, int(memory / (2 * FLOAT_BYTES * dimensions * TRAIN_PER_LIST))).bit_length() - 1
    lists = 2 ** min(wanted, by_rows, by_memory)
    if wanted <= min(by_rows, by_memory):
        why = "about 4 sqrt(rows), where finding lists and reading them cost alike"
    else:
        limit = "there are rows" if by_rows <= by_memory else "index.memory_gib has room"
        why = f"as many as {limit} to train, {TRAIN_PER_LIST} a list"
    if lists >= GRAPH_LISTS:
        why += "; a graph (HNSW) finds them, which is faster than comparing each"
    return lists, why


def _codes(dimensions: int) -> list[Code]:
    """Ever shorter codes. A PQ code has a byte for so many numbers as divide the dimensions, at most as many as was
    measured: dimensions of few divisors, as 398, have few codes."""
    codes = [Code("SQfp16", HALF_BYTES * dimensions, 1, 1.0), Code("SQ8", dimensions, 4, 1.0)]
    for most, candidates, recall in ((2, 8, 1.0), (4, 16, 0.99), (8, 32, 0.95)):
        numbers = max((size for size in range(2, most + 1) if dimensions % size == 0), default=0)
        if numbers > most // 2:
            size = dimensions // numbers
            codes.append(Code(f"PQ{size}", size, candidates, recall, CODEBOOK * FLOAT_BYTES * dimensions))
    return codes


def _code(rows: int, dimensions: int, lists: int, shards: int, settings: IndexSettings) -> tuple[Code, str]:
    """The longest code that fits the memory beside what is known of the rows, of those that keep enough for the recall
    target."""
    good = [code for code in _codes(dimensions) if code.recall >= settings.recall_target]
    room = f"index.memory_gib={settings.memory_gib:g}"
    for code in good:
        size = _memory(rows, dimensions, lists, code, shards)
        if size <= settings.memory_gib * GIB:
            why = f"the longest code that fits beside what is known of the rows: {_size(size)} of {room}"
            break
    else:
        code = good[-1]
        size = _memory(rows, dimensions, lists, code, shards)
        why = f"the shortest code that keeps index.recall_target={settings.recall_target:g}: {_size(size)} with what is"
        why += f" known of the rows, over {room}"
    if code.candidates > 1:
        why += f"; the first {code.candidates} k candidates are compared again by the stored rows"
    return code, why


def _latency_ms(rows: int, dimensions: int, lists: int, probes: int, shards: int, code: Code, k: int = 10) -> float:
    lists_ms = GRAPH_MS if lists >= GRAPH_LISTS else lists * dimensions / ELEMENTS_PER_MS
    rows_ms = rows * probes / lists * dimensions / ELEMENTS_PER_MS
    return lists_ms + rows_ms + shards * SHARD_MS + k * code.candidates * CANDIDATE_MS


def _build_ms(rows: int, dimensions: int, lists: int, training_rows: int) -> float:
    assign = GRAPH_MS if lists >= GRAPH_LISTS else lists * dimensions / PRODUCTS_PER_MS
    return ITERATIONS * training_rows * lists * dimensions / PRODUCTS_PER_MS + rows * (assign + ROW_MS)


def _ms(value: float) -> str:
    return f"{value / 1000:,.1f} s" if value >= 1000 else f"{value:.3g} ms"


def _size(count: float) -> str:
    return f"{count / GIB:.3g} GiB"
