"""The one door to files: local folders and `s3://` behind the same functions.

Bulk data goes through pyarrow filesystems, conditional writes through boto3 (S3) or a lock file, fsync and rename
(local), streamed text through smart_open. A write is seen whole or not at all. Nothing is deleted here.

What passes by itself (throttling, cut connections, timeouts, a conflict of writers) is tried again with growing pauses
and counted; what a person must mend is told in one line.
"""

import base64
import contextlib
import errno
import fcntl
import hashlib
import io
import os
import random
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.exceptions
import pyarrow as pa
import pyarrow.fs as pafs
import smart_open
import urllib3.exceptions
from botocore.config import Config

from cxr_retrieval.errors import UserError

CHUNK = 1 << 20
TRIES = 8  # of one request: about half a minute with the pauses between them
DENIED_TRIES = 3  # S3 under load has been seen to deny what it allows
CHECK_TRIES = 4
READ_TIMEOUT_S = 60.0
S3 = "s3://"
# A body that breaks off while it is read: the request itself had succeeded, so boto3 is done with it.
CUT = (
    botocore.exceptions.ResponseStreamingError,
    botocore.exceptions.IncompleteReadError,
    botocore.exceptions.ReadTimeoutError,
    urllib3.exceptions.HTTPError,
)
DENIED = ("AccessDenied", "403")
LASTING = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "NoSuchBucket", "ExpiredToken", "WrongRegion")

Result = TypeVar("Result")


@dataclass(frozen=True)
class StoredFile:
    """A file: its path relative to the folder that was listed or written to, its URI and its size in bytes."""

    path: str
    uri: str
    size: int


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
        return _s3_filesystem(TRIES), uri.removeprefix(S3)
    return pafs.LocalFileSystem(), canonical(uri)


def check(uri: str) -> None:
    """Ask object storage for one name under `uri`: what is wrong with keys, bucket or route is known before the work.

    Raises UserError, one line with the remedy. Local paths are not asked.
    """
    if is_s3(uri):
        bucket, key = _bucket_key(canonical(uri))
        with _explained(uri):
            try:
                answer = _s3_client(CHECK_TRIES).list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
                _check_region(uri, answer)
                _s3_filesystem(CHECK_TRIES).get_file_info(bucket)  # bulk reads find their credentials another way
            except botocore.exceptions.ClientError as error:
                if _SAME.get(_code(error), _code(error)) != "SlowDown":  # busy, but it knows who asks
                    raise


def _check_region(uri: str, answer: Any) -> None:
    """boto3 follows a bucket into another region, pyarrow does not: it would fail in the middle of the work."""
    headers = answer["ResponseMetadata"]["HTTPHeaders"]
    region, ours = headers.get("x-amz-bucket-region"), _s3_client().meta.region_name
    if region and ours and region != ours and ours != "aws-global":
        raise _told(uri, "WrongRegion", region)


def retries() -> int:
    """Requests to object storage that this process has sent again so far, and what was added to them."""
    return _RETRIES.count


def add_retries(count: int) -> None:
    """Count what another process of this job reports of itself."""
    _RETRIES.add(count)


def forget_clients() -> None:
    """Read the AWS_* variables anew at the next request."""
    _s3_client.cache_clear()
    _s3_filesystem.cache_clear()


def list_files(uri: str) -> Iterator[StoredFile]:
    """Every file below `uri`, streamed in the order of its path; names that begin with a dot are left out."""
    uri = canonical(uri)
    if not is_s3(uri):
        yield from _list_local(uri, "")
        return
    bucket, prefix = _bucket_key(uri + "/")
    with _explained(uri):
        for page in _s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", []):
                path = entry["Key"].removeprefix(prefix)
                if path and not any(name.startswith(".") for name in path.split("/")):
                    yield StoredFile(path, join(uri, path), entry["Size"])


