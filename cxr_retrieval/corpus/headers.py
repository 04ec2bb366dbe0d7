"""The headers of an archive's DICOM files: read once, in parallel, and kept for every later look at the archive.

Headers are read for a *stretch* of the listing at a time, by one Ray task that writes an artifact. What is kept of a
file holds as long as its path, size and version do: a grown archive costs its new files, and a scan that was
killed goes on behind its last finished stretches.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from cxr_retrieval import artifacts, storage
from cxr_retrieval.artifacts import MANIFEST, Artifact, Draft, Equation
from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.corpus.dicom import (
    BARE_TEXT,
    DICOM_ENDINGS,
    DicomFacts,
    is_bare_dicom,
    is_dicom,
    read_facts,
)
from cxr_retrieval.corpus.files import UNREADABLE, read_beginning
from cxr_retrieval.corpus.formats import format_of
from cxr_retrieval.corpus.formats.labels import HeaderFormat
from cxr_retrieval.corpus.limits import HEADER_ROOM, RejectedImage
from cxr_retrieval.corpus.rows import rows_digest
from cxr_retrieval.errors import UserError
from cxr_retrieval.progress import Progress
from cxr_retrieval.runtime import DIED, TRIES, nodes_cpus
from cxr_retrieval.storage import StoredFile
from cxr_retrieval.tombstones import RemovedPatients

KIND, HEADERS_FILE = "headers", "headers.parquet"
VERSION = 4  # raise it with every change of what is read of a header
STRETCH = 2048  # files of one task
READS = 16  # files that a task reads at once: hides the latency of object storage
LENGTHS = (64 << 10, 1 << 20, HEADER_ROOM)  # bytes of a file that are read, one after the other until its header ends

IMAGE, OBJECT, FILE = "image", "object", "file"  # a DICOM image; DICOM without an image, such as reports; no DICOM

FACTS = [  # the fields of DicomFacts
    ("image_uid", pa.string()),
    ("patient_id", pa.string()),
    ("study_uid", pa.string()),
    ("study_date", pa.date32()),
    ("modality", pa.string()),
    ("view", pa.string()),
    ("sex", pa.string()),
    ("age_years", pa.int16()),
    ("body_part", pa.string()),
    ("laterality", pa.string()),
    ("burned_in", pa.bool_()),
    ("has_image", pa.bool_()),
]
# One row a file. An image of a removed patient has a `mark` in place of its path, and no facts.
HEADERS = pa.schema(
    [
        ("path", pa.string()),
        ("mark", pa.string()),
        ("size", pa.int64()),
        ("version", pa.int64()),
        ("kind", pa.string()),
        ("reason", pa.string()),
        ("text", pa.string()),
        *FACTS,
    ]
)
ADD_UP = Equation("files", (IMAGE, OBJECT, FILE))


@dataclass(frozen=True)
class Headers:
    """What a workspace keeps, under the name of a corpus, of the headers of an archive.

    `scans`: whether those that are not kept are read; it takes Ray.
    """

    workspace: str
    settings: CorpusSettings
    removed: RemovedPatients
    scans: bool

    @property
    def archive(self) -> str:
        return storage.canonical(self.settings.archive or "")

    @property
    def folder(self) -> str:
        return storage.join(self.workspace, "corpora", self.settings.name, KIND)

    def kept(self) -> Iterator[pa.Table]:
        """What was read before of this archive, by schema HEADERS; also of files that are there no more."""
        try:
            files = storage.list_files(self.folder)
            found = [storage.parent(file.uri) for file in files if file.path.endswith(f"/{MANIFEST}")]
        except FileNotFoundError:
            return
        for stretch in storage.read_ahead(artifacts.find, found):
            if stretch and stretch.manifest["settings"] == self._shaping:
                yield _table(stretch)

    def scan(self, files: Iterable[Sequence[StoredFile]], total: int) -> Iterator[pa.Table]:
        """The headers of `total` files, which come in stretches; each is kept before it is told.

        Holds as many stretches as there are CPUs, twice.
        """
        read = ray.remote(max_retries=TRIES - 1)(_read_stretch)
        shared = ray.put(self)
        work = f"{KIND}-{hashlib.sha256(self.folder.encode()).hexdigest()[:20]}"
        with Progress(self.workspace, work, self.folder, "read headers", total, "files") as progress:
            waiting: list[Any] = []
            for stretch in files:
                waiting.append(read.remote(shared, stretch))
                if len(waiting) >= 2 * sum(nodes_cpus()):
                    yield self._next(waiting, progress)
            while waiting:
                yield self._next(waiting, progress)

    def _next(self, waiting: list[Any], progress: Progress) -> pa.Table:
        (ready,), _ = ray.wait(waiting, num_returns=1)
        waiting.remove(ready)
        try:
            uri, retries = ray.get(ready)
        except DIED as error:
            raise UserError(
                f"{self.archive}: the process that read headers of its files died at every try: one of them crashes the"
                " reader or takes more memory than there is (Ray's logs say which); take it out of the archive and run"
                " the same command again, it goes on"
            ) from error
        storage.add_retries(retries)
        table = _table(artifacts.load(uri, KIND))
        progress.advance(table.num_rows)
        return table

    @property
    def _shaping(self) -> dict[str, Any]:
        return {"archive": self.archive, "format": self.settings.format, "version": VERSION}

    def draft(self, files: Sequence[StoredFile]) -> Draft:
        """What is kept of a stretch, by the paths, sizes and versions of its files."""
        listing = [{"path": file.path, "size": file.size, "version": file.version} for file in files]
        return Draft.under(self.folder, KIND, self._shaping, (rows_digest(pa.Table.from_pylist(listing)),))


def _table(stretch: Artifact) -> pa.Table:
    return pq.read_table(io.BytesIO(stretch.read(HEADERS_FILE)))


def _read_stretch(headers: Headers, files: Sequence[StoredFile]) -> tuple[str, int]:
    """Read the headers of a stretch and keep them: where, and how many requests were sent again. Runs in a Ray task."""
    before = storage.retries()
    draft = headers.draft(files).begin()
    layout = format_of(headers.settings)
    assert isinstance(layout, HeaderFormat)
    with ThreadPoolExecutor(READS) as pool:
        rows = list(pool.map(partial(_row, layout, headers.removed), files))
    with draft.staged(HEADERS_FILE) as (local, entry):
        pq.write_table(pa.Table.from_pylist(rows, schema=HEADERS), local, compression="zstd")
    kinds = Counter(row["kind"] for row in rows)
    draft.finish([entry.value], {"files": len(rows), **{kind: kinds[kind] for kind in ADD_UP.parts}}, [ADD_UP])
    return draft.uri, storage.retries() - before


def _row(layout: HeaderFormat, removed: RemovedPatients, file: StoredFile) -> dict[str, Any]:
    """What is kept of a file."""
    row: dict[str, Any] = {"path": file.path, "size": file.size, "version": file.version, "kind": IMAGE}
    try:
        facts = _facts(file)
    except RejectedImage as rejected:
        return {**row, "reason": rejected.reason, "text": rejected.text}
    except MemoryError:
        return {**row, "reason": UNREADABLE, "text": "there was not enough memory to read its header"}
    if facts is None or not facts.has_image:
        return {**row, "kind": FILE if facts is None else OBJECT}
    patient = layout.patient_of(file.path, facts)
    if patient in removed:
        return {**row, "path": None, "mark": removed.mark(file.path)}
    return {**row, **{name: getattr(facts, name) for name, _ in FACTS}, "patient_id": patient}


def _facts(file: StoredFile) -> DicomFacts | None:
    """The facts of a file's header, read no further than it takes; None of a file that is no DICOM and is not called
    so. Raises RejectedImage."""
    for length in LENGTHS:
        data = read_beginning(file.uri, length)
        if not is_dicom(data):
            if is_bare_dicom(data):
                raise RejectedImage("not_an_image", BARE_TEXT)
            if file.path.lower().endswith(DICOM_ENDINGS):
                raise RejectedImage("not_an_image", f"no DICOM, though it is called so: {file.size:,} bytes")
            return None
        whole = len(data) < length
        try:
            return read_facts(data, whole=whole)
        except RejectedImage as rejected:
            if whole or rejected.reason != "damaged" or length == LENGTHS[-1]:
                raise
    raise AssertionError("the last length either gives facts or a reason")
