"""Preparing images against plain loops that read, hash, decode, resize and write the same Parquet.

  python -m benchmarks.prepare

PNG, DICOM that is not compressed, and DICOM in JPEG 2000. A peer is as many processes as there are cores, without Ray,
each with its share of the same images. One decodes with Pillow, or pydicom and its windowing; the other as prepare
does, which leaves what prepare itself costs: Ray, checks, accounts. The images are so many that what is paid once is
seen for what it is: listing, what workers import, and the second task of Ray Data, which begins a second after its
first. The rate without that is told apart, from when every worker has finished its first partition.
"""

import hashlib
import io
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_windowing

from benchmarks.archive import large_archive, png
from benchmarks.claim import Claim, publish
from cxr_retrieval import storage
from cxr_retrieval.artifacts import MANIFEST, Artifact
from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.corpus.decoding import decode
from cxr_retrieval.corpus.limits import Limits
from cxr_retrieval.corpus.parts import TASK_CPUS, recipe_of
from cxr_retrieval.corpus.preparation import prepare
from cxr_retrieval.runtime import start_ray

IMAGES, SIDE, SIZE, ROUNDS = 4096, 1024, 256, 3
PARTS = 8  # for every core
BITS = 12
SETTINGS = CorpusSettings(size=SIZE)
RECIPE, LIMITS = recipe_of(SETTINGS), Limits.of(SETTINGS)


def dicom(grey_HW: np.ndarray, compressed: bool = False) -> bytes:
    """A film as a DICOM file of 12 bits and a window over all of them."""
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = uid.JPEG2000Lossless if compressed else uid.ExplicitVRLittleEndian
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = uid.DigitalXRayImageStorageForPresentation
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = uid.generate_uid()
    header.Modality = "DX"
    header.Rows, header.Columns = grey_HW.shape
    header.SamplesPerPixel, header.PixelRepresentation, header.PhotometricInterpretation = 1, 0, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, BITS, BITS - 1
    header.WindowCenter, header.WindowWidth = 1 << BITS - 1, 1 << BITS
    values = grey_HW.astype(np.uint16) << BITS - 8
    if compressed:
        frame = imagecodecs.jpeg2k_encode(values, level=0, reversible=True, codecformat="j2k", bitspersample=BITS)
        header.PixelData = encapsulate([frame])
    else:
        header.PixelData = values.tobytes()
    header["PixelData"].VR = "OB" if compressed else "OW"
    file = io.BytesIO()
    pydicom.dcmwrite(file, header, enforce_file_format=True)
    return file.getvalue()


def jpeg_2000(grey_HW: np.ndarray) -> bytes:
    return dicom(grey_HW, compressed=True)


def read_png(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def read_dicom(data: bytes) -> np.ndarray:
    header = pydicom.dcmread(io.BytesIO(data))
    windowed = apply_windowing(header.pixel_array, header)
    return np.rint(windowed * (255.0 / ((1 << header.BitsStored) - 1))).astype(np.uint8)


def read_as_prepare(data: bytes) -> np.ndarray:
    return decode(data, RECIPE, LIMITS).pixels


@dataclass(frozen=True)
class Kind:
    """Files of one kind: their name, what writes one, its ending, how others read it, and how many times fewer there
    are than of the others, where one takes long."""

    name: str
    encoded: Callable[[np.ndarray], bytes]
    ending: str
    read: Callable[[bytes], np.ndarray]
    fewer: int = 1


KINDS = (
    Kind("PNG", png, ".png", read_png),
    Kind("DICOM, 12 bits", dicom, ".dcm", read_dicom),
    Kind("DICOM, 12 bits in JPEG 2000", jpeg_2000, ".dcm", read_dicom, fewer=4),
)


def plain_loop(read: Callable[[bytes], np.ndarray], paths: list[Path], out: Path) -> None:
    """The work itself."""
    cv2.setNumThreads(1)
    rows = []
    for path in paths:
        data = path.read_bytes()
        pixels = cv2.resize(read(data), (SIZE, SIZE), interpolation=cv2.INTER_AREA).tobytes()
        rows.append((path.name, pixels, hashlib.sha256(data).digest(), hashlib.sha256(pixels).digest()))
    names, pixels, hashes, pixel_hashes = zip(*rows, strict=True)
    table = pa.table(
        {
            "image_id": pa.array(names),
            "pixels": pa.array(pixels, pa.binary(SIZE * SIZE)),
            "source_sha256": pa.array(hashes, pa.binary(32)),
            "pixel_sha256": pa.array(pixel_hashes, pa.binary(32)),
        }
    )
    pq.write_table(table, out, compression="zstd", compression_level=1, use_dictionary=False, row_group_size=128)


def plain_loops(
    processes: ProcessPoolExecutor, read: Callable[[bytes], np.ndarray], paths: list[Path], to: Path
) -> float:
    """Images per second of the plain loop on all cores."""
    cores = os.cpu_count() or 1
    shares = [paths[core::cores] for core in range(cores)]
    began = time.perf_counter()
    list(processes.map(plain_loop, [read] * cores, shares, [to / f"{core}.parquet" for core in range(cores)]))
    return len(paths) / (time.perf_counter() - began)


def ours(archive: str, workspace: str, images: int) -> tuple[float, float]:
    """Images per second of prepare, without its start and in all."""
    cores = os.cpu_count() or 1
    part = images // (PARTS * cores)
    began = time.perf_counter()
    corpus, _ = prepare(CorpusSettings(archive=archive, size=SIZE, partition_images=part), workspace)
    return steady_rate(corpus, part, int(cores / TASK_CPUS)), corpus.counts["prepared"] / (time.perf_counter() - began)


def steady_rate(artifact: Artifact, part: int, workers: int) -> float:
    """Rows per second by the times of the manifests, from when as many parts as there are workers have ended until the
    last ones are about to: at both ends as many are under way. Parts are of so many rows."""
    ended = sorted(os.path.getmtime(storage.join(uri, MANIFEST)) for uri in artifact.part_uris)
    return (len(ended) - 2 * workers + 1) * part / (ended[-workers] - ended[workers - 1])


def main() -> None:
    start_ray()
    cores, claims = os.cpu_count() or 1, []
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(cores, get_context("spawn")) as processes:
        for number, kind in enumerate(KINDS):
            images = IMAGES // kind.fewer
            archive = large_archive(images, SIDE, kind.encoded, kind.ending, f"films-{kind.encoded.__name__}")
            films = sorted((Path(archive) / "images").glob(f"*{kind.ending}"))
            loops = {"the same work in a plain loop": kind.read, "a plain loop of our decoding": read_as_prepare}
            for read in loops.values():  # what is imported and read first takes longer
                plain_loops(processes, read, films[: 8 * cores], Path(folder))
            peers: dict[str, list[float]] = {against: [] for against in loops}
            rates = []
            for turn in range(ROUNDS):
                for against, read in loops.items():
                    peers[against].append(plain_loops(processes, read, films, Path(folder)))
                rates.append(ours(archive, f"{folder}/{number}/{turn}", images))
            for place, what in enumerate(("once every worker runs", f"{images:,} images, start included")):
                found = [pair[place] for pair in rates]
                claims += [
                    Claim.of(
                        f"images/s of prepare, {SIDE} x {SIDE} {kind.name} to {SIZE}, {what}",
                        f"{against}, same cores",
                        0.9,
                        [rate / peer for rate, peer in zip(found, theirs, strict=True)],
                        ours=float(np.median(found)),
                        plain_loop=float(np.median(theirs)),
                    )
                    for against, theirs in peers.items()
                ]
    publish("prepare", claims)


if __name__ == "__main__":
    main()
