"""Reading an archive's listing and label tables: one row per image object, nothing decoded yet.

Listing and tables are streamed into a private SQLite database on disk and joined there: an archive of a hundred million
images needs no more memory than one of a thousand, and about 500 bytes an image of the temporary folder (TMPDIR). How
archives are laid out, `formats` knows.
"""

import contextlib
import datetime
import errno
import hashlib
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple
from itertools import chain, groupby, islice
from typing import Any

import pyarrow as pa

from cxr_retrieval import storage
from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.corpus.formats import format_of, formats_with
from cxr_retrieval.corpus.formats.labels import Tables
from cxr_retrieval.corpus.limits import exclusion
from cxr_retrieval.corpus.rows import ARCHIVE
from cxr_retrieval.corpus.splits import TEST, hash_split, listed_split
from cxr_retrieval.errors import UserError
from cxr_retrieval.tombstones import NOBODY, RemovedPatients

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")
PHANTOM_PLAN = "phantom.json"  # what phantoms were drawn from; it belongs to an archive and nothing in it is needed
REMOVED = "removed"  # what is told of an image whose patient was removed

NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA cache_size = -65536;  -- 64 MiB; the rest is on disk
CREATE TABLE listing (path TEXT PRIMARY KEY, image TEXT, size INTEGER) WITHOUT ROWID;
CREATE TABLE labels (image TEXT PRIMARY KEY, patient TEXT, facts TEXT, twice INTEGER DEFAULT 0) WITHOUT ROWID;
CREATE TABLE boxes (image TEXT, finding TEXT, x REAL, y REAL, w REAL, h REAL);
CREATE TABLE listed (image TEXT PRIMARY KEY, split TEXT) WITHOUT ROWID;
CREATE TABLE placed (key TEXT PRIMARY KEY, place INTEGER) WITHOUT ROWID;  -- a path, or the mark of a removed image
"""
INDEXES = """
CREATE INDEX listing_image ON listing (image);
CREATE INDEX boxes_image ON boxes (image);
"""
JOINED = """
SELECT path, image, size, patient, facts, twice,
    labels.image IS NOT NULL AS labelled,
    (SELECT count(*) FROM listing AS other WHERE other.image = listing.image) AS namesakes,
    EXISTS (SELECT 1 FROM boxes WHERE boxes.image = listing.image) AS boxed,
    listed.split AS listed, place
FROM listing LEFT JOIN labels USING (image) LEFT JOIN listed USING (image) LEFT JOIN placed ON key = path
"""
PLACED, NEW = f"{JOINED} WHERE place IS NOT NULL ORDER BY place, path", f"{JOINED} WHERE place IS NULL ORDER BY path"
THEIRS = """
SELECT path FROM listing JOIN labels USING (image) WHERE patient IN (SELECT value FROM json_each(?))
"""
BARE_NAMES = """
UPDATE listing SET image = file_name(path)
WHERE image NOT IN (SELECT image FROM labels) AND file_name(path) IN (SELECT image FROM labels)
    AND file_name(path) NOT IN (SELECT path FROM listing)
