"""What evidence looks like: arms beside each other, and each figure against what it took."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from droppos.draw.curves import COLOURS, INK, RULE, SOFT, frame

CONTROL = "#C3C8CF"


@dataclass(frozen=True, slots=True)
class Bar:
    """One arm."""

    label: str
    value: float
    """A share in [0, 1]."""
    half: float | None
    """Half its 95 % interval; None where it is not known."""
    control: bool
    """Whether it is something to beat."""


@dataclass(frozen=True, slots=True)
class Course:
    """One arm at several budgets."""

    label: str
    budgets: Sequence[float]
    """In TFLOP."""
    values: Sequence[float]
    """Shares in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Level:
    """What does not depend on the budget."""

    label: str
    value: float


def draw_bars(panels: Sequence[tuple[str, Sequence[Bar]]], path: Path) -> None:
    """Draw a panel of bars for each figure; the same arms in each, in the same order.

    Args:
        panels: A title and the arms of each. An arm may be missing in some.
        path: PNG to write.
    """
    labels = list(dict.fromkeys(bar.label for _, bars in panels for bar in bars))
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15)
    height = 1.4 + 0.42 * len(labels)
    figure = Figure(
        figsize=(4 + 3.2 * len(panels), height), dpi=140, layout=layout, facecolor="white"
    )
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (title, bars) in zip(axes, panels, strict=True):
        _bars(panel, title, bars, labels)
    axes[0].set_yticks(range(len(labels)), labels, fontsize=11, color=INK)
    axes[0].invert_yaxis()
    figure.savefig(path)


def _bars(panel: Axes, title: str, bars: Sequence[Bar], labels: Sequence[str]) -> None:
    for bar in bars:
        place, value = labels.index(bar.label), 100 * bar.value
        colour = CONTROL if bar.control else COLOURS[0]
        panel.barh(place, value, height=0.62, color=colour)
        reach = value
        if bar.half is not None:
            half = 100 * bar.half
            panel.errorbar(value, place, xerr=half, color=INK, capsize=3, linewidth=1.2)
            reach += half
        panel.annotate(
            f"{value:.1f}",
            (reach, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=10,
        )
    panel.set_title(fill(title, 24), loc="left", color=INK, fontsize=12, fontweight="bold")
    frame(panel)
    panel.grid(axis="y", visible=False)
    panel.grid(axis="x", color=RULE, linewidth=1)
    panel.set_xlim(left=0)
    panel.margins(x=0.22)
    panel.set_xlabel("%", color=SOFT)


def draw_courses(
    panels: Sequence[tuple[str, Sequence[Course], Sequence[Level]]], path: Path
) -> None:
    """Draw figures against the operations of the training.

    Args:
        panels: A title, the arms, and what they are to beat.
        path: PNG to write.
    """
    labels = list(dict.fromkeys(course.label for _, courses, _ in panels for course in courses))
    colours = dict(zip(labels, cycle(COLOURS), strict=False))
    layout = ConstrainedLayoutEngine(w_pad=0.2, h_pad=0.2)
    figure = Figure(figsize=(5.4 * len(panels), 5), dpi=140, layout=layout, facecolor="white")
    for panel, (title, courses, levels) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for course in courses:
            values = [100 * value for value in course.values]
            colour = colours[course.label]
            panel.plot(course.budgets, values, color=colour, linewidth=2.2, marker="o")
        for level in levels:
            panel.axhline(100 * level.value, color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)))
            panel.annotate(
                f"{level.label} {100 * level.value:.1f}",
                (1, 100 * level.value),
                xycoords=("axes fraction", "data"),
                xytext=(-4, -4),
                textcoords="offset points",
                ha="right",
                va="top",
                color=SOFT,
                fontsize=10,
            )
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_locator(LogLocator(base=2, subs=(25 / 16,)))  # 25, 50, 100, ...
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.set_title(title, loc="left", color=INK, fontsize=13, fontweight="bold")
        frame(panel)
        panel.margins(y=0.12)
        panel.set_xlabel("TFLOP of training", color=SOFT)
        panel.set_ylabel("%", color=SOFT)
    lines = [Line2D([], [], color=colours[label], linewidth=2.2, marker="o") for label in labels]
    figure.legend(
        lines, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=11
    )
    figure.savefig(path)
