"""A place: a folder or an object, on this machine or on S3, reached the same way.

``/data/photos``, ``file:///data/photos`` and ``s3://bucket/photos`` all open as a
:class:`Place` over one pyarrow filesystem. Credentials are found the standard AWS way
(environment, profile, instance role); nothing here stores or prints them. They need
s3:ListBucket, s3:GetObject, s3:PutObject and, to delete old checkpoints, s3:DeleteObject.

Traps this module keeps others out of:

- S3 has no folders. A place with no object below it doesn't exist, and nothing here makes the
  empty "directory" objects with which pyarrow would imitate one.
- A server may create a bucket on the first write to it (SeaweedFS does), so a typo would
  become a bucket: the bucket is looked up before anything is written.
- pyarrow answers "path does not exist" for a missing bucket too, and "access denied" for
  requests that had no credentials at all; the errors here tell these apart.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import pyarrow as pa
from pyarrow import fs as pafs

from droppos.errors import ConfigError, DataError

CONNECT_TIMEOUT = 10.0
"""Seconds until an endpoint that does not answer counts as unreachable."""
REQUEST_TIMEOUT = 60.0
"""Seconds a request may be silent (pyarrow heeds it on macOS and Windows only)."""
ATTEMPTS = 5
"""Tries of each request, with growing pauses; an endpoint that refuses costs about 10 s."""

_DENIED = (
    "ACCESS_DENIED",
    "AccessDenied",
    "INVALID_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "INVALID_CLIENT_TOKEN_ID",
    "ExpiredToken",
    "InvalidToken",
    "HTTP status 403",
)
_UNREACHABLE = ("NETWORK_CONNECTION", "REQUEST_TIMEOUT", "curlCode")
_PART = ".part"


class Entry(NamedTuple):
    """A file below a place."""

    name: str
    """Path relative to the place, with forward slashes."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Place:
    """A folder or an object, which need not exist. Equal, hashed and pickled by its URI.

    A pickled place is opened anew where it arrives, with the credentials found there.
    """

    uri: str
    """Absolute path, or s3://bucket/key, without a slash at the end."""
    path: str = field(compare=False, repr=False)
    """The same as the filesystem spells it."""
    fs: pafs.FileSystem = field(compare=False, repr=False)
    """pyarrow filesystem, for the few calls this class does not wrap."""

    def __truediv__(self, name: str) -> "Place":
        """Go to what is called ``name`` (which may hold slashes) below this place."""
        name = name.strip("/")
        return Place(f"{self.uri.rstrip('/')}/{name}", f"{self.path.rstrip('/')}/{name}", self.fs)

    def __str__(self) -> str:
        return self.uri

    def __reduce__(self) -> tuple[Any, ...]:
        return open_place, (self.uri,)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def is_s3(self) -> bool:
        """Whether this is an object store, so that no file of the machine can be mapped."""
        return self.uri.startswith("s3://")

    @property
    def bucket(self) -> str:
        """Bucket of an S3 place."""
        return self.path.split("/", 1)[0]

    def check_reachable(self) -> None:
        """Fail now, with the reason, if nothing could be read or written here.

        A job calls it before it starts, since finding out after the first epoch is late.

        Raises:
            DataError: If the bucket is missing or may not be entered, the endpoint does not
                answer, or there are no credentials.
        """
        if self.is_s3:
            with explained(self, "reach"):
                _require_bucket(self)

    def exists(self) -> bool:
        """Whether there is an object here, or any below."""
        return self._info("look up").type != pafs.FileType.NotFound

    def is_file(self) -> bool:
        """Whether there is an object here, and not only below."""
        return self._info("look up").type == pafs.FileType.File

    def size(self) -> int:
        """Bytes of the object here."""
        info = self._info("look up")
        if info.type != pafs.FileType.File:
            raise DataError(_missing(self, "look up"))
        return info.size

    def children(self) -> list[str]:
        """Names of what is directly below, sorted; none when there is nothing here."""
        return sorted({entry.split("/", 1)[0] for entry in self._list(recursive=False)})

    def files(self) -> list[Entry]:
        """Every file below, however deep, sorted by name; links are followed."""
        found = self._list(recursive=True)
        return sorted(Entry(name, info.size) for name, info in found.items() if info.is_file)

    def open_input(self) -> pa.NativeFile:
        """Open the object for random access.

        Not as a stream, even to read it whole: pyarrow's ``open_input_stream`` took 3 to 8
        times as long from S3. Reads from the file raise OSError: see :func:`explained`.
        """
        with explained(self, "read"):
            return self.fs.open_input_file(self.path)

    def read_bytes(self) -> bytes:
        """Read the whole object."""
        with explained(self, "read"), self.fs.open_input_file(self.path) as file:
            return file.read()

    def write_bytes(self, data: bytes | pa.Buffer) -> None:
        """Write the whole object, or nothing: no reader ever sees half of it."""
        with explained(self, "write"):
            if not self.is_s3:
                _write_and_rename(Path(self.path), data)
                return
            _require_bucket(self)
            with self.fs.open_output_stream(self.path) as file:
                file.write(data)

    def delete(self) -> None:
        """Delete the object here and all below; nothing here is fine."""
        with explained(self, "delete"):
            if self.is_s3:
                _delete_objects(self)
            elif Path(self.path).is_dir():
                shutil.rmtree(self.path)
            else:
                Path(self.path).unlink(missing_ok=True)

    def _info(self, verb: str) -> pafs.FileInfo:
        with explained(self, verb):
            info = self.fs.get_file_info(self.path)
            if info.type == pafs.FileType.NotFound and self.is_s3:
                _require_bucket(self)
            return info

    def _list(self, recursive: bool) -> dict[str, pafs.FileInfo]:
        """List by relative name, without the half-written files of a process that was killed."""
        selector = pafs.FileSelector(self.path, allow_not_found=True, recursive=recursive)
        with explained(self, "list"):
            infos = self.fs.get_file_info(selector)
            if not infos and self.is_s3:
                _require_bucket(self)
            start = len(self.path.rstrip("/")) + 1
            found = {info.path[start:]: info for info in infos}
        return {name: info for name, info in found.items() if not _is_part(name)}


