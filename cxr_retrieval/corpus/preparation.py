"""Archive to prepared corpus: partitions of the archive's manifest, decoded by Ray Data, one shard each.

A partition is one batch of the manifest and becomes one part of the corpus (an artifact of its own), written
whole by one task: a task needs the memory of one partition, and a restart decodes only partitions without a manifest.
"""

import hashlib
import json
import shutil
import tempfile
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import IO, Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from ray.util.annotations import RayDeprecationWarning

from cxr_retrieval import artifacts, storage
from cxr_retrieval.artifacts import PLAN, Artifact, Draft, Equation, FileEntry
from cxr_retrieval.config import CorpusSettings, PrivacySettings
from cxr_retrieval.corpus.archive import Archive, room
from cxr_retrieval.corpus.decoding import DecodedImage, Recipe, decode
from cxr_retrieval.corpus.exclusions import Exclusions, find_duplicates
from cxr_retrieval.corpus.files import READS_AHEAD, UNREADABLE, read_listed
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.corpus.formats import format_of
from cxr_retrieval.corpus.headers import Headers
from cxr_retrieval.corpus.limits import ExcludedImage, Limits, RejectedImage
from cxr_retrieval.corpus.manifest import MANIFEST_FILE, ManifestWriter, read_partition, read_partitions
from cxr_retrieval.corpus.rows import EXCLUSIONS, LABELS, QUARANTINE, as_read, corpus_schema, rows_digest
from cxr_retrieval.corpus.splits import SPLITS
from cxr_retrieval.errors import UserError
from cxr_retrieval.progress import Progress
from cxr_retrieval.runtime import DIED, TRIES, nodes_cpus, nodes_memory
from cxr_retrieval.tombstones import RemovedPatients

KIND, PART_KIND = "corpus", "corpus-part"
ROWS_FILE, QUARANTINE_FILE, EXCLUSIONS_FILE = "rows.parquet", "quarantine.parquet", "exclusions.parquet"
KEYED = PrivacySettings()  # removed patients are told by a key, unless an archive is said to be public
LATEST = "latest"  # beside the corpora of a name
BYTES_AHEAD = 64 << 20  # of the files that are held while another is decoded
# Bytes a pixel of an image that is decoded, its file and what is made of it on the way: of a PNG of 16 bits, 17 of one
# with colours. JPEG 2000 with colours takes 28, and nobody's films of the largest size are that.
DECODING = 18
BEGUN_TOLD = 8  # partitions that are told where one of them cannot be prepared
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


def task_memory(settings: CorpusSettings) -> int:
    """Bytes that a task may take: the pixels of its partition twice, files read ahead, and the largest image."""
    return 2 * settings.partition_images * settings.size**2 + BYTES_AHEAD + DECODING * settings.max_pixels


@dataclass(frozen=True)
class CorpusPlan:
    """What preparing an archive means before any image is read: the corpus, its parts, and the archive's manifest, a
    file in the temporary folder that has no name and is gone with this plan."""

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
    with room(archive.uri), ManifestWriter.to(manifest) as writer:
        for rows in archive.partitions():
            parts.append(Draft.under(storage.join(folder, "parts"), PART_KIND, shaping, (rows_digest(rows),)))
            writer.write(rows)
    draft = Draft.under(folder, KIND, shaping | {"name": settings.name}, [part.input_id for part in parts])
    return CorpusPlan(archive, draft, parts, manifest)


def _latest_uri(folder: str, settings: CorpusSettings) -> str:
    """The file that names the last corpus prepared from an archive under one name."""
    archive = hashlib.sha256(storage.canonical(settings.archive or "").encode()).hexdigest()[:20]
    return storage.join(folder, LATEST, f"{archive}.json")


def _remember_latest(corpus: Artifact, settings: CorpusSettings) -> None:
    """Note a corpus as the last one of its archive: what was never finished decides nothing about what comes after."""
    latest = _latest_uri(storage.parent(corpus.uri), settings)
    told = json.dumps({"input_id": corpus.input_id}).encode()
    if not storage.exists(latest) or storage.read_bytes(latest) != told:
        storage.write_bytes(latest, told)


