"""The row of a prepared corpus and the row of the archive's manifest, as Arrow schemas."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from cxr_retrieval.corpus.decoding import Recipe
from cxr_retrieval.corpus.files import UNREADABLE

BOX = pa.struct(
    [(name, pa.string() if name == "finding" else pa.float32()) for name in ("finding", "x", "y", "w", "h")]
)

LABELS = [
    ("patient_id", pa.string()),
    ("study_id", pa.string()),
    ("study_date", pa.date32()),
    ("follow_up", pa.int32()),
    ("age_years", pa.int16()),
    ("sex", pa.string()),
    ("view", pa.string()),
    ("findings", pa.list_(pa.string())),
    ("unknown", pa.list_(pa.string())),
    ("other", pa.list_(pa.string())),  # findings in the archive's own words, which are none of the 14
    ("report_text", pa.string()),
]

# One row per image object of the archive. Where `reason` is set, the image is known to be unusable before it is read.
ARCHIVE = pa.schema(
    [
        ("image_id", pa.string()),
        ("source_uri", pa.string()),
        ("size", pa.int64()),
        ("version", pa.int64()),  # of the file, see storage.StoredFile
        ("reason", pa.string()),
        ("text", pa.string()),
        ("excluded", pa.string()),
        *LABELS,
        ("boxes", pa.list_(BOX)),
        ("split", pa.string()),
    ]
)

QUARANTINE = pa.schema(
    [("image_id", pa.string()), ("source_uri", pa.string()), ("reason", pa.string()), ("text", pa.string())]
)

EXCLUSIONS = pa.schema(
    [
        ("part", pa.int32()),
        ("row", pa.int32()),
        ("image_id", pa.string()),
        ("rule", pa.string()),
        ("kept_image_id", pa.string()),
        ("same_patient", pa.bool_()),
    ]
)


def as_read(rows: pa.Table, quarantined: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows by schema ARCHIVE after their files were read: those that are `quarantined` as UNREADABLE have that reason.

    What else was found in a file is no part of them: it follows from the file.
    """
    found = {row["source_uri"]: row["text"] for row in quarantined if row["reason"] == UNREADABLE}
    told = [
        {**row, "reason": UNREADABLE, "text": found[row["source_uri"]]} if row["source_uri"] in found else row
        for row in rows.to_pylist()
    ]
    return pa.Table.from_pylist(told, schema=ARCHIVE)


def rows_digest(rows: pa.Table) -> str:
    """Hash of rows, independent of how they are chunked."""
    digest = hashlib.sha256()
    for batch in rows.combine_chunks().to_batches(max_chunksize=4096):
        digest.update(repr(batch.to_pylist()).encode())
    return digest.hexdigest()[:20]


def corpus_schema(recipe: Recipe) -> pa.Schema:
    """Schema of a shard; pixels are `uint8 [size, size]`, boxes are in prepared pixels."""
    fields = [
        ("image_id", pa.string()),
        *LABELS,
        ("pixels", pa.binary(recipe.size * recipe.size)),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("pixel_aspect", pa.float64()),  # height of a source pixel over its width
        ("burned_in", pa.bool_()),  # whether the header says so of text; older parts lack it: it is in no part's id
        ("source_uri", pa.string()),
        ("source_sha256", pa.binary(32)),
        ("pixel_sha256", pa.binary(32)),
        ("boxes", pa.list_(BOX)),
        ("split", pa.string()),
    ]
    shape = json.dumps([recipe.size, recipe.size])
    return pa.schema(fields, metadata={"pixels_shape": shape, "decode_recipe": json.dumps(recipe.to_json())})
