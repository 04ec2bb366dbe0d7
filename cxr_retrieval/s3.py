"""Object storage as `storage` uses it: requests that are tried again and counted, errors that name their remedy.

What passes by itself (throttling, cut connections, timeouts, a conflict of writers) is sent again with growing pauses
and counted; what a person must mend is told in one line. boto3 asks for whole objects and writes, pyarrow reads ranges.
"""

import base64
import contextlib
import errno
import hashlib
import io
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.exceptions
import pyarrow as pa
import pyarrow.fs as pafs
import urllib3.exceptions
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.config import Config

from cxr_retrieval.errors import UserError

SCHEME = "s3://"
TRIES = 8  # of one request: about half a minute with the pauses between them
DENIED_TRIES = 3  # S3 under load has been seen to deny what it allows
CHECK_TRIES = 4
READ_TIMEOUT_S = 60.0
# A body that breaks off while it is read: the request itself had succeeded, so boto3 is done with it. Not where no
# answer came at all (ReadTimeoutError): boto3 has asked as often as it may, a timeout each.
CUT = (
    botocore.exceptions.ResponseStreamingError,
    botocore.exceptions.IncompleteReadError,
    urllib3.exceptions.HTTPError,
)
MOST_BYTES = 5 * 10**9  # of one PUT
PART_BYTES = 64 << 20  # of larger files, which are sent in parts; of very large ones more, since S3 takes 10,000 parts
DENIED = ("AccessDenied", "403")
OF_ONE_OBJECT = ("AccessDenied", "InvalidObjectState")  # others beside it may be readable
LASTING = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "NoSuchBucket", "ExpiredToken", "WrongRegion")

Result = TypeVar("Result")


def check(uri: str) -> None:
    """Ask for one name under `uri`. Raises UserError with the remedy for what is wrong with keys, bucket or route."""
    bucket, key = _bucket_key(uri)
    with explained(uri):
        try:
            answer = _persistently(partial(client(CHECK_TRIES).list_objects_v2, Bucket=bucket, Prefix=key, MaxKeys=1))
            _check_region(uri, answer)
            filesystem(CHECK_TRIES).get_file_info(bucket)  # bulk reads find their credentials another way
        except botocore.exceptions.ClientError as error:
            if _SAME.get(_code(error), _code(error)) != "SlowDown":  # busy, but it knows who asks
                raise


def _check_region(uri: str, answer: Any) -> None:
    """boto3 follows a bucket into another region, pyarrow does not: it would fail in the middle of the work."""
    headers = answer["ResponseMetadata"]["HTTPHeaders"]
    region, ours = headers.get("x-amz-bucket-region"), client().meta.region_name
    if region and ours and region != ours and ours != "aws-global":
        raise _told(uri, "WrongRegion", region)


def exists(uri: str) -> bool:
    """Whether there is an object at `uri`."""
    bucket, key = _bucket_key(uri)
    try:
        with explained(uri):
            try:
                _persistently(partial(client().head_object, Bucket=bucket, Key=key))
            except botocore.exceptions.ClientError as error:
                if _code(error) != "404":
                    check(uri)  # the answer to a HEAD has no text: this one tells what is wrong
                raise
    except FileNotFoundError:
        return False
    return True


def objects(uri: str) -> Iterator[tuple[str, int, float, str]]:
    """Every object below `uri`, streamed: its key without the prefix, its size in bytes, when it was written (seconds
    since 1970), its tag."""
    after: dict[str, str] = {}
    while True:
        page, found = _page(uri, **after)
        yield from found
        if not page["IsTruncated"]:
            return
        after = {"ContinuationToken": page["NextContinuationToken"]}


def top_objects(uri: str) -> Iterator[tuple[str, int, float, str]]:
    """The objects right below `uri`, as far as the first page of names shows them, as `objects` tells them."""
    return _page(uri, Delimiter="/")[1]


def _page(uri: str, **asked: str) -> tuple[Any, Iterator[tuple[str, int, float, str]]]:
    """A page of a listing as S3 answers it, and the objects in it."""
    bucket, prefix = _bucket_key(uri + "/")
    with explained(uri):
        page = _persistently(partial(client().list_objects_v2, Bucket=bucket, Prefix=prefix, **asked))
    named = ((entry["Key"].removeprefix(prefix), entry) for entry in page.get("Contents", []))
    return page, (
        (path, entry["Size"], entry["LastModified"].timestamp(), entry["ETag"]) for path, entry in named if path
    )


def get(uri: str) -> tuple[bytes, str]:
    """The whole object and its tag."""
    bucket, key = _bucket_key(uri)
    with explained(uri):
        return _persistently(partial(_read, Bucket=bucket, Key=key))


