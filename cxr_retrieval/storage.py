"""The one door to files: local folders and `s3://` behind the same functions.

Bulk data goes through pyarrow filesystems, conditional writes through boto3 (S3) or a lock file, fsync and rename
(local), streamed text through smart_open. A write is seen whole or not at all.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import smart_open

from cxr_retrieval import s3
from cxr_retrieval.errors import UserError

S3 = s3.SCHEME
MOST_BYTES = s3.MOST_BYTES  # of one file that may lie on object storage
CHUNK = 1 << 20
READS_AHEAD = 8  # files read at once: hides the latency of object storage
WITHOUT_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # what file systems that have no hard links answer
DEEPEST = 100  # folders in folders that are listed
SCRATCH = re.compile(r"\..+\.[0-9a-f]{8}")  # see _temporary_beside

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class StoredFile:
    """A file: its path relative to the folder that was listed or written to, its URI, its size in bytes, and when it
    was written last, in seconds since 1970.

    `version` is another one when its content is: of S3's ETag, or the local nanosecond that it was written in.
    """

    path: str
    uri: str
    size: int
    modified: float
    version: int = 0


def canonical(uri: str) -> str:
    """The URI in its one spelling: `s3://bucket/key`, or an absolute local path, without a trailing slash."""
    if uri.startswith(S3):
        return uri.rstrip("/")
    if "://" in uri and not uri.startswith("file://"):
        raise UserError(f"{uri}: only local paths, file:// and s3:// are supported")
    return str(Path(uri.removeprefix("file://")).expanduser().absolute())


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/"), *names])


def parent(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[0]


def is_s3(uri: str) -> bool:
    return uri.startswith(S3)


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """A pyarrow filesystem and the path in it, for libraries that take both. It tries again by itself, uncounted."""
    if is_s3(uri):
        return s3.filesystem(), uri.removeprefix(S3)
    return pafs.LocalFileSystem(), canonical(uri)


def check(uri: str) -> None:
    """Ask object storage for one name under `uri`: what is wrong with keys, bucket or route is known before the work.

    Raises UserError, one line with the remedy. Local paths are not asked.
    """
    if is_s3(uri):
        s3.check(canonical(uri))


def check_writing(uri: str) -> None:
    """Write an empty file that no listing shows into the folder `uri`, where that is object storage: a right that is
    missing is known before the work. Raises UserError with the remedy."""
    if is_s3(uri):
        write_bytes(join(canonical(uri), ".may-write"), b"")


def require_conditions(uri: str) -> None:
    """Refuse object storage that writes whatever the conditions of `create` and `replace` are: of two who publish there
    both would win. Tried on an empty file that no listing shows. Raises UserError."""
    if is_s3(uri):
        probe = join(canonical(uri), ".conditions")
        write_bytes(probe, b"")
        if replace(probe, b"", None) or replace(probe, b"", "another"):
            raise UserError(
                f"{uri}: this object storage writes over what is there though it is asked not to (If-None-Match,"
                " If-Match), so two who publish at once would both win: publish to one that heeds conditional writes"
            )


def retries() -> int:
    """Requests to object storage that this process has sent again so far, and what was added to them."""
    return s3.RETRIES.count


def add_retries(count: int) -> None:
    """Count what another process of this job reports of itself."""
    s3.RETRIES.add(count)


def forget_clients() -> None:
    """Read the AWS_* variables anew at the next request."""
    s3.client.cache_clear()
    s3.keeps_versions.cache_clear()
    s3.filesystem.cache_clear()


def list_files(uri: str, left_out: Callable[[str], None] = lambda _: None) -> Iterator[StoredFile]:
    """Every file below `uri`, streamed in the order of its path; names that begin with a dot are left out, and
    `left_out` is told the last name of each: of a key, or of a local file or folder, which is not looked into.

    What is neither file nor folder, such as a pipe or a link to nothing, is listed too: reading it tells that it is no
    file. Raises UserError for a link that leads out of `uri` or in a circle: what lies elsewhere is not read. No name
    below `uri` is told: folders may be named after patients.
    """
    uri = canonical(uri)
    if not is_s3(uri):
        yield from _list_local(uri, "", uri, left_out)
        return
    for found in s3.objects(uri):
        if any(name.startswith(".") for name in found[0].split("/")):
            left_out(found[0].rpartition("/")[2])
        else:
            yield _stored_object(uri, *found)


def list_top(uri: str, wanted: Callable[[str], bool]) -> Iterator[StoredFile]:
    """The files right in `uri` whose names are `wanted`, as `list_files` tells them: of a local folder all, on object
    storage those that the first page of names shows. Raises FileNotFoundError."""
    uri = canonical(uri)
    if is_s3(uri):
        found = (_stored_object(uri, *facts) for facts in s3.top_objects(uri))
        yield from (file for file in found if not file.path.startswith(".") and wanted(file.path))
        return
    with _listing(uri, ""):
        _, names = _names_in(uri, "", uri, lambda _: None, frozenset())
        for name in filter(wanted, names):
            if os.path.isfile(path := os.path.join(uri, name)):
                state = os.stat(path)
                yield StoredFile(name, path, state.st_size, state.st_mtime, state.st_mtime_ns)


def _stored_object(uri: str, path: str, size: int, modified: float, tag: str) -> StoredFile:
    version = int.from_bytes(hashlib.sha256(tag.encode()).digest()[:8], "big", signed=True)
    return StoredFile(path, join(uri, path), size, modified, version)


def list_scratch(uri: str) -> Iterator[StoredFile]:
    """What local writes below `uri` that were killed have left beside where they wrote to, and what those under way are
    writing. Object storage shows nothing of a write before its end."""
    if is_s3(uri):
        return
    top = canonical(uri)

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    with _listing(top, ""):
        for folder, folders, names in os.walk(top, onerror=refuse):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for path in (os.path.join(folder, name) for name in sorted(names) if SCRATCH.fullmatch(name)):
                with contextlib.suppress(FileNotFoundError):  # its writer has ended meanwhile
                    state = os.stat(path)
                    yield StoredFile(os.path.relpath(path, top), path, state.st_size, state.st_mtime, state.st_mtime_ns)


def exists(uri: str) -> bool:
    """Whether there is a file at `uri`."""
    uri = canonical(uri)
    return s3.exists(uri) if is_s3(uri) else os.path.isfile(uri)


def read_bytes(uri: str) -> bytes:
    """The whole file. Raises FileNotFoundError where there is none."""
    uri = canonical(uri)
    if not is_s3(uri):
        with _explained(uri):
            _require_file(uri)
            return Path(uri).read_bytes()
    return s3.get(uri)[0]


def read_beginning(uri: str, length: int) -> bytes:
    """The first `length` bytes of a file, all where it is shorter.

    Raises OSError where this file is not there or cannot be read, and UserError where storage fails for all; its name,
    which may be a patient's, is in neither one's words (`strerror` of the first).
    """
    uri = canonical(uri)
    if is_s3(uri):
        return s3.get_beginning(uri, length)
    _require_file(uri)
    with Path(uri).open("rb") as file:
        return file.read(length)


@contextlib.contextmanager
def open_text(uri: str) -> Iterator[IO[str]]:
    """A text file, streamed; one that `is_packed` is decompressed. Bytes that are not UTF-8 become
    escapes such as `\\xfc`: names that differ stay different."""
    uri = canonical(uri)
    options = {"client": s3.client()} if is_s3(uri) else {}
    with _explained(uri):
        if not is_s3(uri):
            _require_file(uri)
        packed = ".gz" if is_packed(uri) else "disable"
        with smart_open.open(
            uri, encoding="utf-8-sig", errors="backslashreplace", compression=packed, transport_params=options
        ) as stream:
            yield stream


def is_packed(uri: str) -> bool:
    """Whether a text file is compressed, by its ending: nothing but gzip is unpacked."""
    return uri.lower().endswith(".gz")


def write_bytes(uri: str, data: bytes) -> None:
    """Write the whole file at once: a reader sees the old file or the new one, never a part."""
    with staged(uri) as path:
        path.write_bytes(data)


@contextlib.contextmanager
def staged(uri: str) -> Iterator[Path]:
    """A local path to write to; when the block ends without an error the file appears whole at `uri`."""
    uri = canonical(uri)
    with _explained(uri):
        if is_s3(uri):
            with tempfile.TemporaryDirectory(prefix="cxr-") as folder:
                path = Path(folder) / "staged"
                yield path
                s3.put(uri, path)
            return
        target = Path(uri)
        target.parent.mkdir(parents=True, exist_ok=True)
        path = _temporary_beside(target)
        try:
            yield path
            _fsync(path)
            os.replace(path, target)
            _fsync(target.parent)
        except BaseException:
            path.unlink(missing_ok=True)  # only the scratch file of this very write
            raise


def create(uri: str, source: Path) -> bool:
    """Copy the local file `source` to `uri` if nothing is there yet; False if something is (it is left as it is)."""
    uri = canonical(uri)
    with _explained(uri):
        if is_s3(uri):
            return s3.put(uri, source, IfNoneMatch="*")
        target = Path(uri)
        if target.exists():
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        path = _temporary_beside(target)
        try:
            with source.open("rb") as read, path.open("wb") as written:
                while chunk := read.read(CHUNK):
                    written.write(chunk)
            _fsync(path)
            _move_if_new(path, target)
            _fsync(target.parent)
        except FileExistsError:
            return False
        finally:
            path.unlink(missing_ok=True)
        return True


def _move_if_new(path: Path, target: Path) -> None:
    """Raises FileExistsError if somebody else was first."""
    try:
        os.link(path, target)
    except OSError as error:
        if error.errno not in WITHOUT_LINKS:
            raise
        with _locked(target.parent / ".create.lock"):
            if target.exists():
                raise FileExistsError from None
            os.replace(path, target)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among those who lock this file; no longer when the process ends, however it ends."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def read_tagged(uri: str) -> tuple[bytes, str] | None:
    """A file's bytes and the tag that `replace` compares, or None where there is no file."""
    uri = canonical(uri)
    try:
        if not is_s3(uri):
            data = read_bytes(uri)
            return data, hashlib.sha256(data).hexdigest()
        return s3.get(uri)
    except FileNotFoundError:
        return None


