"""What a prepared corpus holds, counted as its rows stream by: findings by split, view, sex and age, and examples.

Shapes: N images of a table, C findings.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr_retrieval.corpus.findings import FINDINGS, NO_FINDING

COLUMNS = [
    *("patient_id", "split", "view", "sex", "age_years", "findings", "unknown", "other", "boxes", "pixel_sha256"),
    "burned_in",
]
GROUPS = ("split", "view", "sex", "age")
AGE_BANDS = (("0 to 17", 17), ("18 to 39", 39), ("40 to 64", 64), ("65 and over", 999))
NOT_KNOWN = "not known"
EXAMPLES = 3  # of each finding


def age_band(years: int | None) -> str | None:
    """The band of AGE_BANDS that an age in years lies in; None where it is unknown."""
    return None if years is None else next(name for name, last in AGE_BANDS if years <= last)


@dataclass
class Tally:
    """How many images a group has, how many of these have no finding, all being absent, of how many that is not known
    (none is present, and some are unknown), and how many have each finding, or may have it: `int64 [C]`."""

    images: int = 0
    without: int = 0
    without_unknown: int = 0
    present_C: np.ndarray = field(default_factory=lambda: np.zeros(len(FINDINGS), np.int64))
    unknown_C: np.ndarray = field(default_factory=lambda: np.zeros(len(FINDINGS), np.int64))


@dataclass(frozen=True, order=True)
class Example:
    """An image that stands for a finding. Those into which text may be burned come last, of the others those with a box
    of it first, and then as a hash draws them."""

    burned_in: bool
    without_box: bool
    draw: bytes
    patient: str
    part: int
    place: int
    """Which of the rows of its part it is, those that readers do not see not counted."""


class Census:
    """Counts of all rows that were added. What it holds does not grow with their number.

    `groups` are tallies by the name of a group and its value; `together_CC` counts the images that have both findings,
    `int64 [C, C]`; `other` counts findings in the archive's own words; `ages` counts (sex, age in years); `examples`
    has at most EXAMPLES of each finding, and of images that have none, each of another patient.
    """

    def __init__(self) -> None:
        self.all = Tally()
        self.groups: dict[str, defaultdict[str, Tally]] = {name: defaultdict(Tally) for name in GROUPS}
        self.together_CC = np.zeros((len(FINDINGS), len(FINDINGS)), np.int64)
        self.other: Counter[str] = Counter()
        self.ages: Counter[tuple[str, int]] = Counter()
        self.examples: dict[str, list[Example]] = {name: [] for name in (*FINDINGS, NO_FINDING)}

    def add(self, table: pa.Table, part: int, first: int) -> None:
        """Count the rows of a table with COLUMNS, `first` being the place of its first row in its part."""
        present_NC, unknown_NC = _flags(table["findings"]), _flags(table["unknown"])
        ages = table["age_years"].to_pylist()
        values = {name: [value or NOT_KNOWN for value in table[name].to_pylist()] for name in GROUPS if name != "age"}
        values["age"] = [age_band(years) or NOT_KNOWN for years in ages]
        _count(self.all, present_NC, unknown_NC)
        for name in GROUPS:
            column_N = np.asarray(values[name], dtype=object)
            for value in set(values[name]):
                mine_N = column_N == value
                _count(self.groups[name][value], present_NC[mine_N], unknown_NC[mine_N])
        counts_NC = present_NC.astype(np.int64)
        self.together_CC += counts_NC.T @ counts_NC
        self.other.update(pc.list_flatten(table["other"]).to_pylist())
        self.ages.update((sex, years) for sex, years in zip(values["sex"], ages, strict=True) if years is not None)
        self._choose(table, [*present_NC.T, ~(present_NC | unknown_NC).any(1)], part, first)

    def _choose(self, table: pa.Table, columns_CN: list[np.ndarray], part: int, first: int) -> None:
        patients, draws = table["patient_id"].to_pylist(), table["pixel_sha256"].to_pylist()
        text = table["burned_in"].to_pylist()
        boxed = [{box["finding"] for box in boxes} for boxes in table["boxes"].to_pylist()]
        for name, column_N in zip(self.examples, columns_CN, strict=True):
            found = [
                Example(text[row], name not in boxed[row], draws[row], patients[row], part, first + row)
                for row in np.flatnonzero(column_N).tolist()
            ]
            best: dict[str, Example] = {}
            for example in sorted(self.examples[name] + found):
                if len(best) < EXAMPLES:
                    best.setdefault(example.patient, example)
            self.examples[name] = list(best.values())


def _flags(column: pa.ChunkedArray) -> np.ndarray:
    """Which findings each row of a column of lists names: bool [N, C]."""
    lists = column.combine_chunks()
    flags_NC = np.zeros((len(lists), len(FINDINGS)), bool)
    names = pc.index_in(pc.list_flatten(lists), value_set=pa.array(FINDINGS))
    flags_NC[pc.list_parent_indices(lists).to_numpy(), names.to_numpy()] = True
    return flags_NC


def _count(tally: Tally, present_NC: np.ndarray, unknown_NC: np.ndarray) -> None:
    tally.images += len(present_NC)
    none_N = ~present_NC.any(1)
    open_N = unknown_NC.any(1)
    tally.without += int((none_N & ~open_N).sum())
    tally.without_unknown += int((none_N & open_N).sum())
    tally.present_C += present_NC.sum(0)
    tally.unknown_C += unknown_NC.sum(0)
