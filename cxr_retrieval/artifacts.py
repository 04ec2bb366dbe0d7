"""What a finished artifact is: a folder named by its input id, `plan.json` first, `manifest.json` last.

A folder without a manifest is unfinished: it can be resumed, and nothing reads it as done. An artifact may be made of
*parts*, artifacts of their own that are finished one by one and shared by every artifact that needs the same part.
"""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from cxr_retrieval import storage
from cxr_retrieval.errors import UserError

SCHEMA_VERSION = 1
PLAN, MANIFEST = "plan.json", "manifest.json"
SOFTWARE = (
    "cxr-retrieval",
    "ray",
    "torch",
    "transformers",
    "pyarrow",
    "numpy",
    "opencv-python-headless",
    "faiss-cpu",
    "faiss-gpu",
)


class AccountingError(Exception):
    """Rows that went in and rows that came out do not add up: a bug, never shipped as a result."""


class CorruptArtifact(UserError):
    """A file of an artifact is not what the manifest says."""


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: its path in the folder, its size in bytes and its SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Equation:
    """Rows that must be accounted for: the count on the left equals the sum of the counts on the right."""

    total: str
    parts: tuple[str, ...]

    def check(self, counts: Mapping[str, int]) -> str:
        """The equation with its numbers; raises AccountingError when it does not hold."""
        right = sum(counts[name] for name in self.parts)
        text = f"{self.total} {counts[self.total]} = " + " + ".join(f"{name} {counts[name]}" for name in self.parts)
        if counts[self.total] != right:
            raise AccountingError(f"rows do not add up: {text}")
        return text


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: where it is and its manifest."""

    uri: str
    manifest: Mapping[str, Any]

    @property
    def input_id(self) -> str:
        return str(self.manifest["input_id"])

    @property
    def counts(self) -> dict[str, int]:
        return dict(self.manifest["counts"])

    @property
    def part_uris(self) -> list[str]:
        """The folders of the artifact's parts: they lie in `parts/` beside the artifact that shares them."""
        return [storage.join(storage.parent(self.uri), "parts", part["input_id"]) for part in self.manifest["parts"]]

    @property
    def files(self) -> list[FileEntry]:
        return [FileEntry(**entry) for entry in self.manifest["files"]]

    def read(self, path: str) -> bytes:
        """A file's bytes, checked against the manifest. Raises CorruptArtifact when they differ or are missing."""
        entry = {entry.path: entry for entry in self.files}[path]
        uri = storage.join(self.uri, path)
        try:
            data = storage.read_bytes(uri)
        except FileNotFoundError:
            raise CorruptArtifact(f"{uri}: the file that the manifest names is missing; restore it") from None
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise CorruptArtifact(f"{uri}: the bytes are not those of the manifest; restore the file")
        return data


def input_id(kind: str, settings: Mapping[str, Any], inputs: Sequence[str]) -> str:
    """The identity of a result before it exists: kind, schema version, settings and the ids of the inputs, hashed."""
    return _digest({"kind": kind, "schema": SCHEMA_VERSION, "settings": settings, "inputs": list(inputs)})[:20]


def content_id(files: Sequence[FileEntry], parts: Sequence[str] = ()) -> str:
    """The identity of a result by its bytes: its files, in any order, and the content ids of its parts, hashed."""
    return _digest([_listed(files), list(parts)])[:20]


def find(uri: str) -> Artifact | None:
    """The finished artifact at `uri`, or None while there is none. Raises CorruptArtifact if that is no JSON."""
    try:
        return Artifact(storage.canonical(uri), json.loads(storage.read_bytes(storage.join(uri, MANIFEST))))
    except FileNotFoundError:
        return None
    except ValueError:
        raise CorruptArtifact(f"{storage.join(uri, MANIFEST)}: not a manifest; restore the file") from None


