"""What still holds patients who were removed: in a workspace, and where its indexes are published.

A tombstone hides a patient at once. This finds the bytes: a corpus part by the patients of its rows, then everything
that was made from what was found, by the inputs that every artifact names. Models and quantizers are told, not deleted:
no row of them is anybody's, and only training anew takes out what they have learnt.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cxr_retrieval import storage
from cxr_retrieval.artifacts import MANIFEST, PLAN, CorruptArtifact, find
from cxr_retrieval.corpus.exclusions import EXCLUSIONS_FILE
from cxr_retrieval.corpus.headers import HEADERS_FILE
from cxr_retrieval.corpus.manifest import MANIFEST_FILE, read_partitions
from cxr_retrieval.corpus.parts import QUARANTINE_FILE, ROWS_FILE
from cxr_retrieval.errors import UserError
from cxr_retrieval.index.aliases import list_aliases
from cxr_retrieval.index.build import QUANTIZER_KIND
from cxr_retrieval.index.files import sidecars
from cxr_retrieval.index.versions import GONE_REMEDY, OBJECTS, VERSIONS, Version, list_versions, named_objects, resolve
from cxr_retrieval.privacy import Pseudonyms
from cxr_retrieval.tombstones import NO_TOMBSTONES, RemovedPatients, Tombstones
from cxr_retrieval.training.model import KIND as MODEL_KIND
from cxr_retrieval.training.sweep import KIND as SWEEP_KIND

LEARNT = (MODEL_KIND, QUANTIZER_KIND, SWEEP_KIND)  # made from patients, and no row of them is one
# Of a workspace: what was made from other things before these, so that a purge that is killed finds the rest again.
FOLDERS = ("reports", "indexes", "models", "embeddings", "corpora")
SCRATCH_S = 86_400.0  # a write that is under way writes more often


@dataclass(frozen=True)
class Holdings:
    """What holds removed patients. `files` are all that has to go, in an order in which a purge may be killed after any
    and be run again.

    `learnt` are models, quantizers and sweeps that were made from their images, and stay. `to` is where versions are
    published, if these are. Half-written files, of whom cannot be told, go too where nothing was written to them for a
    day: `unfinished` are those that stay, since somebody may be writing them.
    """

    versions: tuple[str, ...]
    artifacts: tuple[str, ...]
    files: tuple[storage.StoredFile, ...]
    learnt: tuple[str, ...]
    to: str | None = None
    unfinished: tuple[storage.StoredFile, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


NOTHING = Holdings((), (), (), ())


def published_in(workspace: str) -> list[str]:
    """Where in a workspace indexes are published: those of its `indexes` that have a version, by their names."""
    folder = storage.join(storage.canonical(workspace), "indexes")
    parts = (file.path.split("/") for file in _files(folder))
    return [storage.join(folder, name) for name in sorted({name for name, *rest in parts if rest[:1] == [VERSIONS]})]


def listed_images(patients: Iterable[str], workspace: str) -> dict[str, set[str]]:
    """The images that the corpora of a workspace list of every patient, both by the names that the archive gives."""
    found: dict[str, set[str]] = {patient: set() for patient in patients}
    for uri in _of_corpora(workspace, MANIFEST_FILE):
        for rows in _named(uri):
            for patient, image in _pairs(rows.filter(pc.field("patient_id").isin(list(found)))):
                found[patient].add(image)
    return found


def shared_images(listed: Mapping[str, set[str]], workspace: str) -> dict[str, str]:
    """Those of these patients' images that have the pixels of an image of somebody else, and a file that names both:
    that image stays, and may be the same person's under another name."""
    theirs: set[str] = set().union(*listed.values())
    names = pa.array(theirs, pa.string())
    found: dict[str, str] = {}
    for uri in _of_corpora(workspace, EXCLUSIONS_FILE):
        with storage.arrow_reader(uri) as file:
            for rows in pq.ParquetFile(file).iter_batches(columns=["image_id", "kept_image_id", "same_patient"]):
                left_out, kept = (pc.is_in(rows[column], names) for column in ("image_id", "kept_image_id"))
                across = rows.filter(pc.and_(pc.xor(left_out, kept), pc.invert(rows["same_patient"])))
                for pair in _pairs(across.select(["image_id", "kept_image_id"])):
                    found |= {image: uri for image in pair if image in theirs}
    return found


def _of_corpora(workspace: str, name: str) -> Iterator[str]:
    """The files of one name in all corpora of a workspace."""
    for file in _files(storage.join(storage.canonical(workspace), "corpora")):
        if file.path.endswith(f"/{name}"):
            yield file.uri