def _partitions_before(folder: str, settings: CorpusSettings) -> Iterator[pa.Table]:
    """The partitions of the last corpus that was prepared from this archive; none where there is none any more."""
    try:
        latest = json.loads(storage.read_bytes(_latest_uri(folder, settings)))["input_id"]
        file = storage.arrow_reader(storage.join(folder, latest, MANIFEST_FILE))
    except FileNotFoundError:
        return
    with file:
        yield from read_partitions(file, ["source_uri", "image_id", "reason", "text"])


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
        _remember_latest(done, settings)  # of a job that was killed before it did
        return done, False
    draft, manifest = plan.draft, _begin(plan.draft, plan.manifest)
    with ThreadPoolExecutor(READS_AHEAD) as pool:
        found = list(pool.map(artifacts.find, [part.uri for part in plan.parts]))
    before = sum(part.counts["archive"] for part in found if part)
    with Progress.of(workspace, draft, "prepare", plan.archive.rows, before=before) as progress:
        finished = _prepare_parts(plan, found, settings, progress, names=not privacy.pseudonymise)
        if [part.uri for part in finished] != [part.uri for part in plan.parts]:
            draft = replace(draft, inputs=tuple(part.input_id for part in finished))
            draft = replace(draft, uri=storage.join(storage.parent(draft.uri), draft.input_id))
            manifest = _begin(draft, _manifest_as_read(plan, finished))
        corpus = _finish(draft, manifest, finished, plan.archive, settings)
        _remember_latest(corpus, settings)
        return corpus, True


def _begin(draft: Draft, manifest: IO[bytes]) -> FileEntry:
    """Begin a corpus: its plan, and the manifest of its archive, of which the tasks read their partitions."""
    draft.begin()
    with draft.staged(MANIFEST_FILE) as (local, entry), local.open("wb") as file:
        manifest.seek(0)
        shutil.copyfileobj(manifest, file)
    return entry.value


def _manifest_as_read(plan: CorpusPlan, finished: Sequence[Artifact]) -> IO[bytes]:
    """The manifest of an archive of which some images could not be read, and which tells that of them."""
    manifest = tempfile.TemporaryFile()  # noqa: SIM115  # for the caller to read
    planned = read_partitions(plan.manifest)
    with room(plan.archive.uri), ManifestWriter.to(manifest) as writer:
        for rows, part, made in zip(planned, plan.parts, finished, strict=True):
            if made.uri != part.uri:
                with storage.arrow_reader(storage.join(made.uri, QUARANTINE_FILE)) as file:
                    rows = as_read(rows, pq.read_table(file).to_pylist())
            writer.write(rows)
    return manifest


def _prepare_parts(
    plan: CorpusPlan, found: list[Artifact | None], settings: CorpusSettings, progress: Progress, *, names: bool
) -> list[Artifact]:
    """All parts of the corpus; those not `found` are prepared. `names`: whether images may be told by theirs."""
    draft, parts = plan.draft, plan.parts
    missing = [n for n, part in enumerate(found) if part is None]
    total = plan.archive.rows
    uris = {n: part.uri for n, part in enumerate(parts)}
    quarantined = sum(part.counts["quarantined"] for part in found if part)
    if missing:
        tasks = [{"partition": n, "uri": parts[n].uri} for n in missing]
        task = _PartTask(storage.join(draft.uri, MANIFEST_FILE), dict(parts[0].settings), settings)
        memory = min(task_memory(settings), *nodes_memory())  # a node that has less takes one at a time
        with warnings.catch_warnings():
            # Ray 2.60 has no other way to tell it when to give up, and asks for one that it does not name.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            results = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(
                task, memory=memory, max_retries=TRIES - 1
            )
        waiting = dict.fromkeys(missing)
        try:
            for result in results.iter_rows():
                storage.add_retries(result["retries"])
                if result["error"]:
                    raise UserError(result["error"])
                del waiting[result["partition"]]
                uris[result["partition"]] = result["uri"]
                quarantined += result["quarantined"]
                progress.advance(result["archive"])
                _check_quarantine(quarantined, total, settings, draft.uri, final=False)
        except DIED as error:
            raise UserError(_death_told(draft, parts, waiting, names)) from error
    _check_quarantine(quarantined, total, settings, draft.uri, final=True)
    return [part or artifacts.load(uris[n], PART_KIND) for n, part in enumerate(found)]


def _death_told(draft: Draft, parts: Sequence[Draft], waiting: Iterable[int], names: bool) -> str:
    """What is said where a process died over a partition that was begun, one of those `waiting`, at every try."""
    manifest, told = storage.join(draft.uri, MANIFEST_FILE), []
    at_work = islice(waiting, 2 * int(sum(nodes_cpus())))  # partitions are begun in their order
    for number in islice((n for n in at_work if storage.exists(storage.join(parts[n].uri, PLAN))), BEGUN_TOLD):
        uris = read_partition(manifest, number)["source_uri"].drop_null().to_pylist() if names else []
        told.append(f"{number} ({f'{uris[0]} to {uris[-1]}' if uris else parts[number].uri})")
    return (
        f"{manifest}: the process that prepared one of these of its partitions died at every try: {', '.join(told)};"
        " an image in it crashes its decoder or takes more memory than there is (Ray's logs say which): take it out of"
        " the archive, or lower corpus.max_pixels, and run the same command again, it goes on"
    )


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
    for row, coming in _fetched(rows.to_pylist()):
        try:
            if row["reason"]:
                raise RejectedImage(row["reason"], row["text"])
            if row["excluded"]:
                raise ExcludedImage(row["excluded"])
            data = coming.result()
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


