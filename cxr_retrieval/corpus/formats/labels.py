"""What the label tables of an archive tell of its images, and how such tables are read."""

import contextlib
import csv
import datetime
import gzip
import math
import re
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Protocol, runtime_checkable

from cxr_retrieval import storage
from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.console import printable
from cxr_retrieval.corpus.dicom import DicomFacts
from cxr_retrieval.errors import UserError
from cxr_retrieval.storage import StoredFile

GIVEN = "labels"  # the one table that `corpus.labels` names, or may name
MOST_ROW = 1 << 16  # characters; the longest rows known, PadChest's with their reports, have some thousands
# Label tables pack to a tenth or a thirtieth, and whatever their size, so much is read without a question.
MOST_UNPACKED, ALWAYS_UNPACKED = 200, 16 << 20
MOST_PIXELS = 1e6  # that a box is long, or away from its image's corner
MOST_QUOTED = 60
NOTHING = frozenset({"", "nan", "none", "null", "na", "n/a", "<na>"})  # as programs write it, in any case
AGES = range(0, 121)  # tables have a few impossible ages, such as 414: unknown, the image stays
SEXES = {"m": "M", "male": "M", "f": "F", "female": "F", "o": "O", "other": "O"}
VIEWS = {
    "PA": "PA",
    "POSTEROANTERIOR": "PA",
    "AP": "AP",
    "AP_HORIZONTAL": "AP",  # PadChest's: the patient lies
    "ANTEROPOSTERIOR": "AP",
    "L": "LATERAL",
    "LL": "LATERAL",  # left and right lateral, as DICOM's View Position has them
    "RL": "LATERAL",
    "LAT": "LATERAL",
    "LATERAL": "LATERAL",
}


@dataclass(frozen=True)
class Label:
    """What an archive tells of one image, in the words of this project.

    `image` is what the tables call the image, see `Format.image_of`. `findings` and `unknown` (uncertain, or never
    labelled by this archive) are of FINDINGS; all others are absent. `other` are findings in the archive's own words
    that are none of FINDINGS. `excluded` is the rule by which an image is no chest X-ray that is looked for. Where
    `reason` is set, the image cannot be used, and `text` says why.
    """

    image: str
    patient: str = ""
    study: str = ""
    findings: Sequence[str] = ()
    unknown: Sequence[str] = ()
    other: Sequence[str] = ()
    study_date: datetime.date | None = None
    follow_up: int | None = None
    age_years: int | None = None
    sex: str | None = None
    view: str | None = None
    excluded: str | None = None
    reason: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class Box:
    """A finding's box on an image, in pixels of the frame that `Format.frame` tells."""

    image: str
    finding: str
    x: float
    y: float
    w: float
    h: float


Tables = Mapping[str, StoredFile]


class Format(Protocol):
    """The layout of an archive: which files are its tables, and what they tell.

    `known_by` says to a person what the tables call an image. `needs` are the kinds of tables without which it cannot
    be read, each by the name that a person knows, and `lists` those that in addition the archive's own split needs;
    None: it has no split of its own. `companions` are beginnings of names of files that belong to an archive and are
    not needed. `frame` is the side in pixels of the frame that boxes are given in; None: the image's own.
    """

    name: str
    known_by: str
    needs: Mapping[str, str]
    lists: Mapping[str, str] | None
    companions: Sequence[str]
    frame: int | None

    def __init__(self, settings: CorpusSettings) -> None: ...

    @staticmethod
    def table_kind(path: str) -> str | None:
        """Which of the archive's tables a file is, if it is one."""

    def image_of(self, path: str) -> str:
        """What the tables call the image that lies at a path of the archive."""

    def labels(self, tables: Tables) -> Iterator[Label]:
        """Every row of the label tables. Raises UserError for a table that cannot be read."""

    def boxes(self, tables: Tables) -> Iterator[Box]:
        """Every box. Raises UserError."""

    def listed(self, tables: Tables) -> Iterator[tuple[str, str]]:
        """Images with the split, of SPLITS or TRAIN_OR_VALIDATION, that the archive itself puts them into. Raises
        UserError."""


@runtime_checkable
class HeaderFormat(Format, Protocol):
    """The layout of an archive whose files are DICOM, and whose headers tell what no table tells.

    `endings` are how the names of files end that may be images: every one of them is looked into. Where a table and a
    header tell of the same thing, the table is right.
    """

    endings: Sequence[str]

    def patient_of(self, path: str, facts: DicomFacts) -> str | None:
        """Whose image it is, if its header tells that."""

    def header_label(self, path: str, facts: DicomFacts) -> Label:
        """What a header tells of the image at a path; `image` is what the tables call it, if they do."""


