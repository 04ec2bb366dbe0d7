"""A part of a corpus: one partition of the archive, decoded and written whole by one task.

A task needs the memory of one partition, and a restart decodes only partitions without a manifest.
"""

import hashlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import cv2
import pyarrow as pa
import pyarrow.parquet as pq

from cxr_retrieval import storage
from cxr_retrieval.artifacts import Artifact, Draft, Equation
from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.corpus.decoding import DecodedImage, Recipe, decode
from cxr_retrieval.corpus.files import UNREADABLE, read_listed
from cxr_retrieval.corpus.formats import format_of
from cxr_retrieval.corpus.limits import ExcludedImage, Limits, RejectedImage
from cxr_retrieval.corpus.manifest import read_partition
from cxr_retrieval.corpus.rows import LABELS, QUARANTINE, as_read, corpus_schema, rows_digest
from cxr_retrieval.errors import UserError
from cxr_retrieval.runtime import keep_freed_memory

PART_KIND = "corpus-part"
ROWS_FILE, QUARANTINE_FILE = "rows.parquet", "quarantine.parquet"
BYTES_AHEAD = 64 << 20  # of the files that are held while another is decoded
MOST_WAITING = 1 / 3  # of a task's time: what three tasks on two cores leave no core without work for
JUDGED_BY = 4  # files
# Of a partition's task, so that three share two cores: between its partitions a task waits, for Ray and for storage.
TASK_CPUS = 0.66
# Bytes a pixel of an image that is decoded, its file and what is made of it on the way: of a PNG of 16 bits, 17 of one
# with colours. JPEG 2000 with colours takes 28, and nobody's films of the largest size are that.
DECODING = 18
# Settings that decide what the prepared rows are; the others (limits of the job, names) do not.
SHAPING = ("size", "fit", "max_pixels", "min_side", "source_side", "row_group_images")


PARTS_ADD_UP = Equation("archive", ("prepared", "quarantined", "excluded"))


def recipe_of(settings: CorpusSettings) -> Recipe:
    return Recipe(size=settings.size, fit=settings.fit)


def box_frame(settings: CorpusSettings) -> int | None:
    """Side in pixels of the frame that the archive's boxes are given in; None: each image's own."""
    return settings.box_frame or format_of(settings).frame


def task_memory(settings: CorpusSettings) -> int:
    """Bytes that a task may take: the pixels of its partition twice, files read ahead, and the largest image."""
    return 2 * settings.partition_images * settings.size**2 + BYTES_AHEAD + DECODING * settings.max_pixels


def shaping_of(settings: CorpusSettings) -> dict[str, Any]:
    """The settings that decide what the prepared rows are."""
    told = {name: getattr(settings, name) for name in SHAPING}
    if settings.burned_in != "keep":  # else what was prepared before there was this setting is what it was
        told["burned_in"] = settings.burned_in
    return told | {"recipe": recipe_of(settings).id, "box_frame": box_frame(settings)}


def part_of(folder: str, rows: pa.Table, shaping: dict[str, Any]) -> Draft:
    """The part of a corpus in `folder` that some rows of the archive become."""
    return Draft.under(storage.join(folder, "parts"), PART_KIND, shaping, (rows_digest(rows),))


class PartTask:
    """Prepare one partition of a corpus's manifest. Runs in a Ray task: holds plain values only."""

    def __init__(self, manifest_uri: str, shaping: dict[str, Any], settings: CorpusSettings) -> None:
        self._manifest_uri, self._shaping, self._settings = manifest_uri, shaping, settings

    def __call__(self, task: dict[str, Any], rows: pa.Table | None = None) -> dict[str, Any]:
        before = storage.retries()
        cv2.setNumThreads(1)  # tasks run side by side
        keep_freed_memory()
        try:
            if rows is None:
                rows = read_partition(self._manifest_uri, task["partition"])
            planned = Draft(task["uri"], PART_KIND, self._shaping, (rows_digest(rows),)).begin()
            part = prepare_part(planned, rows, self._settings)
        except UserError as error:  # returned: Ray Data keeps the text of what is raised, and loses what it was
            retries = storage.retries() - before
            return {**task, "archive": 0, "quarantined": 0, "retries": retries, "error": str(error)}
        done = {name: part.counts[name] for name in ("archive", "quarantined")}
        return {**task, "uri": part.uri, **done, "retries": storage.retries() - before, "error": ""}


