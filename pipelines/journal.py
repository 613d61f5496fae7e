"""The journal: what MLflow has not taken yet, on this machine's disk, in order.

    SPOOL/<run>-<writer>.journal    a line that tells whose entries these are, then one a line
    SPOOL/<run>-<writer>.taken      bytes of it that MLflow has taken

An entry is written before anybody tries to send it, so a process that is killed loses none: whoever
goes on with the run on this machine adopts its journal, and `droppos sync` sends what nobody else
will. A living process holds a lock on its journal.

Nothing here imports MLflow.
"""

import fcntl
import json
import logging
import os
import threading
import time
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self
from uuid import uuid4

from droppos.errors import DataError

Status = Literal["FINISHED", "FAILED", "KILLED"]
"""How a run ended, in MLflow's words. KILLED: a person stopped it, or its machine died."""

SUFFIX, TAKEN = ".journal", ".taken"
_ROOMY = 2**20
"""Bytes from which a journal that is all taken starts anew."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """Metrics of one step."""

    step: int
    time_ms: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Names:
    """Parameters and tags."""

    params: Mapping[str, str]
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file of the run, small enough to be kept here."""

    name: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of the run."""

    status: Status
    time_ms: int


Entry = Row | Names | Artifact | Ended
_KINDS: dict[str, type[Entry]] = {kind.__name__: kind for kind in (Row, Names, Artifact, Ended)}


@dataclass(frozen=True, slots=True)
class About:
    """Whose entries a journal holds."""

    uri: str
    """Tracking server or database, without secrets."""
    run_id: str
    """MLflow's id of the run."""
    run_name: str
    home: str
    """URI of the run's folder."""
    writer: str
    """The process that wrote the journal, see `next_writer`; empty if its entries are from
    storage."""


def next_writer(*before: str) -> str:
    """Name a process that writes a run; names compare like the order in which they were given.

    Args:
        before: Names of those that are known to have written it.
    """
    number = max((int(name[:6]) for name in before if name[:6].isdigit()), default=0)
    # Two that begin at once count alike; the later one is meant.
    return f"{number + 1:06d}-{now_ms():013d}-{uuid4().hex[:8]}"


class Stored(NamedTuple):
    """An entry that MLflow has not taken yet."""

    entry: Entry
    end: int
    """What to tell `Journal.take` when MLflow has taken it, and all before it."""