def images_of(
    listed: Mapping[str, set[str]], places: Iterable[str], pseudonyms: Pseudonyms
) -> tuple[dict[str, set[str]], list[str]]:
    """The images of every patient, by the name that the archive gives: those that are `listed` in a workspace, and
    those of all versions at `places`. Images are named as they are outside the corpus.

    Then what is wrong with each version that is damaged, and so was not looked into: it keeps nobody from being
    removed.
    """
    outside = {pseudonyms.name("patient", patient): patient for patient in listed}
    found = {patient: {pseudonyms.name("image", image) for image in images} for patient, images in listed.items()}
    versions, damaged = _readable(places)
    for uri in {version.object_uri(version.files[name]) for version in versions for name in sidecars(version.files)}:
        try:
            rows = _sidecar(uri, ["patient", "image_id"])
        except CorruptArtifact as error:
            damaged.append(str(error))
            continue
        for patient, image in _pairs(rows.filter(pc.field("patient").isin(list(outside)))):
            found[outside[patient]].add(image)
    return found, damaged


def _sidecar(uri: str, columns: Sequence[str]) -> pa.Table:
    """Columns of a published version's sidecar. Raises CorruptArtifact where it is gone or damaged; storage that does
    not answer is neither."""
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError:
        raise CorruptArtifact(f"{uri}: gone since it was uploaded; {GONE_REMEDY}") from None
    try:
        return pq.read_table(pa.BufferReader(data), columns=list(columns))
    except (pa.ArrowInvalid, OSError):  # a rotten footer is an OSError to Parquet's reader
        raise CorruptArtifact(f"{uri}: no longer what was uploaded; {GONE_REMEDY}") from None


def _readable(places: Iterable[str]) -> tuple[list[Version], list[str]]:
    """All versions at `places`, and what is wrong with those that are damaged."""
    versions, damaged = [], []
    for to in places:
        for name in list_versions(to):
            try:
                versions.append(resolve(to, name))
            except CorruptArtifact as error:
                damaged.append(str(error))
    return versions, damaged


def under_other_keys(to: str, pseudonyms: Pseudonyms) -> list[str]:
    """The versions at `to` whose patients have the names of another key: whom they show, this one does not tell.
    Damaged ones, which nobody can open, are left out."""
    versions, _ = _readable([to])
    return [version.id for version in versions if version.facts["settings"]["pseudonymised"] != pseudonyms.key_id]


def _pairs(table: pa.Table | pa.RecordBatch) -> Iterator[tuple[str, str]]:
    """The rows of a table of two columns."""
    return zip(*(column.to_pylist() for column in table.columns), strict=True)


def _named(uri: str) -> Iterator[pa.Table]:
    """Patients and images that an archive's manifest or a part of a corpus names, a piece after the other."""
    columns = ["patient_id", "image_id"]
    with storage.arrow_reader(uri) as file:
        if uri.endswith(MANIFEST_FILE):
            yield from read_partitions(file, columns)
        else:
            yield pq.read_table(file, columns=columns)


def published_holdings(to: str, also: Tombstones = NO_TOMBSTONES) -> Holdings:
    """Versions at `to` with rows of patients with a tombstone there or among `also`, and all objects that no other
    version names.

    Objects of a publish that never ended are among them, however young: whose they hold cannot be told. One that is
    under way finds them gone, before or just after it moves the alias, and is run again.
    """
    to = storage.canonical(to)
    tombstones = Tombstones.at(to) | also
    if not tombstones:
        return NOTHING
    holding: dict[str, bool] = {}  # by sidecar object: versions share them
    held: list[Version] = []
    kept: list[Version] = []
    for version in (resolve(to, name) for name in list_versions(to)):
        (held if _holds(version, tombstones, holding) else kept).append(version)
    staying = {entry.sha256 for version in kept for entry in version.objects}
    names = {f"{version.id}.json" for version in held}
    files = [file for file in _files(storage.join(to, VERSIONS)) if file.path in names]
    files += [file for file in _files(storage.join(to, OBJECTS)) if file.path not in staying]
    dead, unfinished = _scratch([storage.join(to, OBJECTS)])
    return Holdings(tuple(sorted(version.id for version in held)), (), tuple(files + dead), (), to, unfinished)


def workspace_holdings(workspace: str, removed: RemovedPatients) -> Holdings:
    """Artifacts of a workspace that hold patients with a tombstone there, and pages and runs that may show them."""
    if not removed.tombstones:
        return NOTHING
    workspace = storage.canonical(workspace)
    found = {folder: list(_files(storage.join(workspace, folder))) for folder in FOLDERS}
    every = [file for folder in FOLDERS for file in sorted(found[folder], key=_turn)]
    plans = {storage.parent(file.uri): _made_from(file.uri) for file in every if file.path.endswith(f"/{PLAN}")}
    going = {storage.parent(uri) for uri in _corpora_that_hold(found["corpora"], removed)}
    while made := {folder for folder, (_, inputs) in plans.items() if not _ids(going).isdisjoint(inputs)} - going:
        going |= made
    learnt = {folder for folder in going if folder in plans and plans[folder][0] in LEARNT}
    going -= learnt
    names = _ids(going | learnt)
    runs = [file for file in _files(storage.join(workspace, "runs")) if file.path.split("/")[0][:20] in names]
    pages = [file for file in found["reports"] if going and _shows(file.path, names)]
    files = [file for file in every if not going.isdisjoint(_folders_of(file.uri))]
    dead, unfinished = _scratch(storage.join(workspace, folder) for folder in (*FOLDERS, "runs"))
    files = runs + pages + files + dead
    return Holdings((), tuple(sorted(going)), tuple(files), tuple(sorted(learnt)), unfinished=unfinished)


