"""Raw results: one row for each figure of each training, in a CSV that people and page read."""

import csv
import io
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from droppos.errors import DataError
from droppos.measure.intervals import Z_95

_log = logging.getLogger(__name__)

Key = tuple[str, int, int, str]
"""Arm, budget, seed and figure: what a row is of."""


@dataclass(frozen=True, slots=True, order=True)
class Row:
    """One figure of one trained model."""

    arm: str
    budget: int
    """In epochs of the recipe as it is; 0 where nothing was trained."""
    seed: int
    figure: str
    value: float
    low: float
    """95 % interval over the test pictures; the value itself where there is none."""
    high: float
    epochs: int
    """Passes over the pictures."""
    gflops: float
    """Operations of the training by formula, in 10^9."""
    seconds: float
    """Time that this figure took; the first one's has the reading of the pictures in it."""
    protocol: str
    """Digest of all that decides a figure (:mod:`pipelines.evidence.protocol`)."""

    @property
    def key(self) -> Key:
        """What a figure is of."""
        return self.arm, self.budget, self.seed, self.figure

    @property
    def command(self) -> str:
        """What a person types to get it again."""
        return f"droppos evidence --only {self.arm}/{self.budget}/{self.seed} --again"


STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantile of Student's t, for 1 degree of freedom and more; beyond, the normal's."""

HEADER = [*(field.name for field in fields(Row)), "command"]


def read_rows(file: Path, protocol: str) -> dict[Key, Row]:
    """Read the rows of a CSV that were taken under a protocol, by what they are of.

    There are none if there is no file.

    Raises:
        DataError: If it is not what :func:`write_rows` wrote.
    """
    if not file.exists():
        return {}
    rows: list[Row] = []
    try:
        with file.open(newline="") as lines:
            for line in csv.DictReader(lines):
                line.pop("command")
                kinds = {field.name: field.type for field in fields(Row)}
                rows.append(Row(**{name: kinds[name](line[name]) for name in kinds}))  # pyright: ignore[reportCallIssue, reportArgumentType, reportGeneralTypeIssues]
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{file} is not a table of evidence ({error!r}); expected the columns "
            f"{', '.join(HEADER)}; delete it, or get it back from the repository"
        ) from error
    return {row.key: row for row in rows if row.protocol == protocol}


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    """Write rows, sorted, so that a change shows as a few lines."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for row in sorted(rows):
        values = [f"{v:.6g}" if isinstance(v, float) else v for v in astuple(row)]
        writer.writerow([*values, row.command])
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, text.getvalue())


def known_rows(folder: Path, protocol: str) -> dict[str, Row]:
    """Read the figures that a cell has left in its folder, if they are of this protocol.

    What cannot be read is taken again, as if it were not there.
    """
    file = folder / "figures.json"
    try:
        found: dict[str, dict[str, Any]] = json.loads(file.read_text())
        rows = {figure: Row(**row) for figure, row in found.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        _log.warning("%s is damaged (%r); its figures are taken again", file, error)
        return {}
    return {figure: row for figure, row in rows.items() if row.protocol == protocol}


def replace_file(file: Path, text: str) -> None:
    """Write a file at once or not at all."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    with draft.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    draft.replace(file)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure over seeds."""

    mean: float
    half: float | None
    """Half the 95 % interval of the mean, by Student's t; None of a single seed."""
    seeds: int

    @property
    def plain(self) -> str:
        """As a number."""
        return f"{self.mean:.1f}" + ("" if self.half is None else f" ± {self.half:.1f}")

    def __str__(self) -> str:
        """Write it in percent."""
        half = "" if self.half is None else f" ± {100 * self.half:.1f}"
        return f"{100 * self.mean:.1f}{half}"


def estimate(values: Iterable[float]) -> Estimate | None:
    """Average over seeds; None of none."""
    known = list(values)
    if not known:
        return None
    if len(known) == 1:
        return Estimate(known[0], None, 1)
    quantile = STUDENT[len(known) - 2] if len(known) - 2 < len(STUDENT) else Z_95
    return Estimate(mean(known), quantile * stdev(known) / sqrt(len(known)), len(known))
