"""What a search has to tell: its trials, which is best, and whether that is to be believed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Literal

import numpy as np

from pipelines.ranking import Repeats, Setting, repeats_of, settings_of
from pipelines.space import Point, Space


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One trial."""

    name: str
    point: Point
    """Value of each searched field, by its dotted name."""
    state: Literal["finished", "early", "failed", "stopped"]
    """early: ended before its last step, for others were better."""
    figures: Mapping[str, float]
    """What was measured last, by name; some may be missing."""
    history: Sequence[tuple[int, float]]
    """Step, and the objective as measured then."""
    step: int
    """Steps done."""
    steps: int
    """Steps planned."""
    seconds: float | None
    error: str | None
    tracking_run: str | None
    """Identifier of the MLflow run."""

    def figure(self, name: str) -> float | None:
        """Find a figure, if it was measured and is a number."""
        value = self.figures.get(name)
        return value if value is not None and isfinite(value) else None


@dataclass(frozen=True, slots=True)
class Lead:
    """How far the best setting is ahead of the next, and what to hold against that.

    A setting is all that was searched but run.seed, and stands at the mean over its seeds.
    """

    second: Row
    """The best trial of the next setting."""
    by: float
    error: float
    """Standard error of it for each unit of the deviation between seeds: less, of more seeds."""
    settings: int
    spread: float
    """Standard deviation over them: what the values, and chance, change."""
    repeats: Repeats | None
    """What chance alone changes; None where no setting was run twice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """All that a report of a search stands on."""

    name: str
    objective: str
    """Name of the figure that is compared; larger is better."""
    dimensions: Space
    rows: Sequence[Row]
    best: str | None
    """Name of a trial; none takes the best of the finished ones."""
    best_yaml: str | None
    protocol: str
    """A sentence that tells how trials were measured."""
    notes: Sequence[str]
    sharing: Mapping[str, float] | None
    """What a shared stream cost, in words and numbers."""
    scheduled: bool = False
    """Whether values changed while trials ran (population-based training): then a trial's score is
    not that of its last ones."""

    def objective_of(self, row: Row) -> float | None:
        """Find what a trial is ranked by."""
        return row.figure(self.objective)

    @property
    def finished(self) -> list[Row]:
        """Trials that can be compared, best first."""
        done = [row for row in self.rows if row.state == "finished"]
        return self._ordered([row for row in done if self.objective_of(row) is not None])

    @property
    def ranked(self) -> list[Row]:
        """All trials: the best, then by objective, then those without one."""
        return self._ordered(self.rows)

    @property
    def winner(self) -> Row | None:
        """The best trial."""
        named = [row for row in self.rows if row.name == self.best]
        settings = self.settings
        found = named or [self.finished[setting.trials[0]] for setting in settings[:1]]
        return next(iter(found), None)

    @property
    def settings(self) -> list[Setting]:
        """Finished trials by their setting, the best on average first."""
        done = self.finished
        values = [self.objective_of(row) or 0.0 for row in done]
        return settings_of([row.point for row in done], values)

    @property
    def lead(self) -> Lead | None:
        """The best setting's lead, where two or more finished."""
        settings = self.settings
        if len(settings) < 2:
            return None
        first, second = settings[:2]
        return Lead(
            second=self.finished[second.trials[0]],
            by=first.mean - second.mean,
            error=sqrt(1 / len(first.values) + 1 / len(second.values)),
            settings=len(settings),
            spread=float(np.std([setting.mean for setting in settings], ddof=1)),
            repeats=repeats_of(settings),
        )

    def _ordered(self, rows: Sequence[Row]) -> list[Row]:
        def key(row: Row) -> tuple[bool, float]:
            value = self.objective_of(row)
            return row.name != self.best, np.inf if value is None else -value

        return sorted(rows, key=key)
