"""What an index is built from, part by part of the corpus: vectors, what a hit shows, thumbnails, ids.

N rows of a part, duplicates left out; D dimensions.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cxr_retrieval import storage
from cxr_retrieval.artifacts import Artifact
from cxr_retrieval.corpus.reading import Corpus, pixels_of
from cxr_retrieval.embedding.stream import read_part
from cxr_retrieval.network.progressive import Output, embeddings
from cxr_retrieval.privacy import Pseudonyms, row_id
from cxr_retrieval.training.model import Model

THUMBNAIL_SIDE, THUMBNAIL_QUALITY, THUMBNAIL_GROUP = 256, 85, 64
FACTS = [
    "image_id",
    "patient_id",
    "study_date",
    "view",
    "sex",
    "age_years",
    "findings",
    "unknown",
    "source_uri",
    "pixel_sha256",
    "split",
]
SIDECAR = pa.schema(
    [
        ("id", pa.int64()),
        ("image_id", pa.string()),
        ("patient", pa.string()),
        ("study_date", pa.date32()),
        ("view", pa.string()),
        ("sex", pa.string()),
        ("age_years", pa.int16()),
        ("findings", pa.list_(pa.string())),
        ("unknown", pa.list_(pa.string())),
        ("crop", pa.list_(pa.int32(), 4)),
        ("source", pa.string()),
        ("pixel_sha256", pa.binary(32)),
        ("held_out", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Source:
    """What an index is built from. Small enough to send to a worker; everything heavy is read where it is needed."""

    corpus: Corpus
    embeddings: Artifact
    model_uri: str
    embedding: str

    def part_rows(self) -> list[int]:
        """Rows of every part, duplicates left out."""
        parts = self.embeddings.manifest["parts"]
        return [part["counts"]["embedded"] - len(self.corpus.left_out(n)) for n, part in enumerate(parts)]

    def archive_rows(self) -> list[int]:
        """Images of the archive that every part was prepared from: they stay when a patient is removed."""
        return [part["counts"]["archive"] for part in self.corpus.artifact.manifest["parts"]]


def vectors_of(source: Source, model: Model, part: int, columns: list[str]) -> tuple[np.ndarray, np.ndarray, pa.Table]:
    """Unit vectors float16 [N, D], crops [N, 4] and facts of one part."""
    embedded = read_part(source.embeddings, source.corpus, part, model, columns)
    empty = embedded.z_PSND.new_zeros(0)
    output = Output(embedded.z_PSND, empty, embedded.joint_PNC, empty, empty)
    vectors = embeddings(output, model.centring)[source.embedding].numpy()
    return vectors.astype(np.float16), embedded.crop_N4, embedded.facts


def find_collisions(source: Source, pseudonyms: Pseudonyms) -> dict[int, list[int]]:
    """Embedded rows whose id an earlier row has already, by part: they are left out of the index and counted.

    Rows are numbered within their part, duplicates left out. Holds 24 bytes a row. With 63 bits one collision is to be
    expected among some four thousand million images.
    """

    def ids_of(part: int) -> np.ndarray:
        with storage.arrow_reader(source.corpus.files[part]) as file:
            names = pq.read_table(file, columns=["image_id"])["image_id"]
        kept = names.take(pa.array(np.delete(np.arange(len(names)), source.corpus.left_out(part)))).to_pylist()
        return np.fromiter((row_id(pseudonyms.name("image", name)) for name in kept), np.int64)

    ids = list(storage.read_ahead(ids_of, range(len(source.corpus.files))))
    ends = np.cumsum([len(part) for part in ids])
    every = np.concatenate(ids)
    ordered = np.sort(every)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    places = np.flatnonzero(np.isin(every, twice)) if len(twice) else np.empty(0, np.int64)
    _, first = np.unique(every[places], return_index=True)
    later: dict[int, list[int]] = {}
    for place in np.delete(places, first).tolist():
        part = int(np.searchsorted(ends, place, side="right"))
        later.setdefault(part, []).append(place - int(ends[part]) + len(ids[part]))
    return later


def sidecar_of(facts: pa.Table, crops_N4: np.ndarray, pseudonyms: Pseudonyms) -> pa.Table:
    """What a hit shows and a filter needs, with names as they may be known outside the corpus."""
    images = [pseudonyms.name("image", name) for name in facts["image_id"].to_pylist()]
    columns = {
        "id": [row_id(name) for name in images],
        "image_id": images,
        "patient": [pseudonyms.name("patient", name) for name in facts["patient_id"].to_pylist()],
        "crop": crops_N4.tolist(),
        "source": [pseudonyms.name("source", name) for name in facts["source_uri"].to_pylist()],
        "held_out": [split != "train" for split in facts["split"].to_pylist()],
    }
    arrays = [
        pa.array(columns[field.name], field.type)
        if field.name in columns
        else facts[field.name].combine_chunks().cast(field.type)
        for field in SIDECAR
    ]
    return pa.Table.from_arrays(arrays, schema=SIDECAR)


def thumbnails_of(corpus: Corpus, part: int) -> pa.Table:
    """JPEGs of the rows of a part, duplicates left out, at most 256 pixels a side."""
    found = [
        _jpeg(pixels)
        for table in corpus.batches(part, THUMBNAIL_GROUP, ["pixels"])
        for pixels in pixels_of(table, corpus.recipe.size)
    ]
    return pa.table({"jpeg": pa.array(found, pa.binary())})


def _jpeg(pixels: np.ndarray) -> bytes:
    if max(pixels.shape) > THUMBNAIL_SIDE:
        pixels = cv2.resize(pixels, (THUMBNAIL_SIDE, THUMBNAIL_SIDE), interpolation=cv2.INTER_AREA)
    done, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, THUMBNAIL_QUALITY])
    assert done, "an 8-bit grey image always encodes"
    return bytes(data)