def _read(**asked: str) -> tuple[bytes, str]:
    """An object's bytes and its tag. A body that stalls is told as one that is cut: its error is else the same as where
    no answer came, which boto3 has tried again."""
    answer = client().get_object(**asked)
    try:
        return answer["Body"].read(), answer["ETag"]
    except botocore.exceptions.ReadTimeoutError as error:
        raise botocore.exceptions.ResponseStreamingError(error=error) from error


def get_beginning(uri: str, length: int) -> bytes:
    """The first `length` bytes of the object, all of it where it is shorter. Raises OSError where this one object is
    not there or cannot be read; what is raised names the bucket and not the object."""
    bucket, key = _bucket_key(uri)

    def once() -> bytes:
        try:
            return _read(Bucket=bucket, Key=key, Range=f"bytes=0-{length - 1}")[0]
        except botocore.exceptions.ClientError as error:
            if _status(error) == 416:  # no byte of an empty object is in any range
                return b""
            raise

    try:
        with explained(SCHEME + bucket):
            return _persistently(once)
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "there is no such object any more") from None
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, botocore.exceptions.ClientError) and _code(cause) in OF_ONE_OBJECT:
            raise PermissionError(errno.EACCES, str(error)) from None
        raise


def delete(uri: str) -> None:
    """Delete an object; it is no error where there is none. A bucket that keeps versions only hides it."""
    bucket, key = _bucket_key(uri)
    with explained(uri), _needing(uri, "s3:DeleteObject"):
        _persistently(partial(client().delete_object, Bucket=bucket, Key=key))


def delete_for_good(uri: str) -> None:
    """Delete an object with every version and delete marker that its bucket keeps of it: no version id reads it then.

    What readers see goes last: whatever ends this before, the object is still listed and can be deleted again.
    """
    bucket, key = _bucket_key(uri)
    if versioned_bucket(uri) is None:
        delete(uri)
        return
    before: list[str] = []
    with explained(uri):
        while versions := _versions(uri):
            if versions == before:
                raise UserError(f"{uri}: storage keeps versions that it said it deleted: look at what locks the bucket")
            before = versions
            for version in versions:
                with _needing(uri, "s3:DeleteObjectVersion", "or a lock holds it (Object Lock, MFA Delete)"):
                    _persistently(partial(client().delete_object, Bucket=bucket, Key=key, VersionId=version))


def versioned_bucket(uri: str) -> str | None:
    """The bucket of `uri` where it keeps versions of what is deleted or overwritten in it, or did so once and keeps
    those; None where it does not. A bucket is asked once."""
    bucket, _ = _bucket_key(uri)
    return SCHEME + bucket if keeps_versions(bucket) else None


@cache
def keeps_versions(bucket: str) -> bool:
    uri = SCHEME + bucket
    with explained(uri), _needing(uri, "s3:GetBucketVersioning"):
        try:
            return bool(_persistently(partial(client().get_bucket_versioning, Bucket=bucket)).get("Status"))
        except botocore.exceptions.ClientError as error:
            if _code(error) == "NotImplemented":  # storage that knows no versions keeps none
                return False
            raise


def _versions(uri: str) -> list[str]:
    """Ids of versions and delete markers of one object, the one that readers see last; all of them, or, where they do
    not fit on a page, those on the first."""
    bucket, key = _bucket_key(uri)
    with _needing(uri, "s3:ListBucketVersions"):
        page = _persistently(partial(client().list_object_versions, Bucket=bucket, Prefix=key))
    found = [entry for kind in ("Versions", "DeleteMarkers") for entry in page.get(kind, []) if entry["Key"] == key]
    return [entry["VersionId"] for entry in sorted(found, key=lambda entry: bool(entry["IsLatest"]))]


@contextlib.contextmanager
def _needing(uri: str, right: str, otherwise: str = "") -> Iterator[None]:
    """Name the right that a request needs where it is denied: deleting takes more of them than most jobs have."""
    try:
        yield
    except botocore.exceptions.ClientError as error:
        if _SAME.get(_code(error), _code(error)) != "AccessDenied":
            raise
        lacking = " ".join(filter(None, [f"these credentials lack the right {right}", otherwise]))
        raise UserError(f"{uri}: {lacking}: cluster/iam-policy-removal.json lists what removing takes") from error


