"""DICOM files as tests write them: an X-ray of given values, under a name that must be seen nowhere."""

import io
from typing import Any

import numpy as np
import pydicom
from pydicom import uid
from pydicom.dataset import FileDataset, FileMetaDataset

SECRET = "DOE^JANE"
WIDTH, HEIGHT = 90, 70


def ramp(bits: int = 12, signed: bool = False, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Smooth bands with a little noise that use the whole range of `bits`."""
    x, y = np.meshgrid(np.linspace(0, 7, width), np.linspace(0, 5, height))
    wave = np.sin(x) * np.cos(y) + np.random.default_rng(0).normal(0, 0.01, (height, width))
    values = np.rint((wave - wave.min()) / np.ptp(wave) * ((1 << bits) - 1)).astype(np.int64)
    values -= (1 << bits - 1) if signed else 0
    return values.astype(np.dtype(f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}"))


def dataset(pixels: np.ndarray, bits: int = 12, **elements: Any) -> FileDataset:
    """An X-ray of these stored values, uncompressed."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = uid.generate_uid(entropy_srcs=["test"])
    meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    made = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    made.SOPClassUID, made.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    made.PatientName, made.PatientID, made.InstitutionName = SECRET, "4711", "General Hospital"
    made.Rows, made.Columns = pixels.shape[:2]
    made.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    made.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    if pixels.ndim == 3:
        made.PlanarConfiguration = 0
    made.BitsAllocated = 8 * pixels.dtype.itemsize
    made.BitsStored, made.HighBit = bits, bits - 1
    made.PixelRepresentation = int(pixels.dtype.kind == "i")
    made.PixelData = pixels.tobytes()
    made["PixelData"].VR = "OW" if made.BitsAllocated == 16 else "OB"
    for name, value in elements.items():
        setattr(made, name, value)
    return made


def written(made: FileDataset, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, made, enforce_file_format=True, **options)
    return buffer.getvalue()
