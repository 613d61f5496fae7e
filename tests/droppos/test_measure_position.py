from math import log

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from droppos.config import Counts, Grid, Method, Model
from droppos.errors import ConfigError, DataError, TrainingError
from droppos.masking import Draw
from droppos.measure.intervals import Z_95, Proportion, student_95
from droppos.measure.position import (
    PositionMeter,
    PositionReport,
    Predict,
    measure_positions,
    neighbours,
    position_predictor,
    protocol_draw,
)
from droppos.model import DropPos

GRID = Grid(4, 6)
COUNTS = Method(mask_ratio=0.5, position_mask_ratio=0.75).counts(GRID)


def score(predict: Predict, pictures: int = 300, batch: int = 64) -> PositionReport:
    images = torch.zeros(pictures, 1, 1, 3, dtype=torch.uint8)
    meter = PositionMeter(GRID, COUNTS)
    return measure_positions(predict, images, meter, seed=0, batch=batch).report()


def one_hot(cells: Tensor) -> Tensor:
    return 100.0 * F.one_hot(cells, GRID.cells)


def test_a_uniform_guess_scores_ln_n() -> None:
    report = score(lambda _, draw: torch.zeros(*draw.scored.shape, GRID.cells))
    assert report.cross_entropy == pytest.approx(log(GRID.cells), rel=1e-6)


def test_a_random_guess_of_a_free_cell_has_no_skill() -> None:
    def guess(_: Tensor, draw: Draw) -> Tensor:
        logits = torch.rand(*draw.scored.shape, GRID.cells)
        kept = F.one_hot(draw.visible, GRID.cells) * ~draw.dropped[..., None]
        return logits - 10 * kept.sum(1, keepdim=True)

    torch.manual_seed(0)
    report = score(guess, pictures=3000)
    assert report.chance == COUNTS.chance
    assert report.accuracy.value == pytest.approx(report.chance, abs=0.004)
    assert report.skill == pytest.approx(0, abs=0.005)


def test_a_perfect_answer_has_full_skill() -> None:
    report = score(lambda _, draw: one_hot(draw.asked))
    assert report.accuracy.value == report.near.value == report.skill == 1
    assert report.beside is None and report.beside_chance is None
    assert "position/wrong_beside" not in report.metrics()
    assert report.cross_entropy == pytest.approx(0, abs=1e-6)


def test_a_neighbour_is_near_but_not_right() -> None:
    def beside(_: Tensor, draw: Draw) -> Tensor:
        column = draw.asked % GRID.columns
        return one_hot(draw.asked + torch.where(column + 1 < GRID.columns, 1, -1))

    report = score(beside)
    assert (report.accuracy.value, report.near.value) == (0, 1)
    assert report.beside is not None and report.beside.value == 1
    assert report.skill < 0
    centre = (GRID.rows - 1, GRID.columns - 1)
    assert report.offsets[centre[0], centre[1] + 1] > report.offsets[centre[0], centre[1] - 1] > 0
    assert report.offsets.sum() == 300 * COUNTS.scored


@given(st.integers(1, 6), st.integers(1, 6))
def test_neighbours_are_the_cells_that_touch(rows: int, columns: int) -> None:
    cells = [divmod(cell, columns) for cell in range(rows * columns)]
    touching = [
        sum(max(abs(r - other_r), abs(c - other_c)) == 1 for other_r, other_c in cells)
        for r, c in cells
    ]
    assert neighbours(Grid(rows, columns)).flatten().tolist() == touching


def test_wrong_answers_at_random_fall_beside_as_often_as_chance_says() -> None:
    def anywhere_else(_: Tensor, draw: Draw) -> Tensor:
        shift = torch.randint(1, GRID.cells, draw.asked.shape)
        return one_hot((draw.asked + shift) % GRID.cells)

    torch.manual_seed(0)
    report = score(anywhere_else, pictures=3000)
    assert report.beside is not None and report.beside_chance is not None
    low, high = report.beside.interval
    assert low - 0.005 < report.beside_chance < high + 0.005
    assert report.beside.total == report.wrong.sum() == 3000 * COUNTS.scored


def test_chance_beside_is_of_the_cells_that_went_wrong() -> None:
    corner = torch.tensor([0])

    def wrong_in_the_corner(_: Tensor, draw: Draw) -> Tensor:
        return one_hot(torch.where(draw.asked == corner, GRID.cells - 1, draw.asked))

    report = score(wrong_in_the_corner)
    assert report.beside is not None and report.beside.hits == 0
    assert report.beside_chance == pytest.approx(3 / (GRID.cells - 1))


def test_offsets_count_predicted_minus_true() -> None:
    report = score(lambda _, draw: one_hot(torch.zeros_like(draw.asked)))
    drawn = protocol_draw(COUNTS, range(300), seed=0)
    cells = drawn.asked.flatten()
    expected = np.zeros_like(report.offsets)
    for cell in cells.tolist():
        row, column = divmod(cell, GRID.columns)
        expected[GRID.rows - 1 - row, GRID.columns - 1 - column] += 1
    np.testing.assert_array_equal(report.offsets, expected)


def test_masks_depend_on_seed_and_picture_only() -> None:
    whole = protocol_draw(COUNTS, range(10), seed=3)
    part = protocol_draw(COUNTS, range(4, 7), seed=3)
    other = protocol_draw(COUNTS, range(10), seed=4)
    for all_of_them, some in zip(whole, part, strict=True):
        assert all_of_them is not None and some is not None
        torch.testing.assert_close(all_of_them[4:7], some)
    assert not torch.equal(whole.visible, other.visible)
    assert len(whole.visible.unique(dim=0)) == 10
    assert (whole.dropped.sum(1) == COUNTS.scored).all()


