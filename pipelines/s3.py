"""S3 as it is reached from here: the endpoint, pyarrow's client to read, boto3's to write.

Two clients, because of what each does when storage fails (tests/pipelines/test_storage_faults.py
would notice a change):

- pyarrow 25 reads with two thirds of boto3's CPU time. But when the start of an upload
  of more than 10 MB is refused, closing its output stream, or only letting go of it, writes an
  empty object over what was there. So nothing here writes with it.
- When an answer is shorter than what was asked for (an object that was replaced by a shorter
  one after it was opened), pyarrow returns memory as it happened to be. :func:`read_whole`
  notices; shards have checksums.
- request_timeout, which pyarrow says is ignored on Linux, is curl's low-speed limit there:
  silence ends after so many seconds, and a body that stalls at most 8 s later.

boto3 takes a third of a second to import, which tasks that only read need not pay.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import PurePosixPath
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs as pafs

from droppos.errors import ConfigError
from pipelines.retries import ShortAnswerError, patiently

if TYPE_CHECKING:
    from pipelines.storage import Place

CONNECT_TIMEOUT = 10.0
"""Seconds until an endpoint that does not answer counts as unreachable."""
REQUEST_TIMEOUT = 20.0
"""Seconds a request may be silent: a slow first byte is no failure, a stalled body is one."""
ATTEMPTS = 5
"""Tries of each request by a client that retries itself, see :func:`filesystem`."""
PART = 32 * 2**20
"""Bytes of a part of a large upload; S3 takes 10,000, which makes 320 GB."""

_MARK = 16
"""Random bytes at the end of a buffer, which an answer of full length overwrites."""
_making = Lock()

Result = TypeVar("Result")


class Endpoint(NamedTuple):
    """Where S3 is."""

    scheme: str
    address: str | None
    region: str | None

    @classmethod
    def from_environment(cls) -> "Endpoint":
        """Read the standard variables.

        Raises:
            ConfigError: If AWS_ENDPOINT_URL is no http or https address.
        """
        url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if not url:
            return cls("https", None, region)
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.netloc:
            raise ConfigError(
                f"AWS_ENDPOINT_URL must be http://host:port or https://host, got {url!r}"
            )
        # A region is part of every signature, and other servers than Amazon's have none.
        return cls(parts.scheme, parts.netloc, region or "us-east-1")

    def __str__(self) -> str:
        return f"{self.scheme}://{self.address}" if self.address else "Amazon S3"


def identity() -> int:
    """Tell one set of credentials from another, without keeping it."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")
    return hash(tuple(os.environ.get(name) for name in names))


@lru_cache(maxsize=16)
def filesystem(endpoint: Endpoint, identity: int, attempts: int) -> pafs.S3FileSystem:
    """One filesystem for each endpoint and identity, so that connections are kept.

    Args:
        endpoint: Where S3 is.
        identity: As :func:`identity` tells.
        attempts: 1 for work that is done by :func:`patiently`: there the clock bounds it, every
            retry is counted, and 5 tries within each of 15 would be 75. pyarrow's own (of
            each request, with jitter, but bounded by number only) is for what cannot be done
            twice as a whole: Ray's own files, and archives that are read as a stream.
    """
    return pafs.S3FileSystem(
        endpoint_override=endpoint.address,
        scheme=endpoint.scheme,
        region=endpoint.region,
        connect_timeout=CONNECT_TIMEOUT,
        request_timeout=REQUEST_TIMEOUT,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        # One request for a small object instead of three.
        allow_delayed_open=True,
    )


def read_whole(file: pa.NativeFile) -> bytes:
    """Read an object that was just opened.

    Raises:
        ShortAnswerError: If it has become shorter since it was opened.
    """
    buffer = bytearray(file.size())
    mark = os.urandom(_MARK)
    buffer[-_MARK:] = mark[: len(buffer)]
    file.readinto(buffer)
    if buffer and buffer.endswith(mark[: len(buffer)]):
        raise ShortAnswerError(f"fewer bytes came than the {len(buffer)} that were asked for")
    return bytes(buffer)


def write_whole(place: "Place", data: bytes | pa.Buffer, patience: float | None = None) -> None:
    """Write an object of up to 5 GB in one request, which S3 takes whole or not at all."""
    target = {"Bucket": place.bucket, "Key": place.key}
    again(
        f"write {place}",
        lambda: _client().put_object(**target, Body=pa.BufferReader(data)),
        patience,
    )


def listing(place: "Place", recursive: bool) -> dict[str, int | None]:
    """List what is below, by relative name: bytes of an object, None for a folder."""
    prefix = f"{place.key}/" if place.key else ""
    found: dict[str, int | None] = {}
    for page in _pages(place, prefix, "" if recursive else "/"):
        for entry in page.get("Contents", []):
            if not entry["Key"].endswith("/"):  # what some clients write to imitate a folder
                found[entry["Key"][len(prefix) :]] = entry["Size"]
        for folder in page.get("CommonPrefixes", []):
            found[folder["Prefix"][len(prefix) : -1]] = None
    return found