"""  # tables may call an image by its file's name alone, wherever it lies
TORN_PATIENTS = """
SELECT count(*) FROM (
    SELECT 1 FROM listing JOIN labels USING (image) LEFT JOIN listed USING (image)
    WHERE NOT twice AND patient != '' GROUP BY patient HAVING count(DISTINCT ifnull(split, '')) > 1
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
        self._database.create_function("file_name", 1, lambda path: path.rpartition("/")[2], deterministic=True)
        self._format = format_of(settings)
        with room(self.uri):
            self._database.executescript(TABLES)
            tables = self._list()
            self.label_rows = self._read_labels(tables)
            self._database.executemany(
                "INSERT INTO boxes VALUES (?, ?, ?, ?, ?, ?)", map(astuple, self._format.boxes(tables))
            )
            if settings.split == "official":
                self._read_listed(tables)
            self._database.execute(BARE_NAMES)
            self._database.executescript(INDEXES)
            self._place(before)
            self.rows = self._count("SELECT count(*) FROM listing")
            self.labels_without_image = self._count(
                "SELECT count(*) FROM labels WHERE image NOT IN (SELECT image FROM listing)"
            )
        self.table_hashes = {file.path: storage.content_hash(file.uri) for file in tables.values()}

    def partitions(self) -> Iterator[pa.Table]:
        """The rows by schema ARCHIVE: those that were placed before in their partitions, then the others in the order
        of their paths, `corpus.partition_images` at a time."""
        with room(self.uri):
            every = chain(self._database.execute(PLACED), self._database.execute(NEW))
            for place, found in groupby(every, lambda row: row["place"]):
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

    def _list(self) -> Tables:
        """The archive's tables by their kind; its images go into the listing."""
        tables: dict[str, storage.StoredFile] = {}
        others: dict[str, str] = {}  # tables of other formats, by the format
        companions = (PHANTOM_PLAN, *self._format.companions)

        def images() -> Iterator[tuple[str, str, int]]:
            for file in storage.list_files(self.uri):
                name = file.path.rpartition("/")[2]
                if name.lower().endswith(IMAGE_ENDINGS):
                    yield file.path, self._format.image_of(file.path), file.size
                elif kind := self._format.table_kind(file.path):
                    if kind in tables:
                        raise UserError(f"{self.uri}: two tables of one kind, {tables[kind].path} and {name}: keep one")
                    tables[kind] = file
                elif not name.startswith(companions):
                    self.ignored[_ending(name)] += 1
                    for other in formats_with(file.path):
                        others.setdefault(other, name)

        try:
            self._database.executemany("INSERT INTO listing VALUES (?, ?, ?)", images())
        except FileNotFoundError:
            raise UserError(
                f"{self.uri}: there is no such folder; set corpus.archive to the archive's folder or prefix"
            ) from None
        except UnicodeEncodeError as error:
            raise UserError(f"{self.uri}: the name of a file is not UTF-8: {error.object!a}; rename it") from None
        if not self._count("SELECT EXISTS (SELECT 1 FROM listing)"):
            left = f"; {ignored_text(self.ignored)}" if self.ignored else ""
            raise UserError(f"{self.uri}: the archive is empty, no {', '.join(IMAGE_ENDINGS)} file in it{left}")
        for kind, what in self._format.needs.items():
            if kind not in tables:
                found = "".join(f"; {name} is a table of corpus.format={other}" for other, name in others.items())
                raise UserError(
                    f"{self.uri}: no {what} in it, which corpus.format={self._settings.format} needs"
                    f"{found or '; set corpus.format to the layout that the archive has'}"
                )
        return tables

    def _read_labels(self, tables: Tables) -> int:
        """Read the label tables; how many rows they have."""
        count = 0

        def rows() -> Iterator[tuple[str, str, str]]:
            nonlocal count
            for label in self._format.labels(tables):
                count += 1
                yield label.image, label.patient, json.dumps(vars(label), default=str)

        self._database.executemany(
            "INSERT INTO labels (image, patient, facts) VALUES (?, ?, ?) ON CONFLICT (image) DO UPDATE SET twice = 1",
            rows(),
        )
        return count

    def _read_listed(self, tables: Tables) -> None:
        """Read the archive's own split. Raises UserError where it has none, and where it tears a patient apart."""
        if self._format.lists is None:
            raise UserError(f"{self.uri}: {self._format.name} has no split of its own; use corpus.split=hash")
        for kind, what in self._format.lists.items():
            if kind not in tables:
                raise UserError(
                    f"{self.uri}: corpus.split=official needs {what} in the archive; or use corpus.split=hash"
                )
        listed = self._format.listed(tables)
        self._database.executemany("INSERT OR IGNORE INTO listed VALUES (?, ?)", listed)
        if torn := self._count(TORN_PATIENTS):
            raise UserError(
                f"{self.uri}: patients whose images the archive puts into more than one split: {torn:,};"
                " mend the archive's lists or use corpus.split=hash"
            )

    def _row(self, found: sqlite3.Row) -> dict[str, Any]:
        settings = self._settings
        if found["patient"] in self._removed:
            return {"image_id": self._removed.mark(found["path"]), "excluded": REMOVED}
        row: dict[str, Any] = {
            "image_id": found["image"],
            "source_uri": storage.join(self.uri, found["path"]),
            "size": found["size"],
        }
        if found["namesakes"] > 1:
            return {**row, "reason": "name_twice", "text": f"{found['namesakes']} images of the archive have this name"}
        if not found["labelled"]:
            return {**row, "reason": "no_label_row", "text": "the label table has no row for this image"}
        if found["twice"]:
            return {**row, "reason": "labels_twice", "text": "the label table has two rows for this image"}
        label = json.loads(found["facts"])
        if label["reason"]:
            return {**row, "reason": label["reason"], "text": label["text"]}
        if not label["patient"]:
            return {**row, "reason": "no_patient", "text": "the label row names no patient"}
        date = label["study_date"]
        return {
            **row,
            "excluded": exclusion(settings, label["view"], label["age_years"]),
            "patient_id": label["patient"],
            "study_id": label["study"],
            "study_date": datetime.date.fromisoformat(date) if date else None,
            **{name: label[name] for name in ("follow_up", "age_years", "sex", "view", "findings", "unknown", "other")},
            "boxes": self._boxes(found["image"]) if found["boxed"] else [],
            "split": self._split(label["patient"], found["listed"]),
        }

    def _boxes(self, image: str) -> list[dict[str, Any]]:
        boxes = self._database.execute("SELECT finding, x, y, w, h FROM boxes WHERE image = ? ORDER BY rowid", (image,))
        return [dict(box) for box in boxes]

    def _split(self, patient: str, listed: str | None) -> str:
        settings = self._settings
        if settings.split == "all_test":
            return TEST
        if settings.split == "official":
            return listed_split(listed, patient, settings.split_seed, settings.validation_share)
        return hash_split(patient, settings.split_seed, settings.validation_share, settings.test_share)


def rows_digest(rows: pa.Table) -> str:
    """Hash of manifest rows, independent of how they are chunked: listing (names and sizes) and label tables."""
    digest = hashlib.sha256()
    for batch in rows.combine_chunks().to_batches(max_chunksize=4096):
        digest.update(repr(batch.to_pylist()).encode())
    return digest.hexdigest()[:20]


def _ending(name: str) -> str:
    """A file's ending where it is one; a name that goes on after its last dot may be a patient's, and is not told."""
    found = re.search(r"\.[a-z][a-z0-9]{0,4}$", name.lower())
    return found.group() if found else "no ending"


def ignored_text(ignored: Mapping[str, int]) -> str:
    """What a person is told of files of other endings: how many, and of which."""
    counted = ", ".join(f"{ending} {count:,}" for ending, count in sorted(ignored.items()))
    return f"files of other kinds that were left alone: {sum(ignored.values()):,} ({counted})"


@contextlib.contextmanager
def room(uri: str) -> Iterator[None]:
    """What an archive needs of the temporary folder is written in this block. Raises UserError where it is full."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF not in NO_ROOM:
            raise
        raise _full(uri, error) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _full(uri, error) from None


def _full(uri: str, error: Exception) -> UserError:
    return UserError(
        f"{uri}: listing and label tables do not fit into the temporary folder: {error};"
        " set TMPDIR to a folder with room"
    )