def put(uri: str, source: Path, **condition: str) -> bool:
    """Write a file's bytes with their SHA-256; False where a condition (IfMatch, IfNoneMatch) does not hold (412).

    A file of more than 5 GB is sent in parts, each with its hash, and appears with the last of them: then S3 keeps no
    hash of all. Raises UserError for one with a condition, which is asked of one request.
    """
    bucket, key = _bucket_key(uri)
    if (size := source.stat().st_size) > MOST_BYTES:
        if condition:
            raise UserError(
                f"{uri}: {size:,} bytes are more than the {MOST_BYTES:,} that S3 takes at once, as it must take what is"
                " published: lower index.shard_rows and build the index again"
            )
        _persistently(partial(_put_in_parts, bucket, key, source))
        return True
    digest = base64.b64encode(_sha256(source)).decode()

    def once() -> bool:
        try:
            with source.open("rb") as body:
                client().put_object(Bucket=bucket, Key=key, Body=body, ChecksumSHA256=digest, **condition)
        except botocore.exceptions.ClientError as error:
            if _status(error) == 412:
                return False
            raise
        return True

    return _persistently(once)


def _put_in_parts(bucket: str, key: str, source: Path) -> None:
    """Where it fails, what was sent is deleted; where this process is killed it stays at S3, and nobody sees it."""
    # Not the other client that boto3 knows, which has neither our tries nor their count.
    config = TransferConfig(multipart_threshold=1, multipart_chunksize=PART_BYTES, preferred_transfer_client="classic")
    with create_transfer_manager(client(), config) as manager:
        manager.upload(str(source), bucket, key, extra_args={"ChecksumAlgorithm": "SHA256"}).result()


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _persistently(request: Callable[[], Result]) -> Result:
    """What boto3 does not try again by itself: a conflict of writers (409), a body that is cut or stalls, a denial, and
    parts that are known no more (their upload was ended, and the answer lost)."""
    for attempt in range(1, TRIES):
        try:
            return request()
        except botocore.exceptions.ClientError as error:
            passing = _status(error) == 409 or _code(error) == "NoSuchUpload"
            if not (passing or (_code(error) in DENIED and attempt < DENIED_TRIES)):
                raise
        except CUT:
            pass  # the next try decides; the last one's error is the one that is told
        RETRIES.pause(attempt)
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


RETRIES = _Retries()


class File(io.RawIOBase):
    """An object read by pyarrow, range by range; a range that fails is asked for again, and counted."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._file: pa.NativeFile = self._tried(lambda: filesystem(1).open_input_file(uri.removeprefix(SCHEME)))
        self._size: int = self._file.size()
        self._at = 0

    def _tried(self, request: Callable[[], Result]) -> Result:
        with explained(self._uri):
            for attempt in range(1, TRIES):
                try:
                    return request()
                except OSError as error:
                    code = _arrow_code(error)
                    if code is None or code in LASTING or (code in DENIED and attempt == DENIED_TRIES):
                        raise
                RETRIES.pause(attempt)
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
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    return bucket, key


def _status(error: botocore.exceptions.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: botocore.exceptions.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@cache
def client(tries: int = TRIES) -> Any:
    # A session of its own: the default one remembers the credentials that it found first.
    session = boto3.session.Session()
    made = session.client(
        "s3",
        region_name=_region(session),
        config=Config(
            retries={"mode": "legacy", "total_max_attempts": tries},  # the newer modes stop trying after an outage
            connect_timeout=10 if tries == TRIES else 5,
            read_timeout=READ_TIMEOUT_S,
            max_pool_connections=32,
        ),
    )
    made.meta.events.register("request-created.s3", RETRIES.seen)
    return made


@cache
def filesystem(tries: int = TRIES) -> pafs.S3FileSystem:
    endpoint = client().meta.endpoint_url
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
    "InvalidObjectState": "storage keeps it in an archive (Glacier): restore it there first",
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
    return UserError(f"{uri}: {remedy.format(region=region, endpoint=client().meta.endpoint_url)}")


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
def explained(uri: str) -> Iterator[None]:
    """Turn what S3 says, by boto3, pyarrow or smart_open, into one line; what is not there is a FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError) as error:
        raise _told(uri, "NoCredentials") from error
    except (botocore.exceptions.ConnectionError, botocore.exceptions.HTTPClientError) as error:
        raise _told(uri, "NoRoute") from error
    except botocore.exceptions.ParamValidationError as error:
        raise UserError(f"{uri}: this is no name of a bucket and a prefix: write s3://bucket/prefix") from error
    except botocore.exceptions.BotoCoreError as error:
        if not isinstance(error, botocore.exceptions.IncompleteReadError):
            raise UserError(f"{uri}: {' '.join(str(error).split())}; check the AWS_* variables and files") from error
        raise _told(uri, "NoRoute") from error
    except botocore.exceptions.ClientError as error:
        if _code(error) in ("NoSuchKey", "404"):
            raise FileNotFoundError(uri) from error
        raise _told(uri, _code(error), _bucket_region(error)) from error
    except OSError as error:
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
