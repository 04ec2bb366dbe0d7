"""Archive to prepared corpus: partitions of the archive's manifest, decoded by Ray Data, one shard each.

A partition is one batch of the manifest and becomes one part of the corpus, an artifact of its own.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from ray.util.annotations import RayDeprecationWarning

from cxr_retrieval import artifacts, console, storage
from cxr_retrieval.artifacts import MANIFEST, PLAN, Artifact, CorruptArtifact, Draft, Equation, FileEntry
from cxr_retrieval.config import CorpusSettings, PrivacySettings
from cxr_retrieval.corpus.archive import Archive, room
from cxr_retrieval.corpus.beginning import Beginning, NotToldYet
from cxr_retrieval.corpus.exclusions import EXCLUSIONS_FILE, Exclusions, find_duplicates
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.corpus.formats import format_of
from cxr_retrieval.corpus.formats.labels import HeaderFormat
from cxr_retrieval.corpus.headers import Headers
from cxr_retrieval.corpus.manifest import MANIFEST_FILE, ManifestWriter, read_partition, read_partitions
from cxr_retrieval.corpus.parts import (
    PART_KIND,
    QUARANTINE_FILE,
    ROWS_FILE,
    TASK_CPUS,
    PartTask,
    part_of,
    recipe_of,
    shaping_of,
    task_memory,
)
from cxr_retrieval.corpus.rows import EXCLUSIONS, as_read
from cxr_retrieval.corpus.splits import SPLITS
from cxr_retrieval.errors import UserError
from cxr_retrieval.progress import Progress
from cxr_retrieval.runtime import DIED, TRIES, nodes_cpus, reserved_memory
from cxr_retrieval.tombstones import RemovedPatients

KIND = "corpus"
KEYED = PrivacySettings()  # removed patients are told by a key, unless an archive is said to be public
LATEST, BEGUN = "latest", "begun"  # beside the corpora of a name
BEGUN_TOLD = 8  # partitions that are told where one of them cannot be prepared
CORPUS_ADDS_UP = Equation("archive", ("prepared", "quarantined", "excluded", "duplicates"))
IMAGES_ADD_UP = Equation("prepared", SPLITS)  # what the parts told, against the rows that readers will find
PATIENTS_ADD_UP = Equation("patients", SPLITS)  # of all splits together, against those of each: nobody is in two


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
    folder = corpus_folder(settings, workspace)
    _require_apart(settings, workspace)
    removed = RemovedPatients.of(workspace, privacy)
    headers = Headers(workspace, settings, removed, scans)
    archive = Archive(settings, removed, _partitions_before(folder, settings), headers)
    shaping, parts = shaping_of(settings), []
    manifest = tempfile.TemporaryFile()  # noqa: SIM115  # the plan keeps it open
    with room(archive.uri), ManifestWriter.to(manifest) as writer:
        for rows in archive.partitions():
            parts.append(part_of(folder, rows, shaping))
            writer.write(rows)
    return CorpusPlan(archive, _corpus_of(folder, settings, shaping, parts), parts, manifest)


def _require_apart(settings: CorpusSettings, workspace: str) -> None:
    """Refuse a workspace in an archive of which every file may be an image: it would grow by what is written of it."""
    layout, archive = format_of(settings), storage.canonical(settings.archive or "")
    within = f"{storage.canonical(workspace)}/".startswith(f"{archive.rstrip('/')}/")
    if within and isinstance(layout, HeaderFormat) and "" in layout.endings:
        raise UserError(
            f"the workspace {workspace} lies in the archive {archive}, of which every file may be an image: set"
            " workspace to a folder outside"
        )


def _corpus_of(folder: str, settings: CorpusSettings, shaping: dict[str, Any], parts: Sequence[Draft]) -> Draft:
    return Draft.under(folder, KIND, shaping | {"name": settings.name}, [part.input_id for part in parts])


def corpus_folder(settings: CorpusSettings, workspace: str) -> str:
    """Where everything that is kept under a corpus's name is."""
    return storage.join(workspace, "corpora", settings.name)


def _latest_uri(folder: str, settings: CorpusSettings) -> str:
    """The file that names the last corpus prepared from an archive under one name."""
    archive = hashlib.sha256(storage.canonical(settings.archive or "").encode()).hexdigest()[:20]
    return storage.join(folder, LATEST, f"{archive}.json")


def _begun_uri(folder: str, settings: CorpusSettings) -> str:
    """The file that names the last corpus begun from an archive with settings by which its parts are the same ones."""
    cut = shaping_of(settings) | {"partition_images": settings.partition_images}
    name = artifacts.input_id(KIND, cut, [storage.canonical(settings.archive or "")])
    return storage.join(folder, BEGUN, f"{name}.json")


def _remember(pointer: str, input_id: str) -> None:
    """Name a corpus in one of these files."""
    told = json.dumps({"input_id": input_id}).encode()
    if not storage.exists(pointer) or storage.read_bytes(pointer) != told:
        storage.write_bytes(pointer, told)


