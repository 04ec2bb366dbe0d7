"""Published versions of an index on a folder or on S3: immutable objects, manifests that name them, aliases that move.

    TO/objects/<sha256>             a file of one or more versions
    TO/versions/<version-id>.json   which files a version has, and its facts
    TO/aliases/<alias>.json         which version readers of that alias get

Objects first, then the manifest, then one conditional write of the alias: a publish that is killed anywhere leaves the
old alias serving, and running it again finishes it. Nothing is ever deleted here. What is read back is hostile input:
its size is limited, its form is checked, a manifest must hash to the id that names it, and so must every object.
"""

import contextlib
import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, field_validator

from cxr_retrieval import storage
from cxr_retrieval.artifacts import Artifact, CorruptArtifact, FileEntry
from cxr_retrieval.config import NAME
from cxr_retrieval.console import Meter
from cxr_retrieval.errors import UserError
from cxr_retrieval.index import cache as cached
from cxr_retrieval.index.aliases import (
    DEFAULT_ALIAS,
    VERSION_ID,
    Alias,
    Document,
    as_json,
    check_alias,
    known,
    listing,
    move_alias,
    parsed,
    read_alias,
)
from cxr_retrieval.index.files import Located, files_of
from cxr_retrieval.progress import Progress
from cxr_retrieval.tombstones import carry

OBJECTS, VERSIONS = "objects", "versions"
SHA256 = r"^[0-9a-f]{64}$"
FILE_PATH = r"^[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)*$"  # relative, and no part begins with a dot
MANIFEST_LIMIT = 64 << 20
PUBLISH_AGAIN = "publish that version again, after moving the damaged file away if there is one"
GONE_REMEDY = "publish that version again, or drop it"
BUILD_AGAIN = "move the build's folder away and build the index again"


class _File(Document):
    path: str = Field(pattern=FILE_PATH, max_length=512)
    size: int = Field(ge=0, lt=1 << 50)
    sha256: str = Field(pattern=SHA256)


class _Manifest(Document):
    schema_version: Literal[1]
    facts: dict[str, Any]
    files: list[_File]
    _id: str = PrivateAttr()

    @field_validator("files")
    @classmethod
    def _once(cls, files: list[_File]) -> list[_File]:
        twice = [path for path, count in Counter(file.path for file in files).items() if count > 1]
        if twice:
            raise ValueError(f"{twice[0]} is listed twice")
        return files

    def model_post_init(self, _context: Any) -> None:
        # Here, and not on demand, so that facts nested too deeply are refused with everything else that does not fit.
        content = {"files": {file.path: file.sha256 for file in self.files}, "facts": self.facts}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        self._id = hashlib.sha256(text.encode()).hexdigest()[:20]

    @property
    def id(self) -> str:
        return self._id


@dataclass(frozen=True)
class Version:
    """One published version: its files by path, and the facts of the build that it came from."""

    to: str
    id: str
    files: Mapping[str, FileEntry]
    facts: Mapping[str, Any]

    @property
    def objects(self) -> list[FileEntry]:
        """One entry for each distinct object."""
        return distinct(self.files)

    @property
    def bytes(self) -> int:
        return sum(entry.size for entry in self.objects)

    def object_uri(self, entry: FileEntry) -> str:
        return storage.join(self.to, OBJECTS, entry.sha256)


@dataclass(frozen=True)
class Published:
    """What a publish did. `moved` is False when the alias pointed to the version already: there was nothing to do."""

    version: str
    alias: str
    generation: int
    uploaded: int
    reused: int
    bytes: int
    moved: bool


@dataclass(frozen=True)
class OpenVersion:
    """A version of which files are on this machine and were verified: all, or those that were asked for."""

    version: Version
    paths: Mapping[str, Path]

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.version.facts

    def path(self, name: str) -> Path:
        """The local path of a file of the version. The path itself has no ending that would tell its format."""
        if name not in self.paths:
            raise UserError(f"{self.version.to}: version {self.version.id} has no file {name!r}; publish it again")
        return self.paths[name]


def publish(
    build: Artifact, to: str, alias: str, progress: Progress | None = None, workspace: str | None = None
) -> Published:
    """Upload what `to` lacks of a built index, write its version manifest and move the alias to it.

    Who was removed from `workspace`, where the index was built, also while it was, is shown by no version at `to`.

    The same build always gives the same version. Whoever moves the alias first after it was read here wins; the other
    gets a UserError, and its version stands complete beside the winner's. `progress` counts bytes.

    Raises CorruptArtifact as `put_in_front` does where an object that was there already is deleted meanwhile: the same
    again uploads it.
    """
    to = storage.canonical(to)
    check_alias(alias)
    files = files_of(build)
    version, manifest = _version_of(build, files, to)
    seen = read_alias(to, alias)  # before the upload, so that nothing which happens meanwhile is overwritten
    present = listing(storage.join(to, OBJECTS))
    if not present:
        storage.require_conditions(to)  # the first time: all that is promised rests on them
    missing = [entry for entry in version.objects if entry.sha256 not in present]
    uploaded = uploaded_bytes = 0
    if progress:
        progress.found(sum(entry.size for entry in version.objects) - sum(entry.size for entry in missing))
    sources = {file.entry.sha256: file.uri for file in files.values()}
    for entry, ours in cached.in_parallel(lambda entry: _upload(sources[entry.sha256], entry, version), missing):
        uploaded += ours
        uploaded_bytes += entry.size if ours else 0
        if progress:
            progress.advance(entry.size)
    _write_manifest(version, manifest)
    if workspace is not None:
        carry(workspace, to)  # between both: who is removed later is marked here too, where a version is by then
    generation, moved = put_in_front(version, alias, *seen)
    reused = len(version.objects) - uploaded
    return Published(version.id, alias, generation, uploaded, reused, uploaded_bytes, moved)


