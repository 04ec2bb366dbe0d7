"""Reading an archive's listing and label tables: one row per image object, nothing decoded yet.

NIH ChestX-ray14: `images*/**.png`, `Data_Entry_2017*.csv`, optionally `BBox_List_2017.csv` and the official lists.
"""

import contextlib
import csv
import gzip
import hashlib
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from cxr_retrieval import storage
from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.corpus.findings import FINDINGS, NO_FINDING
from cxr_retrieval.corpus.rows import ARCHIVE
from cxr_retrieval.corpus.splits import TEST, hash_split, listed_split
from cxr_retrieval.errors import UserError

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg")
TABLE, BOXES, TEST_LIST = "Data_Entry_2017", "BBox_List_2017", "test_list"
PHANTOM_PLAN = "phantom.json"  # what phantoms were drawn from
COMPANIONS = (PHANTOM_PLAN, "train_val_list")  # belong to an archive, and nothing in them is needed
AGES = range(0, 121)  # NIH's table has a few impossible ages, such as 414: unknown, the image stays
BOX_SPELLING = {"Infiltrate": "Infiltration"}  # NIH's box table spells one finding in its own way


@dataclass(frozen=True)
class Archive:
    """The manifest of an archive: `rows` by schema ARCHIVE in the order of the URIs, and what else was found."""

    rows: pa.Table
    label_rows: int
    labels_without_image: int
    table_hashes: dict[str, str]
    ignored: dict[str, int]
    """How many files of each other ending lie in the archive: neither images that can be read nor its tables."""

    @property
    def digest(self) -> str:
        """Hash of all that decides the prepared rows: listing (names and sizes) and label tables."""
        return rows_digest(self.rows)


@dataclass
class _Tables:
    listing: list[storage.StoredFile] = field(default_factory=list)
    table: storage.StoredFile | None = None
    boxes: storage.StoredFile | None = None
    test_list: storage.StoredFile | None = None
    ignored: Counter[str] = field(default_factory=Counter)


def rows_digest(rows: pa.Table) -> str:
    """Hash of manifest rows, independent of how they are chunked."""
    digest = hashlib.sha256()
    for batch in rows.combine_chunks().to_batches(max_chunksize=4096):
        digest.update(repr(batch.to_pylist()).encode())
    return digest.hexdigest()[:20]


def read_archive(settings: CorpusSettings) -> Archive:
    """List the archive and join its label tables. Raises UserError for an archive without images or label table."""
    if settings.archive is None:
        raise UserError("corpus.archive is not set: give the folder or s3:// prefix that holds the archive")
    uri = storage.canonical(settings.archive)
    found = _sort_files(uri)
    if found.table is None:
        raise UserError(f"{uri}: no label table {TABLE}*.csv in it; the archive must be in NIH's layout")
    labels, twice, label_rows = _read_labels(found.table)
    boxes = _read_boxes(found.boxes)
    test_names = _read_names(found.test_list, settings, uri)
    names: Counter[str] = Counter(file.path.rpartition("/")[2] for file in found.listing)
    rows = [
        _row(file, labels, twice, names, boxes, test_names, settings)
        for file in sorted(found.listing, key=lambda file: file.path)
    ]
    if test_names is not None:
        _check_patients_in_one_list(rows, uri)
    hashes = {
        file.path: hashlib.sha256(storage.read_bytes(file.uri)).hexdigest()
        for file in (found.table, found.boxes, found.test_list)
        if file
    }
    return Archive(
        pa.Table.from_pylist(rows, schema=ARCHIVE),
        label_rows,
        sum(name not in names for name in labels),
        hashes,
        dict(found.ignored),
    )


def _check_patients_in_one_list(rows: list[dict[str, Any]], uri: str) -> None:
    tested = {row["patient_id"] for row in rows if row.get("split") == TEST}
    both = {row["patient_id"] for row in rows if row.get("split") not in (None, TEST)} & tested
    if both:
        raise UserError(
            f"{uri}: patients with images both in {TEST_LIST} and outside it: {len(both):,};"
            " mend the list or use corpus.split=hash"
        )


def _sort_files(uri: str) -> _Tables:
    found = _Tables()
    try:
        for file in storage.list_files(uri):
            name = file.path.rpartition("/")[2]
            if name.lower().endswith(IMAGE_ENDINGS):
                found.listing.append(file)
            elif "/" not in file.path and name.startswith(TABLE) and name.endswith((".csv", ".csv.gz")):
                if found.table:
                    raise UserError(f"{uri}: two label tables, {found.table.path} and {name}: keep one")
                found.table = file
            elif "/" not in file.path and name.startswith(BOXES):
                found.boxes = file
            elif "/" not in file.path and name.startswith(TEST_LIST):
                found.test_list = file
            elif not name.startswith(COMPANIONS):
                found.ignored[_ending(name)] += 1
    except FileNotFoundError:
        raise UserError(
            f"{uri}: there is no such folder; set corpus.archive to the archive's folder or prefix"
        ) from None
    if not found.listing:
        others = f"; {ignored_text(found.ignored)}" if found.ignored else ""
        raise UserError(f"{uri}: the archive is empty, no {', '.join(IMAGE_ENDINGS)} file in it{others}")
    return found