def purge(holdings: Holdings) -> Holdings:
    """Delete all that holds removed patients, but for objects that a version names that was published meanwhile; what
    was deleted. Of a file that goes, a bucket that keeps versions keeps none.

    Raises UserError where an alias serves one of the versions by then, before anything is deleted, and where a right to
    delete is missing.
    """
    named = named_objects(holdings.to, holdings.versions) if holdings.to else set()
    files = tuple(file for file in holdings.files if file.path not in named)
    # Last of all: looking for patients may have taken hours, in which an alias may have moved.
    aliases = list_aliases(holdings.to) if holdings.to else {}
    if serving := sorted(name for name, alias in aliases.items() if alias.version in holdings.versions):
        raise UserError(
            f"{holdings.to}: alias {', '.join(map(repr, serving))} serves a version that holds removed patients: build"
            " and publish the index without them first, then purge"
        )
    for file in files:
        storage.delete_for_good(file.uri)
    return replace(holdings, files=files)


def _scratch(folders: Iterable[str]) -> tuple[list[storage.StoredFile], tuple[storage.StoredFile, ...]]:
    """Half-written files whose writers are gone, and those whose writers may be at work."""
    dead: list[storage.StoredFile] = []
    unfinished: list[storage.StoredFile] = []
    for file in (file for folder in folders for file in storage.list_scratch(folder)):
        (dead if time.time() - file.modified > SCRATCH_S else unfinished).append(file)
    return dead, tuple(unfinished)


def _turn(file: storage.StoredFile) -> tuple[bool, int]:
    """Of an artifact, what tells that it is finished goes first, so that nothing is half there; what tells whose it is
    goes last. Parts go after what they are parts of."""
    name = file.path.rpartition("/")[2]
    order = (
        0 if name == MANIFEST else 2 if name == PLAN else 3 if name in (ROWS_FILE, MANIFEST_FILE, HEADERS_FILE) else 1
    )
    return "/parts/" in file.path, order


def _holds(version: Version, tombstones: Tombstones, holding: dict[str, bool]) -> bool:
    for name in sidecars(version.files):
        entry = version.files[name]
        if entry.sha256 not in holding:
            patients = _sidecar(version.object_uri(entry), ["patient"])["patient"]
            holding[entry.sha256] = bool(tombstones.mask(patients).any())
        if holding[entry.sha256]:
            return True
    return False


def _corpora_that_hold(files: list[storage.StoredFile], removed: RemovedPatients) -> Iterator[str]:
    """Files of corpora, their parts and their headers in which a removed patient, or an image of one, is named."""
    images: set[str] = set()
    for file in files:
        if file.path.endswith(f"/{HEADERS_FILE}"):
            with storage.arrow_reader(file.uri) as opened:
                patients = pc.unique(pq.read_table(opened, columns=["patient_id"])["patient_id"]).to_pylist()
            if any(patient in removed for patient in patients):
                yield file.uri
        if file.path.endswith((f"/{MANIFEST_FILE}", f"/{ROWS_FILE}")):
            theirs: set[str] = set()
            for rows in _named(file.uri):
                patients = [name for name in pc.unique(rows["patient_id"]).to_pylist() if name in removed]
                of_them = pc.is_in(rows["patient_id"], value_set=pa.array(patients, pa.string()))
                theirs.update(rows.filter(of_them)["image_id"].to_pylist())
            if theirs:
                images |= theirs
                yield file.uri
    for file in files:
        if file.path.endswith(f"/{QUARANTINE_FILE}"):
            with storage.arrow_reader(file.uri) as opened:
                names = pq.read_table(opened, columns=["image_id"])["image_id"]
            if images.intersection(names.to_pylist()):
                yield file.uri


def _made_from(plan_uri: str) -> tuple[str, set[str]]:
    """The kind of an artifact, and the ids of what it was made from. A quantizer is known by what it is for, and tells
    in its manifest what it saw."""
    plan = json.loads(storage.read_bytes(plan_uri))
    inputs = set(plan["inputs"])
    if plan["kind"] == QUANTIZER_KIND and (made := find(storage.parent(plan_uri))):
        inputs.add(made.manifest["trained_on"])
    return plan["kind"], inputs


def _shows(path: str, names: set[str]) -> bool:
    """Whether a page may show images: those of what goes or was learnt, and galleries, of which it is not known."""
    stem = path.rpartition("/")[2].partition(".")[0]
    return stem in names or path.startswith("gallery-")


def _ids(folders: set[str]) -> set[str]:
    return {folder.rpartition("/")[2] for folder in folders}


def _folders_of(uri: str) -> Iterator[str]:
    """The folder that a file lies in, the one that this lies in, and so on."""
    end = uri.rfind("/")
    while end > 0:
        yield uri[:end]
        end = uri.rfind("/", 0, end)


def _files(folder: str) -> Iterator[storage.StoredFile]:
    try:
        yield from storage.list_files(folder)
    except FileNotFoundError:
        return
