"""Where the curve against compute points: how far it is to what was hoped for, at the last pace."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import log2

from pipelines.evidence.known import Known
from pipelines.evidence.results import Key, Row
from pipelines.evidence.study import Study

HOPED = {"knn": 0.60, "linear": 0.68, "blocks": 0.68}
"""What frozen features are hoped to come to."""
IN_SIGHT = 20
"""Doublings beyond which a pace says nothing: a million times the compute."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """One arm's figure, and how far it is from what was hoped for."""

    arm: str
    figure: str
    hoped: float
    now: float
    """At the largest budget that is known."""
    tflop: float
    """What that budget came to."""
    per_doubling: float
    """What it gained for each doubling of compute, in the mean from the budget before to the
    largest."""

    @property
    def doublings(self) -> float | None:
        """Doublings that are left at that pace; 0 if it is there, None if it is out of sight."""
        if self.now >= self.hoped:
            return 0.0
        if self.per_doubling * IN_SIGHT < self.hoped - self.now:
            return None
        return (self.hoped - self.now) / self.per_doubling

    @property
    def needed(self) -> float | None:
        """TFLOP at which it would be there, if the pace holds."""
        return None if self.doublings is None else self.tflop * 2**self.doublings


def outlooks(study: Study, rows: Mapping[Key, Row]) -> Iterator[Outlook]:
    """Look ahead from the two largest budgets of each arm that has two."""
    known = Known(rows)
    for arm in study.curve_arms:
        for figure, hoped in HOPED.items():
            points = known.course(arm, study.budgets, figure)
            if len(points) < 2:
                continue
            (before, _), (tflop, now) = points[-2:]
            # Of the same seeds: there are fewer of a larger budget, and seeds differ.
            smaller, larger = known.budgets(arm, study.budgets, figure)[-2:]
            gained = known.paired((arm, larger), (arm, smaller), figure)
            if gained is None or tflop <= before:  # budgets so near that whole epochs are the same
                continue
            pace = gained.mean / log2(tflop / before)
            yield Outlook(arm, figure, hoped, now, tflop, pace)