def load(uri: str, kind: str) -> Artifact:
    """The finished artifact of that kind at `uri`. Raises UserError where there is none, or it is of another kind."""
    artifact = find(uri)
    if artifact is None:
        state = (
            "unfinished: run the job that writes it again" if storage.exists(storage.join(uri, PLAN)) else "not there"
        )
        raise UserError(f"no finished {kind} at {uri}: it is {state}")
    if artifact.manifest["kind"] != kind:
        raise UserError(f"{uri} is a {artifact.manifest['kind']}, not a {kind}")
    return artifact


@dataclass(frozen=True)
class Draft:
    """An artifact that is being written."""

    uri: str
    kind: str
    settings: Mapping[str, Any]
    inputs: tuple[str, ...]

    @classmethod
    def under(cls, folder: str, kind: str, settings: Mapping[str, Any], inputs: Sequence[str]) -> "Draft":
        """The artifact of that identity in its place: a folder named by its input id, under `folder`."""
        return cls(storage.join(folder, input_id(kind, settings, inputs)), kind, settings, tuple(inputs))

    @property
    def input_id(self) -> str:
        return input_id(self.kind, self.settings, self.inputs)

    def begin(self) -> "Draft":
        """Write the plan, or find the same plan of an earlier try. Raises UserError where another plan stands."""
        plan = {"kind": self.kind, "schema": SCHEMA_VERSION, "input_id": self.input_id, "settings": dict(self.settings)}
        plan["inputs"] = list(self.inputs)
        uri = storage.join(self.uri, PLAN)
        try:
            found = json.loads(storage.read_bytes(uri))
        except FileNotFoundError:
            storage.write_bytes(uri, _pretty(plan))
            return self
        if found != json.loads(_pretty(plan)):
            raise UserError(f"{uri} is the plan of other settings: choose another workspace or move the folder away")
        return self

    def write(self, path: str, data: bytes) -> FileEntry:
        """Write one file of the artifact, whole."""
        with self.staged(path) as (local, entry):
            local.write_bytes(data)
        return entry.value

    def staged(self, path: str) -> "_StagedFile":
        """A local path to write one file of the artifact to, and a slot that holds its entry after the block."""
        return _StagedFile(storage.join(self.uri, path), path)

    def finish(
        self,
        files: Sequence[FileEntry],
        counts: Mapping[str, int],
        equations: Sequence[Equation] = (),
        parts: Sequence[Artifact] = (),
        **facts: Any,
    ) -> Artifact:
        """Check the equations and write the manifest: from now on the artifact is finished.

        Parts are named with their content ids; `facts` are further entries of the manifest.
        """
        listed_parts = [_part_facts(part) for part in parts]
        manifest = {
            "kind": self.kind,
            "schema": SCHEMA_VERSION,
            "input_id": self.input_id,
            "content_id": content_id(files, [part["content_id"] for part in listed_parts]),
            "settings": dict(self.settings),
            "inputs": list(self.inputs),
            "software": software(),
            "counts": dict(counts),
            "equations": [equation.check(counts) for equation in equations],
            "files": _listed(files),
            "parts": listed_parts,
            **facts,
        }
        storage.write_bytes(storage.join(self.uri, MANIFEST), _pretty(manifest))
        return Artifact(self.uri, json.loads(_pretty(manifest)))


class _StagedFile:
    """`storage.staged` that also measures what was written."""

    def __init__(self, uri: str, path: str) -> None:
        self._path = path
        self._staged = storage.staged(uri)
        self.value: FileEntry

    def __enter__(self) -> tuple[Path, "_StagedFile"]:
        self._local = self._staged.__enter__()
        return self._local, self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self.value = FileEntry(self._path, self._local.stat().st_size, storage.sha256(self._local))
        self._staged.__exit__(*error)


@cache
def software() -> dict[str, str]:
    """Versions of what made an artifact."""
    versions = {"python": platform.python_version()}
    for name in SOFTWARE:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # faiss comes as either of two packages
    return versions


def _listed(files: Sequence[FileEntry]) -> list[dict[str, Any]]:
    return [asdict(entry) for entry in sorted(files, key=lambda entry: entry.path)]


def _part_facts(part: Artifact) -> dict[str, Any]:
    return {key: part.manifest[key] for key in ("input_id", "content_id", "counts")}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _pretty(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()
