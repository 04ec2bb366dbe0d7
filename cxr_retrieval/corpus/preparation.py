"""Archive to prepared corpus: partitions of the archive's manifest, decoded by Ray Data, one shard each.

A partition is one row group of the manifest and becomes one part of the corpus (an artifact of its own), written
whole by one task: a task needs the memory of one partition, and a restart decodes only partitions without a manifest.
"""

import hashlib
import json
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from cxr_retrieval import artifacts, storage
from cxr_retrieval.artifacts import Artifact, Draft, Equation, FileEntry
from cxr_retrieval.config import CorpusSettings, PrivacySettings
from cxr_retrieval.corpus.archive import Archive, room
from cxr_retrieval.corpus.decoding import DecodedImage, Recipe, decode
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.corpus.formats import format_of
from cxr_retrieval.corpus.headers import Headers
from cxr_retrieval.corpus.limits import ExcludedImage, Limits, RejectedImage
from cxr_retrieval.corpus.rows import ARCHIVE, EXCLUSIONS, LABELS, QUARANTINE, corpus_schema, rows_digest
from cxr_retrieval.corpus.splits import SPLITS
from cxr_retrieval.errors import UserError
from cxr_retrieval.progress import Progress
from cxr_retrieval.tombstones import RemovedPatients

KIND, PART_KIND = "corpus", "corpus-part"
MANIFEST_FILE, ROWS_FILE, QUARANTINE_FILE, EXCLUSIONS_FILE = (
    "archive.parquet",
    "rows.parquet",
    "quarantine.parquet",
    "exclusions.parquet",
)
KEYED = PrivacySettings()  # removed patients are told by a key, unless an archive is said to be public
LATEST = "latest"  # beside the corpora of a name
READS_AHEAD = 8  # files fetched at once, while one is decoded: hides the latency of object storage
# Settings that decide what the prepared rows are; the others (limits of the job, names) do not.
SHAPING = ("size", "fit", "max_pixels", "min_side", "source_side", "row_group_images")

PARTS_ADD_UP = Equation("archive", ("prepared", "quarantined", "excluded"))
CORPUS_ADDS_UP = Equation("archive", ("prepared", "quarantined", "excluded", "duplicates"))
PATIENTS_ADD_UP = Equation("patients", SPLITS)  # of all splits together, against those of each: nobody is in two


def recipe_of(settings: CorpusSettings) -> Recipe:
    return Recipe(size=settings.size, fit=settings.fit)


def box_frame(settings: CorpusSettings) -> int | None:
    """Side in pixels of the frame that the archive's boxes are given in; None: each image's own."""
    return settings.box_frame or format_of(settings).frame


@dataclass(frozen=True)
class CorpusPlan:
    """What preparing an archive means before any image is read: the corpus, its parts, and the archive's manifest, a
    Parquet file in the temporary folder that has no name and is gone with this plan."""

    archive: Archive
    draft: Draft
    parts: list[Draft]
    manifest: IO[bytes]


def plan_corpus(
    settings: CorpusSettings, workspace: str, privacy: PrivacySettings = KEYED, scans: bool = False
) -> CorpusPlan:
    """List the archive, without the patients who were removed from the workspace, and cut it into partitions.

    Headers that are told of and not kept yet are read only where it `scans`, which takes Ray: without them
    `archive.unscanned` is above 0, and no finished corpus is found.

    Raises UserError for an archive that cannot be read, and where `privacy` has no key to tell who was removed.
    """
    folder = storage.join(workspace, "corpora", settings.name)
    removed = RemovedPatients.of(workspace, privacy)
    headers = Headers(workspace, settings, removed, scans)
    archive = Archive(settings, removed, _partitions_before(folder, settings), headers)
    shaping = {name: getattr(settings, name) for name in SHAPING}
    shaping |= {"recipe": recipe_of(settings).id, "box_frame": box_frame(settings)}
    parts = []
    manifest = tempfile.TemporaryFile()  # noqa: SIM115  # the plan keeps it open
    with room(archive.uri), pq.ParquetWriter(manifest, ARCHIVE, compression="zstd") as writer:
        for rows in archive.partitions():  # one row group a partition: a task reads its own and no other
            parts.append(Draft.under(storage.join(folder, "parts"), PART_KIND, shaping, (rows_digest(rows),)))
            writer.write_table(rows, row_group_size=rows.num_rows)
    draft = Draft.under(folder, KIND, shaping | {"name": settings.name}, [part.input_id for part in parts])
    return CorpusPlan(archive, draft, parts, manifest)


