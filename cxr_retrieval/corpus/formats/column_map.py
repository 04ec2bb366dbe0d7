"""Any one table with a header beside the images, whose columns `corpus.columns` tells (`corpus.format=csv`).

Findings are read by SPELLINGS. Those that the table tells of are `corpus.labelled`, or all that a row names; others are
unknown but where they are named.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.console import printable
from cxr_retrieval.corpus.findings import ABSENT, FINDINGS, NO_FINDING, PRESENT, UNKNOWN
from cxr_retrieval.corpus.formats.labels import (
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
from cxr_retrieval.corpus.formats.vocabulary import OWN, in_our_words
from cxr_retrieval.errors import UserError
from cxr_retrieval.storage import StoredFile, canonical

TABLE = "table"
HERE = re.compile(r"^(\./)+")


class ColumnMap:
    name = "a plain table"
    known_by = "its path below the archive or its file's name"
    needs: Mapping[str, str] = {TABLE: "table *.csv at its top"}
    lists: Mapping[str, str] | None = None
    companions: Sequence[str] = ()
    frame: int | None = None

    def __init__(self, settings: CorpusSettings) -> None:
        self._columns = {key: column for key, column in settings.columns.model_dump().items() if column}
        self._root = f"{canonical(settings.archive)}/" if settings.archive else ""
        self._separator = printable(settings.separator)  # as cells come
        self._labelled = settings.labelled
        if strange := set(settings.labelled or ()) - set(FINDINGS):
            raise UserError(f"corpus.labelled: {min(strange)!r} is no finding; they are {', '.join(FINDINGS)}")
        self._blank = ABSENT if settings.unmentioned == "absent" else UNKNOWN

    @staticmethod
    def table_kind(path: str) -> str | None:
        return TABLE if "/" not in path and path.endswith((".csv", ".csv.gz")) else None

    def image_of(self, path: str) -> str:
        return path

    def labels(self, tables: Tables) -> Iterator[Label]:
        labelled = self._labelled if self._labelled is not None else self._named(tables[TABLE])
        for row in self._rows(tables[TABLE]):
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
                **self._facts(row, labelled),
            )

    def boxes(self, _: Tables) -> Iterator[Box]:
        return iter(())

    def listed(self, _: Tables) -> Iterator[tuple[str, str]]:
        return iter(())

    def _rows(self, file: StoredFile) -> Iterator[dict[str, str]]:
        for cells in records(file, list(self._columns.values())):
            yield dict(zip(self._columns, map(filled, cells), strict=True))

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
        whole = found and states.keys() <= {*FINDINGS, NO_FINDING}
        states.pop(NO_FINDING, None)
        untold = dict.fromkeys(labelled, ABSENT if whole else self._blank)
        return OWN.read(untold | states, UNKNOWN)._asdict()
