"""Folders of DICOM files whose headers a test's own process scans, without Ray."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pydicom import uid

from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.corpus.archive import Archive
from cxr_retrieval.corpus.headers import HEADERS_FILE, Headers, _read_stretch
from cxr_retrieval.tombstones import NOBODY, RemovedPatients
from tests.dicoms import dataset, ramp, written

PIXELS = ramp()


def film(patient: str | None = "p1", study: str = "1.2.3", image: str = "1.2.3.4", **elements: Any) -> bytes:
    made = dataset(PIXELS, **elements)
    made.PatientID, made.StudyInstanceUID = patient or "", study
    made.SOPInstanceUID = made.file_meta.MediaStorageSOPInstanceUID = image
    return written(made)


def without_image(sop_class: str = uid.EnhancedSRStorage) -> bytes:
    made = dataset(PIXELS)
    for name in ("Rows", "Columns", "PixelData"):
        delattr(made, name)
    made.SOPClassUID = made.file_meta.MediaStorageSOPClassUID = uid.UID(sop_class)
    return written(made)


class Export:
    """A folder of DICOM files, and a workspace that keeps their headers."""

    format = "dicom"

    def __init__(self, folder: Path) -> None:
        self.archive, self.workspace = folder / "archive", str(folder / "workspace")
        self.archive.mkdir()

    def put(self, **files: bytes) -> "Export":
        for name, data in files.items():
            path = self.archive / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return self

    def labels(self, *lines: str) -> str:
        path = self.archive.parent / "labels.csv"
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    def read(self, removed: RemovedPatients = NOBODY, **changes: Any) -> Archive:
        settings = CorpusSettings(archive=str(self.archive), format=self.format, **changes)
        return Archive(settings, removed, headers=ScannedHere(self.workspace, settings, removed, scans=True))

    def rows(self, removed: RemovedPatients = NOBODY, **changes: Any) -> dict[str, dict[str, Any]]:
        found = self.read(removed, **changes).partitions()
        return {row["image_id"]: row for partition in found for row in partition.to_pylist()}

    def kept(self) -> list[dict[str, Any]]:
        files = Path(self.workspace).rglob(HEADERS_FILE)
        return [row for file in files for row in pq.read_table(file).to_pylist()]


class ScannedHere(Headers):
    def scan(self, files: Any, total: int) -> Any:  # noqa: ARG002
        for stretch in files:
            uri, _ = _read_stretch(self, stretch)
            yield pq.read_table(f"{uri}/{HEADERS_FILE}")