def replace(uri: str, data: bytes, tag: str | None) -> bool:
    """Write `data` if the file still has `tag` (None: if there is no file); False if somebody else was first."""
    uri = canonical(uri)
    with _explained(uri):
        if is_s3(uri):
            condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
            with tempfile.NamedTemporaryFile() as file:
                file.write(data)
                file.flush()
                return s3.put(uri, Path(file.name), **condition)
        target = Path(uri)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / f".{target.name}.lock"):
            current = read_tagged(uri)
            if (current[1] if current else None) != tag:
                return False
            write_bytes(uri, data)
            return True


def delete(uri: str) -> None:
    """Delete a file; it is no error where there is none. What a `versioned_bucket` keeps of it stays."""
    _delete(uri, s3.delete)


def delete_for_good(uri: str) -> None:
    """Delete a file, and all that a `versioned_bucket` keeps of it. Raises UserError where a right is missing to find
    out or to delete that."""
    _delete(uri, s3.delete_for_good)


def _delete(uri: str, object_at: Callable[[str], None]) -> None:
    uri = canonical(uri)
    with _explained(uri):
        if is_s3(uri):
            object_at(uri)
        else:
            Path(uri).unlink(missing_ok=True)


def versioned_bucket(uri: str) -> str | None:
    """The bucket that keeps versions of what is deleted or overwritten at `uri`, where it is in one. Raises UserError
    where the right to ask is missing."""
    return s3.versioned_bucket(canonical(uri)) if is_s3(uri) else None


