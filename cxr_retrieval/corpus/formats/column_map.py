"""Any one table with a header, whose columns `corpus.columns` tells (`corpus.format=csv`): that of `corpus.labels`, or
the one beside the images.

Findings are read by SPELLINGS, from one column that lists them or a column for each. Those that a table of lists tells
of are `corpus.labelled`, or all that a row names; others are unknown but where they are named.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.console import printable
from cxr_retrieval.corpus.findings import ABSENT, FINDINGS, NO_FINDING, PRESENT, UNKNOWN
from cxr_retrieval.corpus.formats.labels import (
    GIVEN,
    Box,
    Label,
    Tables,
    age,
    date,
    filled,
    records,
    sex,
    view,
    whole_number,
)
from cxr_retrieval.corpus.formats.observations import Observations
from cxr_retrieval.corpus.formats.vocabulary import OWN, in_our_words, named
from cxr_retrieval.errors import UserError
from cxr_retrieval.storage import StoredFile, canonical

HERE = re.compile(r"^(\./)+")
OURS = frozenset((*FINDINGS, NO_FINDING))


class ColumnMap:
    name = "a plain table"
    known_by = "its path below the archive or its file's name"
    needs: Mapping[str, str] = {GIVEN: "table *.csv at its top (or named by corpus.labels)"}
    lists: Mapping[str, str] | None = None
    companions: Sequence[str] = ()
    frame: int | None = None

    def __init__(self, settings: CorpusSettings) -> None:
        columns = {key: column for key, column in settings.columns.model_dump().items() if column}
        self._each: dict[str, str] = {}  # the column of each finding, where it has one
        if isinstance(columns.get("findings"), dict):
            self._each = columns.pop("findings")
        self._columns = columns | self._each  # no finding is called as a key of corpus.columns is
        self._observations = Observations(settings, named(self._each))
        self._root = f"{canonical(settings.archive)}/" if settings.archive else ""
        self._separator = printable(settings.separator)  # as cells come
        self._labelled = settings.labelled
        _require_findings("corpus.labelled", settings.labelled or ())
        _require_findings("corpus.columns.findings", (name for name in self._each if in_our_words(name) not in OURS))
        self._blank = ABSENT if settings.unmentioned == "absent" else UNKNOWN

    @staticmethod
    def table_kind(path: str) -> str | None:
        return GIVEN if "/" not in path and path.endswith((".csv", ".csv.gz")) else None

    def image_of(self, path: str) -> str:
        return path

    def labels(self, tables: Tables) -> Iterator[Label]:
        facts = self._reader(tables[GIVEN])
        for row in self._rows(tables[GIVEN]):
            follow_up = row.get("follow_up", "")
            path = row["image"].replace("\\", "/").removeprefix("file://").removeprefix(self._root)
            image = HERE.sub("", path)
            yield Label(
                image,
                row["patient"],
                study=row.get("study") or (f"{row['patient']}_{follow_up}" if follow_up else image),
                study_date=date(row.get("date", "")),
                follow_up=whole_number(follow_up),
                age_years=age(whole_number(row.get("age", "").removesuffix("Y").partition(".")[0])),
                sex=sex(row.get("sex", "")),
                view=view(row.get("view", "")),
                **facts(row),
            )

    def boxes(self, _: Tables) -> Iterator[Box]:
        return iter(())

    def listed(self, _: Tables) -> Iterator[tuple[str, str]]:
        return iter(())

    def _rows(self, file: StoredFile) -> Iterator[dict[str, str]]:
        for cells in records(file, list(self._columns.values())):
            yield dict(zip(self._columns, map(filled, cells), strict=True))

    def _reader(self, file: StoredFile) -> Callable[[Mapping[str, str]], dict[str, Any]]:
        """What makes a row of the table into what is told of findings, as fields of Label."""
        if self._each:
            return lambda row: self._observations.facts({name: row[name] for name in self._each})
        labelled = self._labelled if self._labelled is not None else self._named(file)
        return lambda row: self._facts(row, labelled)

    def _named(self, file: StoredFile) -> list[str]:
        """The findings that a row of the table names, sure or uncertain."""
        named = {
            name
            for row in self._rows(file)
            for key in ("findings", "unknown")
            for name in self._names(row, key)
            if name in FINDINGS
        }
        return sorted(named)

    def _names(self, row: Mapping[str, str], key: str) -> list[str]:
        words = (word.strip() for word in row.get(key, "").split(self._separator))
        return [in_our_words(word) for word in words if word]

    def _facts(self, row: Mapping[str, str], labelled: Sequence[str]) -> dict[str, Any]:
        found, doubtful = self._names(row, "findings"), self._names(row, "unknown")
        states = dict.fromkeys(doubtful, UNKNOWN) | dict.fromkeys(found, PRESENT)
        # A word that is none of ours may be another name of a finding: what is not named may then be there.
        whole = found and states.keys() <= OURS
        states.pop(NO_FINDING, None)
        untold = dict.fromkeys(labelled, ABSENT if whole else self._blank)
        return OWN.read(untold | states, UNKNOWN)._asdict()


def _require_findings(setting: str, names: Iterable[str]) -> None:
    if strange := set(names) - set(FINDINGS):
        raise UserError(f"{setting}: {min(strange)!r} is no finding; they are {', '.join(FINDINGS)}")
