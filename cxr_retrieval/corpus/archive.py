"""Reading an archive's listing and label tables: one row per image object, nothing decoded yet.

Listing and tables are streamed into a private SQLite database on disk and joined there: an archive of a hundred million
images needs no more memory than one of a thousand, and about 500 bytes an image of the temporary folder (TMPDIR); then
its manifest, up to 80 bytes an image, is there too, twice where the workspace is on S3. How archives are laid out,
`formats` knows.
"""

import contextlib
import datetime
import errno
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple
from itertools import chain, groupby, islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cxr_retrieval import storage
from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.console import printable
from cxr_retrieval.corpus.dicom import DICOM_ENDINGS, DicomFacts
from cxr_retrieval.corpus.files import UNREADABLE, is_readable
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.corpus.formats import format_of, formats_with
from cxr_retrieval.corpus.formats.labels import GIVEN, HeaderFormat, Label, Tables, filled
from cxr_retrieval.corpus.headers import FACTS, OBJECT, STRETCH, Headers
from cxr_retrieval.corpus.limits import NOT_LISTED, REMOVED, Limits, exclusion
from cxr_retrieval.corpus.rows import ARCHIVE
from cxr_retrieval.corpus.splits import TEST, hash_split, listed_split
from cxr_retrieval.errors import UserError
from cxr_retrieval.tombstones import NOBODY, RemovedPatients

NOTHING_TOLD = dict(vars(Label("")))
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", *DICOM_ENDINGS)
# Endings of files that are told by them; behind the last dot of others there may be a patient's name.
TOLD_ENDINGS = frozenset(
    (
        *IMAGE_ENDINGS,
        *(".bmp", ".gif", ".heic", ".j2k", ".jp2", ".mha", ".mhd", ".nii", ".nrrd", ".raw", ".svg", ".tif", ".tiff"),
        *(".webp", ".avi", ".mp4", ".mpg", ".csv", ".tsv", ".xls", ".xlsx", ".ods", ".parquet", ".json", ".jsonl"),
        *(".xml", ".yaml", ".yml", ".db", ".sqlite", ".npy", ".npz", ".pkl", ".h5", ".hdf5", ".mat", ".txt", ".md"),
        *(".pdf", ".doc", ".docx", ".odt", ".rtf", ".htm", ".html", ".ppt", ".pptx", ".log", ".zip", ".gz", ".tar"),
        *(".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst", ".iso", ".md5", ".sha256", ".exe", ".dll", ".bat", ".inf"),
        *(".ini", ".jar", ".js", ".css", ".py", ".sh", ".ipynb", ".bak", ".tmp", ".part"),
    )
)
PHANTOM_PLAN = "phantom.json"  # what phantoms were drawn from; it belongs to an archive and nothing in it is needed
WITHOUT_IMAGE, DOTTED = "DICOM without an image", "names with a dot in front"
NO_TEXT = re.compile("[\udc80-\udcff]")  # bytes of a local name that is no UTF-8, as Python holds them
MARKED_BYTES = re.compile("[\x1a\udc80-\udcff]")  # those, and what stands before each where they are told
# Words of an archive's own (other findings, views) are told in logs and on pages. What is longer than any name, or of
# more kinds, is text about patients.
MOST_WORDS, MOST_WORD, WORD_TOLD = 1000, 200, 64  # kinds; characters that are read, and those that are kept

NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA cache_size = -65536;  -- 64 MiB; the rest is on disk
CREATE TABLE listing (path TEXT PRIMARY KEY, image TEXT, size INTEGER, version INTEGER) WITHOUT ROWID;
CREATE TABLE headers (
    key TEXT, size INTEGER, version INTEGER, kind TEXT, reason TEXT, patient TEXT, told_as TEXT, facts TEXT,
    PRIMARY KEY (key, size, version)
) WITHOUT ROWID;  -- key: a path, or the mark of a removed image, of which nothing is told; told_as: its name in tables
CREATE TABLE labels (image TEXT PRIMARY KEY, patient TEXT, facts TEXT, twice INTEGER DEFAULT 0) WITHOUT ROWID;
CREATE TABLE boxes (image TEXT, finding TEXT, x REAL, y REAL, w REAL, h REAL);
CREATE TABLE listed (image TEXT, split TEXT, PRIMARY KEY (image, split)) WITHOUT ROWID;
CREATE TABLE patients (patient TEXT PRIMARY KEY, split TEXT, splits INTEGER) WITHOUT ROWID;  -- of whom one is listed
CREATE TABLE placed (key TEXT PRIMARY KEY, place INTEGER) WITHOUT ROWID;  -- a path, or the mark of a removed image
CREATE TABLE unreadable (path TEXT PRIMARY KEY, text TEXT) WITHOUT ROWID;
"""
INDEXES = """
CREATE INDEX listing_image ON listing (image);
CREATE INDEX boxes_image ON boxes (image);
CREATE VIEW known AS
SELECT path, listing.image, listing.size, listing.version,
    coalesce(nullif(labels.patient, ''), headers.patient) AS patient, labels.facts AS label, headers.facts AS header,
    coalesce(twice, 0) AS twice, headers.key IS NOT NULL AND headers.facts IS NULL AS removed, patients.split AS split
FROM listing LEFT JOIN headers ON headers.key = path
    LEFT JOIN labels ON labels.image = nullif(coalesce(headers.told_as, listing.image), '')  -- '': nothing names it
    LEFT JOIN patients ON patients.patient = coalesce(nullif(labels.patient, ''), headers.patient);
"""
JOINED = """
SELECT known.*, place, unreadable.text AS unreadable,
    (SELECT count(*) FROM listing AS other WHERE other.image = known.image) AS namesakes,
    EXISTS (SELECT 1 FROM boxes WHERE boxes.image = known.image) AS boxed
FROM known LEFT JOIN placed ON key = path LEFT JOIN unreadable USING (path)
"""
PLACED, NEW = f"{JOINED} WHERE place IS NOT NULL ORDER BY place, path", f"{JOINED} WHERE place IS NULL ORDER BY path"
THEIRS = """
SELECT path FROM known WHERE removed OR patient IN (SELECT value FROM json_each(?))
"""
UNKNOWN_BOXES = "DELETE FROM boxes WHERE finding NOT IN (SELECT value FROM json_each(?))"
CONTRADICTED_BOXES = """
DELETE FROM boxes WHERE image IN (SELECT image FROM labels) AND finding NOT IN (
    SELECT value FROM labels, json_each(labels.facts, '$.findings') WHERE labels.image = boxes.image
)
"""
BARE_NAMES = """
UPDATE listing SET image = file_name(path)
WHERE image NOT IN (SELECT image FROM labels) AND file_name(path) IN (SELECT image FROM labels)
    AND file_name(path) NOT IN (SELECT path FROM listing)
"""  # tables may call an image by its file's name alone, wherever it lies
LISTED_PATIENTS = """
INSERT INTO patients SELECT patient, min(split), count(DISTINCT split) FROM labels JOIN listed USING (image)
WHERE NOT twice AND patient != '' GROUP BY patient
"""  # an image that is in no list goes with the patient's others
KEEP = """
INSERT INTO headers VALUES (:key, :size, :version, :kind, :reason, :patient, :told_as, :facts)
ON CONFLICT (key, size, version) DO UPDATE
SET kind = :kind, reason = :reason, patient = :patient, told_as = :told_as, facts = :facts WHERE reason = :unreadable
"""
MARKED = """
INSERT OR IGNORE INTO headers SELECT path, headers.size, headers.version, kind, reason, patient, headers.told_as, facts
FROM listing JOIN headers ON key = mark(path)
"""
# What was kept of a file that is gone, or another one now, holds no more.
CURRENT = """
DELETE FROM headers WHERE NOT EXISTS (
    SELECT 1 FROM listing WHERE path = key AND listing.size = headers.size AND listing.version = headers.version
);
CREATE TABLE unscanned AS
SELECT path, size, version FROM listing WHERE path NOT IN (SELECT key FROM headers) ORDER BY path;
"""
LABELS_WITHOUT_IMAGE = """
SELECT count(*) FROM labels
WHERE image NOT IN (SELECT image FROM listing)
    AND image NOT IN (SELECT told_as FROM headers WHERE told_as != '')
