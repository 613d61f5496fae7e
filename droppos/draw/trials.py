"""How trials of a search are drawn: their fields as axes, their objective as a shade.

Dark blue is good, orange is the best trial, grey has not run to its end.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, exp, isclose, log
from typing import Any, cast

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from droppos.draw.curves import COLOURS

BEST, PALE = COLOURS[1], "#C3C8CF"
SHADES: Colormap = ListedColormap(colormaps["YlGnBu"](np.linspace(0.28, 1, 256)))
"""Without its yellow, which is not seen on white."""
CROWD = 40
"""From so many trials on, lines are thin."""

Value = float | int | bool | str | None


@dataclass(frozen=True, slots=True)
class Axis:
    """One searched field."""

    label: str
    values: tuple[Value, ...]
    """Listed: each value, in the order drawn. Otherwise the low and the high end."""
    listed: bool
    log: bool = False
    """Of a range: whether equal ratios are equally far apart."""

    def place(self, value: Value) -> float:
        """Find where a value lies, from 0 at the low end to 1 at the high one."""
        if self.listed:
            return (self.values.index(value) + 0.5) / len(self.values)
        low, high, at = (self._scaled(cast(float, end)) for end in (*self.values, value))
        return (at - low) / (high - low)

    def value_at(self, place: float) -> float:
        """Find the number at a place of a range."""
        low, high = (self._scaled(cast(float, end)) for end in self.values)
        at = low + place * (high - low)
        return exp(at) if self.log else at

    def ticks(self) -> list[tuple[float, str]]:
        """List places to be marked, and their words: all values, or both ends and some between."""
        if self.listed:
            return [(self.place(value), _short(words(value))) for value in self.values]
        low, high = cast(tuple[float, float], self.values)
        between = _decades(low, high) if self.log else MaxNLocator(4).tick_values(low, high)
        inner = [float(tick) for tick in between if 0.1 < self.place(float(tick)) < 0.9]
        return [(self.place(tick), words(tick)) for tick in (low, *inner, high)]

    def _scaled(self, number: float) -> float:
        return log(number) if self.log else float(number)


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial, as far as it can be drawn."""

    name: str
    point: tuple[Value, ...]
    """One value for each axis."""
    objective: float | None
    """As last measured; larger is better."""
    done: bool
    """Whether it ran to its end, so that its objective can be compared."""
    best: bool = False
    history: Sequence[tuple[int, float]] = ()
    """Step, and objective as measured then."""


def words(value: Value) -> str:
    """Write a value as a person types it, with at most four significant digits."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else f"{value:.4g}"


def blank(width: float, height: float) -> Figure:
    """Make an empty figure, in inches; a page shows 96 pixels of each."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.04)
    return Figure(figsize=(width, height), dpi=160, layout=layout, facecolor="white")


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Make an empty figure with one panel."""
    figure = blank(width, height)
    return figure, figure.subplots()


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Find two ends that differ, even around equal values."""
    low, high = min(values), max(values)
    if isclose(low, high, rel_tol=1e-9, abs_tol=1e-12):
        reach = abs(low) / 10 or 1.0
        return low - reach, high + reach
    return float(low), float(high)


def shades(trials: Sequence[Trial]) -> Normalize:
    """Scale colours to finished trials; the worst tenth is as pale as the one above it."""
    values = [trial.objective for trial in trials if trial.done and trial.objective is not None]
    if not values:
        return Normalize(0, 1)
    low, high = limits([float(np.quantile(values, 0.1)), max(values)])
    return Normalize(low, high, clip=True)


def back_to_front(trials: Sequence[Trial]) -> list[Trial]:
    """Order trials so that better ones cover worse ones, and the best covers all."""
    return sorted(trials, key=lambda t: (t.best, t.done, rank(t)))


def rank(trial: Trial) -> float:
    """Order by objective; unmeasured ones are the worst."""
    return -np.inf if trial.objective is None else trial.objective


def stroke(trial: Trial, shade: Normalize, trials: int) -> dict[str, Any]:
    """Choose the line of a trial among so many."""
    thin = 0.9 if trials >= CROWD else 1.6
    if trial.best:
        return {"color": BEST, "linewidth": 2.8, "alpha": 1.0}
    if not trial.done or trial.objective is None:
        return {"color": PALE, "linewidth": thin, "alpha": 0.75}
    colour = SHADES(float(shade(trial.objective)))
    return {"color": colour, "linewidth": thin, "alpha": 0.75 if trials >= CROWD else 0.9}


def folded(label: str, width: int) -> str:
    """Break a long name after its underscores, dots and spaces, or anywhere if it has none."""
    lines = [""]
    for part in label.replace("_", "_\0").replace(".", ".\0").replace(" ", " \0").split("\0"):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    pieces = [line[i : i + width] for line in lines for i in range(0, max(len(line), 1), width)]
    return "\n".join(piece.rstrip() for piece in pieces)


def _short(text: str) -> str:
    return text if len(text) <= 18 else f"{text[:17]}…"


def _decades(low: float, high: float) -> Iterator[float]:
    for power in range(ceil(np.log10(low)), int(np.floor(np.log10(high))) + 1):
        yield float(f"1e{power}")