def prepare_part(part: Draft, rows: pa.Table, settings: CorpusSettings) -> Artifact:
    """Decode one partition and write it whole: prepared rows, quarantined rows, counts.

    Where files cannot be read, it becomes the part of those rows without them, beside the one that was planned.
    """
    recipe, limits = recipe_of(settings), Limits.of(settings)
    schema, frame = corpus_schema(recipe), box_frame(settings)
    prepared: list[dict[str, Any]] = []
    groups: list[pa.Table] = []
    bad: list[dict[str, Any]] = []
    excluded: Counter[str] = Counter()
    burned_in = 0
    for row, read in _fetched(rows.to_pylist()):
        try:
            if row["reason"]:
                raise RejectedImage(row["reason"], row["text"])
            if row["excluded"]:
                raise ExcludedImage(row["excluded"])
            data = read()
            image = _decoded(data, recipe, limits)
            prepared.append(_prepared_row(row, data, image, recipe, frame))
            burned_in += image.burned_in
        except RejectedImage as rejected:
            bad.append({**row, "reason": rejected.reason, "text": rejected.text})
        except ExcludedImage as left_out:
            excluded[left_out.rule] += 1
        if len(prepared) == settings.row_group_images:  # not all at the end: pixels would be held twice
            groups.append(pa.Table.from_pylist(prepared, schema=schema))
            prepared = []
    if any(row["reason"] == UNREADABLE for row in bad):
        part = Draft.under(
            storage.parent(part.uri), PART_KIND, part.settings, (rows_digest(as_read(rows, bad)),)
        ).begin()
    table = pa.concat_tables([*groups, pa.Table.from_pylist(prepared, schema=schema)])
    with part.staged(ROWS_FILE) as (local, rows_entry):
        pq.write_table(
            table,
            local,
            compression="zstd",
            compression_level=1,
            use_dictionary=["patient_id", "sex", "view", "split"],
            row_group_size=settings.row_group_images,
        )
    with part.staged(QUARANTINE_FILE) as (local, bad_entry):
        pq.write_table(pa.Table.from_pylist(bad, schema=QUARANTINE), local, compression="zstd")
    counts = {
        "archive": rows.num_rows,
        "prepared": table.num_rows,
        "quarantined": len(bad),
        "excluded": excluded.total(),
    }
    reasons = dict(Counter(row["reason"] for row in bad))
    return part.finish(
        [rows_entry.value, bad_entry.value],
        counts,
        [PARTS_ADD_UP],
        quarantine_reasons=reasons,
        exclusion_rules=dict(excluded),
        burned_in=burned_in,
    )


def _decoded(data: bytes, recipe: Recipe, limits: Limits) -> DecodedImage:
    """`decode`; an image for which memory does not suffice is refused alone, and tried again by the next run."""
    try:
        return decode(data, recipe, limits)
    except MemoryError:
        raise RejectedImage(UNREADABLE, "there was not enough memory to decode it") from None


def _fetched(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Callable[[], bytes]]]:
    """Each manifest row, and what gives its file's bytes or raises RejectedImage.

    Local files are read when they are asked for, which another thread would make a sixth slower: what it has read has
    left the processor's cache. Where that is waited for too long, and from object storage at once, files that are
    needed are read ahead, those larger than BYTES_AHEAD in their turn.
    """
    most = storage.READS_AHEAD if any(storage.is_s3(row["source_uri"] or "") for row in rows) else 0
    waiting, ahead, held = deque(rows), deque[Callable[[], bytes]](), 0
    waited, since = 0.0, time.perf_counter()

    def size(row: dict[str, Any]) -> int:
        return 0 if row["reason"] or row["excluded"] else row["size"]

    def begin(row: dict[str, Any]) -> Callable[[], bytes]:
        read = partial(read_listed, row["source_uri"], row["size"])
        return read if row["reason"] or row["excluded"] else pool.submit(read).result

    def timed(read: Callable[[], bytes]) -> bytes:
        nonlocal waited
        began = time.perf_counter()
        try:
            return read()
        finally:
            waited += time.perf_counter() - began

    with ThreadPoolExecutor(storage.READS_AHEAD) as pool:
        for number, row in enumerate(rows, 1):
            if ahead:
                read = ahead.popleft()
                held -= size(row)
            else:
                waiting.popleft()
                read = partial(read_listed, row["source_uri"], row["size"])
            while waiting and len(ahead) < most and held + size(waiting[0]) <= BYTES_AHEAD:
                held += size(waiting[0])
                ahead.append(begin(waiting.popleft()))
            yield row, partial(timed, read)
            if number % JUDGED_BY == 0:
                if waited > MOST_WAITING * (time.perf_counter() - since):
                    most = min(max(1, 2 * most), storage.READS_AHEAD)
                waited, since = 0.0, time.perf_counter()


def _prepared_row(
    row: dict[str, Any], data: bytes, image: DecodedImage, recipe: Recipe, frame: int | None
) -> dict[str, Any]:
    pixels = image.pixels.tobytes()
    scale_x, scale_y = (image.width / frame, image.height / frame) if frame else (1.0, 1.0)
    boxes = []
    for box in row["boxes"]:
        in_source = box["x"] * scale_x, box["y"] * scale_y, box["w"] * scale_x, box["h"] * scale_y
        x, y, w, h = recipe.to_prepared(in_source, image.width, image.height, image.aspect)
        boxes.append({"finding": box["finding"], "x": x, "y": y, "w": w, "h": h})
    return {
        "image_id": row["image_id"],
        **{name: row[name] for name, _ in LABELS},
        "pixels": pixels,
        "original_width": image.width,
        "original_height": image.height,
        "pixel_aspect": image.aspect,
        "burned_in": image.burned_in,
        "source_uri": row["source_uri"],
        "source_sha256": hashlib.sha256(data).digest(),
        "pixel_sha256": hashlib.sha256(pixels).digest(),
        "boxes": boxes,
        "split": row["split"],
    }