class Journal:
    """Entries of one MLflow run by one writer. Its methods may be called from any thread."""

    def __init__(self, path: Path, file: Any, about: About) -> None:
        """Join an open, locked file; see `create` and `adopt`."""
        self.path = path
        self.about = about
        self._file = file
        self._lock = threading.Lock()
        self._taken = self._begin = file.seek(0, os.SEEK_SET) + len(file.readline())
        self._end = file.seek(0, os.SEEK_END)
        self._unwritten: deque[Entry] = deque()
        """What a full disk has not taken; it comes after all that is on disk."""
        self._lent = False
        """Whether the first of those is being sent, so that it stays where it is."""

    @classmethod
    def create(cls, folder: Path, about: About) -> Self:
        """Begin a journal.

        Raises:
            OSError: If the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{about.run_id}-{about.writer}{SUFFIX}"
        file = path.open("x+b", buffering=0)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write(_line(asdict(about)))
        return cls(path, file, about)

    @classmethod
    def adopt(cls, path: Path) -> Self | None:
        """Open what a process left that lives no more; None if it lives, or it is gone.

        Raises:
            DataError: If it cannot be opened, or is no journal.
        """
        try:
            file = path.open("r+b", buffering=0)
        except FileNotFoundError:  # its process has just ended well
            return None
        except OSError as error:
            raise DataError(f"{path} cannot be opened: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            about = About(**json.loads(file.readline()))
        except BlockingIOError:
            file.close()
            return None
        except (OSError, ValueError, TypeError) as error:
            file.close()
            raise DataError(
                f"{path} is no journal: its first line does not tell whose it is ({error!r}); was "
                "the disk full? Delete it if nothing in it is of use"
            ) from error
        journal = cls(path, file, about)
        journal._recover()
        return journal

    def _recover(self) -> None:
        """Go on after what was taken, and drop a line that its writer did not finish."""
        with suppress(OSError, ValueError):  # without a mark, nothing was taken
            self._taken = int(self._mark.read_text())
        self._file.seek(0)
        whole = self._file.read().rfind(b"\n") + 1
        self._file.truncate(whole)
        self._end = whole

    @property
    def _mark(self) -> Path:
        return self.path.with_suffix(TAKEN)

    def append(self, entry: Entry) -> None:
        """Keep an entry. A disk that is full keeps it in memory until there is room."""
        with self._lock:
            self._unwritten.append(entry)
            self._write()

    def _write(self) -> None:
        while self._unwritten and not self._lent:
            entry = self._unwritten[0]
            line = _line({"kind": type(entry).__name__, **_plain(entry)})
            try:
                self._file.seek(self._end)
                if self._file.write(line) != len(line):
                    raise OSError("the disk is full")
            except (OSError, ValueError) as error:  # ValueError: it was closed
                if len(self._unwritten) == 1:
                    _log.warning("%s cannot be written now: %s", self.path, error)
                return
            self._end += len(line)
            self._unwritten.popleft()

    def pending(self, most: int) -> list[Stored]:
        """Give the oldest entries that are not taken yet, at most so many."""
        with self._lock:
            self._write()
            if self._file.closed:
                return []
            found = []
            place = self._taken
            # Of the open file, not by its name: somebody may have tidied the folder up.
            with os.fdopen(os.dup(self._file.fileno()), "rb") as reader:
                reader.seek(place)
                while len(found) < most and place < self._end:
                    line = reader.readline()
                    place += len(line)
                    if (entry := _entry(line)) is not None:
                        found.append(Stored(entry, place))
            if not found and self._unwritten:  # no room on disk: from memory, one at a time
                self._lent = True
                return [Stored(self._unwritten[0], -1)]
            return found

    def take(self, end: int) -> None:
        """Note that MLflow has taken all entries up to this one."""
        with self._lock:
            if self._file.closed:
                return
            if end == -1:
                self._unwritten.popleft()
                self._lent = False
                return
            roomy = end == self._end > _ROOMY
            self._taken = self._begin if roomy else end
            with suppress(OSError):  # a process after this one sends some again: no harm
                self._mark.write_text(str(self._taken))
            if roomy:  # after the mark, which would point beyond the end if this were all
                self._file.truncate(self._begin)
                self._end = self._begin

    def left(self) -> int:
        """Count what is not taken yet."""
        on_disk = sum(stored.end != -1 for stored in self.pending(2**31))
        return on_disk + len(self._unwritten)

    def close(self) -> None:
        """Let go of the file; it is deleted if all of it is taken.

        With files that MLflow's store did not take beside it, it stays and tells whose they are.
        """
        empty = self.left() == 0
        if self._unwritten:
            _log.error(
                "%d entries of run %s are lost: neither MLflow took them nor the disk at %s",
                *(len(self._unwritten), self.about.run_name, self.path),
            )
        with self._lock:
            if empty and not files_beside(self.path).exists():
                self.path.unlink(missing_ok=True)
                self._mark.unlink(missing_ok=True)
            self._file.close()


def journals(folder: Path, run_id: str = "*") -> list[Path]:
    """List the journals of a spool folder, the oldest first, those of living processes too."""
    found = folder.glob(f"{run_id}-*{SUFFIX}") if folder.is_dir() else []
    return sorted(found, key=_modified)


def files_beside(journal: Path) -> Path:
    """Name the folder of the files of a journal that MLflow's store did not take."""
    return journal.with_suffix(".files")


def _modified(path: Path) -> float:
    with suppress(OSError):  # its process has just ended well
        return path.stat().st_mtime
    return 0.0


def now_ms() -> int:
    """Tell the time in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _plain(entry: Entry) -> dict[str, Any]:
    if isinstance(entry, Artifact):
        return {"name": entry.name, "content": b64encode(entry.content).decode()}
    return asdict(entry)


def _entry(line: bytes) -> Entry | None:
    """Read a line; None, with a warning, for one that is damaged: the others still count."""
    try:
        values = json.loads(line)
        kind = _KINDS[values.pop("kind")]
        if kind is Artifact:
            values["content"] = b64decode(values["content"])
        return kind(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("a line of a journal is damaged and passed over: %r", error)
        return None
