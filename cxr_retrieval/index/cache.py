"""Verified files on this machine: the objects of a local store where they lie, those of S3 fetched once.

Nobody reads a byte before its SHA-256 is checked. A checked file leaves a receipt, what the file system says of it, so
that a later open hashes only what changed since. Losing the cache folder costs time, never correctness.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

from cxr_retrieval import storage
from cxr_retrieval.artifacts import CorruptArtifact, FileEntry
from cxr_retrieval.errors import UserError

VARIABLE = "CXR_CACHE"
DEFAULT = "~/.cache/cxr-retrieval"
THREADS = 8  # hashlib and the network both release the GIL
CHUNK = 8 << 20  # one request to S3

Item = TypeVar("Item")
Result = TypeVar("Result")


def cache_folder(cache: str | None = None) -> Path:
    """The folder of fetched objects and receipts: `cache`, else the variable CXR_CACHE, else one in the home folder."""
    chosen = storage.canonical(cache or os.environ.get(VARIABLE) or DEFAULT)
    if storage.is_s3(chosen):
        raise UserError(f"{chosen}: the cache must be a local folder; set {VARIABLE} to one")
    return Path(chosen)


def verified(uri: str, entry: FileEntry, cache: Path, remedy: str) -> Path:
    """A local path that holds the object at `uri`, checked against its entry.

    Raises CorruptArtifact, with `remedy` as what to do, when the object is missing or is not what the entry says.
    """
    if _in_place(uri):
        path = Path(uri)
        try:
            matches = _matches(path, entry, cache)
        except FileNotFoundError:
            raise CorruptArtifact(f"{uri}: the object is missing; {remedy}") from None
        if not matches:
            raise CorruptArtifact(f"{uri}: the bytes are not those that its name promises; {remedy}")
        return path
    path = cache / "objects" / entry.sha256
    with _only_one(path):
        try:
            matches = _matches(path, entry, cache)
        except FileNotFoundError:
            matches = False
        if not matches:  # not there yet, or damaged here: the original decides
            fetch(uri, entry, path, remedy)
            _leave_receipt(entry, cache, _state(path))
    return path


def fetch(uri: str, entry: FileEntry, target: Path, remedy: str) -> None:
    """Copy a stored file to `target`, hashed on the way: it appears whole and right, or CorruptArtifact is raised."""
    hasher, size = hashlib.sha256(), 0
    with storage.staged(str(target)) as path, path.open("wb") as written:
        for chunk in _chunks(uri, remedy):
            hasher.update(chunk)
            size += len(chunk)
            if size > entry.size:  # a store that lies must not fill this disk
                break
            written.write(chunk)
        written.flush()
        if size != entry.size or hasher.hexdigest() != entry.sha256:
            raise CorruptArtifact(f"{uri}: the bytes are not those that the manifest names; {remedy}")


def measure(uri: str, remedy: str) -> tuple[int, str]:
    """Size and SHA-256 of a stored file, streamed. Raises CorruptArtifact where there is none."""
    hasher, size = hashlib.sha256(), 0
    for chunk in _chunks(uri, remedy):
        hasher.update(chunk)
        size += len(chunk)
    return size, hasher.hexdigest()


def read_limited(uri: str, limit: int, remedy: str) -> bytes:
    """A stored file of at most `limit` bytes. Raises FileNotFoundError for none, CorruptArtifact for a larger one."""
    with storage.arrow_reader(uri) as file:
        data: bytes = file.read(limit + 1)
    if len(data) > limit:
        raise CorruptArtifact(f"{uri}: larger than {limit:,} bytes; {remedy}")
    return data


def in_parallel(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Each item with its result, as they are done; the first error cancels what has not begun and is raised."""
    with ThreadPoolExecutor(THREADS) as pool:
        futures = {pool.submit(function, item): item for item in items}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _in_place(uri: str) -> bool:
    return not storage.is_s3(uri)


def _chunks(uri: str, remedy: str) -> Iterator[bytes]:
    try:
        file = storage.arrow_reader(uri)
    except FileNotFoundError:
        raise CorruptArtifact(f"{uri}: the file is missing; {remedy}") from None
    with file:
        while chunk := file.read(CHUNK):
            yield chunk


def _matches(path: Path, entry: FileEntry, cache: Path) -> bool:
    """Whether the file is what the entry says, by its receipt or else by its hash."""
    before = _state(path)
    if before["size"] != entry.size:
        return False
    if _read_receipt(_receipt(entry, cache, before)) == before:
        return True
    if storage.sha256(path) != entry.sha256:
        return False
    if _state(path) == before:  # else somebody touched it while it was read: the next open hashes again
        _leave_receipt(entry, cache, before)
    return True


def _state(path: Path) -> dict[str, int]:
    """What changes when a file does. The change time is in it because, unlike the others, nobody can set it back."""
    found = path.stat()
    return {
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
        "inode": found.st_ino,
    }


def _receipt(entry: FileEntry, cache: Path, state: dict[str, int]) -> Path:
    # With the inode in the name, two stores that share an object do not overwrite each other's receipt.
    return cache / "receipts" / f"{entry.sha256}-{state['inode']}.json"


def _read_receipt(receipt: Path) -> object:
    try:
        return json.loads(receipt.read_bytes())
    except (OSError, ValueError):
        return None


def _leave_receipt(entry: FileEntry, cache: Path, state: dict[str, int]) -> None:
    # A cache that cannot be written costs a hash on the next open, nothing else; so does a receipt that a power cut
    # takes away, which is why nothing waits for the disk here.
    receipt = _receipt(entry, cache, state)
    scratch = receipt.with_name(f".{receipt.name}.{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        receipt.parent.mkdir(exist_ok=True)
        scratch.write_text(json.dumps(state), encoding="utf-8")
        os.replace(scratch, receipt)


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """One process of this machine fetches an object; the others wait for its copy instead of fetching their own."""
    try:
        path.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.parent.mkdir(exist_ok=True)
        lock = (path.parent / f".{path.name}.lock").open("w")
    except OSError as error:
        remedy = f"set {VARIABLE} to a folder that can be written"
        raise UserError(f"{path.parent}: the cache cannot be written ({error.strerror}); {remedy}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the process ends, however it ends
        yield
