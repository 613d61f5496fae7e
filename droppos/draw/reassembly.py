"""The reassembly: a photograph's loose pieces, laid where the model believes they belong.

One row a photograph, five panels: the photograph; the pieces the model is given in place; the
heap of loose ones it is given besides; where it puts those; where they were.

Axes in this file
    H, W  rows and columns of pixels
    V     visible patches; S of them are loose: their position was dropped
    N     cells in the patch grid (rows * columns)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from droppos.config import Grid

# Near Okabe and Ito's green and vermilion: told apart with any colour vision.
RIGHT, WRONG = "#00A878", "#E2510B"
PAPER, EMPTY, LINE = "#FFFFFF", "#ECEDEF", "#F8F8F9"
INK, SOFT = "#1D1F24", "#6B7079"

PANEL = 560
"""Longer side of a panel, in pixels of the PNG."""
MARGIN, GAP = 72, 44
HEADINGS = (
    ("The photograph", "cut into {cells} pieces"),
    ("What the model is given", "{kept} pieces in place"),
    ("and a heap", "of {scored} loose ones"),
    ("Where it puts the loose ones", "each in a frame"),
    ("Where they were", "faint: what the model never saw"),
)


@dataclass(frozen=True, slots=True)
class Reassembly:
    """One photograph and the model's answer."""

    picture: UInt8[np.ndarray, "H W 3"]
    visible: Int[np.ndarray, " V"]
    """True cell of each visible patch."""
    loose: Int[np.ndarray, " S"]
    """Which of them (index into ``visible``) lost their position, so were asked for."""
    predicted: Int[np.ndarray, " S"]
    """Cell in which the model believes each loose piece."""
    confidence: Float[np.ndarray, " S"]
    """Probability of that cell; where several claim one, the surest is laid there."""

    @classmethod
    def from_logits(
        cls,
        picture: UInt8[np.ndarray, "H W 3"],
        visible: Int[np.ndarray, " V"],
        loose: Int[np.ndarray, " S"],
        logits: Float[np.ndarray, "S N"],
    ) -> "Reassembly":
        """Read the model's position logits of one picture."""
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        confidence = 1 / odds.sum(axis=1)  # the best cell's odds are 1
        return cls(picture, visible, loose, logits.argmax(axis=1), confidence)

    @property
    def right(self) -> int:
        """Loose pieces put into exactly their cell."""
        return int((self.predicted == self.visible[self.loose]).sum())

    @property
    def scored(self) -> int:
        """Number of loose pieces."""
        return len(self.loose)

    @property
    def given(self) -> list[int]:
        """Cells of the pieces whose place is known."""
        return np.delete(self.visible, self.loose).tolist()

    def laid(self) -> dict[int, int]:
        """Find which loose piece (by the cell it came from) lies in which cell.

        A piece that claims the cell of one whose place is known, or of a surer one, is not
        to be seen.
        """
        taken = set(self.given)
        cells: dict[int, int] = {}
        for i in np.argsort(-self.confidence, kind="stable").tolist():
            cell = int(self.predicted[i])
            if cell not in taken:
                cells.setdefault(cell, int(self.visible[self.loose[i]]))
        return cells


class _Board(NamedTuple):
    """A photograph on its way into panels: pixels of a piece, and the scaled picture."""

    grid: Grid
    side: int
    picture: Image.Image

    @classmethod
    def of(cls, picture: UInt8[np.ndarray, "H W 3"], grid: Grid) -> "_Board":
        side = max(8, PANEL // max(grid))
        size = (side * grid.columns, side * grid.rows)
        return cls(grid, side, Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))

    def corner(self, cell: int) -> tuple[int, int]:
        row, column = divmod(cell, self.grid.columns)
        return column * self.side, row * self.side

    def piece(self, cell: int) -> Image.Image:
        x, y = self.corner(cell)
        return self.picture.crop((x, y, x + self.side, y + self.side))

    def empty(self) -> Image.Image:
        panel = Image.new("RGB", self.picture.size, EMPTY)
        pen = ImageDraw.Draw(panel)
        for x in range(self.side, panel.width, self.side):
            pen.line((x, 0, x, panel.height), fill=LINE, width=2)
        for y in range(self.side, panel.height, self.side):
            pen.line((0, y, panel.width, y), fill=LINE, width=2)
        return panel


def draw_reassembly(rows: Sequence[Reassembly], grid: Grid, chance: float, path: Path) -> None:
    """Draw photographs, their loose pieces, and where the model puts them.

    Args:
        rows: The photographs, one row each, at least one; all have equally many loose pieces,
            and at least one.
        grid: Rows and columns of the patch grid.
        chance: Accuracy of the best guess that looks at no picture.
        path: PNG to write.
    """
    panels = [_panels(row, grid) for row in rows]
    widths = [max(line[column].width for line in panels) for column in range(len(HEADINGS))]
    heights = [max(panel.height for panel in line) for line in panels]
    width = 2 * MARGIN + sum(widths) + GAP * (len(widths) - 1)
    head, foot, caption = 300, 110, 84
    canvas = Image.new("RGB", (width, head + sum(heights) + caption * len(rows) + foot), PAPER)
    pen = ImageDraw.Draw(canvas)
    lefts = [MARGIN + sum(widths[:i]) + GAP * i for i in range(len(widths))]

    _headline(pen, rows[0], grid, lefts, head)
    top = head
    for row, line, height in zip(rows, panels, heights, strict=True):
        for left, panel in zip(lefts, line, strict=True):
            canvas.paste(panel, (left, top))
        _caption(pen, row, chance, (lefts[3], top + height + 16))
        top += height + caption
    _legend(pen, (MARGIN, top + 24))
    canvas.save(path)


