"""The life of a run, simulated: steps, checkpoints, lost machines and restarts, over its hours.

A simulation by events: the next one is the end of an interval, or a loss. Time between losses is
exponential. It is drawn by seed, so the same plan gives the same hours.
"""

from dataclasses import dataclass
from math import inf

import numpy as np

from pipelines.plan.losses import Losses

LIVES = 16
"""Lives whose mean is told."""
MOST_EVENTS = 20_000
"""Events of one life above which nothing is simulated: the mean of so many is the formula's."""


@dataclass(frozen=True, slots=True)
class Life:
    """What became of a run, in the mean over several lives."""

    seconds: float
    spread_s: float
    """Standard deviation between lives."""
    hard: float
    """Losses without notice."""
    noticed: float
    """Losses with one."""
    again_s: float
    """Seconds of steps that were done again."""


def live(work_s: float, interval_s: float, losses: Losses, seed: int, lives: int = LIVES) -> Life:
    """Simulate several lives of a run.

    Args:
        work_s: Seconds of all its steps, without any loss or checkpoint.
        interval_s: Seconds of training from one checkpoint to the next.
        losses: What strikes.
        seed: Of the draws.
        lives: How many.
    """
    factor = losses.factor(interval_s)
    if factor == inf:
        return Life(inf, 0.0, inf, inf, inf)
    expected = _expected(work_s, interval_s, losses, factor)
    if work_s / interval_s + 2 * (expected.hard + expected.noticed) > MOST_EVENTS:
        return expected
    generator = np.random.default_rng(seed)
    found = np.array([_one(work_s, interval_s, losses, generator) for _ in range(lives)])
    seconds, hard, noticed, again = found.mean(axis=0).tolist()
    return Life(seconds, float(found[:, 0].std()), hard, noticed, again)


def _expected(work_s: float, interval_s: float, losses: Losses, factor: float) -> Life:
    """Tell the mean of many events by formula."""
    seconds = work_s * factor
    noticed = losses.noticed_per_s * work_s
    hard = losses.hard_per_s * seconds
    return Life(seconds, 0.0, hard, noticed, hard * (interval_s / 2 + losses.write_s))


def _one(
    work_s: float, interval_s: float, losses: Losses, generator: np.random.Generator
) -> tuple[float, float, float, float]:
    """Live once: seconds, losses of both kinds, and seconds done again."""
    rate = losses.hard_per_s + losses.noticed_per_s
    share = losses.hard_per_s / rate if rate else 0.0

    def until(rate: float) -> float:
        return float(generator.exponential(1 / rate)) if rate else inf

    now = again = 0.0
    hard = noticed = 0
    # Seconds of steps, and those in the newest checkpoint.
    done = saved = 0.0
    # When the checkpoint that is being written will be complete, and what is in it.
    complete_at = written = 0.0
    strike = until(rate)
    while True:
        goal = min(written + interval_s, work_s)
        at_goal = now + goal - done
        if strike < at_goal:
            done += strike - now
            now = strike
            if complete_at <= now:
                saved = written
            if generator.random() < share:
                hard += 1
                again += done - saved
                done = written = saved
            else:
                noticed += 1
                now += losses.blocked_s + losses.write_s
                saved = written = done
            while (sooner := until(losses.hard_per_s)) < losses.restart_s:  # and once more
                now += sooner
            now += losses.restart_s
            complete_at, strike = now, now + until(rate)
            continue
        now, done = at_goal, goal
        if done >= work_s:
            return now, hard, noticed, again
        # One at a time: the step waits for the checkpoint before this one.
        now = max(now, complete_at) + losses.blocked_s
        saved, written = written, done
        complete_at = now + losses.write_s
        strike = max(strike, now)  # one that fell into the copy finds it incomplete