def open_place(uri: str) -> Place:
    """Open a path, ``file://`` or ``s3://`` URI; nothing is read or written yet.

    Args:
        uri: A relative path is taken from the current folder, once and for all: workers run
            in other folders.

    Raises:
        ConfigError: If the URI is of another kind, or names no bucket.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        path = Path(uri).expanduser().absolute()
        return Place(str(path), path.as_posix(), pafs.LocalFileSystem())
    if scheme == "file" and rest.startswith("/"):
        return open_place(unquote(rest))
    if scheme == "s3" and rest.strip("/"):
        path = rest.strip("/")
        return Place(f"s3://{path}", path, _s3(_Endpoint.from_environment(), _identity()))
    raise ConfigError(
        f"a place must be a path, file:///path or s3://bucket/path, got {uri!r}; "
        "other stores are reached when they speak S3: set AWS_ENDPOINT_URL"
    )


@contextmanager
def explained(place: Place, verb: str) -> Iterator[None]:
    """Turn what a filesystem raises inside the block into a DataError with a way out.

    Args:
        place: What is worked on.
        verb: What is tried, as in "cannot read".
    """
    try:
        yield
    except OSError as error:
        raise DataError(_explanation(place, verb, error)) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"cannot {verb} {place}: the name {error.object!r} is not UTF-8; rename the file"
        ) from error


class _Endpoint(NamedTuple):
    scheme: str
    address: str | None
    region: str | None

    @classmethod
    def from_environment(cls) -> "_Endpoint":
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


def _identity() -> int:
    """Tell one set of credentials from another, without keeping it."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")
    return hash(tuple(os.environ.get(name) for name in names))