def list_versions(to: str) -> list[str]:
    """The ids of all versions at `to`, in the order of their ids."""
    names = (path.removesuffix(".json") for path in listing(storage.join(storage.canonical(to), VERSIONS)))
    return [name for name in names if re.fullmatch(VERSION_ID, name)]


def named_objects(to: str, but: Container[str] = ()) -> set[str]:
    """The names of all objects that versions at `to` have, but for those of some versions by their ids."""
    return {entry.sha256 for name in list_versions(to) if name not in but for entry in resolve(to, name).objects}


def split_reference(reference: str) -> tuple[str, str]:
    """`URI@name` as URI and name of an alias or version; without a name it is the alias `latest`.

    Only an `@` behind the last `/` parts them, so folders above may have one; a last folder with one needs `@name`.
    """
    folder, slash, last = reference.rpartition("/")
    base, at, name = last.rpartition("@")
    if not at:
        return reference, DEFAULT_ALIAS
    uri = folder + slash + base
    if not uri.strip("/") or not re.fullmatch(NAME, name):
        raise UserError(f"cannot read {reference!r}: write URI@alias or URI@version")
    return uri, name


def named_version(to: str, name: str) -> str:
    """The id of the version that an alias points to, or that id itself; whether the version is there is not looked at.

    Raises UserError, naming the aliases that exist, when there is no such alias.
    """
    if not re.fullmatch(NAME, name):
        raise UserError(f"{name!r} is not a name of an alias or version; {known(to)}")
    if re.fullmatch(VERSION_ID, name):
        return name
    alias = read_alias(to, name)[0]
    if alias is None:
        raise UserError(f"{to}: there is no alias {name!r}; {known(to)}")
    return alias.version


def resolve(to: str, name: str) -> Version:
    """The version that an alias points to, or the one with that id.

    Raises UserError, naming the aliases that exist, when there is neither; CorruptArtifact for a damaged manifest.
    """
    to = storage.canonical(to)
    wanted = named_version(to, name)
    uri = _version_uri(to, wanted)
    try:
        manifest = parsed(_Manifest, uri, cached.read_limited(uri, MANIFEST_LIMIT, PUBLISH_AGAIN))
    except FileNotFoundError:
        if wanted != name:
            message = f"{uri}: the manifest that alias {name!r} points to is missing; publish that version again"
            raise CorruptArtifact(message) from None
        raise UserError(f"{to}: there is no version {wanted}; {known(to)}") from None
    if manifest.id != wanted:
        raise CorruptArtifact(f"{uri}: the content is not that of version {wanted}; {PUBLISH_AGAIN}")
    return _version(to, manifest)


def open_version(reference: str, cache: str | None = None, meter: Meter | None = None) -> OpenVersion:
    """Verify every file of the version that `URI@name` refers to, fetching it first where the index is on S3.

    Local objects are used in place, remote ones are kept in the cache folder (`cache`, else the variable CXR_CACHE,
    else one in the home folder). `meter` counts bytes. Raises CorruptArtifact before anybody reads a damaged file.
    """
    version = resolve(*split_reference(reference))
    return open_files(version, version.files, cache, meter)


def open_files(
    version: Version, names: Iterable[str], cache: str | None = None, meter: Meter | None = None
) -> OpenVersion:
    """As `open_version`, of some of a version's files only."""
    folder = cached.cache_folder(cache)
    files = {name: version.files[name] for name in names if name in version.files}
    paths: dict[str, Path] = {}
    for entry, path in cached.in_parallel(
        lambda entry: cached.verified(version.object_uri(entry), entry, folder, PUBLISH_AGAIN), distinct(files)
    ):
        paths[entry.sha256] = path
        if meter:
            meter.advance(entry.size)
    return OpenVersion(version, {name: paths[entry.sha256] for name, entry in files.items()})


def distinct(files: Mapping[str, FileEntry]) -> list[FileEntry]:
    """One entry for each object of some files."""
    return list({entry.sha256: entry for entry in files.values()}.values())