def exists(uri: str) -> bool:
    """Whether there is a file at `uri`."""
    uri = canonical(uri)
    if not is_s3(uri):
        return os.path.isfile(uri)
    bucket, key = _bucket_key(uri)
    try:
        with _explained(uri):
            try:
                _s3_client().head_object(Bucket=bucket, Key=key)
            except botocore.exceptions.ClientError as error:
                if _code(error) != "404":
                    check(uri)  # the answer to a HEAD has no text: this one tells what is wrong
                raise
    except FileNotFoundError:
        return False
    return True


def read_bytes(uri: str) -> bytes:
    """The whole file. Raises FileNotFoundError where there is none."""
    uri = canonical(uri)
    if not is_s3(uri):
        with _explained(uri):
            return Path(uri).read_bytes()
    return _get(uri)[0]


@contextlib.contextmanager
def open_text(uri: str) -> Iterator[IO[str]]:
    """A text file, streamed and decompressed by its ending (`.gz`). Bytes that are not UTF-8 become U+FFFD."""
    uri = canonical(uri)
    options = {"client": _s3_client()} if is_s3(uri) else {}
    with (
        _explained(uri),
        smart_open.open(uri, encoding="utf-8-sig", errors="replace", transport_params=options) as stream,
    ):
        yield stream


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
                _put(uri, path)
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
            return _put(uri, source, IfNoneMatch="*")
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
            os.link(path, target)  # fails if somebody else was first
            _fsync(target.parent)
        except FileExistsError:
            return False
        finally:
            path.unlink(missing_ok=True)
        return True


def read_tagged(uri: str) -> tuple[bytes, str] | None:
    """A file's bytes and the tag that `replace` compares, or None where there is no file."""
    uri = canonical(uri)
    try:
        if not is_s3(uri):
            data = read_bytes(uri)
            return data, hashlib.sha256(data).hexdigest()
        return _get(uri)
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
                return _put(uri, Path(file.name), **condition)
        target = Path(uri)
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / f".{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the process ends, however it ends
            current = read_tagged(uri)
            if (current[1] if current else None) != tag:
                return False
            write_bytes(uri, data)
            return True


