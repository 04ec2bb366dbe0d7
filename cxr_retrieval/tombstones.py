"""Tombstones: marks of patients who were removed, honoured at once by every job and reader that finds them.

    WORKSPACE/tombstones/<digest>.json    prepare leaves the patient's images out, and so does all that follows
    TO/tombstones/<digest>.json           search shows them of no published version, whichever an alias serves

A tombstone names nobody: its digest is of the name that the patient has outside the corpus, which is a keyed pseudonym
unless the archive is public. It tells the id of that key: under another one it would match nobody.
"""

import datetime
import hashlib
import json
import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr_retrieval import storage
from cxr_retrieval.config import PrivacySettings
from cxr_retrieval.errors import UserError
from cxr_retrieval.privacy import Pseudonyms

FOLDER = "tombstones"
FILE = re.compile(r"([0-9a-f]{64})\.json")


@dataclass(frozen=True)
class Tombstones:
    """The patients who were removed from one place, by the digests of the names that they have outside the corpus."""

    digests: frozenset[str] = frozenset()

    @classmethod
    def at(cls, place: str) -> "Tombstones":
        """Those that lie at `place`, a workspace or where an index is published."""
        try:
            files = [file.path for file in storage.list_files(storage.join(place, FOLDER))]
        except FileNotFoundError:
            return cls()  # nobody was ever removed there
        return cls(frozenset(found[1] for path in files if (found := FILE.fullmatch(path))))

    def __bool__(self) -> bool:
        return bool(self.digests)

    def __or__(self, other: "Tombstones") -> "Tombstones":
        return Tombstones(self.digests | other.digests)

    def __contains__(self, name: str | None) -> bool:
        return bool(self.digests) and name is not None and _digest(name) in self.digests

    def mask(self, names: pa.ChunkedArray) -> np.ndarray:
        """Which rows are of removed patients, bool [N]; every name is looked at once."""
        if not self.digests:
            return np.zeros(len(names), bool)
        removed = [name for name in pc.unique(names).to_pylist() if name in self]
        found: np.ndarray = np.asarray(pc.fill_null(pc.is_in(names, value_set=pa.array(removed, pa.string())), False))
        return found


NO_TOMBSTONES = Tombstones()


@dataclass(frozen=True)
class RemovedPatients:
    """The patients of an archive who were removed from a workspace, by the names that the archive gives them."""

    tombstones: Tombstones
    pseudonyms: Pseudonyms

    @classmethod
    def of(cls, workspace: str, privacy: PrivacySettings) -> "RemovedPatients":
        """Raises UserError where there are tombstones and no key, or some by names of another key: nobody could tell
        whose they are. Those that tell no key, of earlier releases, count as made by the one in use."""
        tombstones = Tombstones.at(workspace)
        if not tombstones:
            return NOBODY
        pseudonyms = Pseudonyms.of(privacy)

        def key_id(digest: str) -> str | None:
            uri = _uri(workspace, digest)
            try:
                found: str | None = json.loads(storage.read_bytes(uri)).get("key_id", pseudonyms.key_id)
            except (ValueError, AttributeError) as error:
                raise UserError(
                    f"{uri}: a damaged tombstone: it still hides its patient, and does not tell under which key:"
                    " restore the file, or write {} into it if that was the key in use; to delete it shows them again"
                ) from error
            return found

        told = storage.read_ahead(key_id, tombstones.digests)
        others = [found for found in told if found != pseudonyms.key_id]
        if others:
            raise UserError(
                f"{workspace}: patients were removed from it under {_key(others[0])} and would come back under"
                f" {_key(pseudonyms.key_id)}: give the key of then (CXR_PRIVACY_KEY, privacy.key_file,"
                " privacy.pseudonymise)"
            )
        return cls(tombstones, pseudonyms)

    def __contains__(self, patient: str | None) -> bool:
        return (
            bool(self.tombstones)
            and patient is not None
            and self.pseudonyms.name("patient", patient) in self.tombstones
        )

    def mark(self, path: str) -> str:
        """What stands for an image of theirs, so that it keeps its place: a name that tells nobody's."""
        keyed = self.pseudonyms.name("image", path)
        return hashlib.sha256(keyed.encode()).hexdigest()[:20]


NOBODY = RemovedPatients(NO_TOMBSTONES, Pseudonyms(None))


def remove(place: str, patient: str, pseudonyms: Pseudonyms) -> bool:
    """Put a tombstone for a patient, by the name that the archive gives; False where there is one already."""
    uri = _uri(place, _digest(pseudonyms.name("patient", patient)))
    if storage.exists(uri):
        return False
    removed_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    storage.write_bytes(uri, json.dumps({"removed_at": removed_at, "key_id": pseudonyms.key_id}).encode())
    return True


def carry(place: str, to: str) -> None:
    """Put the tombstones of one place at another too, where they are not there."""
    for digest in sorted(Tombstones.at(place).digests - Tombstones.at(to).digests):
        storage.write_bytes(_uri(to, digest), storage.read_bytes(_uri(place, digest)))


def _uri(place: str, digest: str) -> str:
    return storage.join(place, FOLDER, f"{digest}.json")


def _key(key_id: str | None) -> str:
    return f"privacy key {key_id}" if key_id else "their own names (privacy.pseudonymise=false)"


def _digest(name: str) -> str:
    return hashlib.sha256(f"tombstone:{name}".encode()).hexdigest()
