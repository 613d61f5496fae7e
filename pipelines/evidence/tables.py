"""Flat dataclasses as CSV: written sorted, so that a change shows as a few lines."""

import csv
import io
import os
from collections.abc import Callable, Iterable
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, TypeVar

from droppos.errors import DataError

Line = TypeVar("Line")


def read_table(file: Path, kind: type[Line], refusal: str) -> list[Line]:
    """Read what :func:`write_table` wrote of a dataclass of numbers and words.

    Args:
        file: The CSV; one that is not there has no lines.
        kind: The dataclass. Columns that it does not have are left alone.
        refusal: What to say of a file that is something else: "is not a table of ...".

    Raises:
        DataError: If the file is something else.
    """
    if not file.exists():
        return []
    kinds: dict[str, Any] = {field.name: field.type for field in fields(kind)}  # pyright: ignore[reportArgumentType]
    try:
        with file.open(newline="") as lines:
            return [
                kind(**{name: kinds[name](line[name]) for name in kinds})
                for line in csv.DictReader(lines)
            ]
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{file} {refusal} ({error!r}); expected the columns {', '.join(kinds)}; delete it, "
            "or get it back from the repository"
        ) from error


def write_table(
    file: Path, kind: type[Line], lines: Iterable[Line], **derived: Callable[[Line], str]
) -> None:
    """Write a dataclass's values as CSV.

    Args:
        file: The CSV; its folder is made.
        kind: The dataclass.
        lines: Its values, which have an order.
        derived: More columns, for people.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(field.name for field in fields(kind)), *derived])  # pyright: ignore[reportArgumentType]
    for line in sorted(lines):  # pyright: ignore[reportArgumentType]
        values = [f"{v:.6g}" if isinstance(v, float) else v for v in astuple(line)]  # pyright: ignore[reportArgumentType]
        writer.writerow([*values, *(tell(line) for tell in derived.values())])
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, text.getvalue())


def replace_file(file: Path, text: str) -> None:
    """Write a file at once or not at all."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    with draft.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    draft.replace(file)