def _ending(name: str) -> str:
    """A file's ending where it is one; a name that goes on after its last dot may be a patient's, and is not told."""
    found = re.search(r"\.[a-z][a-z0-9]{0,4}$", name.lower())
    return found.group() if found else "no ending"


def ignored_text(ignored: Mapping[str, int]) -> str:
    """What a person is told of files of other endings: how many, and of which."""
    counted = ", ".join(f"{ending} {count:,}" for ending, count in sorted(ignored.items()))
    return f"files of other kinds that were left alone: {sum(ignored.values()):,} ({counted})"


def _row(
    file: storage.StoredFile,
    labels: dict[str, dict[str, str]],
    twice: set[str],
    names: Counter[str],
    boxes: dict[str, list[dict[str, Any]]],
    test_names: set[str] | None,
    settings: CorpusSettings,
) -> dict[str, Any]:
    image_id = file.path.rpartition("/")[2]
    row: dict[str, Any] = {"image_id": image_id, "source_uri": file.uri, "size": file.size}
    label = labels.get(image_id)
    if names[image_id] > 1:
        return {**row, "reason": "name_twice", "text": f"{names[image_id]} images of the archive have this name"}
    if label is None:
        return {**row, "reason": "no_label_row", "text": "the label table has no row for this image"}
    if image_id in twice:
        return {**row, "reason": "labels_twice", "text": "the label table has two rows for this image"}
    findings = [name for name in label["Finding Labels"].split("|") if name != NO_FINDING]
    strange = [name for name in findings if name not in FINDINGS]
    if strange:
        return {**row, "reason": "unknown_finding", "text": f"finding {strange[0]!r} is none of the {len(FINDINGS)}"}
    patient = label["Patient ID"].strip()
    if not patient:
        return {**row, "reason": "no_patient", "text": "the label row names no patient"}
    age = _number(label["Patient Age"])
    follow_up = _number(label["Follow-up #"])
    view = label["View Position"].strip() or None
    if settings.split == "all_test":
        split = TEST
    elif test_names is not None:
        split = listed_split(image_id in test_names, patient, settings.split_seed, settings.validation_share)
    else:
        split = hash_split(patient, settings.split_seed, settings.validation_share, settings.test_share)
    return {
        **row,
        "excluded": "view" if settings.views is not None and view not in settings.views else None,
        "patient_id": patient,
        "study_id": f"{patient}_{label['Follow-up #'].strip()}",
        "follow_up": follow_up,
        "age_years": age if age in AGES else None,
        "sex": label["Patient Gender"].strip() or None,
        "view": view,
        "findings": [name for name in FINDINGS if name in findings],
        "unknown": [],
        "boxes": boxes.get(image_id, []),
        "split": split,
    }


def _read_labels(file: storage.StoredFile) -> tuple[dict[str, dict[str, str]], set[str], int]:
    needed = (
        "Image Index",
        "Finding Labels",
        "Follow-up #",
        "Patient ID",
        "Patient Age",
        "Patient Gender",
        "View Position",
    )
    labels: dict[str, dict[str, str]] = {}
    twice: set[str] = set()
    count = 0
    with _readable(file), storage.open_text(file.uri) as text:
        reader = csv.DictReader(text)
        missing = [name for name in needed if name not in (reader.fieldnames or ())]
        if missing:
            raise UserError(f"{file.uri}: column {missing[0]!r} is missing; the table must have NIH's columns")
        for row in reader:
            count += 1
            if row["Image Index"] in labels:
                twice.add(row["Image Index"])
            labels[row["Image Index"]] = {name: row[name] or "" for name in needed}
    return labels, twice, count


def _read_boxes(file: storage.StoredFile | None) -> dict[str, list[dict[str, Any]]]:
    boxes: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(_csv_rows(file)):
        if number == 0 or not row:
            continue  # NIH's header is `Bbox [x,y,w,h],,,`: the columns are known by their places
        try:
            x, y, w, h = (float(value) for value in row[2:6])
            if not (math.isfinite(x + y + w + h) and w > 0 and h > 0):
                raise ValueError("a box without area")
        except ValueError:
            raise UserError(
                f"{file.uri if file else ''}: line {number + 1} is no box: four numbers x, y, w, h with w and h above 0"
            ) from None
        finding = BOX_SPELLING.get(row[1], row[1])
        boxes.setdefault(row[0], []).append({"finding": finding, "x": x, "y": y, "w": w, "h": h})
    return boxes


def _read_names(file: storage.StoredFile | None, settings: CorpusSettings, uri: str) -> set[str] | None:
    if settings.split != "nih_lists":
        return None
    if file is None:
        raise UserError(
            f"{uri}: corpus.split=nih_lists needs NIH's {TEST_LIST}.txt in the archive; or use corpus.split=hash"
        )
    return {row[0].strip() for row in _csv_rows(file) if row}


def _csv_rows(file: storage.StoredFile | None) -> Iterator[list[str]]:
    if file is None:
        return
    with _readable(file), storage.open_text(file.uri) as text:
        yield from csv.reader(text)


@contextlib.contextmanager
def _readable(file: storage.StoredFile) -> Iterator[None]:
    try:
        yield
    except (csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file.uri} cannot be read as a table: {error}; copy it again") from None


def _number(text: str) -> int | None:
    digits = text.strip().removesuffix("Y")  # the table's first edition writes 058Y
    return int(digits) if digits.isdecimal() and len(digits) < 10 else None