def _partitions_before(folder: str, settings: CorpusSettings) -> Iterator[pa.Table]:
    """The partitions of the last corpus that was prepared from this archive, then those of the last that was begun, if
    it is another: what was finished of it has images that the first does not know. None of one that is gone."""
    corpora: dict[str, None] = {}
    for pointer in (_latest_uri(folder, settings), _begun_uri(folder, settings)):
        with contextlib.suppress(FileNotFoundError):
            corpora[json.loads(storage.read_bytes(pointer))["input_id"]] = None
    for corpus in corpora:
        try:
            file = storage.arrow_reader(storage.join(folder, corpus, MANIFEST_FILE))
        except FileNotFoundError:
            continue
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


@dataclass(frozen=True)
class HeadStart:
    """The first partition of an archive that was never begun, at work while the rest is being listed: the first
    image of a million is out within seconds.

    It is a guess of what the partition is, begun as the one part of a corpus of its own: whose images are in it is told
    by that corpus's manifest, for removals. It stays unfinished, since no job needs the right to delete a workspace's
    corpora; where the whole listing tells another partition, the part is of no other corpus.
    """

    part: Draft
    result: Any
    """Reference to what a PartTask tells of the part."""

    @classmethod
    @contextlib.contextmanager
    def of(cls, settings: CorpusSettings, workspace: str, privacy: PrivacySettings) -> Iterator["HeadStart | None"]:
        """None where the archive was prepared or begun before, which places its images, its first part is there, or its
        beginning does not tell it."""
        folder, head, rows = corpus_folder(settings, workspace), None, None
        if not any(map(storage.exists, (_latest_uri(folder, settings), _begun_uri(folder, settings)))):
            with contextlib.suppress(NotToldYet, UserError):  # what is wrong is told when all of it is listed
                (rows,) = Beginning(settings, RemovedPatients.of(workspace, privacy)).partitions()
        if rows is not None:
            shaping = shaping_of(settings)
            part = part_of(folder, rows, shaping)
            if artifacts.find(part.uri) is None:
                head = cls._at_work(_corpus_of(folder, settings, shaping, [part]), part, rows, settings)
        try:
            yield head
        finally:
            if head and ray.is_initialized():
                ray.cancel(head.result)  # where nobody has waited for it

    @classmethod
    def _at_work(cls, draft: Draft, part: Draft, rows: pa.Table, settings: CorpusSettings) -> "HeadStart":
        console.say(f"prepare: the first {rows.num_rows:,} images, while the archive is being listed")
        with tempfile.TemporaryFile() as manifest:
            with room(settings.archive or ""), ManifestWriter.to(manifest) as writer:
                writer.write(rows)
            _begin(draft, manifest)
        work = ray.remote(num_cpus=TASK_CPUS, memory=reserved_memory(task_memory(settings)), max_retries=TRIES - 1)(
            _run
        ).options(name="HeadStart")
        return cls(part, work.remote(_task_of(draft, part, settings), {"partition": 0, "uri": part.uri}, rows))

    def is_of(self, plan: CorpusPlan) -> bool:
        """Whether the guess was right."""
        return self.part.uri == plan.parts[0].uri


def _wake_workers() -> None:
    """Have the processes that tasks will run in import what these need, seconds of work, while the archive is being
    listed. Nobody waits for them, and without Ray, which a finished corpus does not take, there are none."""
    if ray.is_initialized():
        awake = ray.remote(num_cpus=TASK_CPUS)(_awake)
        for _ in range(int(sum(nodes_cpus()) / TASK_CPUS)):
            awake.remote()


def _awake() -> str:
    """Of Ray Data, which imports itself when it is first asked for something."""
    return ray.data.__name__


def _run(task: PartTask, what: dict[str, Any], rows: pa.Table) -> dict[str, Any]:
    return task(what, rows)


def _task_of(draft: Draft, part: Draft, settings: CorpusSettings) -> PartTask:
    return PartTask(storage.join(draft.uri, MANIFEST_FILE), dict(part.settings), settings)