def sha256(path: Path) -> str:
    """SHA-256 of a local file as hexadecimal text."""
    with _explained(str(path)), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _list_local(folder: str, prefix: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[StoredFile]:
    with _explained(folder), os.scandir(folder) as entries:
        state = os.stat(folder)
        place = (state.st_dev, state.st_ino)
        if place in above:
            raise UserError(f"{folder}: a link to a folder that it lies in: remove it")
        shown = [e for e in entries if not e.name.startswith(".")]
    # A folder sorts as "name/": the order of whole paths, which is S3's order too.
    ordered = sorted(shown, key=lambda e: e.name + "/" if e.is_dir() else e.name)
    for entry in ordered:
        if entry.is_dir():
            yield from _list_local(entry.path, f"{prefix}{entry.name}/", above | {place})
        elif entry.is_file():
            yield StoredFile(prefix + entry.name, entry.path, entry.stat().st_size)


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


def _get(uri: str) -> tuple[bytes, str]:
    """The whole object and its tag."""
    bucket, key = _bucket_key(uri)

    def get() -> tuple[bytes, str]:
        answer = _s3_client().get_object(Bucket=bucket, Key=key)
        return answer["Body"].read(), answer["ETag"]

    with _explained(uri):
        return _persistently(get)


def _put(uri: str, source: Path, **condition: str) -> bool:
    bucket, key = _bucket_key(uri)
    digest = base64.b64encode(bytes.fromhex(sha256(source))).decode()

    def put() -> bool:
        try:
            with source.open("rb") as body:
                _s3_client().put_object(Bucket=bucket, Key=key, Body=body, ChecksumSHA256=digest, **condition)
        except botocore.exceptions.ClientError as error:
            if _status(error) == 412:
                return False
            raise
        return True

    return _persistently(put)


def _persistently(request: Callable[[], Result]) -> Result:
    """What boto3 does not try again by itself: a conflict of writers (409), an answer cut in its middle, a denial."""
    for attempt in range(1, TRIES):
        try:
            return request()
        except botocore.exceptions.ClientError as error:
            if not (_status(error) == 409 or (_code(error) in DENIED and attempt < DENIED_TRIES)):
                raise
        except CUT:
            pass  # the next try decides; the last one's error is the one that is told
        _RETRIES.pause(attempt)
    return request()


class _Retries:
    """How many requests of this process were sent again."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def add(self, count: int = 1) -> None:
        with self._lock:
            self.count += count

    def pause(self, attempt: int) -> None:
        """Count one more try and wait before it: longer every time, and not in step with others."""
        self.add()
        time.sleep(min(0.1 * 2**attempt, 10.0) * random.uniform(0.5, 1.0))

    def seen(self, request: Any, **_: Any) -> None:
        """boto3's event for every request that it is about to send."""
        if request.context.get("retries", {}).get("attempt", 1) > 1:
            self.add()


_RETRIES = _Retries()


class _S3File(io.RawIOBase):
    """An object read by pyarrow, range by range; a range that fails is asked for again, and counted."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._file: pa.NativeFile = self._tried(lambda: _s3_filesystem(1).open_input_file(uri.removeprefix(S3)))
        self._size: int = self._file.size()
        self._at = 0

    def _tried(self, request: Callable[[], Result]) -> Result:
        with _explained(self._uri):
            for attempt in range(1, TRIES):
                try:
                    return request()
                except OSError as error:
                    code = _arrow_code(error)
                    if code is None or code in LASTING or (code in DENIED and attempt == DENIED_TRIES):
                        raise
                _RETRIES.pause(attempt)
            return request()

    def read(self, size: int | None = -1) -> bytes:
        size = self._size - self._at if size is None or size < 0 else min(size, self._size - self._at)
        if size <= 0:
            return b""
        data: bytes = self._tried(lambda: self._file.read_at(size, self._at))
        self._at += len(data)
        return data

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _bucket_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix(S3).partition("/")
    return bucket, key


def _status(error: botocore.exceptions.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: botocore.exceptions.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@cache
def _s3_client(tries: int = TRIES) -> Any:
    # A session of its own: the default one remembers the credentials that it found first.
    session = boto3.session.Session()
    client = session.client(
        "s3",
        region_name=_region(session),
        config=Config(
            retries={"mode": "legacy", "total_max_attempts": tries},  # the newer modes stop trying after an outage
            connect_timeout=10 if tries == TRIES else 5,
            read_timeout=READ_TIMEOUT_S,
            max_pool_connections=32,
        ),
    )
    client.meta.events.register("request-created.s3", _RETRIES.seen)
    return client


@cache
def _s3_filesystem(tries: int) -> pafs.S3FileSystem:
    client = _s3_client()
    endpoint = client.meta.endpoint_url
    own = not re.fullmatch(r"s3([.-][a-z0-9-]+)?\.amazonaws\.com(\.cn)?", urlsplit(endpoint).hostname or "")
    return pafs.S3FileSystem(
        endpoint_override=endpoint if own else None,
        region=_region(boto3.session.Session()),
        connect_timeout=10,
        request_timeout=READ_TIMEOUT_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=tries),
        force_virtual_addressing=False,
    )


def _region(session: boto3.session.Session) -> str | None:
    return os.environ.get("AWS_REGION") or session.region_name  # boto3 knows AWS_DEFAULT_REGION only


# What storage answers, and what a person does about it.
_REMEDIES = {
    "InvalidAccessKeyId": "storage does not know this access key: check AWS_ACCESS_KEY_ID (or AWS_PROFILE)",
    "SignatureDoesNotMatch": "the secret does not belong to the access key: check AWS_SECRET_ACCESS_KEY",
    "NoSuchBucket": "there is no such bucket: check the name, or create it",
    "AccessDenied": "these credentials have no right to it: cluster/iam-policy.json lists the rights that jobs need",
    "ExpiredToken": "the session token has expired: get new credentials and run the same command again, it goes on",
    "WrongRegion": "the bucket is in another region: set AWS_REGION to {region}",
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it",
    "SlowDown": f"storage still asks to slow down after {TRIES} tries: run the same command again later, it goes on",
    "NoRoute": "no answer from {endpoint}: check the network, and AWS_ENDPOINT_URL_S3 if it is set",
    "NoCredentials": "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role",
}
_SAME = {
    "403": "AccessDenied",
    "AllAccessDisabled": "AccessDenied",
    "AccountProblem": "AccessDenied",
    "InvalidToken": "ExpiredToken",
    "ExpiredTokenException": "ExpiredToken",
    "TokenRefreshRequired": "ExpiredToken",
    "RequestExpired": "ExpiredToken",
    "PermanentRedirect": "WrongRegion",
    "AuthorizationHeaderMalformed": "WrongRegion",
    "IllegalLocationConstraintException": "WrongRegion",
    "301": "WrongRegion",
    "503": "SlowDown",
    "ServiceUnavailable": "SlowDown",
    "Throttling": "SlowDown",
    "NetworkConnection": "NoRoute",
}


def _told(uri: str, code: str, region: str = "its region") -> UserError:
    remedy = _REMEDIES.get(_SAME.get(code, code))
    if remedy is None:
        return UserError(f"{uri}: storage answered {code}; run the same command again, it goes on")
    return UserError(f"{uri}: {remedy.format(region=region, endpoint=_s3_client().meta.endpoint_url)}")


def _arrow_code(error: OSError) -> str | None:
    """S3's word for what pyarrow writes in its own (ACCESS_DENIED); None where it is no answer of S3."""
    found = re.search(r"AWS Error ([A-Z_]+)", str(error)) if error.errno is None else None
    if found is None:
        return None
    status = re.search(r"HTTP status (\d+)", str(error))
    code = found.group(1).title().replace("_", "")
    if code == "Unknown" and status:
        code = status.group(1)
    return _SAME.get(code, code)


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turn what a user can mend about storage into one line; FileNotFoundError stays what it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError) as error:
        raise _told(uri, "NoCredentials") from error
    except (botocore.exceptions.ConnectionError, botocore.exceptions.HTTPClientError) as error:
        raise _told(uri, "NoRoute") from error
    except botocore.exceptions.BotoCoreError as error:
        if not isinstance(error, botocore.exceptions.IncompleteReadError):
            raise UserError(f"{uri}: {' '.join(str(error).split())}; check the AWS_* variables and files") from error
        raise _told(uri, "NoRoute") from error
    except botocore.exceptions.ClientError as error:
        if _code(error) in ("NoSuchKey", "404"):
            raise FileNotFoundError(uri) from error
        raise _told(uri, _code(error), _bucket_region(error)) from error
    except OSError as error:
        remedies = {
            errno.ENOSPC: "no space left: free some and run the same command again, it goes on where it stopped",
            errno.EDQUOT: "disk quota reached: free some space and run the same command again",
            errno.EACCES: "permission denied: check the folder's rights",
            errno.EROFS: "the file system is read-only: choose another workspace",
            errno.EEXIST: "a file stands where a folder is needed: choose another path",
            errno.ENOTDIR: "a file stands where a folder is needed: choose another path",
        }
        if error.errno in remedies:
            raise UserError(f"{uri}: {remedies[error.errno]}") from error
        if (code := _arrow_code(error)) is not None:
            raise _told(uri, code) from error
        if isinstance(cause := getattr(error, "backend_error", None), botocore.exceptions.ClientError):  # smart_open's
            if _code(cause) in ("NoSuchKey", "404"):
                raise FileNotFoundError(uri) from error
            raise _told(uri, _code(cause), _bucket_region(cause)) from error
        raise


def _bucket_region(error: botocore.exceptions.ClientError) -> str:
    told = error.response.get("Error", {}).get("Region")
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return str(told or headers.get("x-amz-bucket-region") or "its region")


def arrow_reader(uri: str) -> pa.NativeFile:
    """A random-access pyarrow file for Parquet readers. Raises FileNotFoundError where there is none."""
    uri = canonical(uri)
    if is_s3(uri):
        return pa.PythonFile(_S3File(uri), mode="r")
    with _explained(uri):
        return pafs.LocalFileSystem().open_input_file(uri)
