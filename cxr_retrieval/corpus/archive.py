"""Reading an archive's listing and label tables: one row per image object, nothing decoded yet.

NIH ChestX-ray14: `images*/**.png`, `Data_Entry_2017*.csv`, optionally `BBox_List_2017.csv` and the official lists.
Listing and tables are streamed into a private SQLite database on disk and joined there: an archive of a hundred million
images needs no more memory than one of a thousand, and about 250 bytes an image of the temporary folder (TMPDIR).
"""

import contextlib
import csv
import gzip
import hashlib
import json
import math
import re
import sqlite3
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, islice
from typing import Any

import pyarrow as pa

from cxr_retrieval import storage
from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.corpus.findings import FINDINGS, NO_FINDING
from cxr_retrieval.corpus.rows import ARCHIVE
from cxr_retrieval.corpus.splits import TEST, hash_split, listed_split
from cxr_retrieval.errors import UserError
from cxr_retrieval.tombstones import NOBODY, RemovedPatients

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")
TABLE, BOXES, TEST_LIST = "Data_Entry_2017", "BBox_List_2017", "test_list"
PHANTOM_PLAN = "phantom.json"  # what phantoms were drawn from
COMPANIONS = (PHANTOM_PLAN, "train_val_list")  # belong to an archive, and nothing in them is needed
REMOVED = "removed"  # what is told of an image whose patient was removed
AGES = range(0, 121)  # NIH's table has a few impossible ages, such as 414: unknown, the image stays
LABEL_COLUMNS = (
    "Image Index",
    "Finding Labels",
    "Follow-up #",
    "Patient ID",
    "Patient Age",
    "Patient Gender",
    "View Position",
)
BOX_SPELLING = {"Infiltrate": "Infiltration"}  # NIH's box table spells one finding in its own way


NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA cache_size = -65536;  -- 64 MiB; the rest is on disk
CREATE TABLE listing (path TEXT PRIMARY KEY, name TEXT, size INTEGER) WITHOUT ROWID;
CREATE TABLE labels (
    name TEXT PRIMARY KEY, findings TEXT, follow_up TEXT, patient TEXT, age TEXT, sex TEXT, view TEXT,
    twice INTEGER DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE boxes (name TEXT, finding TEXT, x REAL, y REAL, w REAL, h REAL);
CREATE TABLE tested (name TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE placed (key TEXT PRIMARY KEY, place INTEGER) WITHOUT ROWID;  -- a path, or the mark of a removed image
"""
INDEXES = """
CREATE INDEX listing_name ON listing (name);
CREATE INDEX boxes_name ON boxes (name);
"""
JOINED = """
SELECT path, name, size, patient, findings, follow_up, age, sex, view, twice,
    labels.name IS NOT NULL AS labelled,
    (SELECT count(*) FROM listing AS other WHERE other.name = listing.name) AS namesakes,
    EXISTS (SELECT 1 FROM tested WHERE tested.name = listing.name) AS tested, place
FROM listing LEFT JOIN labels USING (name) LEFT JOIN placed ON key = path ORDER BY place IS NULL, place, path
"""
THEIRS = """
SELECT path FROM listing JOIN labels USING (name) WHERE patient IN (SELECT value FROM json_each(?))
"""
TORN_PATIENTS = """
SELECT count(*) FROM (
    SELECT 1 FROM listing JOIN labels USING (name) LEFT JOIN tested USING (name)
    WHERE NOT twice AND patient != '' GROUP BY patient HAVING count(tested.name) NOT IN (0, count(*))
)
"""


class Archive:
    """What an archive holds: its rows, and what else was found.

    `rows` is the number of images; `ignored` says how many files of each other ending there are, which are neither
    images that can be read nor the archive's tables; `table_hashes` are the SHA-256 of the tables by their paths.
    """

    def __init__(
        self, settings: CorpusSettings, removed: RemovedPatients = NOBODY, before: Iterable[pa.Table] = ()
    ) -> None:
        """List the archive and read its tables. Raises UserError for one without images or label table.

        `before` are the partitions that the archive was cut into before: its images keep them, and new ones come in new
        partitions. Images of `removed` patients keep their places too, and nothing is told of them.
        """
        if settings.archive is None:
            raise UserError("corpus.archive is not set: give the folder or s3:// prefix that holds the archive")
        self.uri = storage.canonical(settings.archive)
        self._settings, self._removed = settings, removed
        self.ignored: Counter[str] = Counter()
        self._database = sqlite3.connect("")  # a file that has no name: it is gone with this process, killed or not
        self._database.row_factory = sqlite3.Row
        with _room(self.uri):
            self._database.executescript(TABLES)
            tables = self._list()
            self.label_rows = self._read_labels(tables[TABLE])
            if BOXES in tables:
                self._read_boxes(tables[BOXES])
            if settings.split == "nih_lists":
                self._read_test_list(tables.get(TEST_LIST))
            self._database.executescript(INDEXES)
            self._place(before)
            self.rows = self._count("SELECT count(*) FROM listing")
            self.labels_without_image = self._count(
                "SELECT count(*) FROM labels WHERE name NOT IN (SELECT name FROM listing)"
            )
            if settings.split == "nih_lists" and (torn := self._count(TORN_PATIENTS)):
                raise UserError(
                    f"{self.uri}: patients with images both in {TEST_LIST} and outside it: {torn:,};"
                    " mend the list or use corpus.split=hash"
                )
        self.table_hashes = {file.path: storage.content_hash(file.uri) for file in tables.values()}

    def partitions(self) -> Iterator[pa.Table]:
        """The rows by schema ARCHIVE: those that were placed before in their partitions, then the others in the order
        of their paths, `corpus.partition_images` at a time."""
        with _room(self.uri):
            cursor = self._database.execute(JOINED)
            for place, found in groupby(cursor, lambda row: row["place"]):
                most = self._settings.partition_images if place is None else None
                while rows := list(islice(found, most)):
                    yield pa.Table.from_pylist([self._row(row) for row in rows], schema=ARCHIVE)

    def _place(self, before: Iterable[pa.Table]) -> None:
        """Remember which partition every image was in before."""
        start = len(self.uri) + 1
        for place, rows in enumerate(before):
            pairs = zip(rows["source_uri"].to_pylist(), rows["image_id"].to_pylist(), strict=True)
            keys = (mark if uri is None else uri[start:] for uri, mark in pairs)
            self._database.executemany("INSERT OR IGNORE INTO placed VALUES (?, ?)", ((key, place) for key in keys))
        if self._removed.tombstones:  # what is kept of their images is a mark, and its place becomes the path's
            patients = self._database.execute("SELECT DISTINCT patient FROM labels")
            theirs = [row["patient"] for row in patients if row["patient"] in self._removed]
            paths = [row["path"] for row in self._database.execute(THEIRS, (json.dumps(theirs),))]
            self._database.executemany(
                "INSERT OR IGNORE INTO placed SELECT ?, place FROM placed WHERE key = ?",
                ((path, self._removed.mark(path)) for path in paths),
            )

    def _count(self, query: str) -> int:
        return int(self._database.execute(query).fetchone()[0])

    def _list(self) -> dict[str, storage.StoredFile]:
        """The archive's tables by their kind; its images go into the listing."""
        tables: dict[str, storage.StoredFile] = {}

        def images() -> Iterator[tuple[str, str, int]]:
            for file in storage.list_files(self.uri):
                name = file.path.rpartition("/")[2]
                if name.lower().endswith(IMAGE_ENDINGS):
                    yield file.path, name, file.size
                elif kind := _table_kind(file.path):
                    if kind in tables:
                        raise UserError(f"{self.uri}: two tables of one kind, {tables[kind].path} and {name}: keep one")
                    tables[kind] = file
                elif not name.startswith(COMPANIONS):
                    self.ignored[_ending(name)] += 1

        try:
            self._database.executemany("INSERT INTO listing VALUES (?, ?, ?)", images())
        except FileNotFoundError:
            raise UserError(
                f"{self.uri}: there is no such folder; set corpus.archive to the archive's folder or prefix"
            ) from None
        except UnicodeEncodeError as error:
            raise UserError(f"{self.uri}: the name of a file is not UTF-8: {error.object!a}; rename it") from None
        if not self._count("SELECT EXISTS (SELECT 1 FROM listing)"):
            others = f"; {ignored_text(self.ignored)}" if self.ignored else ""
            raise UserError(f"{self.uri}: the archive is empty, no {', '.join(IMAGE_ENDINGS)} file in it{others}")
        if TABLE not in tables:
            raise UserError(f"{self.uri}: no label table {TABLE}*.csv in it; the archive must be in NIH's layout")
        return tables

    def _read_labels(self, file: storage.StoredFile) -> int:
        """Read the label table; how many rows it has."""
        count = 0

        def rows() -> Iterator[tuple[str, ...]]:
            nonlocal count
            with _readable(file), storage.open_text(file.uri) as text:
                reader = csv.DictReader(text)
                missing = [name for name in LABEL_COLUMNS if name not in (reader.fieldnames or ())]
                if missing:
                    raise UserError(f"{file.uri}: column {missing[0]!r} is missing; the table must have NIH's columns")
                for row in reader:
                    count += 1
                    yield tuple((row[name] or "").strip() for name in LABEL_COLUMNS)

        self._database.executemany(
            "INSERT INTO labels (name, findings, follow_up, patient, age, sex, view) VALUES (?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (name) DO UPDATE SET twice = 1",
            rows(),
        )
        return count

    def _read_boxes(self, file: storage.StoredFile) -> None:
        def boxes() -> Iterator[tuple[str, str, float, float, float, float]]:
            for number, row in enumerate(_csv_rows(file)):
                if number == 0 or not row:
                    continue  # NIH's header is `Bbox [x,y,w,h],,,`: the columns are known by their places
                try:
                    x, y, w, h = (float(value) for value in row[2:6])
                    if not (math.isfinite(x + y + w + h) and w > 0 and h > 0):
                        raise ValueError("a box without area")
                except ValueError:
                    raise UserError(
                        f"{file.uri}: line {number + 1} is no box: four numbers x, y, w, h with w and h above 0"
                    ) from None
                yield row[0], BOX_SPELLING.get(row[1], row[1]), x, y, w, h

        self._database.executemany("INSERT INTO boxes VALUES (?, ?, ?, ?, ?, ?)", boxes())

    def _read_test_list(self, file: storage.StoredFile | None) -> None:
        if file is None:
            raise UserError(
                f"{self.uri}: corpus.split=nih_lists needs NIH's {TEST_LIST}.txt in the archive;"
                " or use corpus.split=hash"
            )
        names = ((row[0].strip(),) for row in _csv_rows(file) if row)
        self._database.executemany("INSERT OR IGNORE INTO tested VALUES (?)", names)

    def _row(self, found: sqlite3.Row) -> dict[str, Any]:
        settings, name = self._settings, found["name"]
        if found["patient"] in self._removed:
            return {"image_id": self._removed.mark(found["path"]), "excluded": REMOVED}
        row: dict[str, Any] = {
            "image_id": name,
            "source_uri": storage.join(self.uri, found["path"]),
            "size": found["size"],
        }
        if found["namesakes"] > 1:
            return {**row, "reason": "name_twice", "text": f"{found['namesakes']} images of the archive have this name"}
        if not found["labelled"]:
            return {**row, "reason": "no_label_row", "text": "the label table has no row for this image"}
        if found["twice"]:
            return {**row, "reason": "labels_twice", "text": "the label table has two rows for this image"}
        findings = [finding for finding in found["findings"].split("|") if finding != NO_FINDING]
        strange = [finding for finding in findings if finding not in FINDINGS]
        if strange:
            text = f"finding {strange[0]!r} is none of the {len(FINDINGS)}"
            return {**row, "reason": "unknown_finding", "text": text}
        patient = found["patient"]
        if not patient:
            return {**row, "reason": "no_patient", "text": "the label row names no patient"}
        age = _number(found["age"])
        view = found["view"] or None
        boxes = self._database.execute("SELECT finding, x, y, w, h FROM boxes WHERE name = ? ORDER BY rowid", (name,))
        return {
            **row,
            "excluded": "view" if settings.views is not None and view not in settings.views else None,
            "patient_id": patient,
            "study_id": f"{patient}_{found['follow_up']}",
            "follow_up": _number(found["follow_up"]),
            "age_years": age if age in AGES else None,
            "sex": found["sex"] or None,
            "view": view,
            "findings": [finding for finding in FINDINGS if finding in findings],
            "unknown": [],
            "boxes": [dict(box) for box in boxes],
            "split": self._split(patient, bool(found["tested"])),
        }

    def _split(self, patient: str, tested: bool) -> str:
        settings = self._settings
        if settings.split == "all_test":
            return TEST
        if settings.split == "nih_lists":
            return listed_split(tested, patient, settings.split_seed, settings.validation_share)
        return hash_split(patient, settings.split_seed, settings.validation_share, settings.test_share)


def rows_digest(rows: pa.Table) -> str:
    """Hash of manifest rows, independent of how they are chunked: listing (names and sizes) and label tables."""
    digest = hashlib.sha256()
    for batch in rows.combine_chunks().to_batches(max_chunksize=4096):
        digest.update(repr(batch.to_pylist()).encode())
    return digest.hexdigest()[:20]


def _table_kind(path: str) -> str | None:
    """Which of the archive's tables a file is, if it is one; they lie at its root."""
    if "/" in path:
        return None
    if path.startswith(TABLE):
        return TABLE if path.endswith((".csv", ".csv.gz")) else None
    return next((kind for kind in (BOXES, TEST_LIST) if path.startswith(kind)), None)


def _ending(name: str) -> str:
    """A file's ending where it is one; a name that goes on after its last dot may be a patient's, and is not told."""
    found = re.search(r"\.[a-z][a-z0-9]{0,4}$", name.lower())
    return found.group() if found else "no ending"


def ignored_text(ignored: Mapping[str, int]) -> str:
    """What a person is told of files of other endings: how many, and of which."""
    counted = ", ".join(f"{ending} {count:,}" for ending, count in sorted(ignored.items()))
    return f"files of other kinds that were left alone: {sum(ignored.values()):,} ({counted})"


def _csv_rows(file: storage.StoredFile) -> Iterator[list[str]]:
    with _readable(file), storage.open_text(file.uri) as text:
        yield from csv.reader(text)


@contextlib.contextmanager
def _readable(file: storage.StoredFile) -> Iterator[None]:
    try:
        yield
    except (csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file.uri} cannot be read as a table: {error}; copy it again") from None


@contextlib.contextmanager
def _room(uri: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF not in NO_ROOM:
            raise
        raise UserError(
            f"{uri}: listing and label tables do not fit into the temporary folder: {error};"
            " set TMPDIR to a folder with room"
        ) from None


def _number(text: str) -> int | None:
    digits = text.removesuffix("Y")  # the table's first edition writes 058Y
    return int(digits) if digits.isdecimal() and len(digits) < 10 else None
