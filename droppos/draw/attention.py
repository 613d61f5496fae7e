"""What the class token looks at, laid over the photographs.

One row a photograph: itself, the mean over heads, then each head. All panels of a figure share one
scale, in multiples of an even look, so a head that is sharp looks sharper than one that is not.

Axes in this file
    P  photographs
    T  tokens: the class token, then the cells of the patch grid
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from droppos.config import Grid
from droppos.draw.curves import INK, SOFT

COLOURS = "YlOrRd"
MOST_HEADS = 12
"""Heads that are drawn; of more, the first ones, and the figure says so."""
TAIL = 0.005
"""Share of cells that may lie above the scale's upper end, so that one cell does not set it."""
FAINT = 0.22
"""How much of a colour's brightness the photograph beneath may take away."""


def draw_attention(
    pictures: UInt8[np.ndarray, "P rows columns 3"],
    attention: Float[np.ndarray, "P heads T"],
    grid: Grid,
    path: Path,
) -> None:
    """Draw where the class token looks in the last block.

    Args:
        pictures: The photographs, at least one.
        attention: Of `droppos.measure.attention.class_attention`: rows that sum to 1.
        grid: Rows and columns of the patch grid.
        path: PNG to write.
    """
    heads = attention.shape[1]
    shown = min(heads, MOST_HEADS)
    times_even = attention[:, :, 1:] * attention.shape[2]
    mean = times_even.mean(axis=1, keepdims=True)
    panels = np.concatenate([mean, times_even[:, :shown]], axis=1)
    scale = Normalize(0, max(1.0, float(np.quantile(panels, 1 - TAIL))))

    side = max(1.25, 11 / (shown + 2))
    tall = side * pictures.shape[1] / pictures.shape[2]
    figure = Figure(
        figsize=(side * (shown + 2) + 1.6, (tall + 0.28) * len(pictures) + 1.9),
        dpi=160,
        layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, rect=(0.015, 0.02, 0.97, 0.87)),
        facecolor="white",
    )
    axes = figure.subplots(len(pictures), shown + 2, squeeze=False)
    for picture, row, line, kept in zip(
        pictures, panels, axes, attention[:, :, 0].mean(axis=1), strict=True
    ):
        line[0].imshow(picture)
        for panel, cells in zip(line[1:], row, strict=True):
            panel.imshow(_overlay(picture, cells.reshape(grid), scale))
        line[1].set_xlabel(f"on itself: {100 * kept:.1f} %", color=SOFT, fontsize=10, labelpad=3)
    names = ["photograph", "mean of heads", *(f"head {i + 1}" for i in range(shown))]
    for top, name in zip(axes[0], names, strict=True):
        top.set_title(name, color=INK, fontsize=11, pad=6)
    for panel in axes.flat:
        _bare(panel)
    _headline(figure, heads, shown)
    bar = figure.colorbar(
        ScalarMappable(scale, COLOURS), ax=axes, shrink=0.6, aspect=22, pad=0.015, extend="max"
    )
    bar.set_label(f"times an even look (1 of {attention.shape[2]})", color=SOFT, fontsize=11)
    bar.ax.tick_params(colors=SOFT, labelsize=10)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]  # a Spine, typed as callable
    figure.savefig(path)


def _overlay(
    picture: UInt8[np.ndarray, "rows columns 3"],
    cells: Float[np.ndarray, "down across"],
    scale: Normalize,
) -> Float[np.ndarray, "rows columns 3"]:
    """Colour each cell by its value; the photograph shows through as a faint shade."""
    shade = picture.mean(axis=2) / 255
    side = picture.shape[0] // cells.shape[0]
    colour = colormaps[COLOURS](scale(cells))[..., :3]
    wide = colour.repeat(side, axis=0).repeat(side, axis=1)
    return wide * (1 - FAINT + FAINT * shade)[..., None]


def _headline(figure: Figure, heads: int, shown: int) -> None:
    some = f" The first {shown} of {heads} heads." if shown < heads else ""
    inches = figure.get_figheight()
    left = 0.25 / figure.get_figwidth()
    at = (left, 1 - 0.42 / inches)
    figure.text(*at, "Where does the class token look?", color=INK, fontsize=17, weight="bold")
    text = (
        "Attention in the last block, over whole photographs. One scale for all panels;"
        f" dark is looked at more.{some}"
    )
    figure.text(left, 1 - 0.74 / inches, text, color=SOFT, fontsize=11)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