@lru_cache(maxsize=8)
def _s3(endpoint: _Endpoint, identity: int) -> pafs.S3FileSystem:
    """One filesystem for each endpoint and identity, so that connections are kept."""
    return pafs.S3FileSystem(
        endpoint_override=endpoint.address,
        scheme=endpoint.scheme,
        region=endpoint.region,
        connect_timeout=CONNECT_TIMEOUT,
        request_timeout=REQUEST_TIMEOUT,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        # One request for a small object instead of three.
        allow_delayed_open=True,
    )


def _write_and_rename(path: Path, data: bytes | pa.Buffer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid4().hex}{_PART}")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _is_part(name: str) -> bool:
    return name.endswith(_PART) and name.rsplit("/", 1)[-1].startswith(".")


def _require_bucket(place: Place) -> None:
    if place.fs.get_file_info(place.bucket).type == pafs.FileType.NotFound:
        raise DataError(
            f"cannot reach {place}: there is no bucket {place.bucket!r} at "
            f"{_Endpoint.from_environment()}; create it, or correct its name"
        )


def _delete_objects(place: Place) -> None:
    """Delete with boto3: pyarrow would leave an empty object in place of the folder above."""
    _, _, key = place.path.partition("/")
    if not key:
        raise ConfigError(f"will not delete all of {place}; name a folder in the bucket")
    _require_bucket(place)
    import boto3  # a third of a second, which decode tasks need not pay
    from botocore.exceptions import BotoCoreError, ClientError

    endpoint = _Endpoint.from_environment()
    url = str(endpoint) if endpoint.address else None
    client: Any = boto3.client("s3", endpoint_url=url, region_name=endpoint.region)
    try:
        pages = client.get_paginator("list_objects_v2").paginate(
            Bucket=place.bucket, Prefix=f"{key}/"
        )
        keys = [found["Key"] for page in pages for found in page.get("Contents", [])]
        # Folders last, deepest first: S3 has none, but SeaweedFS goes on listing empty ones.
        folders = {f"{parent}/" for name in keys for parent in _folders(name, below=key)}
        keys = [key, *keys, *sorted(folders, key=len, reverse=True)]
        for i in range(0, len(keys), 1000):  # the most that one request may hold
            batch = {"Objects": [{"Key": name} for name in keys[i : i + 1000]], "Quiet": True}
            failed = client.delete_objects(Bucket=place.bucket, Delete=batch).get("Errors", [])
            if failed:
                first = failed[0]
                raise OSError(f"{first.get('Code')} {first.get('Message')} ({first.get('Key')})")
    except (BotoCoreError, ClientError) as error:
        raise OSError(str(error)) from error


def _folders(name: str, below: str) -> list[str]:
    """Every folder that holds ``name``, down from ``below``."""
    return [str(p) for p in PurePosixPath(name).parents if len(str(p)) >= len(below)]


def _explanation(place: Place, verb: str, error: OSError) -> str:
    text = str(error)
    start = f"cannot {verb} {place}: "
    if isinstance(error, FileNotFoundError):
        if place.is_s3:
            with explained(place, verb):
                _require_bucket(place)
        return _missing(place, verb)
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{start}part of its path is a file, not a folder; choose another place"
    if not place.is_s3:
        return f"{start}{error.strerror or text}; check its permissions and the space left"
    if "NO_SUCH_BUCKET" in text or "NoSuchBucket" in text:
        return f"{start}there is no bucket {place.bucket!r}; create it, or correct its name"
    if any(sign in text for sign in _UNREACHABLE):
        return (
            f"{start}{_Endpoint.from_environment()} does not answer; check the network, and "
            f"AWS_ENDPOINT_URL if the store is not Amazon's ({text})"
        )
    if any(sign in text for sign in _DENIED):
        return start + _denied(text)
    return f"{start}{text}"


def _missing(place: Place, verb: str) -> str:
    return f"cannot {verb} {place}: there is no such {'object' if place.is_s3 else 'file'}"


def _denied(text: str) -> str:
    import boto3

    if boto3.Session().get_credentials() is None:
        return (
            "no AWS credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE, or give the machine a role"
        )
    return (
        "access denied: the credentials that were found are wrong, have expired, or do not "
        f"allow this; `aws sts get-caller-identity` says whose they are ({text})"
    )
