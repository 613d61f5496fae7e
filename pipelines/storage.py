"""A place: a folder or an object, on this machine or on S3, reached the same way.

``/data/photos``, ``file:///data/photos`` and ``s3://bucket/photos`` all open as a
:class:`Place` over one pyarrow filesystem. Credentials are found the standard AWS way
(environment, profile, instance role); nothing here stores or prints them. They need
s3:ListBucket, s3:GetObject, s3:PutObject, to delete old checkpoints s3:DeleteObject, and
s3:AbortMultipartUpload, without which uploads that failed stay and are charged for.

Traps this module keeps others out of:

- S3 has no folders. A place with no object below it doesn't exist, and nothing here makes the
  empty "directory" objects with which pyarrow would imitate one.
- A server may create a bucket on the first write to it (SeaweedFS does), so a typo would
  become a bucket: the bucket is looked up before anything is written.
- pyarrow answers "path does not exist" for a missing bucket too, and "access denied" for
  requests that had no credentials at all; the errors here tell these apart.
- Storage fails in passing. All that may be done twice is done by
  :func:`pipelines.retries.patiently`; what does not pass, such as a missing object, is told at
  once. :mod:`pipelines.s3` has the traps of the clients.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar
from urllib.parse import unquote
from uuid import uuid4

import pyarrow as pa
from pyarrow import fs as pafs

from droppos.errors import ConfigError, DataError, StorageError
from pipelines import s3
from pipelines.retries import is_passing, patiently
from pipelines.retries import retries as retries  # for those who know only this module

FIRST_PATIENCE = 15.0
"""Seconds for storage to answer before a job starts: a wrong address never will."""

_DENIED = (
    "ACCESS_DENIED",
    "AccessDenied",
    "INVALID_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "INVALID_CLIENT_TOKEN_ID",
    "ExpiredToken",
    "InvalidToken",
    "HTTP status 403",
    "Unable to locate credentials",
)
_UNREACHABLE = ("NETWORK_CONNECTION", "REQUEST_TIMEOUT", "curlCode")
_PART = ".part"

Result = TypeVar("Result")


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
    """pyarrow filesystem that retries by itself, for Ray; its way to write to S3 is unsafe."""
    once: pafs.FileSystem = field(compare=False, repr=False)
    """The same, for work that is retried as a whole."""

    def __truediv__(self, name: str) -> "Place":
        """Go to what is called ``name`` (which may hold slashes) below this place."""
        name = name.strip("/")
        uri, path = f"{self.uri.rstrip('/')}/{name}", f"{self.path.rstrip('/')}/{name}"
        return Place(uri, path, self.fs, self.once)

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

    @property
    def key(self) -> str:
        """Key of an S3 place, without its bucket."""
        return self.path.partition("/")[2]

    def check_reachable(self) -> None:
        """Fail now, with the reason, if nothing could be read or written here.

        A job calls it before it starts, since finding out after the first epoch is late.

        Raises:
            DataError: If the bucket is missing.
            StorageError: If the bucket may not be entered, the endpoint does not answer, or
                there are no credentials.
        """
        if self.is_s3:
            self._try("reach", lambda: _require_bucket(self), FIRST_PATIENCE)

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
        return sorted(Entry(name, size) for name, size in found.items() if size is not None)

    def open_input(self) -> pa.NativeFile:
        """Open the object for random access, by someone who can't begin anew: else :meth:`read`.

        Not as a stream, even to read it whole: pyarrow's ``open_input_stream`` took 3 to 8
        times as long from S3. Reads from the file raise OSError: see :func:`explained`.
        """
        with explained(self, "read"):
            return self.fs.open_input_file(self.path)

    def read(self, work: Callable[[pa.NativeFile], Result]) -> Result:
        """Open the object and let ``work`` read it; both again when storage fails in passing.

        Raises:
            DataError: If there is no such object.
            StorageError: If storage can't be reached, throttles beyond patience, or refuses.
        """

        def attempt() -> Result:
            with self.once.open_input_file(self.path) as file:
                return work(file)

        return self._try("read", attempt)

    def read_bytes(self) -> bytes:
        """Read the whole object."""
        return self.read(s3.read_whole if self.is_s3 else lambda file: file.read())

    def download(self, folder: Path) -> None:
        """Copy every file below to a folder of this machine, which need not exist."""
        for file in self.files():
            copy = folder / file.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((self / file.name).read_bytes())

    def write_bytes(self, data: bytes | pa.Buffer, patience: float | None = None) -> None:
        """Write the whole object, or nothing: no reader ever sees half of it.

        Args:
            data: All of it.
            patience: Seconds for which each of two requests of an object store is tried;
                `retries.PATIENCE` when not given.
        """
        if self.is_s3:
            self._try("write", lambda: _require_bucket(self), patience)
            with explained(self, "write"):
                s3.write_whole(self, data, patience)
        else:
            with self.open_output() as file:
                file.write(data)

    @contextmanager
    def open_output(self) -> Iterator["BinaryIO | s3.Upload"]:
        """Open to write piece by piece; the object appears whole if the block ends well."""
        with explained(self, "write"):
            if not self.is_s3:
                with _replacing(Path(self.path)) as file:
                    yield file
                return
            self._try("write", lambda: _require_bucket(self))
            upload = s3.Upload(self)
            try:
                yield upload
                upload.finish()
            except BaseException:
                with suppress(OSError):
                    upload.abort()
                raise

    def delete(self) -> None:
        """Delete the object here and all below; nothing here is fine."""
        with explained(self, "delete"):
            if self.is_s3:
                if not self.key:
                    raise ConfigError(f"will not delete all of {self}; name a folder in it")
                s3.delete_tree(self)
            elif Path(self.path).is_dir():
                shutil.rmtree(self.path)
            else:
                Path(self.path).unlink(missing_ok=True)

    def _info(self, verb: str) -> pafs.FileInfo:
        def look() -> pafs.FileInfo:
            info = self.once.get_file_info(self.path)
            if info.type == pafs.FileType.NotFound and self.is_s3:
                _require_bucket(self)
            return info

        return self._try(verb, look)

    def _list(self, recursive: bool) -> dict[str, int | None]:
        """List by relative name, without the half-written files of a process that was killed.

        Returns:
            Bytes of each file, None for folders.
        """
        with explained(self, "list"):
            if self.is_s3:
                found = s3.listing(self, recursive)
            else:
                selector = pafs.FileSelector(self.path, allow_not_found=True, recursive=recursive)
                start = len(self.path.rstrip("/")) + 1
                found = {i.path[start:]: i.size for i in self.fs.get_file_info(selector)}
        return {name: size for name, size in found.items() if not _is_part(name)}

    def _try(self, verb: str, work: Callable[[], Result], patience: float | None = None) -> Result:
        """Do what may be done twice: the one way in which this module asks S3 for anything."""
        with explained(self, verb):
            return patiently(f"{verb} {self}", work, patience) if self.is_s3 else work()


def open_place(uri: str) -> Place:
    """Open a path, ``file://`` or ``s3://`` URI; nothing is read or written yet.

    Args:
        uri: A relative path is taken from the current folder, once and for all: workers run
            in other folders.

    Raises:
        ConfigError: If the URI is of another kind, or names no bucket.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator and not re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", uri):
        try:
            path = Path(os.path.abspath(Path(uri).expanduser()))  # noqa: PTH100 - without `..`
        except RuntimeError as error:
            raise ConfigError(f"a place must be a path, got {uri!r}: {error}") from error
        local = pafs.LocalFileSystem()
        return Place(str(path), path.as_posix(), local, local)
    if scheme == "file" and rest.startswith("/"):
        return open_place(unquote(rest))
    if scheme == "s3" and rest.strip("/"):
        path = rest.strip("/")
        known = s3.Endpoint.from_environment(), s3.identity()
        fs, once = s3.filesystem(*known, s3.ATTEMPTS), s3.filesystem(*known, 1)
        return Place(f"s3://{path}", path, fs, once)
    raise ConfigError(
        f"a place must be a path, file:///path or s3://bucket/path, got {uri!r}; "
        "other stores are reached when they speak S3: set AWS_ENDPOINT_URL"
    )


