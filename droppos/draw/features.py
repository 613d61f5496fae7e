"""Patch features as colours: patches that the model finds alike have one colour.

Axes in this file
    P  photographs
    N  cells in the patch grid (rows * columns)
"""

from collections.abc import Sequence
from math import ceil
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from droppos.config import Grid
from droppos.draw.curves import INK, SOFT

ACROSS = 3
"""Photographs in a row, each beside its colours."""
SIDE = 1.9
"""Width of a panel, in inches."""


def draw_features(
    pictures: UInt8[np.ndarray, "P rows columns 3"],
    colours: Float[np.ndarray, "P N 3"],
    explained: Sequence[float],
    place: float,
    grid: Grid,
    path: Path,
) -> None:
    """Draw photographs beside the first three principal components of their patch features.

    Args:
        pictures: The photographs, at least one.
        colours: Of `droppos.measure.components.components`, over all of them together.
        explained: Share of variance along each component.
        place: Share of variance that the cell alone explains.
        grid: Rows and columns of the patch grid.
        path: PNG to write.
    """
    across = min(ACROSS, len(pictures))
    down = ceil(len(pictures) / across)
    tall = SIDE * pictures.shape[1] / pictures.shape[2]
    width = max(2 * SIDE * across + 0.4, 7.6)
    height = (tall + 0.12) * down + 1.6
    left = 0.25 / width
    figure = Figure(
        figsize=(width, height),
        dpi=160,
        layout=ConstrainedLayoutEngine(
            w_pad=0.03, h_pad=0.06, rect=(0.5 * left, 0.02, 1 - left, 0.97 - 1.4 / height)
        ),
        facecolor="white",
    )
    axes = figure.subplots(down, 2 * across, squeeze=False)
    for panel in axes.flat:
        panel.axis("off")
    pairs = axes.reshape(-1, 2)
    for (photograph, coloured), picture, cells in zip(pairs, pictures, colours, strict=False):
        photograph.imshow(picture)
        extent = (0, picture.shape[1], picture.shape[0], 0)
        coloured.imshow(cells.reshape(*grid, 3), extent=extent, interpolation="nearest")
    figure.text(
        left,
        1 - 0.45 / height,
        "Patches that look alike to the model",
        color=INK,
        fontsize=17,
        weight="bold",
    )
    shares = ", ".join(f"{100 * share:.0f} %" for share in explained)
    text = (
        "One colour, one kind of patch, in all photographs. Red, green, blue: the first three\n"
        f"principal components of the patch features ({shares} of their variance).\n"
        f"Shades that run the same way in all are the place: it explains {100 * place:.0f} %."
    )
    figure.text(left, 1 - 0.6 / height, text, color=SOFT, fontsize=11, va="top", linespacing=1.35)
    figure.savefig(path)
