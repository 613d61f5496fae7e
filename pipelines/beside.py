"""What is written beside a checkpoint, and counts when that does: ids of pictures, metrics.

A writer notes things in the training thread and cuts them for a checkpoint; the thread that writes
the checkpoint writes what was cut. What is cut stays in memory until the checkpoint is known to
count: one that storage did not take leaves its things to the next. So storage describes exactly the
steps that are committed, and perhaps one tail that a killed group wrote for a checkpoint it did not
finish; the next group deletes that tail before it starts (`forget_after`).
"""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from droppos.errors import DataError
from pipelines.storage import Place

Item = TypeVar("Item")

_STEPS = re.compile(r"steps-(\d+)-(\d+)\..+")
_log = logging.getLogger(__name__)


class StepsFile(NamedTuple):
    """One file written beside a checkpoint."""

    place: Place
    first: int
    """First step in it."""
    end: int
    """Step after the last in it; the checkpoint that commits it."""


def steps_files(folder: Place) -> list[StepsFile]:
    """List the files of a folder by step, committed or not."""
    found = []
    for name in folder.children():
        if match := _STEPS.fullmatch(name):
            found.append(StepsFile(folder / name, int(match[1]), int(match[2])))
    return sorted(found, key=lambda file: (file.first, file.place.name))


def forget_after(folder: Place, step: int) -> None:
    """Delete what no checkpoint up to this step has committed; one rank calls this."""
    for file in steps_files(folder):
        if file.end > step:
            file.place.delete()


class Beside(Generic[Item]):
    """Keeps things in memory until a checkpoint counts."""

    def __init__(
        self,
        folder: Place,
        suffix: str,
        encode: Callable[[Sequence[Item]], bytes],
        start_step: int,
    ) -> None:
        """Start with nothing.

        Args:
            folder: Where the files go.
            suffix: End of their names, which must tell this writer's from another's.
            encode: Makes the content of a file.
            start_step: First step of the group.
        """
        self._folder = folder
        self._suffix = suffix
        self._encode = encode
        self._first = start_step
        self._items: list[Item] = []
        self._cut: tuple[int, int, Place] | None = None
        self._stale: list[Place] = []
        """Files that may have been written for checkpoints that do not count."""

    def note(self, item: Item) -> None:
        """Keep a thing for the next checkpoint."""
        self._items.append(item)

    def cut(self, end: int) -> Callable[[], None]:
        """Take all that was noted for the checkpoint of this step.

        Returns:
            What writes it, for another thread; nothing when there is none. It raises DataError if
            storage refuses.
        """
        if not self._items:
            return lambda: None
        place = self._folder / f"steps-{self._first:08d}-{end:08d}.{self._suffix}"
        self._cut = (len(self._items), end, place)
        items = tuple(self._items)
        stale, self._stale = self._stale, []

        def write() -> None:
            for file in stale:  # the same things are in this one
                file.delete()
            place.write_bytes(self._encode(items))

        return write

    def committed(self) -> None:
        """Forget what was cut last: its checkpoint counts."""
        if self._cut is not None:
            count, self._first, _ = self._cut
            del self._items[:count]
            self._cut = None

    def put_off(self) -> None:
        """Leave what was cut last to the next checkpoint: storage did not take this one.

        What was perhaps written goes when that is: storage may still be away, and nobody waits.
        """
        if self._cut is not None:
            self._stale.append(self._cut[2])
            self._cut = None

    def withdraw(self) -> None:
        """Delete what was cut last and perhaps written: the run is another's now, or ends."""
        if self._cut is None:
            return
        place, self._cut = self._cut[2], None
        try:
            place.delete()
        except DataError as error:
            _log.warning("%s is of a checkpoint that does not count, and stays: %s", place, error)