"""


class Archive:
    """What an archive holds: its rows, and what else was found.

    `rows` is the number of images; `ignored` says how many files of each other ending there are, which are neither
    images that can be read nor the archive's tables; `boxes_left_out` counts boxes whose finding is none of FINDINGS
    (`unknown_finding`) or none that their image has (`not_in_labels`): where labels and boxes disagree, nothing says
    what a crop should have found. `table_hashes` are the SHA-256 of the tables by their paths.
    `unscanned` files may be images or not, and their rows are not known yet: their headers are still to be read.
    """

    def __init__(
        self,
        settings: CorpusSettings,
        removed: RemovedPatients = NOBODY,
        before: Iterable[pa.Table] = (),
        headers: Headers | None = None,
    ) -> None:
        """List the archive and read its tables. Raises UserError for one without images or label table.

        `before` are the partitions that the archive was cut into before: its images keep the first that they are in,
        and new ones come in new partitions. Those that could not be read then are tried now. Images of `removed`
        patients keep their places too, and nothing is told of them. `headers` are those of the archive's files, where
        its format asks for them.
        """
        if settings.archive is None:
            raise UserError("corpus.archive is not set: give the folder or s3:// prefix that holds the archive")
        self.uri = storage.canonical(settings.archive)
        self._settings, self._removed = settings, removed
        self._max_bytes = Limits.of(settings).max_bytes
        self.ignored: Counter[str] = Counter()
        self.unscanned = 0
        self._database = sqlite3.connect("")  # a file that has no name: it is gone with this process, killed or not
        self._database.row_factory = sqlite3.Row
        self._database.create_function("file_name", 1, lambda path: path.rpartition("/")[2], deterministic=True)
        self._format = format_of(settings)
        # Asked once: for every image, to be asked what a protocol is takes a third of the listing's time.
        self._header_format = self._format if isinstance(self._format, HeaderFormat) else None
        with room(self.uri):
            self._database.executescript(TABLES)
            tables, others = self._list()
            if self._header_format:
                self._read_headers(self._header_format, headers)
            self._require_whole(tables, others)
            self.label_rows = self._read_labels(tables)
            self.boxes_left_out = self._read_boxes(tables)
            if not self._header_format:
                self._database.execute(BARE_NAMES)
            self._database.executescript(INDEXES)
            if settings.split == "official":
                self._read_listed(tables)
            self._place(before)
            self.rows = self._count("SELECT count(*) FROM listing")
            self.labels_without_image = self._count(LABELS_WITHOUT_IMAGE)
            self._require_labels()
        self.table_hashes = self._hashes(tables)

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
            self._try_again(rows.filter(pc.equal(rows["reason"], UNREADABLE)))
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

    def _try_again(self, rows: pa.Table) -> None:
        """Remember which of some rows that could not be read before still cannot be."""
        uris, start = rows["source_uri"].to_pylist(), len(self.uri) + 1
        found = zip(uris, rows["text"].to_pylist(), storage.read_ahead(is_readable, uris), strict=True)
        still = [(uri[start:], text) for uri, text, readable in found if not readable]
        self._database.executemany("INSERT OR IGNORE INTO unreadable VALUES (?, ?)", still)

    def _count(self, query: str) -> int:
        return int(self._database.execute(query).fetchone()[0])

    def _list(self) -> tuple[Tables, Mapping[str, str]]:
        """The archive's tables by their kind, and names of tables of other formats by the format; its images, or what
        may be one, go into the listing."""
        tables: dict[str, storage.StoredFile] = {}
        others: dict[str, str] = {}
        companions = (PHANTOM_PLAN, *self._format.companions)

        endings = tuple(self._header_format.endings) if self._header_format else IMAGE_ENDINGS
        given = storage.canonical(self._settings.labels) if self._settings.labels else None

        def left_out(name: str) -> None:
            if name.lower().endswith(endings):
                self.ignored[DOTTED] += 1

        def images() -> Iterator[tuple[str, str, int, int]]:
            for file in self._files(left_out):
                name = file.path.rpartition("/")[2]
                if file.uri == given:
                    continue
                if name.lower().endswith(endings):
                    # A byte that is no text becomes a control character and its value, and so does that character
                    # itself, so that no two files have one path: the row is a bad name.
                    path = MARKED_BYTES.sub(lambda byte: f"\x1a{ord(byte.group()) & 0xFF:02x}", file.path)
                    yield path, self._format.image_of(path), file.size, file.version
                elif not given and (kind := self._format.table_kind(file.path)):
                    if kind in tables:
                        told = f"{self.uri}: two tables of one kind, {tables[kind].path} and {name}: keep one"
                        raise UserError(f"{told}, or name it by corpus.labels" if kind == GIVEN else told)
                    if NO_TEXT.search(file.path):
                        raise UserError(f"{self.uri}: the name of a table is not UTF-8: {name!a}; rename it")
                    tables[kind] = file
                elif not name.startswith(companions):
                    self.ignored[_ending(name)] += 1
                    for other in formats_with(file.path):
                        others.setdefault(other, name)

        try:
            self._database.executemany("INSERT INTO listing VALUES (?, ?, ?, ?)", images())
        except FileNotFoundError:
            raise UserError(
                f"{self.uri}: there is no such folder; set corpus.archive to the archive's folder or prefix"
            ) from None
        if given:
            tables[GIVEN] = storage.StoredFile(given, given, 0, 0.0)
        return tables, others

    # What a Beginning reads less of.

    def _files(self, left_out: Callable[[str], None]) -> Iterator[storage.StoredFile]:
        return storage.list_files(self.uri, left_out)

    def _told(self, tables: Tables) -> Iterator[Label]:
        return self._format.labels(tables)

    def _hashes(self, tables: Tables) -> dict[str, str]:
        return {file.path: storage.content_hash(file.uri) for file in tables.values()}

    def _read_headers(self, layout: HeaderFormat, headers: Headers | None) -> None:
        """Keep what the headers of the listed files tell, and drop from the listing what is no image."""
        for rows in headers.kept() if headers else ():
            self._keep(layout, rows)
        if headers and headers.scans:  # what could not be read before may be readable now
            self._database.execute("DELETE FROM headers WHERE reason = ?", (UNREADABLE,))
        self._find_marked()
        self._database.executescript(CURRENT)
        self.unscanned = self._count("SELECT count(*) FROM unscanned")
        if self.unscanned and headers and headers.scans:
            for rows in headers.scan(self._stretches(), self.unscanned):
                self._keep(layout, rows)
            self._find_marked()
            self.unscanned = 0
        for path, kind in self._database.execute("SELECT key, kind FROM headers WHERE kind != 'image'"):
            self.ignored[WITHOUT_IMAGE if kind == OBJECT else _ending(path.rpartition("/")[2])] += 1
        self._database.execute("DELETE FROM listing WHERE path IN (SELECT key FROM headers WHERE kind != 'image')")

    def _find_marked(self) -> None:
        """Give what was kept of removed patients' images to the paths that their marks stand for."""
        if self._removed.tombstones:
            self._database.create_function("mark", 1, self._removed.mark, deterministic=True)
            self._database.execute(MARKED)

    def _stretches(self) -> Iterator[list[storage.StoredFile]]:
        found = self._database.execute("SELECT path, size, version FROM unscanned ORDER BY rowid")
        while rows := found.fetchmany(STRETCH):
            yield [
                storage.StoredFile(path, storage.join(self.uri, path), size, 0.0, version)
                for path, size, version in rows
            ]

    def _keep(self, layout: HeaderFormat, headers: pa.Table) -> None:
        def kept(row: dict[str, Any]) -> dict[str, Any]:
            if row["path"] is None:
                return {**row, "key": row["mark"], "patient": None, "told_as": None, "facts": None}
            if row["reason"]:
                label = Label(layout.image_of(row["path"]), reason=row["reason"], text=row["text"])
            else:
                label = layout.header_label(row["path"], DicomFacts(**{name: row[name] for name, _ in FACTS}))
            facts = json.dumps(vars(label), default=str)
            return {
                **row,
                "key": row["path"],
                "patient": filled(row["patient_id"] or ""),
                "told_as": label.image,
                "facts": facts,
            }

        rows = ({**kept(row), "unreadable": UNREADABLE} for row in headers.to_pylist())
        self._database.executemany(KEEP, rows)

    def _require_whole(self, tables: Tables, others: Mapping[str, str]) -> None:
        """Raises UserError where there is no image, or not the tables that the layout needs."""
        if not self._count("SELECT EXISTS (SELECT 1 FROM listing)"):
            left = f"; {ignored_text(self.ignored)}" if self.ignored else ""
            wanted = "DICOM image" if self._header_format else f"{', '.join(IMAGE_ENDINGS)} file"
            raise UserError(f"{self.uri}: the archive is empty, no {wanted} in it{left}")
        for kind, what in self._format.needs.items():
            if kind not in tables:
                found = "".join(f"; {name} is a table of corpus.format={other}" for other, name in others.items())
                raise UserError(
                    f"{self.uri}: no {what} in it, which corpus.format={self._settings.format} needs"
                    f"{found or '; set corpus.format to the layout that the archive has'}"
                )

    def _require_labels(self) -> None:
        """Raises UserError where there are label rows and none is of an image. No name is told: it may be a person."""
        labelled = self._count("SELECT count(*) FROM labels")
        if labelled and self.labels_without_image == labelled and not self.unscanned:
            raise UserError(
                f"{self.uri}: none of the {labelled:,} label rows is of an image in it;"
                f" corpus.format={self._settings.format} knows an image by {self._format.known_by}: mend the tables,"
                " or give those of these images"
            )

    def _read_labels(self, tables: Tables) -> int:
        """Read the label tables; how many rows they have."""
        count = 0
        findings, views = _Words(self.uri, "findings"), _Words(self.uri, "views")

        def rows() -> Iterator[tuple[str, str, str]]:
            nonlocal count
            for label in self._told(tables):
                count += 1
                facts = vars(label) | {"other": findings.kept(label.other)}
                if label.view:
                    (facts["view"],) = views.kept([label.view])
                yield label.image, filled(label.patient), json.dumps(facts, default=str)

        self._database.executemany(
            "INSERT INTO labels (image, patient, facts) VALUES (?, ?, ?) ON CONFLICT (image) DO UPDATE SET twice = 1",
            rows(),
        )
        return count

    def _read_boxes(self, tables: Tables) -> dict[str, int]:
        """Read the boxes that have a finding of their image; how many others there are, by what is wrong with them."""
        self._database.executemany(
            "INSERT INTO boxes VALUES (?, ?, ?, ?, ?, ?)", map(astuple, self._format.boxes(tables))
        )
        unknown = self._database.execute(UNKNOWN_BOXES, (json.dumps(FINDINGS),)).rowcount
        return {"unknown_finding": unknown, "not_in_labels": self._database.execute(CONTRADICTED_BOXES).rowcount}

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
        self._database.execute(LISTED_PATIENTS)
        if torn := self._count("SELECT count(*) FROM patients WHERE splits > 1"):
            raise UserError(
                f"{self.uri}: patients whose images the archive puts into more than one split: {torn:,};"
                " mend the archive's lists or use corpus.split=hash"
            )

    def _row(self, found: sqlite3.Row) -> dict[str, Any]:
        settings = self._settings
        if found["removed"] or found["patient"] in self._removed:
            return {"image_id": self._removed.mark(found["path"]), "excluded": REMOVED}
        row: dict[str, Any] = {
            "image_id": found["image"],
            "source_uri": storage.join(self.uri, found["path"]),
            "size": found["size"],
            "version": found["version"],
        }
        if printable(found["path"]) != found["path"]:
            text = "its path has characters that cannot be shown; rename it"
            return {**row, "image_id": printable(found["image"]), "reason": "bad_name", "text": text}
        if self._header_format and found["header"] is None:
            return row  # unscanned
        if found["namesakes"] > 1:
            return {**row, "reason": "name_twice", "text": f"{found['namesakes']} images of the archive have this name"}
        if found["label"] is None and self._format.needs:
            return {**row, "reason": "no_label_row", "text": "the label table has no row for this image"}
        if found["twice"]:
            return {**row, "reason": "labels_twice", "text": "the label table has two rows for this image"}
        label = json.loads(found["header"]) if found["header"] else dict(NOTHING_TOLD)
        label |= {name: value for name, value in json.loads(found["label"] or "{}").items() if value not in (None, "")}
        if label["reason"]:
            return {**row, "reason": label["reason"], "text": label["text"]}
        if not found["patient"]:
            where = "header" if self._header_format else "label row"
            return {**row, "reason": "no_patient", "text": f"the {where} names no patient"}
        date = label["study_date"]
        split = self._split(found["patient"], found["split"])
        excluded = label["excluded"] or exclusion(settings, label["view"], label["age_years"])
        excluded = excluded or (NOT_LISTED if split is None else None)
        if not excluded and found["size"] > self._max_bytes:
            text = (
                f"{found['size']:,} bytes, more than {self._max_bytes:,}, which an image of corpus.max_pixels may take"
            )
            row |= {"reason": "too_large", "text": text}
        elif not excluded and found["unreadable"]:
            row |= {"reason": UNREADABLE, "text": found["unreadable"]}
        return {
            **row,
            "excluded": excluded,
            "patient_id": found["patient"],
            "study_id": label["study"],
            "study_date": datetime.date.fromisoformat(date) if date else None,
            **{name: label[name] for name in ("follow_up", "age_years", "sex", "view", "findings", "unknown", "other")},
            "boxes": self._boxes(found["image"]) if found["boxed"] else [],
            "split": split,
        }

    def _boxes(self, image: str) -> list[dict[str, Any]]:
        boxes = self._database.execute("SELECT finding, x, y, w, h FROM boxes WHERE image = ? ORDER BY rowid", (image,))
        return [dict(box) for box in boxes]

    def _split(self, patient: str, listed: str | None) -> str | None:
        settings = self._settings
        if settings.split == "all_test":
            return TEST
        if settings.split == "official":
            return listed and listed_split(listed, patient, settings.split_seed, settings.validation_share)
        return hash_split(patient, settings.split_seed, settings.validation_share, settings.test_share)


class _Words:
    """Words of one kind that the labels of an archive hold."""

    def __init__(self, uri: str, kind: str) -> None:
        self._uri, self._kind = uri, kind
        self._seen: set[str] = set()

    def kept(self, words: Sequence[str]) -> list[str]:
        """The words, cut where they are long. Raises UserError where they are so long or so many that they are text."""
        self._seen.update(words)
        long = any(len(word) > MOST_WORD for word in words)
        if long or len(self._seen) > MOST_WORDS:
            found = f"one has more than {MOST_WORD} characters" if long else f"more than {MOST_WORDS:,} differ"
            raise UserError(
                f"{self._uri}: the labels' {self._kind} look like text, which would be told in logs and on pages:"
                f" {found}; name a column of short names (corpus.columns, corpus.separator), or mend the table"
            )
        return list(dict.fromkeys(word[:WORD_TOLD] for word in words))


def _ending(name: str) -> str:
    """A file's ending where it is one of TOLD_ENDINGS."""
    _, dot, found = name.lower().rpartition(".")
    if not dot:
        return "no ending"
    return dot + found if dot + found in TOLD_ENDINGS else "another ending"


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