def _fetched(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Future[bytes]]]:
    """Each manifest row with its file's bytes, or RejectedImage, to come. Files that are needed are read ahead, those
    larger than BYTES_AHEAD in their turn."""
    waiting, ahead, held = deque(rows), deque[Future[bytes]](), 0

    def size(row: dict[str, Any]) -> int:
        return 0 if row["reason"] or row["excluded"] else row["size"]

    def fetch() -> Future[bytes]:
        nonlocal held
        row = waiting.popleft()
        held += size(row)
        if row["reason"] or row["excluded"]:
            return Future()
        return pool.submit(read_listed, row["source_uri"], row["size"])

    with ThreadPoolExecutor(READS_AHEAD) as pool:
        for row in rows:
            coming = ahead.popleft() if ahead else fetch()
            held -= size(row)
            while waiting and len(ahead) < READS_AHEAD and held + size(waiting[0]) <= BYTES_AHEAD:
                ahead.append(fetch())
            yield row, coming


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
    files = [storage.join(part.uri, ROWS_FILE) for part in parts]
    duplicates = across = 0
    with (
        room(archive.uri),
        draft.staged(EXCLUSIONS_FILE) as (local, entry),
        pq.ParquetWriter(local, EXCLUSIONS, compression="zstd") as writer,
    ):
        for found in find_duplicates(files):
            writer.write_table(found)
            duplicates += found.num_rows
            across += pc.sum(pc.invert(found["same_patient"])).as_py()
    counts = {
        name: sum(part.counts[name] for part in parts) for name in ("archive", "prepared", "quarantined", "excluded")
    }
    counts["duplicates"] = duplicates
    counts["prepared"] -= duplicates
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
        duplicates_across_patients=across,
        **row_facts(parts, Exclusions.read(storage.join(draft.uri, EXCLUSIONS_FILE))),
    )


def row_facts(parts: Sequence[Artifact], exclusions: Exclusions) -> dict[str, Any]:
    """Images, patients and findings of each split, and the proof that no patient is in two: their numbers add up. And
    how many images have each finding that is none of FINDINGS.

    Raises AccountingError where patients do not add up. Holds at most 32 bytes a patient of each part.
    """
    other: Counter[str] = Counter()
    images = dict.fromkeys(SPLITS, 0)
    findings = {split: dict.fromkeys(FINDINGS, 0) for split in SPLITS}
    hashed: dict[str, list[np.ndarray]] = {split: [np.empty(0, np.uint64)] for split in SPLITS}
    for number, part in enumerate(parts):
        with storage.arrow_reader(storage.join(part.uri, ROWS_FILE)) as file:
            rows = pq.read_table(file, columns=["patient_id", "split", "findings", "other"])
        seen_rows = np.delete(np.arange(rows.num_rows), exclusions.of(number))
        seen: dict[str, set[str]] = {split: set() for split in SPLITS}
        for row in rows.take(pa.array(seen_rows)).to_pylist():
            images[row["split"]] += 1
            seen[row["split"]].add(row["patient_id"])
            other.update(row["other"])
            for name in row["findings"]:
                findings[row["split"]][name] += 1
        for split, names in seen.items():
            beginnings = b"".join(hashlib.sha256(name.encode()).digest()[:8] for name in names)
            hashed[split].append(np.frombuffer(beginnings, np.uint64))
    patients = {split: np.unique(np.concatenate(hashed.pop(split))) for split in SPLITS}
    numbers = {split: len(found) for split, found in patients.items()}
    proof = PATIENTS_ADD_UP.check(numbers | {"patients": len(np.unique(np.concatenate(list(patients.values()))))})
    facts = {
        split: {"images": images[split], "patients": numbers[split], "findings": findings[split]} for split in SPLITS
    }
    return {"splits": facts, "split_equation": proof, "other_findings": dict(other)}


def schema_recipe(schema: pa.Schema) -> Recipe:
    """The decode recipe that a shard carries in its schema's metadata."""
    return Recipe.from_json(json.loads(schema.metadata[b"decode_recipe"]))