def _latest_uri(folder: str, settings: CorpusSettings) -> str:
    """The file that names the last corpus prepared from an archive under one name."""
    archive = hashlib.sha256(storage.canonical(settings.archive or "").encode()).hexdigest()[:20]
    return storage.join(folder, LATEST, f"{archive}.json")


def _partitions_before(folder: str, settings: CorpusSettings) -> Iterator[pa.Table]:
    """The partitions of the last corpus that was prepared from this archive; none where there is none any more."""
    try:
        latest = json.loads(storage.read_bytes(_latest_uri(folder, settings)))["input_id"]
        file = storage.arrow_reader(storage.join(folder, latest, MANIFEST_FILE))
    except FileNotFoundError:
        return
    with file:
        manifest = pq.ParquetFile(file)
        for group in range(manifest.num_row_groups):
            yield manifest.read_row_group(group, columns=["source_uri", "image_id"])


def find_prepared(settings: CorpusSettings, workspace: str, privacy: PrivacySettings = KEYED) -> Artifact:
    """The corpus of an archive as it is now. Raises UserError where it is not prepared yet."""
    found = artifacts.find(plan_corpus(settings, workspace, privacy).draft.uri)
    if found is None:
        raise UserError(
            f"the archive {settings.archive} is not prepared yet: run jobs.prepare with these settings first"
        )
    return found


def prepare(settings: CorpusSettings, workspace: str, privacy: PrivacySettings = KEYED) -> tuple[Artifact, bool]:
    """The prepared corpus of an archive, and whether anything had to be done.

    Raises UserError for an archive that cannot be read or where more than `max_quarantined` of the images are bad.
    """
    plan = plan_corpus(settings, workspace, privacy, scans=True)
    done = artifacts.find(plan.draft.uri)
    if done:
        return done, False
    plan.draft.begin()
    manifest = _write_manifest(plan)
    with ThreadPoolExecutor(READS_AHEAD) as pool:
        found = list(pool.map(artifacts.find, [part.uri for part in plan.parts]))
    before = sum(part.counts["archive"] for part in found if part)
    with Progress.of(workspace, plan.draft, "prepare", plan.archive.rows, before=before) as progress:
        finished = _prepare_parts(plan, found, settings, progress)
        corpus = _finish(plan.draft, manifest, finished, plan.archive, settings)
        # Not before: what was never finished decides nothing about what comes after it.
        latest = _latest_uri(storage.parent(plan.draft.uri), settings)
        storage.write_bytes(latest, json.dumps({"input_id": corpus.input_id}).encode())
        return corpus, True


def _write_manifest(plan: CorpusPlan) -> FileEntry:
    with plan.draft.staged(MANIFEST_FILE) as (local, entry), local.open("wb") as file:
        plan.manifest.seek(0)
        shutil.copyfileobj(plan.manifest, file)
    return entry.value


def _prepare_parts(
    plan: CorpusPlan, found: list[Artifact | None], settings: CorpusSettings, progress: Progress
) -> list[Artifact]:
    """All parts of the corpus; those not `found` are prepared."""
    draft, parts = plan.draft, plan.parts
    missing = [n for n, part in enumerate(found) if part is None]
    total = plan.archive.rows
    quarantined = sum(part.counts["quarantined"] for part in found if part)
    if missing:
        tasks = [{"group": n, "uri": parts[n].uri} for n in missing]
        task = _PartTask(storage.join(draft.uri, MANIFEST_FILE), dict(parts[0].settings), settings)
        results = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(task)
        for result in results.iter_rows():
            storage.add_retries(result["retries"])
            if result["error"]:
                raise UserError(result["error"])
            quarantined += result["quarantined"]
            progress.advance(result["archive"])
            _check_quarantine(quarantined, total, settings, draft.uri, final=False)
    _check_quarantine(quarantined, total, settings, draft.uri, final=True)
    return [part or artifacts.load(parts[n].uri, PART_KIND) for n, part in enumerate(found)]


def _check_quarantine(bad: int, total: int, settings: CorpusSettings, uri: str, *, final: bool) -> None:
    if bad > settings.max_quarantined * total:
        raise UserError(
            f"{bad:,} {'' if final else 'so far '}of {total:,} images are quarantined, more than"
            f" corpus.max_quarantined={settings.max_quarantined:g}: see {QUARANTINE_FILE} in"
            f" {storage.join(storage.parent(uri), 'parts')}, mend the archive or raise the limit"
        )


