"""What a search found: each trial as a line through its settings, and each setting by itself.

Dark blue is good, orange is the best trial, grey has not run to its end. These functions return
the figure, for a page holds it as SVG and a folder as PNG.
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

from droppos.draw.curves import COLOURS, INK, RULE, SOFT

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
            return [(self.place(value), words(value)) for value in self.values]
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


def draw_parallel(fields: Sequence[Axis], trials: Sequence[Trial], objective: str) -> Figure:
    """Draw each trial as a line through its settings to its objective.

    Args:
        fields: One upright each, left to right; at least one.
        trials: At least one has an objective. Those without one end before its upright.
        objective: What stands above the last upright.
    """
    figure, axes = canvas(11, 5)
    known = [trial.objective for trial in trials if trial.objective is not None]
    outcome = Axis(objective, limits(known), listed=False)
    heights = _heights(fields, trials)
    shade = shades(trials)
    for trial in back_to_front(trials):
        line = [*heights[trial.name]]
        if trial.objective is not None:
            line.append(outcome.place(trial.objective))
        axes.plot(*_smooth(line), **stroke(trial, shade, len(trials)), solid_capstyle="round")
    for column, axis in enumerate([*fields, outcome]):
        _upright(axes, column, axis, last=column == len(fields))
    _strip(axes, len(fields), outcome, shade)
    axes.set_xlim(-0.25, len(fields) + 0.2)
    axes.set_ylim(-0.04, 1.04)
    axes.set_axis_off()
    return figure


def draw_fields(fields: Sequence[Axis], trials: Sequence[Trial], objective: str) -> Figure:
    """Draw each field against the objective; short bars are medians of finished trials.

    Args:
        fields: One panel each, at least one.
        trials: Those without an objective are left out.
        objective: Words at the side.
    """
    columns = min(3, len(fields))
    rows = ceil(len(fields) / columns)
    figure = blank(0.8 + 3.4 * columns, 0.4 + 3.1 * rows)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    shown = [trial for trial in trials if trial.objective is not None]
    shade = shades(trials)
    for number, panel in enumerate(panels.flat):
        if number < len(fields):
            _panel(panel, fields[number], number, shown, shade)
        else:
            panel.set_axis_off()
    for panel in panels[:, 0]:
        panel.set_ylabel(objective, color=SOFT, fontsize=11)
    return figure


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
    return sorted(trials, key=lambda t: (t.best, t.done, _rank(t)))


def stroke(trial: Trial, shade: Normalize, trials: int) -> dict[str, Any]:
    """Choose the line of a trial among so many."""
    thin = 0.9 if trials >= CROWD else 1.6
    if trial.best:
        return {"color": BEST, "linewidth": 2.8, "alpha": 1.0}
    if not trial.done or trial.objective is None:
        return {"color": PALE, "linewidth": thin, "alpha": 0.75}
    colour = SHADES(float(shade(trial.objective)))
    return {"color": colour, "linewidth": thin, "alpha": 0.75 if trials >= CROWD else 0.9}


def style(axes: Axes) -> None:
    """Leave of a panel's frame what helps reading: a base line and pale rules."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)
    axes.grid(axis="y", color=RULE, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, length=0, labelsize=10)


def _rank(trial: Trial) -> float:
    return -np.inf if trial.objective is None else trial.objective


def _decades(low: float, high: float) -> Iterator[float]:
    for power in range(ceil(np.log10(low)), int(np.floor(np.log10(high))) + 1):
        yield float(f"1e{power}")


def _heights(fields: Sequence[Axis], trials: Sequence[Trial]) -> dict[str, list[float]]:
    """Place trials on each axis; those of one listed value side by side, the better the higher."""
    heights: dict[str, list[float]] = {trial.name: [] for trial in trials}
    for column, axis in enumerate(fields):
        for group in _alike(axis, column, trials):
            room = min(0.5 / len(axis.values), 0.012 * len(group)) if axis.listed else 0.0
            for rank, trial in enumerate(sorted(group, key=_rank)):
                shift = room * ((rank + 0.5) / len(group) - 0.5)
                heights[trial.name].append(axis.place(trial.point[column]) + shift)
    return heights


def _alike(axis: Axis, column: int, trials: Sequence[Trial]) -> list[list[Trial]]:
    if not axis.listed:
        return [[trial] for trial in trials]
    return [[trial for trial in trials if trial.point[column] == value] for value in axis.values]


