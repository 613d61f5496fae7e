from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from droppos.config import Grid, Method
from droppos.draw.attention import draw_attention
from droppos.draw.confusion import draw_confusion
from droppos.draw.curves import Series, draw_curves
from droppos.draw.features import draw_features
from droppos.draw.reassembly import Reassembly, draw_reassembly

GRID = Grid(3, 4)


def reassembly(logits: np.ndarray) -> Reassembly:
    """Four visible patches in cells 0, 5, 7, 11; the first keeps its position."""
    return Reassembly.from_logits(
        picture=np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8),
        visible=np.array([0, 5, 7, 11]),
        loose=np.array([1, 2, 3]),
        logits=logits,
    )


def claiming(*claims: tuple[int, float]) -> np.ndarray:
    logits = np.zeros((3, GRID.cells))
    for piece, (cell, strength) in enumerate(claims):
        logits[piece, cell] = strength
    return logits


def size_of_drawing(path: Path) -> tuple[int, int]:
    """Width and height in pixels, of a picture that is not blank."""
    with Image.open(path) as picture:
        assert np.asarray(picture.convert("L")).std() > 5
        return picture.size


def test_the_surest_piece_is_laid_where_several_claim_a_cell() -> None:
    row = reassembly(claiming((7, 2), (7, 9), (7, 5)))
    assert row.laid() == {7: 7}
    assert (row.right, row.scored) == (1, 3)


def test_a_piece_whose_place_is_known_is_never_covered() -> None:
    assert reassembly(claiming((0, 99), (7, 1), (11, 1))).laid() == {7: 7, 11: 11}


def test_confidence_is_the_probability_of_the_cell_named() -> None:
    row = reassembly(claiming((5, np.log(11)), (7, 0), (11, 0)))
    np.testing.assert_allclose(row.confidence, [0.5, 1 / 12, 1 / 12])


@pytest.mark.parametrize("rows", [1, 3])
def test_reassembly_is_drawn_large(tmp_path: Path, rows: int) -> None:
    row = reassembly(claiming((5, 2), (7, 9), (2, 5)))
    counts = Method(mask_ratio=0.6).counts(GRID)
    draw_reassembly([row] * rows, GRID, counts.chance, tmp_path / "reassembly.png")
    width, height = size_of_drawing(tmp_path / "reassembly.png")
    assert width > 4 * 560 and height > rows * 420


@pytest.mark.parametrize("points", [1, 2, 500])
def test_curves_are_drawn(tmp_path: Path, points: int) -> None:
    steps = list(range(points))
    falling = [5 / (1 + step) for step in steps]
    draw_curves(
        [Series("training", steps, falling), Series("held out", steps[-1:], falling[-1:])],
        [Series("training", steps, [value / 10 for value in falling])],
        Method().counts(Grid(14, 14)),
        tmp_path / "curves.png",
    )
    assert size_of_drawing(tmp_path / "curves.png") == (1760, 1280)


@pytest.mark.parametrize("grid", [Grid(14, 14), Grid(3, 7), Grid(1, 4)])
def test_confusion_is_drawn(tmp_path: Path, grid: Grid) -> None:
    shape = (2 * grid.rows - 1, 2 * grid.columns - 1)
    offsets = np.random.default_rng(0).poisson(3, shape)
    draw_confusion(offsets, 0.2, tmp_path / "confusion.png")
    assert size_of_drawing(tmp_path / "confusion.png") == (1440, 1376)


def test_confusion_of_answers_that_are_all_right_is_drawn(tmp_path: Path) -> None:
    offsets = np.zeros((5, 5), dtype=np.int64)
    offsets[2, 2] = 40
    draw_confusion(offsets, None, tmp_path / "confusion.png")
    assert size_of_drawing(tmp_path / "confusion.png") == (1440, 1376)


@pytest.mark.parametrize(("photographs", "heads"), [(1, 3), (4, 16)])
def test_attention_is_drawn(tmp_path: Path, photographs: int, heads: int) -> None:
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (photographs, 48, 64, 3), dtype=np.uint8)
    looks = random.dirichlet(np.ones(13), (photographs, heads))
    draw_attention(pictures, looks, GRID, tmp_path / "attention.png")
    width, height = size_of_drawing(tmp_path / "attention.png")
    assert width > 1800 and height > 160 * photographs


def test_an_even_look_is_drawn_in_the_colour_of_one(tmp_path: Path) -> None:
    pictures = np.full((1, 48, 64, 3), 255, np.uint8)
    draw_attention(pictures, np.full((1, 2, 13), 1 / 13), GRID, tmp_path / "even.png")
    with Image.open(tmp_path / "even.png") as drawing:
        pixels = np.asarray(drawing.convert("RGB")).reshape(-1, 3)
    # The scale ends at 1 where nothing is above it: the colour map's end, over white.
    end = np.array(colormaps["YlOrRd"](1.0)[:3]) * 255
    assert (np.abs(pixels - end).max(axis=1) < 2).mean() > 0.2


@pytest.mark.parametrize("photographs", [1, 2, 7])
def test_features_are_drawn(tmp_path: Path, photographs: int) -> None:
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (photographs, 48, 64, 3), dtype=np.uint8)
    colours = random.random((photographs, 12, 3))
    draw_features(pictures, colours, (0.4, 0.2, 0.1), 0.3, GRID, tmp_path / "features.png")
    assert min(size_of_drawing(tmp_path / "features.png")) > 300
