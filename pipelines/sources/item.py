"""What is read from a source: pictures that may be some, and where they come from."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

Refusal = tuple[str, str]
"""Kind and reason."""


@dataclass(frozen=True)
class Item:
    """Something in the source that may be a picture."""

    place: int
    """Its number among the source's items."""
    key: str
    """Path relative to the source; unique."""
    label: int | None
    """Index into the source's classes."""
    read: Callable[[], bytes | None]
    """Fetch the bytes, from any thread; none when the source holds none for it."""


@dataclass(frozen=True)
class Source:
    """The pictures of one source, in the order in which they are packed."""

    uri: str
    """As it was opened."""
    fingerprint: str
    """SHA-256 of the names and sizes of its files."""
    total: int
    """Number of items: what may be pictures."""
    items_from: Callable[[int], Iterator[Item]]
    """Iterate items from one on, always in the same order."""
    classes: tuple[str, ...] | None
    """Name of each label; none without labels."""
    mixed: bool
    """Whether they lie mixed, whatever their names."""
    refused: dict[str, Refusal]
    """By key, of what is no picture by its name, and no item."""


@dataclass(frozen=True)
class Wanted:
    """What of a source is asked for, and where it is."""

    only: str | None = None
    """Shell-style pattern of the paths, relative to the source, that are read: `*` stands for
    anything, slashes too. All are when none is given."""
    image_column: str | None = None
    """Of a parquet: where encoded pictures are."""
    label_column: str | None = None
    """Of a parquet: where their labels are."""

    def takes(self, name: str) -> bool:
        """Whether a path is of what is asked for."""
        return self.only is None or fnmatchcase(name, self.only)


def listed(names: Iterable[object], most: int = 8) -> str:
    """Write names in a row, the first of them if there are many."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if texts[most:] else "")
