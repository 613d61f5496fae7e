"""What a data set's manifest says of bounded copies: which pictures are some, what that saved."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from droppos.errors import DataError


class Saved(NamedTuple):
    """What smaller copies saved."""

    copies: int = 0
    """Pictures that are copies; all others are as they were found."""
    bytes_before: int = 0
    """Size of what the copies were made from."""
    bytes_after: int = 0
    """Size of the copies."""


@dataclass(frozen=True)
class Bounded:
    """The bound on a data set's pictures: larger ones were replaced by smaller copies."""

    short_side: int
    """Pixels; no picture's short side is above it."""
    quality: int
    """JPEG quality of the copies."""
    copies: int
    """As in Saved."""
    bytes_before: int
    """As in Saved."""
    bytes_after: int
    """As in Saved."""


def total(parts: Iterable[Saved]) -> Saved:
    """Add up; nothing gives zeros."""
    return Saved(*(sum(column) for column in zip(Saved(), *parts, strict=True)))


def bounded_from_json(loaded: Any, origin: str) -> Bounded | None:
    """Read a manifest's entry, which data sets without a bound don't have.

    Raises:
        DataError: If there is one that is no such entry.
    """
    if loaded is None:
        return None
    names = [field.name for field in fields(Bounded)]
    if not isinstance(loaded, dict) or any(type(loaded.get(name)) is not int for name in names):
        raise DataError(
            f"{origin}: bounded must be an object of whole numbers {', '.join(names)}, got "
            f"{loaded!r}; restore it, or prepare the data set again"
        )
    return Bounded(**{name: loaded[name] for name in names})