class _PartTask:
    """Prepare one partition. Runs in a Ray Data task: holds plain values only."""

    def __init__(self, manifest_uri: str, shaping: dict[str, Any], settings: CorpusSettings) -> None:
        self._manifest_uri, self._shaping = manifest_uri, shaping
        self._settings = settings

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        before = storage.retries()
        cv2.setNumThreads(1)  # tasks run side by side, one a core
        try:
            with storage.arrow_reader(self._manifest_uri) as file:
                rows = pq.ParquetFile(file).read_row_group(task["group"])
            part = Draft(task["uri"], PART_KIND, self._shaping, (rows_digest(rows),)).begin()
            counts = prepare_part(part, rows, self._settings).counts
        except UserError as error:  # returned: Ray Data keeps the text of what is raised, and loses what it was
            retries = storage.retries() - before
            return {"archive": 0, "quarantined": 0, "retries": retries, "error": str(error)}
        done = {name: counts[name] for name in ("archive", "quarantined")}
        return {**done, "retries": storage.retries() - before, "error": ""}


def prepare_part(part: Draft, rows: pa.Table, settings: CorpusSettings) -> Artifact:
    """Decode one partition and write it whole: prepared rows, quarantined rows, counts."""
    recipe = recipe_of(settings)
    limits = Limits(settings.min_side, settings.max_pixels, settings.source_side or 0)
    schema, frame = corpus_schema(recipe), box_frame(settings)
    prepared: list[dict[str, Any]] = []
    groups: list[pa.Table] = []
    bad: list[dict[str, Any]] = []
    excluded: Counter[str] = Counter()
    burned_in = 0
    for row, data in _fetched(rows.to_pylist()):
        try:
            if row["reason"]:
                raise RejectedImage(row["reason"], row["text"])
            if row["excluded"]:
                raise ExcludedImage(row["excluded"])
            if isinstance(data, Exception):
                raise RejectedImage("unreadable", str(data))
            image = decode(data or b"", recipe, limits)
            prepared.append(_prepared_row(row, data or b"", image, recipe, frame))
            burned_in += image.burned_in
        except RejectedImage as rejected:
            bad.append({**row, "reason": rejected.reason, "text": rejected.text})
        except ExcludedImage as left_out:
            excluded[left_out.rule] += 1
        if len(prepared) == settings.row_group_images:  # not all at the end: pixels would be held twice
            groups.append(pa.Table.from_pylist(prepared, schema=schema))
            prepared = []
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


def _fetched(rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], bytes | Exception | None]]:
    """Each manifest row with its file's bytes, the error of reading them, or None where they are not needed."""

    def fetch(row: dict[str, Any]) -> bytes | Exception | None:
        if row["reason"] or row["excluded"]:
            return None
        try:
            return storage.read_bytes(row["source_uri"])
        except FileNotFoundError as error:
            return error
        except UserError as error:
            if isinstance(error.__cause__, PermissionError):
                return error  # one file that may not be read; a whole disk that fails ends the job
            raise

    with ThreadPoolExecutor(READS_AHEAD) as pool:
        coming = (pool.submit(fetch, row) for row in rows)
        ahead = deque(islice(coming, READS_AHEAD))
        for row in rows:
            data = ahead.popleft().result()
            ahead.extend(islice(coming, 1))
            yield row, data


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
        "source_uri": row["source_uri"],
        "source_sha256": hashlib.sha256(data).digest(),
        "pixel_sha256": hashlib.sha256(pixels).digest(),
        "boxes": boxes,
        "split": row["split"],
    }


def _finish(
    draft: Draft, manifest: FileEntry, parts: list[Artifact], archive: Archive, settings: CorpusSettings
) -> Artifact:
    exclusions = find_duplicates([storage.join(part.uri, ROWS_FILE) for part in parts])
    with draft.staged(EXCLUSIONS_FILE) as (local, entry):
        pq.write_table(exclusions, local, compression="zstd")
    counts = {
        name: sum(part.counts[name] for part in parts) for name in ("archive", "prepared", "quarantined", "excluded")
    }
    counts["duplicates"] = exclusions.num_rows
    counts["prepared"] -= exclusions.num_rows
    reasons: Counter[str] = Counter()
    rules: Counter[str] = Counter()
    for part in parts:
        reasons.update(part.manifest["quarantine_reasons"])
        rules.update(part.manifest["exclusion_rules"])
    return draft.finish(
        [manifest, entry.value],
        counts,
        [CORPUS_ADDS_UP],
        parts,
        archive_uri=storage.canonical(settings.archive or ""),
        decode_recipe=recipe_of(settings).to_json(),
        decode_recipe_id=recipe_of(settings).id,
        label_rows=archive.label_rows,
        labels_without_image=archive.labels_without_image,
        label_tables=archive.table_hashes,
        ignored_files=archive.ignored,
        boxes_left_out=archive.boxes_left_out,
        quarantine_reasons=dict(reasons),
        exclusion_rules=dict(rules),
        burned_in=sum(part.manifest["burned_in"] for part in parts),
        duplicates_across_patients=pc.sum(pc.invert(exclusions["same_patient"])).as_py() or 0,
        **row_facts(parts, exclusions),
    )