def test_states_of_ranks_add_up_to_the_whole() -> None:
    torch.manual_seed(0)
    table = torch.randn(20, COUNTS.scored, GRID.cells)
    pictures = torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 1, 3)

    def predict(images: Tensor, draw: Draw) -> Tensor:
        return table[images[:, 0, 0, 0].long()] + one_hot(draw.asked) / 40

    def measured(first: int, last: int, batch: int) -> PositionMeter:
        meter = PositionMeter(GRID, COUNTS)
        part = pictures[first:last]
        return measure_positions(predict, part, meter, seed=1, batch=batch, first=first)

    whole, ranks = measured(0, 20, 20), [measured(0, 8, 3), measured(8, 20, 5)]
    for mine, theirs in zip(ranks[0].state, ranks[1].state, strict=True):
        mine += theirs
    expected, report = whole.report(), ranks[0].report()
    assert report.accuracy == expected.accuracy
    assert report.beside == expected.beside and report.beside_chance == expected.beside_chance
    assert report.cross_entropy == pytest.approx(expected.cross_entropy, rel=1e-6)
    np.testing.assert_array_equal(report.offsets, expected.offsets)
    assert 0 < expected.skill < 1


def test_pictures_that_are_right_or_wrong_as_a_whole_count_once() -> None:
    def all_or_nothing(images: Tensor, draw: Draw) -> Tensor:
        right = torch.arange(len(images))[:, None] % 2 == 0
        return one_hot(torch.where(right, draw.asked, (draw.asked + 2) % GRID.cells))

    report = score(all_or_nothing, pictures=100)
    assert report.accuracy.value == 0.5
    assert report.accuracy.design_effect == pytest.approx(COUNTS.scored)


def test_a_near_miss_has_an_interval_of_its_own() -> None:
    def beside_or_far(images: Tensor, draw: Draw) -> Tensor:
        """Answer one cell off in every other picture, and three off in the rest; never right."""
        column = draw.asked % GRID.columns
        side = torch.where(column < 3, 1, -1)
        odd = torch.arange(len(images))[:, None] % 2
        return one_hot(draw.asked + side * (1 + 2 * odd))

    report = score(beside_or_far, pictures=100)
    assert report.accuracy.value == 0 and report.beside is not None
    coin_flips = Proportion(50, 100).interval
    for share in (report.near, report.beside):
        assert share.value == 0.5
        assert share.interval == pytest.approx(coin_flips, abs=0.01)


def test_wrong_answers_that_are_near_as_pictures_are_count_pictures() -> None:
    def predict(images: Tensor, draw: Draw) -> Tensor:
        """Half of a picture right, and the wrong half all near or all far, picture by picture."""
        column = draw.asked % GRID.columns
        side = torch.where(column < 3, 1, -1)
        odd = torch.arange(len(images))[:, None] % 2
        right = torch.arange(COUNTS.scored) % 2 == 0
        return one_hot(draw.asked + torch.where(right, 0, side * (1 + 2 * odd)))

    report = score(predict, pictures=100)
    wrong = COUNTS.scored // 2
    assert report.beside is not None and report.beside.value == 0.5
    wider = (student_95(99) / Z_95) ** 2  # a hundred pictures are not very many, either
    assert report.beside.design_effect == pytest.approx(wrong * 100 / 99 * wider)


def test_independent_patches_count_each() -> None:
    torch.manual_seed(0)
    report = score(lambda _, draw: torch.randn(*draw.scored.shape, GRID.cells), pictures=2000)
    assert report.accuracy.design_effect == pytest.approx(1, abs=0.15)


def test_the_only_cell_left_over_shows_no_skill() -> None:
    grid, counts = Grid(1, 3), Counts(cells=3, visible=3, kept=2)
    meter = PositionMeter(grid, counts)
    draw = protocol_draw(counts, range(4), seed=0)
    meter.update(100.0 * F.one_hot(draw.asked, 3), draw)
    report = meter.report()
    assert (report.accuracy.value, report.chance, report.skill) == (1, 1, 0)
    assert report.near.value == 1


def test_a_model_of_any_training_ratio_is_measured_in_one_protocol() -> None:
    model = Model(image_size=(32, 48), patch_size=8, width=16, depth=1, heads=2, decoder_heads=2)
    grid, method = model.grid, Method(mask_ratio=0.2, dropped_token="wrong")
    droppos = DropPos(model, method).eval()
    counts = Method().counts(grid)
    pictures = torch.randint(256, (5, 32, 48, 3), dtype=torch.uint8)
    reports = [
        measure_positions(
            position_predictor(droppos), pictures, PositionMeter(grid, counts), seed=0, batch=batch
        ).report()
        for batch in (1, 5)
    ]
    assert reports[0].accuracy == reports[1].accuracy
    assert reports[0].accuracy.total == 5 * counts.scored
    assert all(np.isfinite(value) for value in reports[0].metrics().values())


def test_what_cannot_be_measured_is_said() -> None:
    meter = PositionMeter(GRID, COUNTS)
    with pytest.raises(DataError, match="was anything measured"):
        meter.report()
    draw = protocol_draw(COUNTS, range(2), seed=0)
    meter.update(torch.full((2, COUNTS.scored, GRID.cells), float("nan")), draw)
    with pytest.raises(TrainingError, match="diverged"):
        meter.report()
    with pytest.raises(ConfigError, match="nothing to measure"):
        PositionMeter(GRID, Counts(cells=24, visible=6, kept=6))
    model = Model(image_size=(32, 32), patch_size=16, width=16, depth=1, heads=2)
    with pytest.raises(ConfigError, match="trains no position head"):
        position_predictor(DropPos(model, Method(objective="pixels")))