@contextmanager
def explained(place: Place, verb: str) -> Iterator[None]:
    """Turn what a filesystem raises inside the block into an error with a way out.

    Args:
        place: What is worked on.
        verb: What is tried, as in "cannot read".

    Raises:
        DataError: If what is there, or isn't, is the cause.
        StorageError: If S3 does not answer, fails, or refuses.
    """
    try:
        yield
    except OSError as error:
        raise _explanation(place, verb, error) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"cannot {verb} {place}: the name {error.object!r} is not UTF-8; rename the file"
        ) from error


def open_reachable(uri: str) -> Place:
    """Open a place that a person has named, where a wrong address is told within seconds.

    Raises:
        DataError: As :func:`open_place` and :meth:`Place.check_reachable`.
    """
    place = open_place(uri)
    place.check_reachable()
    return place


def will_pass(error: StorageError) -> bool:
    """Tell whether storage was away, throttled or silent, and did not refuse."""
    return isinstance(error.__cause__, OSError) and is_passing(error.__cause__)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file beside ``path``, and rename it if the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid4().hex}{_PART}")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _is_part(name: str) -> bool:
    return name.endswith(_PART) and name.rsplit("/", 1)[-1].startswith(".")


def _require_bucket(place: Place) -> None:
    if place.once.get_file_info(place.bucket).type == pafs.FileType.NotFound:
        raise DataError(
            f"cannot reach {place}: there is no bucket {place.bucket!r} at "
            f"{s3.Endpoint.from_environment()}; create it, or correct its name"
        )


def _explanation(place: Place, verb: str, error: OSError) -> DataError:
    text = str(error)
    start = f"cannot {verb} {place}: "
    if isinstance(error, FileNotFoundError):
        if place.is_s3:
            place._try(verb, lambda: _require_bucket(place))
        return DataError(_missing(place, verb))
    if isinstance(error, FileExistsError | NotADirectoryError):
        return DataError(f"{start}part of its path is a file, not a folder; choose another place")
    if not place.is_s3:
        return StorageError(
            f"{start}{error.strerror or text}; check the disk or mount, its permissions and the "
            "space left"
        )
    endpoint = s3.Endpoint.from_environment()
    if "NO_SUCH_BUCKET" in text or "NoSuchBucket" in text:
        return DataError(
            f"{start}there is no bucket {place.bucket!r} at {endpoint}; create it, or correct its "
            "name"
        )
    if any(sign in text for sign in _UNREACHABLE):
        return StorageError(
            f"{start}{endpoint} does not answer; check the network, and AWS_ENDPOINT_URL if "
            f"the store is not Amazon's ({text})"
        )
    if is_passing(error):
        return StorageError(
            f"{start}{endpoint} is overloaded or out of order; try again later, or with fewer "
            f"workers or data.decode_cpus if it throttles ({text})"
        )
    if any(sign in text for sign in _DENIED):
        return StorageError(start + _denied(text))
    # Not known to be about the data: an expired token, say, answers 400 without a word.
    return StorageError(f"{start}{text}")


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
