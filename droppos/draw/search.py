"""What a search found: each trial as a line through its settings, and each setting by itself.

These functions return the figure, for a page holds it as SVG and a folder as PNG.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import ceil

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as MplPath

from droppos.draw.curves import INK, SOFT, frame
from droppos.draw.trials import (
    BEST,
    CROWD,
    PALE,
    SHADES,
    Axis,
    Trial,
    back_to_front,
    blank,
    canvas,
    folded,
    limits,
    rank,
    shades,
    stroke,
)

ENOUGH = 20
"""Finished trials from which on a quarter of them along a range has a median to speak of."""


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
        axes.add_patch(PathPatch(_smooth(line), fill=False, **stroke(trial, shade, len(trials))))
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


def _heights(fields: Sequence[Axis], trials: Sequence[Trial]) -> dict[str, list[float]]:
    """Place trials on each axis; those of one listed value side by side, the better the higher."""
    heights: dict[str, list[float]] = {trial.name: [] for trial in trials}
    for column, axis in enumerate(fields):
        for group in _alike(axis, column, trials):
            room = min(0.5 / len(axis.values), 0.012 * len(group)) if axis.listed else 0.0
            for order, trial in enumerate(sorted(group, key=rank)):
                shift = room * ((order + 0.5) / len(group) - 0.5)
                heights[trial.name].append(axis.place(trial.point[column]) + shift)
    return heights


def _alike(axis: Axis, column: int, trials: Sequence[Trial]) -> list[list[Trial]]:
    if not axis.listed:
        return [[trial] for trial in trials]
    return [[trial for trial in trials if trial.point[column] == value] for value in axis.values]


def _smooth(heights: Sequence[float]) -> MplPath:
    """Lead a line level through each upright, so that the eye can follow it across others."""
    corners, codes = [(0.0, heights[0])], [MplPath.MOVETO]
    for left, (begin, end) in enumerate(pairwise(heights)):
        corners += [(left + 1 / 3, begin), (left + 2 / 3, end), (left + 1.0, end)]
        codes += [MplPath.CURVE4] * 3
    if len(heights) == 1:
        corners, codes = [*corners, (0.06, heights[0])], [*codes, MplPath.LINETO]
    return MplPath(corners, codes)


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


def _strip(axes: Axes, column: int, outcome: Axis, shade: Normalize) -> None:
    """Colour the objective's upright: it is the legend of the lines."""
    places = np.linspace(0, 1, 128)
    colours = SHADES(shade([outcome.value_at(float(place)) for place in places]))
    axes.imshow(
        np.asarray(colours)[:, None, :],
        extent=(column, column + 0.0055 * (column + 0.45), 0, 1),
        origin="lower",
        aspect="auto",
        zorder=3,
    )


def _panel(axes: Axes, axis: Axis, column: int, shown: Sequence[Trial], shade: Normalize) -> None:
    dots = 26 if len(shown) >= CROWD else 46
    ordered = back_to_front(shown)
    places = np.array([axis.place(trial.point[column]) for trial in ordered])
    if axis.listed:  # strewn, the same way each time
        places += (np.arange(len(ordered)) * 0.618 % 1 - 0.5) * 0.4 / len(axis.values)
    values = np.array([trial.objective for trial in ordered], float)
    done = np.array([trial.done for trial in ordered])
    best = np.array([trial.best for trial in ordered])
    early, others = ~(done | best), done & ~best
    axes.scatter(places[early], values[early], dots, "none", edgecolor=PALE, linewidth=1.2)
    colours = SHADES(shade(values[others]))
    axes.scatter(
        places[others], values[others], dots, colours, edgecolor="white", linewidth=0.7, zorder=3
    )
    axes.scatter(places[best], values[best], 2.2 * dots, BEST, edgecolor="white", zorder=3)
    for left, right, median in _medians(axis, column, [trial for trial in shown if trial.done]):
        axes.plot([left, right], [median, median], color=INK, linewidth=1.8, zorder=4)
    frame(axes)
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
    elif len(done) >= ENOUGH:
        ordered = sorted(done, key=lambda trial: axis.place(trial.point[column]))
        for quarter in np.array_split(np.arange(len(ordered)), 4):
            group = [ordered[i] for i in quarter]
            ends = [axis.place(trial.point[column]) for trial in (group[0], group[-1])]
            yield ends[0], ends[1], _median(group)


def _median(trials: Sequence[Trial]) -> float:
    return float(np.median([trial.objective for trial in trials if trial.objective is not None]))
