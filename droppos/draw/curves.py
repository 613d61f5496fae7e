"""Loss and position accuracy over a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import log
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import StrMethodFormatter

from droppos.config import Counts

COLOURS = ("#2F6DB5", "#D55E00", "#00A878", "#8C5BA6")
INK, SOFT, RULE = "#1D1F24", "#6B7079", "#E3E5E8"
DENSE = 60
"""From so many points on, a curve is drawn as its running mean over its own pale trace."""


@dataclass(frozen=True, slots=True)
class Series:
    """One curve, with the words that stand at its end."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    """One a step; a share in [0, 1] or nats."""


def draw_curves(
    loss: Sequence[Series], accuracy: Sequence[Series], counts: Counts, path: Path
) -> None:
    """Draw loss above accuracy over the optimizer steps, each with what a guess scores.

    Args:
        loss: In nats. ln N is a uniform guess; a smoothed target cannot be met below its own
            entropy, so its curve does not end at 0.
        accuracy: Shares of scored patches in [0, 1].
        counts: Patches of a picture by part, for the scores of guesses.
        path: PNG to write.
    """
    layout = ConstrainedLayoutEngine(w_pad=0.3, h_pad=0.25)
    figure = Figure(figsize=(11, 8), dpi=160, layout=layout, facecolor="white")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for series, colour in zip(loss, COLOURS, strict=False):
        _draw(upper, series.steps, series.values, colour)
    for series, colour in zip(accuracy, COLOURS, strict=False):
        _draw(lower, series.steps, [100 * value for value in series.values], colour)

    _guess(upper, log(counts.cells), f"uniform guess: ln {counts.cells} = {log(counts.cells):.2f}")
    _guess(lower, 100 * counts.chance, f"chance: {100 * counts.chance:.1f} %")
    lower.set_ylim(bottom=0)
    _style(upper, "Loss of positions, in nats")
    _style(lower, "Loose pieces put into the right cell, in %")
    lower.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    lower.set_xlabel("optimizer step", color=SOFT, fontsize=12)
    # Limits must be final before labels are kept apart.
    _label(upper, loss, 1, "{:.2f}")
    _label(lower, accuracy, 100, "{:.1f} %")
    figure.savefig(path)


def _draw(axes: Axes, steps: Sequence[int], values: Sequence[float], colour: str) -> None:
    if len(values) >= DENSE:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    marker = "" if len(values) >= DENSE else "o"
    smooth = trend(values)
    axes.plot(
        steps, smooth, color=colour, linewidth=2.4, marker=marker, markersize=5, clip_on=False
    )


def trend(values: Sequence[float]) -> Sequence[float]:
    """Average each value of a dense curve with its neighbours; leave a sparse one alone."""
    if len(values) < DENSE:
        return values
    reach = len(values) // 40
    sums = [0.0, *accumulate(values)]
    bounds = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in bounds]


def _guess(axes: Axes, height: float, text: str) -> None:
    axes.axhline(height, color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        text,
        (1, height),
        xycoords=("axes fraction", "data"),
        xytext=(-6, 4),
        textcoords="offset points",
        ha="right",
        color=SOFT,
        fontsize=11,
    )


def frame(axes: Axes, labelsize: float = 10) -> None:
    """Leave of a panel's frame what helps reading: a base line and pale rules."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)
    axes.grid(axis="y", color=RULE, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, length=0, labelsize=labelsize)


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=14, fontweight="bold", pad=12)
    frame(axes, labelsize=11)
    axes.margins(x=0, y=0.08)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.1 * (high - low))  # the words on the guess's line need room


def _label(axes: Axes, curves: Sequence[Series], scale: float, number: str) -> None:
    """Write each curve's name and last value at its end, kept a line apart."""
    low, high = axes.get_ylim()
    line = (high - low) * 0.09
    ends = sorted(
        (scale * trend(series.values)[-1], series.label, colour)
        for series, colour in zip(curves, COLOURS, strict=False)
        if len(series.values)
    )
    height = low - line
    for value, label, colour in ends:
        height = max(value, height + line)
        axes.annotate(
            f"{label}  {number.format(value)}",
            (1, height),
            xycoords=("axes fraction", "data"),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=12,
            fontweight="bold",
        )
