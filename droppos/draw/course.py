"""The course of a run: every figure that was logged over its steps, each in a small panel."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from droppos.draw.curves import COLOURS, INK, frame, trend

COLUMNS = 3
HEIGHT = 2.3
"""Inches of a row of panels."""


def draw_course(panels: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Draw a panel for each figure, all over the same steps.

    A dense curve is its running mean over its own pale trace; few points are shown as points.

    Args:
        panels: Steps and values by title, with units; each has a point.
    """
    rows = -(-len(panels) // COLUMNS)
    layout = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.14)
    figure = Figure(figsize=(11, HEIGHT * rows + 0.3), layout=layout, facecolor="white")
    grid = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True)
    last = max(step for points in panels.values() for step, _ in points)
    for axes, (title, points) in zip(grid.flat, panels.items(), strict=False):
        steps, values = zip(*points, strict=True)
        smooth = trend(values)
        if smooth is not values:
            axes.plot(steps, values, color=COLOURS[0], linewidth=0.7, alpha=0.25)
        marker = "o" if len(points) < 12 else ""
        style = {"linewidth": 1.7, "marker": marker, "markersize": 4, "clip_on": False}
        axes.plot(steps, smooth, color=COLOURS[0], **style)
        frame(axes, labelsize=8.5)
        axes.set_title(title, loc="left", color=INK, fontsize=10, fontweight="bold")
        axes.set_xlim(0, last)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
    for at, axes in enumerate(grid.flat):
        if at >= len(panels):
            axes.set_visible(False)
        # The last panel of each column tells the steps, also above an empty place.
        axes.tick_params(labelbottom=at + COLUMNS >= len(panels))
    return figure
