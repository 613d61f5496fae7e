"""How many pictures each stage of ingest could bring, beside what the GPUs take."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import StrMethodFormatter

from droppos.draw.curves import COLOURS, INK, RULE, SOFT

REACH = 2.2
"""The axis ends at so many times the slowest stage or the demand, whichever is more: a stage that
is far from bounding anything is cut off there, so that the others stay readable."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One stage."""

    label: str
    pictures_per_s: float
    """What it could do alone; infinite when it takes no time."""
    note: str
    """How it was measured, in small print."""


def draw_ingest(bars: Sequence[Bar], demand: float, demand_label: str, path: Path) -> None:
    """Draw a horizontal bar for each stage, and a line for the demand.

    Args:
        bars: Top to bottom, in the order in which pictures pass.
        demand: Pictures per second that the GPUs take.
        demand_label: Its words, as "2 GPUs: 3,000".
        path: PNG to write.
    """
    layout = ConstrainedLayoutEngine(w_pad=0.3, h_pad=0.25)
    figure = Figure(figsize=(11, 1.7 + 1.05 * len(bars)), dpi=160, layout=layout, facecolor="white")
    axes = figure.subplots()
    end = REACH * max(demand, min(bar.pictures_per_s for bar in bars))
    for row, bar in enumerate(bars):
        _draw(axes, row, bar, end, COLOURS[0] if bar.pictures_per_s >= demand else COLOURS[1])
    axes.axvline(demand, color=INK, linewidth=1.6, linestyle=(0, (4, 3)))
    axes.annotate(
        f"{demand_label} pictures/s",
        (demand, 1),
        xycoords=("data", "axes fraction"),
        xytext=(6, -4),
        textcoords="offset points",
        va="top",
        color=INK,
        fontsize=12,
        fontweight="bold",
    )
    _style(axes, bars, end)
    figure.savefig(path)


def _draw(axes: Axes, row: int, bar: Bar, end: float, colour: str) -> None:
    length = min(bar.pictures_per_s, end)
    axes.barh(row, length, height=0.46, color=colour)
    cut = bar.pictures_per_s > end
    number = f"{bar.pictures_per_s:,.0f}" if isfinite(bar.pictures_per_s) else "no limit"
    axes.annotate(
        f"{number} →" if cut else number,
        (length, row),
        xytext=(-8 if cut else 8, 0),
        textcoords="offset points",
        ha="right" if cut else "left",
        va="center",
        color="white" if cut else colour,
        fontsize=13,
        fontweight="bold",
        bbox={"boxstyle": "round,pad=0.2", "color": colour if cut else "white"},
    )
    axes.annotate(
        bar.note,
        (0, row + 0.26),
        xytext=(2, -3),
        textcoords="offset points",
        va="top",
        color=SOFT,
        fontsize=10.5,
    )


def _style(axes: Axes, bars: Sequence[Bar], end: float) -> None:
    axes.set_title(
        "What each stage of ingest can bring, in pictures per second",
        loc="left",
        color=INK,
        fontsize=14,
        fontweight="bold",
        pad=12,
    )
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
    axes.set_ylim(len(bars) - 0.4, -0.75)  # the first stage on top, room for the demand's words
    axes.set_xlim(0, end)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)
    axes.grid(axis="x", color=RULE, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", colors=SOFT, length=0, labelsize=11)
    axes.tick_params(axis="y", colors=INK, length=0, labelsize=12.5)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
