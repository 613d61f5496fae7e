"""A proportion never stands alone: it comes with its 95 % interval."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

from droppos.errors import DataError

Z_95 = 1.959963984540054
"""Half-width of the central 95 % of a standard normal."""
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The same of Student's t, for 1 degree of freedom and more."""


def student_95(freedom: int) -> float:
    """Tell the half-width of the central 95 % of Student's t.

    Args:
        freedom: Degrees of freedom, 1 or more.
    """
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    # Beyond, by the expansion in 1 / freedom (Fisher and Cornish, 1960): to 0.003 at 10.
    z = Z_95
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


def design_effect(measured: float, clusters: int, each: int) -> float:
    """Widen an interval for observations that come in clusters, as patches do in pictures.

    Few clusters tell badly how far they lie apart, so theirs is wider by Student's t. A single one
    tells nothing: it may as well be one observation.

    Args:
        measured: Spread between clusters over that of as many independent observations.
        clusters: How many.
        each: Observations of each.

    Returns:
        See `Proportion.design_effect`; from 1 to `each`.
    """
    if clusters < 2:
        return float(each)
    wider = (student_95(clusters - 1) / Z_95) ** 2
    return min(max(1.0, measured) * wider, float(each))


def wilson(hits: float, total: float) -> tuple[float, float]:
    """Bound a proportion with 95 % confidence.

    Wilson's score interval (1927): unlike value ± 1.96 standard errors it stays inside
    [0, 1] and is honest for few observations and for 0 or all hits.

    Args:
        hits: Successes among ``total``; fractions are allowed (see `Proportion`).
        total: Independent observations, above 0.
    """
    value = hits / total
    shrink = 1 + Z_95**2 / total
    centre = (value + Z_95**2 / (2 * total)) / shrink
    half = Z_95 / shrink * sqrt(value * (1 - value) / total + (Z_95 / (2 * total)) ** 2)
    # At 0 and at 1 a bound equals the value but for rounding; it must not pass it.
    return min(max(0.0, centre - half), value), max(min(1.0, centre + half), value)


def in_words(value: float, low: float, high: float) -> str:
    """Write a proportion with its interval, in percent."""
    return f"{100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def read_metric(metrics: Mapping[str, float], name: str) -> str | None:
    """Write what `Proportion.metrics` named; None if it is not there, or stands without interval.

    Runs of older versions have some accuracies without one.
    """
    found = [metrics.get(f"{name}{end}") for end in ("", "_low_95", "_high_95")]
    known = [value for value in found if value is not None]
    return in_words(*known) if len(known) == len(found) else None


@dataclass(frozen=True, slots=True)
class Proportion:
    """Hits among observations. Prints as ``61.2 % (60.1 to 62.3)``."""

    hits: int
    total: int
    design_effect: float = 1.0
    """Observations it takes to tell as much as one independent one. Patches of one picture
    are easy or hard together, so their interval is wider than their number says."""

    def __post_init__(self) -> None:
        if not 0 <= self.hits <= self.total or self.total == 0:
            raise DataError(
                f"a proportion needs 0 <= hits <= total and a total above 0, got {self.hits} of "
                f"{self.total}; was anything measured?"
            )

    @property
    def value(self) -> float:
        """Hits per observation, in [0, 1]."""
        return self.hits / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper bound of the 95 % interval, in [0, 1]."""
        return wilson(self.hits / self.design_effect, self.total / self.design_effect)

    def skill(self, chance: float) -> float:
        """Correct for chance: (value - chance) / (1 - chance).

        Args:
            chance: Value of the best guess that looks at no picture.

        Returns:
            0 for that guess, 1 for all hits, below 0 for worse than it. 0 as well where the guess
            is always right, so that nothing can be told apart.
        """
        return 0.0 if chance == 1 else (self.value - chance) / (1 - chance)

    def metrics(self, name: str) -> dict[str, float]:
        """Name value and interval for a ledger, where numbers stand alone."""
        low, high = self.interval
        return {name: self.value, f"{name}_low_95": low, f"{name}_high_95": high}

    def __str__(self) -> str:
        return in_words(self.value, *self.interval)
