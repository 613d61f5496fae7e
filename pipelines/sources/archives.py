"""Archives: a tar or a zip, a tar of tars, a folder of them.

What is in an archive of an archive, or of a folder, has the archive's name for a folder: ImageNet
is handed out as a tar of a tar for each class, and WebDataset keeps a folder of numbered ones.
"""

import gzip
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from droppos.errors import DataError
from pipelines.sources.item import Refusal
from pipelines.storage import Place, explained

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".zip")
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, gzip.BadGzipFile)


@dataclass
class Members:
    """The files of one archive, or of several."""

    fetch: dict[str, Callable[[], bytes]] = field(default_factory=dict)
    """How each is read, by name."""
    left_out: dict[str, Refusal] = field(default_factory=dict)
    """Why others are not."""
    inner: set[str] = field(default_factory=set)
    """Names of the archives that are folders in these names, without suffix."""

    @property
    def numbered(self) -> set[str]:
        """Those archives, if they only have numbers, as parts of one thing have; else none.

        Some may be missing: of ImageNet's classes, which are numbers too, a thousandth is there.
        """
        found = [re.fullmatch(r"(.*?)(\d+)", name) for name in self.inner]
        numbers = [int(match[2]) for match in found if match]
        of_one = len({match and match[1] for match in found}) == 1 and bool(numbers)
        dense = of_one and max(numbers) - min(numbers) < 2 * len(numbers)
        return self.inner if dense else set()


def is_archive(name: str) -> bool:
    """Whether a file is one, by its name."""
    return name.lower().endswith(SUFFIXES)


@contextmanager
def open_archive(place: Place) -> Iterator[Members]:
    """List what is in the archive at ``place``; it can be read until the block ends.

    Members are read in another order than theirs, which needs random access. So one that is on S3,
    or compressed as a whole, is first unpacked into a temporary file; TMPDIR says where.

    Raises:
        DataError: If it is none, or damaged.
    """
    name = place.name.lower()
    gzipped = name.endswith((".gz", ".tgz"))
    try:
        with ExitStack() as stack:
            path = Path(place.path)
            if place.is_s3 or gzipped:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="droppos-"))
                path = Path(folder) / "copy"
                with path.open("wb") as copy:  # closed: there may be a thousand
                    _copy(place, copy, gzipped)
            found = Members()
            if name.endswith(".zip"):
                _add_zip(stack.enter_context(zipfile.ZipFile(path)), place, found)
            else:
                with path.open("rb") as file:
                    _add_tar(file, path, "", 0, path.stat().st_size, found)
            if not found.fetch:
                raise DataError(f"source {place} holds no files; give one with pictures in it")
            yield found
    except _DAMAGED as error:
        raise DataError(
            f"source {place} is no archive, or a damaged one ({error}); fetch or make it again"
        ) from error


@contextmanager
def open_archives(place: Place, names: Sequence[str]) -> Iterator[Members]:
    """List what is in several archives below ``place``, the name of each before its members'."""
    with ExitStack() as stack:
        every = Members()
        for name in names:
            one = stack.enter_context(open_archive(place / name))
            stem = _stem(name)
            if stem in every.inner:
                raise DataError(
                    f"source {place} holds two archives called {stem}, such as {name}, and their "
                    "pictures would be called alike; rename one, or take it away"
                )
            every.inner |= {stem, *(f"{stem}/{inner}" for inner in one.inner)}
            every.fetch |= {f"{stem}/{member}": read for member, read in one.fetch.items()}
            every.left_out |= {f"{stem}/{member}": why for member, why in one.left_out.items()}
        yield every


def _stem(name: str) -> str:
    return name[: -len(next(end for end in SUFFIXES if name.lower().endswith(end)))]


def _copy(place: Place, copy: Any, gzipped: bool) -> None:
    with explained(place, "unpack"), place.open_input() as source:
        unpacked: Any = gzip.GzipFile(fileobj=source) if gzipped else source
        shutil.copyfileobj(unpacked, copy, 1 << 22)


def _add_tar(file: BinaryIO, path: Path, folder: str, start: int, size: int, to: Members) -> None:
    """Add the members of the tar that lies at ``start`` of a file, and of the tars in it."""
    inner: list[tarfile.TarInfo] = []
    piece: Any = _Piece(file, start, size)
    with tarfile.open(fileobj=piece, mode="r:") as archive:
        for member in archive:
            name = folder + _clean(member.name)
            # A name that comes twice was updated: the last one counts, as when unpacking.
            if member.isfile() and name.lower().endswith(".tar"):
                inner.append(member)
            elif member.isfile():
                to.fetch[name] = partial(_read_at, path, start + member.offset_data, member.size)
            elif member.islnk() and (linked := to.fetch.get(folder + _clean(member.linkname))):
                to.fetch[name] = linked
            elif not member.isdir():
                to.left_out[name] = "no file", "a link that is not followed, or a device"
        _require_end(archive, piece)
    taken = {name.rpartition("/")[0] for name in to.fetch} if inner else set()
    for member in inner:
        name = folder + _clean(member.name)
        own = name if _stem(name) in taken else _stem(name)
        try:
            to.inner.add(own)
            _add_tar(file, path, f"{own}/", start + member.offset_data, member.size, to)
        except tarfile.TarError as error:
            to.left_out[name] = "undecodable", f"no tar, or a damaged one: {error}"


def _require_end(archive: tarfile.TarFile, file: "_Piece") -> None:
    """See that what stands behind the last member is the end: Python takes anything for that."""
    file.seek(archive.offset)
    if any(file.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(
            f"what follows {len(archive.getmembers()):,} files, at byte {archive.offset:,}, is no "
            "file of a tar"
        )


class _Piece:
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        self._file.seek(self._start + self._at)
        data = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data

    def seek(self, at: int) -> int:
        self._at = at
        return at

    def tell(self) -> int:
        return self._at


def _read_at(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _add_zip(archive: zipfile.ZipFile, place: Place, to: Members) -> None:
    members = [member for member in archive.infolist() if not member.is_dir()]
    if any(member.flag_bits & 1 for member in members):
        raise DataError(f"{place} is encrypted; unpack it and give the folder")
    to.fetch |= {_clean(member.filename): partial(archive.read, member) for member in members}


def _clean(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in {"", "."})


def without_common_folder(members: Members) -> Members:
    """Take away the one folder that an archive of a folder usually starts with."""
    common = _common_folder(members.fetch)
    return Members(
        {name.removeprefix(common): read for name, read in members.fetch.items()},
        {name.removeprefix(common): why for name, why in members.left_out.items()},
        {name.removeprefix(common) for name in members.inner},
    )


def _common_folder(names: Iterable[str]) -> str:
    """Find that folder, and its slash."""
    visible = [name for name in names if not is_hidden(name)]
    tops = {name.split("/", 1)[0] if "/" in name else "" for name in visible}
    return "" if len(tops) != 1 or "" in tops else f"{next(iter(tops))}/"


def is_hidden(name: str) -> bool:
    """Whether a file is one that nobody meant, by its name or a folder's."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
