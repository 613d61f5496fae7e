"""Losses: what checkpoints and lost machines cost, and how often to save. Pure.

A loss without notice costs the steps since the last checkpoint that was complete, and a restart.
One with a notice costs a checkpoint and a restart, no step; how often checkpoints are made changes
nothing about it. So the best interval follows from the former alone.

Young 1974 gives it to first order, Daly 2006 (equation 37) to a higher one. For losses at random
(Poisson) the expected time is known exactly (Daly 2006, equation 13), and so is its optimum, where
x = interval / mean time between losses solves (1 - x) e^x = e^(-saving / mean time).
"""

from dataclasses import dataclass
from math import exp, expm1, inf, sqrt

HOPELESS = 10.0
"""Losses in one interval above which the run is said never to end: that is e^10 tries each."""

RARE = 1e-10
"""Losses while a checkpoint is made below which Young's interval is right to 1e-5, and what the
exact equation tells apart is lost in rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """What strikes a run, and what each stroke and each checkpoint takes; seconds."""

    hard_per_s: float
    """Losses without notice in a second, of all machines together."""
    noticed_per_s: float
    """Losses with one."""
    blocked_s: float
    """For which each checkpoint holds training up."""
    write_s: float
    """Until it is complete, while training goes on: a loss before that costs the steps since the
    one before, so these seconds are done again as well."""
    restart_s: float
    """From a loss to the next step."""

    def factor(self, interval_s: float) -> float:
        """Give the expected time of a run over that of its steps alone.

        Args:
            interval_s: Seconds of training from one checkpoint to the next.
        """
        rate, attempt = self.hard_per_s, interval_s + self.blocked_s
        again = self.restart_s + self.write_s
        if rate * max(attempt, again) > HOPELESS:
            return inf
        if rate == 0:
            tries = attempt / interval_s
        else:
            tries = exp(rate * again) * expm1(rate * attempt) / (rate * interval_s)
        held_up = self.noticed_per_s * (self.blocked_s + self.write_s + self.restart_s)
        return tries * (1 + held_up)

    @property
    def best_interval_s(self) -> float:
        """Find the interval with the least expected time; infinite if nothing strikes.

        Not below `write_s`: one checkpoint is under way at a time.
        """
        return max(best(self.hard_per_s, self.blocked_s), self.write_s)


def young(rate: float, saving_s: float) -> float:
    """Give Young's interval for so many losses in a second."""
    return sqrt(2 * saving_s / rate)


def daly(rate: float, saving_s: float) -> float:
    """Give Daly's higher-order interval."""
    half = saving_s * rate / 2
    if half >= 1:
        return 1 / rate
    return young(rate, saving_s) * (1 + sqrt(half) / 3 + half / 9) - saving_s


def best(rate: float, saving_s: float) -> float:
    """Give the interval that is best by the exact expectation.

    By bisection: (1 - x) e^x falls from 1 to 0 as x goes from 0 to 1.
    """
    if rate == 0:
        return inf
    if rate * saving_s < RARE:
        return young(rate, saving_s)
    wanted, low, high = exp(-rate * saving_s), 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - middle) * exp(middle) > wanted else (low, middle)
    return high / rate