def find_duplicates(files: Sequence[str]) -> pa.Table:
    """Rows whose pixels another row has too, over all shards: the lowest image id stays, the others are listed.

    Holds 16 bytes a row, of its hash; those that occur twice are looked at as a whole.
    """
    begun = np.concatenate([_hash_beginnings(uri) for uri in files])
    begun.sort()
    suspects = np.unique(begun[1:][begun[1:] == begun[:-1]])
    groups: dict[bytes, list[tuple[str, int, int, str]]] = {}
    for number, uri in enumerate(files if len(suspects) else ()):
        found = np.flatnonzero(np.isin(_hash_beginnings(uri), suspects))
        if len(found) == 0:
            continue
        with storage.arrow_reader(uri) as file:
            table = pq.read_table(file, columns=["image_id", "patient_id", "pixel_sha256"]).take(pa.array(found))
        for row, record in zip(found, table.to_pylist(), strict=True):
            groups.setdefault(record["pixel_sha256"], []).append(
                (record["image_id"], number, int(row), record["patient_id"])
            )
    rows = [
        {
            "part": number,
            "row": row,
            "image_id": image_id,
            "rule": "duplicate",
            "kept_image_id": group[0][0],
            "same_patient": patient == group[0][3],
        }
        for group in map(sorted, groups.values())
        for image_id, number, row, patient in group[1:]
    ]
    rows.sort(key=lambda row: (row["part"], row["row"]))
    return pa.Table.from_pylist(rows, schema=EXCLUSIONS)


def _hash_beginnings(uri: str) -> np.ndarray:
    """The first 8 bytes of each row's pixel hash: `uint64 [rows]`."""
    with storage.arrow_reader(uri) as file:
        hashes = pq.read_table(file, columns=["pixel_sha256"])["pixel_sha256"]
    return np.frombuffer(b"".join(value[:8] for value in hashes.to_pylist()), np.uint64)


def row_facts(parts: Sequence[Artifact], exclusions: pa.Table) -> dict[str, Any]:
    """Images, patients and findings of each split, and the proof that no patient is in two: their numbers add up. And
    how many images have each finding that is none of FINDINGS.

    Raises AccountingError where patients do not add up. Holds 8 bytes a patient of each part.
    """
    other: Counter[str] = Counter()
    images = dict.fromkeys(SPLITS, 0)
    findings = {split: dict.fromkeys(FINDINGS, 0) for split in SPLITS}
    hashed: dict[str, list[np.ndarray]] = {split: [np.empty(0, np.uint64)] for split in SPLITS}
    left_out = {(row["part"], row["row"]) for row in exclusions.to_pylist()}
    for number, part in enumerate(parts):
        with storage.arrow_reader(storage.join(part.uri, ROWS_FILE)) as file:
            rows = pq.read_table(file, columns=["patient_id", "split", "findings", "other"]).to_pylist()
        seen: dict[str, set[str]] = {split: set() for split in SPLITS}
        for index, row in enumerate(rows):
            if (number, index) in left_out:
                continue
            images[row["split"]] += 1
            seen[row["split"]].add(row["patient_id"])
            other.update(row["other"])
            for name in row["findings"]:
                findings[row["split"]][name] += 1
        for split, names in seen.items():
            beginnings = b"".join(hashlib.sha256(name.encode()).digest()[:8] for name in names)
            hashed[split].append(np.frombuffer(beginnings, np.uint64))
    patients = {split: np.unique(np.concatenate(found)) for split, found in hashed.items()}
    numbers = {split: len(found) for split, found in patients.items()}
    proof = PATIENTS_ADD_UP.check(numbers | {"patients": len(np.unique(np.concatenate(list(patients.values()))))})
    facts = {
        split: {"images": images[split], "patients": numbers[split], "findings": findings[split]} for split in SPLITS
    }
    return {"splits": facts, "split_equation": proof, "other_findings": dict(other)}


def schema_recipe(schema: pa.Schema) -> Recipe:
    """The decode recipe that a shard carries in its schema's metadata."""
    return Recipe.from_json(json.loads(schema.metadata[b"decode_recipe"]))