def read_file(version: Version, path: str) -> bytes:
    """The bytes of one of a version's files, a small one. Raises CorruptArtifact where they are not those published."""
    entry = version.files[path]
    try:
        data = storage.read_bytes(version.object_uri(entry))
    except FileNotFoundError:
        raise CorruptArtifact(f"{version.object_uri(entry)}: gone since it was uploaded; {GONE_REMEDY}") from None
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise CorruptArtifact(f"{version.object_uri(entry)}: the bytes are not those published; {PUBLISH_AGAIN}")
    return data


def verify(to: str, version: str) -> list[str]:
    """Hash every object of a version (an id or an alias) again; a line for each that is missing or damaged."""

    def problem(entry: FileEntry) -> str | None:
        uri = found.object_uri(entry)
        try:
            size, digest = cached.measure(uri, PUBLISH_AGAIN)
        except CorruptArtifact as error:
            return str(error)
        if size != entry.size:
            return f"{uri}: {size:,} bytes instead of {entry.size:,}; {PUBLISH_AGAIN}"
        return None if digest == entry.sha256 else f"{uri}: the bytes hash to {digest}; {PUBLISH_AGAIN}"

    found = resolve(to, version)
    return sorted(text for _, text in cached.in_parallel(problem, found.objects) if text)


def _version_of(build: Artifact, located: Mapping[str, Located], to: str) -> tuple[Version, bytes]:
    """The version that a build gives, and its manifest's bytes: both depend on nothing but the build."""
    facts = {key: value for key, value in build.manifest.items() if key not in ("files", "parts")}
    files = [{"path": name, "size": f.entry.size, "sha256": f.entry.sha256} for name, f in sorted(located.items())]
    data = as_json({"schema_version": 1, "facts": facts, "files": files})
    if len(data) > MANIFEST_LIMIT:
        raise UserError(f"{build.uri}: its manifest is over {MANIFEST_LIMIT >> 20} MB; use larger index.shard_rows")
    return _version(to, parsed(_Manifest, build.uri, data)), data


def _version(to: str, manifest: _Manifest) -> Version:
    files = {file.path: FileEntry(file.path, file.size, file.sha256) for file in manifest.files}
    return Version(to, manifest.id, files, manifest.facts)


def _upload(source: str, entry: FileEntry, version: Version) -> bool:
    """Create one object from a checked local file; False if somebody else created it meanwhile."""
    with contextlib.ExitStack() as stack:
        if storage.is_s3(source):
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cxr-"))) / entry.sha256
            cached.fetch(source, entry, path, BUILD_AGAIN)
        else:
            path = Path(source)
            try:
                digest = storage.sha256(path)
            except FileNotFoundError:
                raise CorruptArtifact(f"{source}: the file is missing; {BUILD_AGAIN}") from None
            if digest != entry.sha256:
                raise CorruptArtifact(f"{source}: the bytes are not those of the build's manifest; {BUILD_AGAIN}")
        return storage.create(version.object_uri(entry), path)


def _write_manifest(version: Version, data: bytes) -> None:
    uri = _version_uri(version.to, version.id)
    with tempfile.TemporaryDirectory(prefix="cxr-") as folder:
        path = Path(folder) / "manifest.json"
        path.write_bytes(data)
        if storage.create(uri, path):
            return
        try:
            found = cached.read_limited(uri, MANIFEST_LIMIT, PUBLISH_AGAIN)
        except FileNotFoundError:
            raise CorruptArtifact(f"{uri}: it was there and is gone; publish again") from None
        if found != data:
            raise CorruptArtifact(f"{uri}: another manifest stands there; move it away and publish again")


def put_in_front(version: Version, alias: str, old: Alias | None, tag: str | None) -> tuple[int, bool]:
    """Point the alias to a version, as `move_alias` does, that is whole before and after.

    Whoever drops, collects or purges now sees what the alias serves; who looked before may have deleted since. Raises
    CorruptArtifact where something of the version is gone, UserError where storage cannot tell; both say so where the
    alias has moved by then.
    """
    check_whole(version)
    done = move_alias(version.to, alias, version.id, old, tag)
    try:
        check_whole(version)
    except UserError as error:
        raise type(error)(f"alias {alias!r} serves version {version.id} now, but {error}") from error
    return done


def check_whole(version: Version) -> None:
    """The manifest is there, and every object with its size. Raises CorruptArtifact."""
    manifest = _version_uri(version.to, version.id)
    if not storage.exists(manifest):
        raise CorruptArtifact(f"{manifest}: gone since it was written; publish that version again")
    present = listing(storage.join(version.to, OBJECTS))
    for entry in version.objects:
        if entry.sha256 not in present:
            raise CorruptArtifact(f"{version.object_uri(entry)}: gone since it was uploaded; {GONE_REMEDY}")
        if present[entry.sha256] != entry.size:
            found = f"{present[entry.sha256]:,} bytes instead of {entry.size:,}"
            raise CorruptArtifact(f"{version.object_uri(entry)}: {found}; move it away and publish again")


def _version_uri(to: str, version: str) -> str:
    return storage.join(to, VERSIONS, f"{version}.json")