def _panels(row: Reassembly, grid: Grid) -> tuple[Image.Image, ...]:
    board = _Board.of(row.picture, grid)
    given = _keep(row, board, board.empty())
    return board.picture, given, _heap(row, board), _believed(row, board), _true(row, board)


def _heap(row: Reassembly, board: _Board) -> Image.Image:
    """Strew the loose pieces: neither slot nor offset tells anything of where they were."""
    loose = row.visible[row.loose].tolist()
    pitch = int(board.side * 1.35)
    down = max(1, board.picture.height // pitch)
    across = ceil(len(loose) / down)
    panel = Image.new("RGB", (max(across * pitch, 240), board.picture.height), PAPER)
    random = np.random.default_rng(0)
    slots = random.permutation(len(loose)).tolist()
    shifts = random.integers(0, pitch - board.side + 1, size=(len(loose), 2)).tolist()
    for cell, slot, (dx, dy) in zip(loose, slots, shifts, strict=True):
        panel.paste(board.piece(cell), (slot % across * pitch + dx, slot // across * pitch + dy))
    return panel


def _believed(row: Reassembly, board: _Board) -> Image.Image:
    panel = _keep(row, board, board.empty())
    laid = row.laid()
    for cell, origin in laid.items():
        panel.paste(board.piece(origin), board.corner(cell))
    for cell, origin in laid.items():
        _frame(panel, board, cell, RIGHT if origin == cell else WRONG)
    return panel


def _true(row: Reassembly, board: _Board) -> Image.Image:
    panel = Image.blend(Image.new("RGB", board.picture.size, EMPTY), board.picture, 0.18)
    for cell in row.visible.tolist():
        panel.paste(board.piece(cell), board.corner(cell))
    return panel


def _keep(row: Reassembly, board: _Board, panel: Image.Image) -> Image.Image:
    for cell in row.given:
        panel.paste(board.piece(cell), board.corner(cell))
    return panel


def _frame(panel: Image.Image, board: _Board, cell: int, colour: str) -> None:
    x, y = board.corner(cell)
    pen = ImageDraw.Draw(panel)
    thick = max(3, board.side // 12)
    # The white line inside keeps a frame apart from a piece of its own colour.
    for inset, line, width in ((0, PAPER, thick + 1 + thick // 3), (1, colour, thick)):
        far = board.side - 1 - inset
        pen.rectangle((x + inset, y + inset, x + far, y + far), outline=line, width=width)


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    # Matplotlib brings it along, so the picture looks the same on every machine.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / name, size)


def _headline(
    pen: ImageDraw.ImageDraw, row: Reassembly, grid: Grid, lefts: list[int], bottom: int
) -> None:
    numbers = {
        "cells": grid.cells,
        "kept": len(row.visible) - row.scored,
        "scored": row.scored,
    }
    pen.text((MARGIN, 56), "Where does each piece belong?", INK, _font(46, bold=True))
    text = (
        "The model sees {kept} pieces of a photograph in place and {scored} loose ones, "
        "and must say where each loose piece was."
    )
    pen.text((MARGIN, 120), text.format(**numbers), SOFT, _font(27))
    for left, (title, detail) in zip(lefts, HEADINGS, strict=True):
        pen.text((left, bottom - 86), title, INK, _font(28, bold=True))
        pen.text((left, bottom - 48), detail.format(**numbers), SOFT, _font(23))


def _caption(pen: ImageDraw.ImageDraw, row: Reassembly, chance: float, at: tuple[int, int]) -> None:
    share = f"{row.right} of {row.scored} right: {100 * row.right / row.scored:.0f} %"
    font = _font(26, bold=True)
    pen.text(at, share, INK, font)
    beside = (at[0] + pen.textlength(share + "  ", font), at[1])
    hidden = row.scored - len(row.laid())
    covered = f"; {hidden} hidden under surer ones" if hidden else ""
    pen.text(beside, f"by guessing {100 * chance:.1f} %{covered}", SOFT, _font(26))


def _legend(pen: ImageDraw.ImageDraw, at: tuple[int, int]) -> None:
    x, y = at
    font = _font(25)
    for colour, text in (
        (RIGHT, "put into the right place"),
        (WRONG, "put into a wrong place"),
        (None, "no frame: its place was given"),
    ):
        box = (x, y, x + 32, y + 32)
        pen.rectangle(box, fill=EMPTY, outline=colour, width=5 if colour else 0)
        pen.text((x + 46, y), text, INK, font)
        x += int(46 + pen.textlength(text, font) + 60)
