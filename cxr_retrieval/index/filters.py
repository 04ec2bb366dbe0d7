"""Which images of an index may be found: asked for by view, sex, age, findings and date, applied inside the search."""

import datetime
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr_retrieval.corpus.findings import NO_FINDING
from cxr_retrieval.errors import UserError


@dataclass(frozen=True)
class Filters:
    """What a found image must be; a field left as it is asks for nothing.

    An image passes only by what the archive tells of it: one without an age passes no range of ages, and a finding that
    is unknown of it counts neither as there nor as not there. Ends of ranges belong to them. `No Finding` may stand
    for a finding: no finding there, and none unknown.

    Of several values the order is that of the alphabet and each counts once, so that what asks for the same is equal,
    and takes no more than all the values that an index has.
    """

    views: tuple[str, ...] = ()
    sex: str | None = None
    age_from: int | None = None
    age_to: int | None = None
    date_from: datetime.date | None = None
    date_to: datetime.date | None = None
    any_of: tuple[str, ...] = ()
    all_of: tuple[str, ...] = ()
    none_of: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("views", "any_of", "all_of", "none_of"):
            object.__setattr__(self, name, tuple(sorted(set(getattr(self, name)))))

    def mask(self, table: pa.Table) -> np.ndarray:
        """The rows of a sidecar that pass, bool [N]."""
        passing = np.ones(table.num_rows, bool)
        if self.views:
            passing &= among(table["view"], self.views)
        if self.sex is not None:
            passing &= among(table["sex"], [self.sex])
        for column, first, last in (
            ("age_years", self.age_from, self.age_to),
            ("study_date", self.date_from, self.date_to),
        ):
            if first is not None:
                passing &= _true(pc.greater_equal(table[column], first))
            if last is not None:
                passing &= _true(pc.less_equal(table[column], last))
        if self.any_of:
            any_of = np.zeros(table.num_rows, bool)
            for name in self.any_of:
                any_of |= _present(table, name)
            passing &= any_of
        for name in self.all_of:
            passing &= _present(table, name)
        for name in self.none_of:
            passing &= ~_present(table, name) & ~_unknown(table, name)
        return passing


EVERYTHING = Filters()
OLDEST = 150  # years that an age may be asked for


TELLING = ["view", "sex", "findings", "study_date"]  # columns of a sidecar that a vocabulary is read from


@dataclass(frozen=True)
class Vocabulary:
    """The values that the images of an index have, and so what a filter may name; `dated`: some have a study date."""

    views: tuple[str, ...]
    sexes: tuple[str, ...]
    findings: tuple[str, ...]
    dated: bool

    @classmethod
    def of(cls, sidecars: Sequence[pa.Table]) -> "Vocabulary":
        """Of some shards: what their images have."""
        return cls(
            _values(table["view"] for table in sidecars),
            _values(table["sex"] for table in sidecars),
            _values(pc.list_flatten(table["findings"]) for table in sidecars),
            any(table["study_date"].null_count < table.num_rows for table in sidecars),
        )

    @classmethod
    def joined(cls, parts: Sequence["Vocabulary"], findings: Iterable[str]) -> "Vocabulary":
        """Of an index; `findings` are those of the model, in its order, before others that only images have."""
        had = sorted({name for part in parts for name in part.findings})
        return cls(
            tuple(sorted({view for part in parts for view in part.views})),
            tuple(sorted({sex for part in parts for sex in part.sexes})),
            tuple(dict.fromkeys([*findings, *had, NO_FINDING])),
            any(part.dated for part in parts),
        )

    def check(self, filters: Filters) -> None:
        """Raises UserError, one line, for a value that no image has and for a range that ends before it begins."""
        for kind, wanted, known in (
            ("view", filters.views, self.views),
            ("sex", [filters.sex] if filters.sex is not None else [], self.sexes),
            ("finding", [*filters.any_of, *filters.all_of, *filters.none_of], self.findings),
        ):
            for value in wanted:
                if value not in known:
                    raise UserError(f"no image of this index has {kind} {value!r}: {_nearest(value, known)}")
        for age in (filters.age_from, filters.age_to):
            if age is not None and not 0 <= age <= OLDEST:
                raise UserError(f"an age of {age} years: give one from 0 to {OLDEST}")
        for kind, first, last in (
            ("age", filters.age_from, filters.age_to),
            ("date", filters.date_from, filters.date_to),
        ):
            if first is not None and last is not None and first > last:  # type: ignore[operator]  # both of one kind
                raise UserError(f"{kind}s from {first} to {last} hold none: the first is after the last")
        if not self.dated and (filters.date_from or filters.date_to):
            raise UserError("no image of this index has a study date: leave the date out of the filter")


def among(column: pa.ChunkedArray, values: Sequence[str]) -> np.ndarray:
    """The rows whose text is one of `values`, bool [N]; a missing text is none."""
    return _true(pc.is_in(column, value_set=pa.array(values, pa.string())))


def _present(table: pa.Table, name: str) -> np.ndarray:
    if name == NO_FINDING:
        return _lengths(table["findings"]) + _lengths(table["unknown"]) == 0
    return _holding(table["findings"], name)


def _unknown(table: pa.Table, name: str) -> np.ndarray:
    if name == NO_FINDING:
        return (_lengths(table["findings"]) == 0) & (_lengths(table["unknown"]) > 0)
    return _holding(table["unknown"], name)


def _holding(lists: pa.ChunkedArray, name: str) -> np.ndarray:
    """The rows whose list holds a name, bool [N]."""
    holding = np.zeros(len(lists), bool)
    column = lists.combine_chunks()
    rows = pc.list_parent_indices(column).to_numpy()
    holding[rows[_true(pc.equal(pc.list_flatten(column), name))]] = True
    return holding


def _lengths(lists: pa.ChunkedArray) -> np.ndarray:
    lengths: np.ndarray = np.asarray(pc.fill_null(pc.list_value_length(lists), 0))
    return lengths


def _true(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    passing: np.ndarray = np.asarray(pc.fill_null(column, False))
    return passing


def _values(columns: Iterable[pa.ChunkedArray]) -> tuple[str, ...]:
    return tuple(sorted({value for column in columns for value in pc.unique(column).to_pylist() if value is not None}))


def _nearest(value: str, known: Sequence[str]) -> str:
    if not known:
        return "it tells that of no image"
    close = difflib.get_close_matches(value, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}"
