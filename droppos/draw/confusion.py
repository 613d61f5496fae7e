"""Where wrong answers fall: beside the true cell, or anywhere."""

from pathlib import Path

import numpy as np
from jaxtyping import Int
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from droppos.draw.curves import INK, SOFT


def draw_confusion(
    offsets: Int[np.ndarray, "down right"], beside_chance: float | None, path: Path
) -> None:
    """Draw how far answers lie from the truth, as a map around the true cell.

    Args:
        offsets: Scored patches by (predicted - true) row and column, the centre being right,
            as `droppos.measure.position.PositionReport` has it. At least one patch.
        beside_chance: Share of the wrong answers that would fall beside the true cell if they
            looked at nothing; None if no answer is wrong.
        path: PNG to write.
    """
    rows, columns = (offsets.shape[0] + 1) // 2, (offsets.shape[1] + 1) // 2
    share = offsets / offsets.sum()
    around = share[max(rows - 2, 0) : rows + 1, max(columns - 2, 0) : columns + 1].sum()
    right = share[rows - 1, columns - 1]
    words = f"How far {int(offsets.sum()):,} answers lie from the truth (framed: right)."
    if beside_chance is not None:
        beside = 100 * (around - right) / (1 - right)
        words += (
            f"\nOf the wrong ones, {beside:.0f} % are beside the true cell "
            f"(by guessing {100 * beside_chance:.0f} %)."
        )

    layout = ConstrainedLayoutEngine(w_pad=0.25, h_pad=0.2)
    figure = Figure(figsize=(9, 8.6), dpi=160, layout=layout, facecolor="white")
    axes = figure.subplots()
    edges = (-columns + 0.5, columns - 0.5, rows - 0.5, -rows + 0.5)
    # On a linear scale all but the centre would look empty; log leaves out the zeros.
    percent = np.ma.masked_equal(100 * share, 0)
    # A scale needs two ends, even where all answers have one offset.
    scale = LogNorm(min(percent.min(), percent.max() / 10), percent.max())
    image = axes.imshow(percent, cmap="YlGnBu", norm=scale, extent=edges)
    axes.set_facecolor("#ECEDEF")
    axes.add_patch(
        Rectangle((-0.5, -0.5), 1, 1, fill=False, edgecolor="#E2510B", linewidth=2, zorder=3)
    )
    axes.set_title(
        f"{100 * right:.1f} % in the right cell, {100 * (around - right):.1f} % one cell away",
        loc="left",
        color=INK,
        fontsize=16,
        fontweight="bold",
        pad=52,
    )
    caption = axes.annotate(
        words,
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 14),
        textcoords="offset points",
        color=SOFT,
        fontsize=12,
        linespacing=1.4,
    )
    caption.set_in_layout(False)  # or the map would give way to a long line
    axes.set_xlabel("cells to the right of the true one (negative: left)", color=SOFT, fontsize=12)
    axes.set_ylabel("cells below the true one (negative: above)", color=SOFT, fontsize=12)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=SOFT, length=0, labelsize=11)
    bar = figure.colorbar(image, ax=axes, shrink=0.72, format="{x:g} %", pad=0.02)
    bar.set_label("share of answers (logarithmic; grey: none)", color=SOFT, fontsize=11)
    bar.ax.tick_params(colors=SOFT, labelsize=11)
    bar.ax.yaxis.set_minor_formatter(FuncFormatter(lambda share, _: f"{share:g} %"))
    bar.ax.tick_params(which="minor", colors=SOFT, labelsize=9)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]  # a Spine, typed as callable
    figure.savefig(path)
