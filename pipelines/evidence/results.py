"""Raw results: one row for each figure of each training, in a CSV that people and page read."""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from droppos.measure.intervals import student_95
from pipelines.evidence.arms import BY_NAME
from pipelines.evidence.protocol import digest
from pipelines.evidence.tables import read_table, write_table

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
    """Digest of what decided it (:mod:`pipelines.evidence.protocol`)."""

    @property
    def key(self) -> Key:
        """What a figure is of."""
        return self.arm, self.budget, self.seed, self.figure

    @property
    def current(self) -> bool:
        """Whether it would be taken in the same way today."""
        return self.arm in BY_NAME and self.protocol == digest(self.arm, self.figure)

    @property
    def command(self) -> str:
        """What a person types to get it again."""
        return f"droppos evidence --only {self.arm}/{self.budget}/{self.seed} --again"


def read_rows(file: Path) -> dict[Key, Row]:
    """Read the rows of a CSV that are current, by what they are of.

    There are none if there is no file.

    Raises:
        DataError: If it is not what :func:`write_rows` wrote.
    """
    rows = read_table(file, Row, "is not a table of evidence")
    return {row.key: row for row in rows if row.current}


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    """Write rows, each with its command."""
    write_table(file, Row, rows, command=lambda row: row.command)


def known_rows(folder: Path) -> dict[str, Row]:
    """Read the figures that a cell has left in its folder, if they are current.

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
    return {figure: row for figure, row in rows.items() if row.current}


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
    half = student_95(len(known) - 1) * stdev(known) / sqrt(len(known))
    return Estimate(mean(known), half, len(known))