def prepare(settings: CorpusSettings, workspace: str, privacy: PrivacySettings = KEYED) -> tuple[Artifact, bool]:
    """The prepared corpus of an archive, and whether anything had to be done.

    Raises UserError for an archive that cannot be read or where more than `max_quarantined` of the images are bad.
    """
    with HeadStart.of(settings, workspace, privacy) as head:
        _wake_workers()
        plan = plan_corpus(settings, workspace, privacy, scans=True)
        folder = corpus_folder(settings, workspace)
        done = artifacts.find(plan.draft.uri)
        if done:
            _remember(_latest_uri(folder, settings), done.input_id)  # of a job that was killed before it did
            return done, False
        draft, manifest = plan.draft, _begin(plan.draft, plan.manifest)
        _remember(_begun_uri(folder, settings), draft.input_id)
        found = list(storage.read_ahead(artifacts.find, (part.uri for part in plan.parts)))
        begun = head.result if head and head.is_of(plan) else None
        if begun:
            found[0] = None  # finished meanwhile or not, its task tells of it
        before = sum(part.counts["archive"] for part in found if part)
        with Progress.of(workspace, draft, "prepare", plan.archive.rows, before=before) as progress:
            finished = _prepare_parts(plan, found, begun, settings, progress, names=not privacy.pseudonymise)
            if [part.uri for part in finished] != [part.uri for part in plan.parts]:
                draft = replace(draft, inputs=tuple(part.input_id for part in finished))
                draft = replace(draft, uri=storage.join(storage.parent(draft.uri), draft.input_id))
                manifest = _begin(draft, _manifest_as_read(plan, finished))
                _remember(_begun_uri(folder, settings), draft.input_id)
            corpus = _finish(draft, manifest, finished, plan.archive, settings)
            _remember(_latest_uri(folder, settings), corpus.input_id)
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
    plan: CorpusPlan,
    found: list[Artifact | None],
    begun: Any | None,
    settings: CorpusSettings,
    progress: Progress,
    *,
    names: bool,
) -> list[Artifact]:
    """All parts of the corpus; those not `found` are prepared, and the first is at work where its task's result has
    `begun`. `names`: whether images may be told by theirs."""
    draft, parts = plan.draft, plan.parts
    missing = [n for n, part in enumerate(found) if part is None]
    total = plan.archive.rows
    uris = {n: part.uri for n, part in enumerate(parts)}
    quarantined = sum(part.counts["quarantined"] for part in found if part)
    waiting = dict.fromkeys(missing)
    try:
        for result in _results(plan, missing, begun, settings):
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
    made = storage.read_ahead(partial(artifacts.load, kind=PART_KIND), (uris[n] for n in missing))
    return [part or next(made) for part in found]


def _results(
    plan: CorpusPlan, missing: Sequence[int], begun: Any | None, settings: CorpusSettings
) -> Iterator[dict[str, Any]]:
    """What the tasks tell of the `missing` parts, in any order: of the first one what `begun` refers to, if it is."""
    tasks = [{"partition": n, "uri": plan.parts[n].uri} for n in missing if n or begun is None]
    if tasks:
        with warnings.catch_warnings():
            # Ray 2.60 has no other way to tell it when to give up, and asks for one that it does not name.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            results = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(
                _task_of(plan.draft, plan.parts[0], settings),
                num_cpus=TASK_CPUS,
                memory=reserved_memory(task_memory(settings)),
                max_retries=TRIES - 1,
            )
        for result in results.iter_rows():
            yield result
            if begun is not None and ray.wait([begun], timeout=0)[0]:
                yield ray.get(begun)
                begun = None
    if begun is not None:
        yield ray.get(begun)


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
    told = {name: sum(part.counts[name] for part in parts) for name in ("prepared", "quarantined", "excluded")}
    counts = told | {"archive": archive.rows, "duplicates": duplicates, "prepared": told["prepared"] - duplicates}
    facts = row_facts(parts, Exclusions.read(storage.join(draft.uri, EXCLUSIONS_FILE)))
    IMAGES_ADD_UP.check(counts | {split: found["images"] for split, found in facts["splits"].items()})
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
        **facts,
    )


def row_facts(parts: Sequence[Artifact], exclusions: Exclusions) -> dict[str, Any]:
    """Images, patients and findings of each split, and the proof that no patient is in two: their numbers add up. And
    how many images have each finding that is none of FINDINGS.

    Raises AccountingError where patients do not add up, and CorruptArtifact for a part that has other rows than its
    manifest says. Holds at most 32 bytes a patient of each part.
    """
    other: Counter[str] = Counter()
    images = dict.fromkeys(SPLITS, 0)
    findings = {split: dict.fromkeys(FINDINGS, 0) for split in SPLITS}
    hashed: dict[str, list[np.ndarray]] = {split: [np.empty(0, np.uint64)] for split in SPLITS}
    for number, rows in enumerate(storage.read_ahead(_labels_read, parts)):
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


def _labels_read(part: Artifact) -> pa.Table:
    """What is counted of a part's rows. Raises CorruptArtifact where they are not as many as its manifest says."""
    uri = storage.join(part.uri, ROWS_FILE)
    with storage.arrow_reader(uri) as file:
        rows = pq.read_table(file, columns=["patient_id", "split", "findings", "other"])
    if rows.num_rows != (wanted := part.counts["prepared"]):
        raise CorruptArtifact(
            f"{uri}: {rows.num_rows:,} rows, and {wanted:,} by the part's manifest: restore the file, or delete that"
            f" {MANIFEST} and run the same command again, which prepares this part anew"
        )
    return rows
