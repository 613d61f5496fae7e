"""What a search found, further: two ratios together, how trials went, which field matters."""

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import StrMethodFormatter

from droppos.draw.curves import COLOURS, INK, RULE, SOFT, frame
from droppos.draw.trials import (
    BEST,
    PALE,
    SHADES,
    Axis,
    Trial,
    back_to_front,
    canvas,
    folded,
    shades,
    stroke,
    words,
)

PARTS = 4
"""Cells along an axis whose values are not listed."""


def draw_map(across: Axis, down: Axis, trials: Sequence[Trial]) -> Figure:
    """Draw the median objective for each pair of values, and how many trials it stands on.

    Args:
        across: First value of each trial's point.
        down: Second value of each trial's point.
        trials: Only finished ones count; at least one.
    """
    columns, rows = _cells(across), _cells(down)
    figure, axes = canvas(min(11, 3.4 + 1.35 * columns), min(9, 1.6 + 0.95 * rows))
    done = [trial for trial in trials if trial.done and trial.objective is not None]
    shade = shades(done)
    for row in range(rows):
        for column in range(columns):
            inside = [t for t in done if _cell(across, down, t) == (column, row)]
            _draw_cell(axes, (column, row), inside, shade)
    axes.set(xlim=(0, columns), ylim=(0, rows))
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=SOFT, length=0, labelsize=11)
    axes.set_xticks(*_marks(across))
    axes.set_yticks(*_marks(down))
    axes.set_xlabel(across.label, color=INK, fontsize=12, fontweight="bold")
    axes.set_ylabel(down.label, color=INK, fontsize=12, fontweight="bold")
    return figure


def draw_courses(trials: Sequence[Trial], objective: str) -> Figure:
    """Draw each trial's objective over its steps.

    Args:
        trials: At least one has a history. A cross is where one ended early.
        objective: Words at the side.
    """
    figure, axes = canvas(11, 4.6)
    shade = shades(trials)
    for trial in back_to_front([trial for trial in trials if trial.history]):
        steps, values = zip(*trial.history, strict=True)
        line = stroke(trial, shade, len(trials))
        marker = "o" if len(steps) == 1 and trial.done else ""
        axes.plot(steps, values, marker=marker, markersize=5, clip_on=False, **line)
        if not trial.done:
            axes.plot(
                steps[-1], values[-1], "x", color=SOFT, markersize=5, markeredgewidth=1.3, zorder=3
            )
        if trial.best:
            axes.annotate(
                f"best {values[-1]:.4g}",
                (steps[-1], values[-1]),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                color=BEST,
                fontsize=11,
                fontweight="bold",
                annotation_clip=False,
            )
    frame(axes)
    axes.margins(x=0.01, y=0.06)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("optimizer step", color=SOFT, fontsize=11)
    axes.set_ylabel(objective, color=SOFT, fontsize=11)
    return figure


def draw_importance(shares: Mapping[str, float], *, trusted: bool) -> Figure:
    """Draw how much of the objective's variation each field explains.

    Args:
        shares: In [0, 1], by the field's label; at least one.
        trusted: Whether enough trials stand behind it; otherwise bars are hollow.
    """
    figure, axes = canvas(8.6, 0.5 + 0.48 * len(shares))
    ordered = sorted(shares.items(), key=lambda entry: -entry[1])
    for row, (_, share) in enumerate(ordered):
        axes.barh(
            row,
            share,
            height=0.56,
            facecolor=COLOURS[0] if trusted else "white",
            edgecolor=COLOURS[0],
            linewidth=1.2,
            linestyle="-" if trusted else (0, (3, 2)),
        )
        axes.annotate(
            f"{100 * share:.0f} %",
            (share, row),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=11,
        )
    axes.set_yticks(range(len(ordered)), [folded(label, 34) for label, _ in ordered])
    axes.set(xlim=(0, 1.15 * ordered[0][1] or 1), ylim=(len(ordered) - 0.5, -0.5), xticks=[])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(RULE)
    axes.tick_params(colors=INK, length=0, labelsize=11)
    return figure


def _cells(axis: Axis) -> int:
    return len(axis.values) if axis.listed else PARTS


def _cell(across: Axis, down: Axis, trial: Trial) -> tuple[int, int]:
    column, row = (
        min(int(axis.place(value) * _cells(axis)), _cells(axis) - 1)
        for axis, value in zip((across, down), trial.point, strict=True)
    )
    return column, row


def _marks(axis: Axis) -> tuple[list[float], list[str]]:
    """Mark the middle of listed values, the edges of parts."""
    if axis.listed:
        return [i + 0.5 for i in range(len(axis.values))], [words(value) for value in axis.values]
    return list(range(PARTS + 1)), [words(axis.value_at(i / PARTS)) for i in range(PARTS + 1)]


def _draw_cell(axes: Axes, at: tuple[int, int], inside: Sequence[Trial], shade: Normalize) -> None:
    column, row = at
    box = (column + 0.025, row + 0.035)
    if not inside:
        axes.add_patch(
            Rectangle(box, 0.95, 0.93, fill=False, edgecolor=PALE, linestyle=(0, (2, 3)))
        )
        axes.text(
            column + 0.5, row + 0.5, "none", color=SOFT, fontsize=10, ha="center", va="center"
        )
        return
    median = float(np.median([cast(float, trial.objective) for trial in inside]))
    colour = SHADES(float(shade(median)))
    best = any(trial.best for trial in inside)
    axes.add_patch(
        Rectangle(
            box,
            0.95,
            0.93,
            facecolor=colour,
            edgecolor=BEST if best else colour,
            linewidth=3.5 if best else 0,
            zorder=3 if best else 2,
        )
    )
    brightness = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]
    ink = INK if brightness > 0.45 else "white"
    middle = column + 0.5
    axes.text(
        middle,
        row + 0.58,
        f"{median:.3f}" if abs(median) < 10 else f"{median:.4g}",
        color=ink,
        fontsize=13,
        fontweight="bold",
        ha="center",
        va="center",
        zorder=4,
    )
    many = f"{len(inside)} trial" if len(inside) == 1 else f"{len(inside)} trials"
    axes.text(middle, row + 0.26, many, color=ink, fontsize=9, ha="center", va="center", zorder=4)