def delete_tree(place: "Place") -> None:
    """Delete the object here and all below; pyarrow would leave an empty object for the folder."""
    pages = _pages(place, f"{place.key}/", "")
    keys = [found["Key"] for page in pages for found in page.get("Contents", [])]
    # Folders last, deepest first: S3 has none, but SeaweedFS goes on listing empty ones.
    folders = {f"{parent}/" for name in keys for parent in _folders(name, below=place.key)}
    keys = [place.key, *keys, *sorted(folders, key=len, reverse=True)]
    for i in range(0, len(keys), 1000):  # the most that one request may hold
        batch = [{"Key": name} for name in keys[i : i + 1000]]
        again(f"delete {place}", partial(_delete, place.bucket, batch))


def _pages(place: "Place", prefix: str, delimiter: str) -> Iterator[dict[str, Any]]:
    """List page by page, each with patience of its own: a million objects are a thousand."""
    ask = partial(
        _client().list_objects_v2, Bucket=place.bucket, Prefix=prefix, Delimiter=delimiter
    )
    page = again(f"list {place}", ask)
    yield page
    while page["IsTruncated"]:
        token = page["NextContinuationToken"]
        page = again(f"list {place}", partial(ask, ContinuationToken=token))
        yield page


def _delete(bucket: str, batch: list[dict[str, str]]) -> None:
    wanted = {"Objects": batch, "Quiet": True}
    for failed in _client().delete_objects(Bucket=bucket, Delete=wanted).get("Errors", []):
        raise OSError(f"AWS Error {failed['Code']}: {failed.get('Message')} ({failed.get('Key')})")


class Upload:
    """An object that is written piece by piece, and is there only once it is finished."""

    def __init__(self, place: "Place") -> None:
        """Start; nothing is sent before there is enough for a part."""
        self._place = place
        self._target = {"Bucket": place.bucket, "Key": place.key}
        self._buffer = bytearray()
        self._id: str | None = None
        self._parts: list[dict[str, Any]] = []
        self._size = 0

    def write(self, data: Any) -> None:
        """Take bytes, or anything that holds contiguous ones."""
        view = memoryview(data).cast("B")
        while len(view):
            room = PART - len(self._buffer)
            self._buffer += view[:room]
            view = view[room:]
            if len(self._buffer) == PART:
                self._send()

    def finish(self) -> None:
        """Make the object appear, all at once."""
        if self._id is None:
            write_whole(self._place, bytes(self._buffer))
            return
        if self._buffer:
            self._send()
        parts = {"Parts": self._parts}
        again(f"write {self._place}", lambda: self._complete(parts))

    def abort(self) -> None:
        """Let S3 forget the parts, for which it charges; a rule of the bucket is the second net."""
        if self._id is not None:
            upload, self._id = self._id, None
            with boto_errors():
                _client().abort_multipart_upload(**self._target, UploadId=upload)

    def _send(self) -> None:
        number, body = len(self._parts) + 1, bytes(self._buffer)
        if self._id is None:
            self._id = again(
                f"write {self._place}",
                lambda: _client().create_multipart_upload(**self._target)["UploadId"],
            )
        sent = again(
            f"write {self._place}",
            lambda: _client().upload_part(
                **self._target, UploadId=self._id, PartNumber=number, Body=body
            ),
        )
        self._parts.append({"PartNumber": number, "ETag": sent["ETag"]})
        self._size += len(body)
        self._buffer.clear()

    def _complete(self, parts: dict[str, Any]) -> None:
        client = _client()
        try:
            client.complete_multipart_upload(
                **self._target, UploadId=self._id, MultipartUpload=parts
            )
        except client.exceptions.NoSuchUpload:
            # Perhaps it was completed by an earlier try, and only the answer was lost.
            if client.head_object(**self._target)["ContentLength"] != self._size:
                raise


def again(what: str, work: Callable[[], Result], patience: float | None = None) -> Result:
    """Ask boto3, patiently."""

    def attempt() -> Result:
        with boto_errors():
            return work()

    return patiently(what, attempt, patience)


def _client() -> Any:
    with _making:  # once, however many threads write
        return _boto_client(Endpoint.from_environment(), identity())


@lru_cache(maxsize=8)
def _boto_client(endpoint: Endpoint, identity: int) -> Any:
    """One client for each endpoint and identity: making one takes a tenth of a second."""
    import boto3
    from botocore.config import Config

    # boto3.client() would go on with the credentials that were found first in this process.
    session = boto3.Session()
    if session.get_credentials() is None:  # a client made now would go on without for ever
        raise OSError("Unable to locate credentials")
    return session.client(
        "s3",
        endpoint_url=str(endpoint) if endpoint.address else None,
        region_name=endpoint.region,
        config=Config(
            connect_timeout=CONNECT_TIMEOUT,
            read_timeout=REQUEST_TIMEOUT,
            retries={"total_max_attempts": 1},  # as for `filesystem`
        ),
    )


@contextmanager
def boto_errors() -> Iterator[None]:
    """Raise boto3's errors as pyarrow words its own, so that both are told apart in one way."""
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectionError,
        HTTPClientError,
    )

    try:
        yield
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        raise OSError(f"{error} (HTTP status {status})") from error
    except (ConnectionError, HTTPClientError) as error:
        raise OSError(f"AWS Error NETWORK_CONNECTION: {error}") from error
    except BotoCoreError as error:
        raise OSError(str(error)) from error


def _folders(name: str, below: str) -> list[str]:
    """Every folder that holds ``name``, down from ``below``."""
    return [str(p) for p in PurePosixPath(name).parents if len(str(p)) >= len(below)]