def sha256(path: Path) -> str:
    """SHA-256 of a local file as hexadecimal text."""
    with _explained(str(path)), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(uri: str) -> str:
    """SHA-256 of the file at `uri` as hexadecimal text, streamed."""
    digest = hashlib.sha256()
    with arrow_reader(uri) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _require_file(path: str) -> None:
    """Raises FileNotFoundError where no file is at a local path: to open a pipe would be to wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise FileNotFoundError(errno.ENOENT, "no file but a folder, pipe or device", path)


def _depth(prefix: str) -> str:
    """Where a folder lies in the one that is listed, without a name."""
    depth = prefix.count("/")
    return f"{depth} folder{'s' if depth > 1 else ''} below it" if depth else "in it"


def _require_within(link: str, top: str, prefix: str) -> None:
    """Raises UserError for a link that leads out of the folder `top` or in a circle."""
    target, root = os.path.realpath(link), os.path.realpath(top)
    if os.path.islink(target):  # what cannot be resolved
        raise _bad_link(top, prefix, "leads in a circle: remove it")
    if not target.startswith(f"{root.rstrip('/')}/") and target != root:
        raise _bad_link(top, prefix, "leads out of it, and what lies elsewhere is not read: move or mount it there")


def _bad_link(top: str, prefix: str, what: str) -> UserError:
    return UserError(f"{top}: a link {_depth(prefix)} {what}; `find {top} -type l` shows it")


def _list_local(
    folder: str,
    prefix: str,
    top: str,
    left_out: Callable[[str], None],
    above: frozenset[tuple[int, int]] = frozenset(),
) -> Iterator[StoredFile]:
    """The files of one folder and those below it. Holds the names in it, and in those that it lies in."""
    if len(above) == DEEPEST:
        raise UserError(f"{top}: folders that lie more than {DEEPEST} deep: move them up")
    try:
        with _listing(top, prefix):
            place, names = _names_in(folder, prefix, top, left_out, above)
    except FileNotFoundError:
        if prefix:
            return  # deleted since it was listed
        raise
    for name in names:
        path = os.path.join(folder, name)
        if name.endswith("/"):
            yield from _list_local(path[:-1], prefix + name, top, left_out, above | {place})
            continue
        with _listing(top, prefix):
            try:
                state = os.stat(path, follow_symlinks=os.path.isfile(path))
            except FileNotFoundError:
                continue  # deleted since it was listed
        yield StoredFile(prefix + name, path, state.st_size, state.st_mtime, state.st_mtime_ns)


def _names_in(
    folder: str, prefix: str, top: str, left_out: Callable[[str], None], above: frozenset[tuple[int, int]]
) -> tuple[tuple[int, int], list[str]]:
    """What tells a folder from every other, and what is in it, in order: of a folder the name with its "/", as it sorts
    in the order of whole paths, which is S3's order too."""
    names = []
    with os.scandir(folder) as entries:
        state = os.stat(folder)
        place = (state.st_dev, state.st_ino)
        if place in above:
            raise _bad_link(top, prefix.rstrip("/"), "leads to a folder that it lies in: remove it")
        for entry in entries:
            if entry.name.startswith("."):
                left_out(entry.name)
                continue
            if entry.is_symlink():
                _require_within(entry.path, top, prefix)
            names.append(f"{entry.name}/" if entry.is_dir() else entry.name)
    return place, sorted(names)