def _smooth(heights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Lead a line level through each upright, so that the eye can follow it across others."""
    if len(heights) == 1:
        return np.array([0.0, 0.06]), np.array([heights[0]] * 2)
    along = np.linspace(0, len(heights) - 1, 24 * (len(heights) - 1) + 1)
    left = np.minimum(along.astype(int), len(heights) - 2)
    part = along - left
    ends = np.asarray(heights)
    return along, ends[left] + (ends[left + 1] - ends[left]) * part**2 * (3 - 2 * part)


def _upright(axes: Axes, column: int, axis: Axis, *, last: bool) -> None:
    axes.plot([column, column], [0, 1], color=SOFT, linewidth=1, zorder=3)
    for place, text in axis.ticks():
        axes.annotate(
            text,
            (column, place),
            xytext=(14 if last else -5, 0),
            textcoords="offset points",
            ha="left" if last else "right",
            va="center",
            color=INK,
            fontsize=9.5,
            zorder=4,
            bbox={"boxstyle": "round,pad=0.12", "color": "white", "alpha": 0.8, "linewidth": 0},
        )
    axes.annotate(
        folded(axis.label, 16),
        (column, 1),
        xytext=(0, 12),
        textcoords="offset points",
        ha="center",
        va="bottom",
        color=INK,
        fontsize=11,
        fontweight="bold",
    )


def folded(label: str, width: int) -> str:
    """Break a long name after its underscores, dots and spaces, or anywhere if it has none."""
    lines = [""]
    for part in label.replace("_", "_\0").replace(".", ".\0").replace(" ", " \0").split("\0"):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    pieces = [line[i : i + width] for line in lines for i in range(0, max(len(line), 1), width)]
    return "\n".join(piece.rstrip() for piece in pieces)


def _strip(axes: Axes, column: int, outcome: Axis, shade: Normalize) -> None:
    """Colour the objective's upright: it is the legend of the lines."""
    places = np.linspace(0, 1, 128)
    colours = SHADES(shade([outcome.value_at(float(place)) for place in places]))
    axes.imshow(
        np.asarray(colours)[:, None, :],
        extent=(column, column + 0.035, 0, 1),
        origin="lower",
        aspect="auto",
        zorder=3,
    )


def _panel(axes: Axes, axis: Axis, column: int, shown: Sequence[Trial], shade: Normalize) -> None:
    dots = 26 if len(shown) >= CROWD else 46
    for number, trial in enumerate(back_to_front(shown)):
        place = axis.place(trial.point[column])
        if axis.listed:  # strewn, the same way each time
            place += (number * 0.618 % 1 - 0.5) * 0.4 / len(axis.values)
        colour = BEST if trial.best else SHADES(float(shade(cast(float, trial.objective))))
        axes.scatter(
            place,
            cast(float, trial.objective),
            s=2.2 * dots if trial.best else dots,
            facecolor=colour if trial.done else "none",
            edgecolor="white" if trial.done else PALE,
            linewidth=0.7 if trial.done else 1.2,
            clip_on=False,
            zorder=3 if trial.done else 2,
        )
    for left, right, median in _medians(axis, column, [trial for trial in shown if trial.done]):
        axes.plot([left, right], [median, median], color=INK, linewidth=1.8, zorder=4)
    style(axes)
    places, texts = zip(*axis.ticks(), strict=True)
    crowded = sum(len(text) for text in texts) > 26
    axes.set_xticks(
        places, texts, rotation=30 if crowded else 0, ha="right" if crowded else "center"
    )
    axes.set_xlim(-0.03, 1.03)
    axes.margins(y=0.08)
    axes.set_title(folded(axis.label, 30), loc="left", color=INK, fontsize=11.5, fontweight="bold")


def _medians(
    axis: Axis, column: int, done: Sequence[Trial]
) -> Iterator[tuple[float, float, float]]:
    """Yield left, right and height of each bar: a listed value's, or a quarter's of the trials."""
    if axis.listed:
        half = 0.32 / len(axis.values)
        for group in filter(None, _alike(axis, column, done)):
            place = axis.place(group[0].point[column])
            yield place - half, place + half, _median(group)
    elif len(done) >= 12:
        ordered = sorted(done, key=lambda trial: axis.place(trial.point[column]))
        for quarter in np.array_split(np.arange(len(ordered)), 4):
            group = [ordered[i] for i in quarter]
            ends = [axis.place(trial.point[column]) for trial in (group[0], group[-1])]
            yield ends[0], ends[1], _median(group)


def _median(trials: Sequence[Trial]) -> float:
    return float(np.median([trial.objective for trial in trials if trial.objective is not None]))