def records(file: StoredFile, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[str, ...]]:
    """The named columns of a table with a header, row by row, without blanks around them; missing cells are empty, and
    so are `optional` columns that the table lacks.

    Raises UserError for a table that lacks one of the columns, has one of them twice or cannot be read, and for a row
    of more cells than there are columns, whose cells nobody can tell the columns of.
    """
    with contextlib.closing(lines(file)) as rows:
        header = next(rows, [])
        places = {name: place for place, name in enumerate(header)}
        missing = [name for name in columns if name not in places]
        if missing:
            raise UserError(f"{file.uri}: column {missing[0]!r} is missing; the table must have the archive's columns")
        if twice := [name for name in (*columns, *optional) if header.count(name) > 1]:
            raise UserError(f"{file.uri}: there are two columns {twice[0]!r}: leave the one that counts")
        wanted = [places.get(name) for name in (*columns, *optional)]
        for number, row in enumerate(rows, 2):
            if any(row[len(header) :]):
                raise UserError(
                    f"{file.uri}: row {number:,} has {len(row)} cells, and the table {len(header)} columns: put cells"
                    " with commas into double quotes"
                )
            if row:
                yield tuple("" if place is None or place >= len(row) else row[place] for place in wanted)


def header_of(file: StoredFile) -> list[str]:
    """The names of a table's columns. Raises UserError for one that cannot be read or is not there."""
    with contextlib.closing(lines(file)) as rows:
        return next(rows, [])


def lines(file: StoredFile) -> Generator[list[str], None, None]:
    """The rows of a table, their cells without blanks around them and as they may be shown (see `printable`).

    Holds one row. Raises UserError for a table that is not there or cannot be read: what is no CSV, has a row longer
    than any label table's, or unpacks to so much that it is none.
    """
    begins, length, total = 1, 0, 0  # the line that a row begins in, its characters so far, and those of the table
    most = math.inf

    def bounded(text: IO[str]) -> Iterator[str]:
        nonlocal length, total
        while line := text.readline(MOST_ROW + 1 - length):
            length += len(line)
            total += len(line)
            if length > MOST_ROW:
                raise csv.Error(f"more than {MOST_ROW:,} characters; is a quote not closed?")
            if total > most:
                raise csv.Error(f"the file unpacks to more than {MOST_UNPACKED} times its size")
            yield line

    try:
        if storage.is_packed(file.uri):
            with storage.arrow_reader(file.uri) as packed:
                most = MOST_UNPACKED * packed.size() + ALWAYS_UNPACKED
        with storage.open_text(file.uri) as text:
            reader = csv.reader(bounded(text), strict=True)
            for row in reader:
                yield [printable(cell.strip()) for cell in row]
                begins, length = reader.line_num + 1, 0
    except csv.Error as error:
        raise UserError(
            f"{file.uri}: the row that begins in line {begins:,} cannot be read: {error};"
            " mend it or copy the table again"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file.uri} cannot be read as a table: {error}; copy it again") from None
    except FileNotFoundError:
        raise UserError(f"{file.uri}: there is no such table; check its name") from None


def filled(cell: str) -> str:
    """What a cell holds; nothing where it holds a program's word for nothing."""
    return "" if cell.casefold() in NOTHING else cell


def whole_number(text: str) -> int | None:
    """A number of under 10 digits, or None where a cell holds no such."""
    return int(text) if text.isdecimal() and len(text) < 10 else None


def coordinate(text: str) -> float:
    """A place or a length in pixels. Raises ValueError for what is no number that an image can have."""
    value = float(text)
    if not abs(value) <= MOST_PIXELS:
        raise ValueError("no place in an image")
    return value


def quoted(cell: str) -> str:
    """A cell as it is quoted in a message: cut where it is long."""
    return repr(cell if len(cell) <= MOST_QUOTED else f"{cell[:MOST_QUOTED]}...")


def age(years: int | None) -> int | None:
    """An age in years that a person can have, or None."""
    return years if years in AGES else None


def date(text: str) -> datetime.date | None:
    """A date written as 2014-09-15 or 20140915, whatever time follows it, or None where a cell holds no such."""
    found = re.match(r"[0-9]{4}-[0-9]{2}-[0-9]{2}|[0-9]{8}", text)
    try:
        return datetime.date.fromisoformat(found.group()) if found else None
    except ValueError:
        return None


def sex(text: str) -> str | None:
    """M, F or O, or None where a cell names no sex."""
    return SEXES.get(text.casefold())


def view(text: str) -> str | None:
    """PA, AP or LATERAL where a cell surely means one of them, else what it holds; None for an empty one."""
    return VIEWS.get(text.upper(), text) or None
