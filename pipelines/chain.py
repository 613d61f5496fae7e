"""The chain: what every checkpoint of a run was, kept when the checkpoint itself is deleted.

    HOME/chain/step-00001000.9c1185a5c5e9.json
        a copy of a checkpoint's complete.json, named by its step and the beginning of its sha256;
        written before that checkpoint counts, and never deleted

Each names the one that its group of workers had before it, by step and hash, so the newest
checkpoint's hash vouches for all that came before: none can be changed, dropped or put in later.
A link that no checkpoint leads to is of one that never counted, or that the run went back behind.

Imports no torch.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from droppos.errors import DataError, StorageError
from pipelines.storage import Place

FOLDER = "chain"
PREVIOUS = "previous"
"""Key of complete.json; a droppos from before the chain did not write it."""

_log = logging.getLogger(__name__)


class Previous(NamedTuple):
    """The checkpoint before another."""

    step: int
    sha256: str
    """Of its complete.json."""


@dataclass(frozen=True, slots=True)
class Link:
    """What one checkpoint was."""

    sha256: str
    """Of its complete.json."""
    text: bytes
    """All of that."""
    record: Mapping[str, Any]
    """The same, parsed."""

    @classmethod
    def of(cls, complete: bytes) -> Self:
        """Make a link of a complete.json."""
        return cls(hashlib.sha256(complete).hexdigest(), complete, json.loads(complete))

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.record["step"]

    @property
    def previous(self) -> Previous | None:
        """The checkpoint before this; None for a run's first one, or where that was not kept."""
        told = self.record.get(PREVIOUS)
        return None if told is None else Previous(told["step"], told["sha256"])


def place_of(home: Place, step: int, sha256: str) -> Place:
    """Tell where a link is kept."""
    return home / FOLDER / f"step-{step:08d}.{sha256[:12]}.json"


def keep(home: Place, link: Link) -> None:
    """Keep a link for good.

    Raises:
        DataError: If storage refuses.
    """
    place_of(home, link.step, link.sha256).write_bytes(link.text)


def keep_start(home: Place, step: int, sha256: str, complete: Place) -> None:
    """Keep the link of the checkpoint that a group starts from, if an older droppos kept none.

    Args:
        home: Folder of the run.
        step: Of the checkpoint.
        sha256: Of its complete.json.
        complete: Where that is.

    Raises:
        DataError: If storage refuses.
    """
    if not place_of(home, step, sha256).exists():
        keep(home, Link.of(complete.read_bytes()))


def read(home: Place, step: int, sha256: str) -> Link:
    """Read a link.

    Raises:
        DataError: If it is missing, or is not what was written.
        StorageError: If storage cannot be asked.
    """
    place = place_of(home, step, sha256)
    text = place.read_bytes()
    found = hashlib.sha256(text).hexdigest()
    if found != sha256:
        raise DataError(
            f"{place} was changed: expected sha256 {sha256}, found {found}; restore it, or what "
            f"the run was up to step {step} cannot be shown"
        )
    return Link.of(text)


def steps(home: Place) -> set[int]:
    """List the steps that have a link."""
    names = (home / FOLDER).children()
    return {int(found[1]) for name in names if (found := re.match(r"step-(\d+)\.", name))}


def walk(home: Place, link: Link) -> Iterator[Link]:
    """Follow a run back from `link`, which comes first, to its first checkpoint.

    Raises:
        DataError: If a link is missing or was changed.
    """
    yield link
    while (previous := link.previous) is not None:
        link = read(home, previous.step, previous.sha256)
        yield link


def bring(source: Place, newest: Link, target: Place) -> None:
    """Copy a checkpoint's link, and those before it, to the run that takes the checkpoint over.

    A past that is not whole is a warning: it proves less, and trains as well.

    Raises:
        StorageError: If storage refuses.
    """
    lacking = []
    try:
        for link in walk(source, newest):
            if place_of(target, link.step, link.sha256).exists():
                break
            lacking.append(link)
    except StorageError:
        raise
    except DataError as error:
        _log.warning("%s goes on from a run whose past is not whole: %s", target, error)
    for link in reversed(lacking):  # where one is, all before it are
        keep(target, link)