@contextlib.contextmanager
def _listing(top: str, prefix: str) -> Iterator[None]:
    """Tell in one line, without a name, what a folder cannot be listed for; FileNotFoundError stays what it is."""
    named = f"{top}, {_depth(prefix)}" if prefix else top
    try:
        with _explained(named, f"; `find {top} -type d ! -readable` shows it" if prefix else ""):
            yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{named}: it cannot be listed: {error.strerror}") from None


def _temporary_beside(target: Path) -> Path:
    path = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    # Not mkstemp: what is published is read by others, as far as the umask lets them.
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return path


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _explained(uri: str, hint: str = "") -> Iterator[None]:
    """Turn what a user can mend about storage into one line, with a hint; FileNotFoundError stays what it is."""
    try:
        with s3.explained(uri):
            yield
    except FileNotFoundError:
        raise
    except OSError as error:
        remedies = {
            errno.ENOSPC: "no space left: free some and run the same command again, it goes on where it stopped",
            errno.EDQUOT: "disk quota reached: free some space and run the same command again",
            errno.EACCES: "permission denied: check the folder's rights",
            errno.EROFS: "the file system is read-only: choose another workspace",
            errno.EEXIST: "a file stands where a folder is needed: choose another path",
            errno.ENOTDIR: "a file stands where a folder is needed: choose another path",
            errno.EISDIR: "a folder stands where a file is needed: choose another path",
        }
        if error.errno in remedies:
            raise UserError(f"{uri}: {remedies[error.errno]}{hint}") from error
        raise


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """What `read` gives for each item, in their order, from threads: at most READS_AHEAD are read or held at a time.
    The first error is raised in its turn, and what has not begun then is not read."""
    ahead: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(READS_AHEAD) as pool:
        try:
            for item in items:
                ahead.append(pool.submit(read, item))
                if len(ahead) == READS_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def arrow_reader(uri: str) -> pa.NativeFile:
    """A random-access pyarrow file for Parquet readers. Raises FileNotFoundError where there is none."""
    uri = canonical(uri)
    if is_s3(uri):
        return pa.PythonFile(s3.File(uri), mode="r")
    with _explained(uri):
        _require_file(uri)
        return pafs.LocalFileSystem().open_input_file(uri)
