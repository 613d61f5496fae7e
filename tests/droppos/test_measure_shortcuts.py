from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from droppos.config import Grid, Method
from droppos.errors import ConfigError, DataError
from droppos.masking import Draw
from droppos.measure.cues import LEAST_PICTURES, Cue, probe_cues
from droppos.measure.edits import (
    chimera,
    crop_borders,
    flatten_fall_off,
    flatten_marks,
    grey,
    shift_grid,
)
from droppos.measure.position import position_predictor
from droppos.measure.shortcuts import THERE, Share, measure_shortcuts
from pipelines.demo_pictures import HOLDOUT, TRAIN
from tests.droppos import planted as plants
from tests.droppos.tiny_training import METHOD, trained

GRID = Grid(6, 6)
COUNTS = METHOD.counts(GRID)
GRID_COUNTS = Method(mask_ratio=0.0).counts(GRID)
"""Every patch of a picture is visible."""

PLANTS: dict[Cue, tuple[Callable, Callable]] = {
    "borders": (plants.letterbox, crop_borders),
    "marks": (plants.watermark, flatten_marks),
    "fall_off": (plants.fall_off, flatten_fall_off),
    "fringes": (plants.fringes, grey),
    "grid": (plants.blocks, lambda pictures: shift_grid(pictures, seed=0)),
}
"""For each cue what plants it, and what takes it out."""


@pytest.fixture(scope="module")
def photographs() -> NDArray[np.uint8]:
    return plants.tiles(TRAIN + HOLDOUT, each=18, side=48)


def planted(pictures: NDArray[np.uint8], cue: Cue) -> Tensor:
    return torch.from_numpy(plants.planted(pictures, PLANTS[cue][0]))


def answers_of(cells: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Draw], Tensor]:
    """Make a model that names a cell for each patch of a picture by itself."""

    def predict(pictures: Tensor, draw: Draw) -> Tensor:
        return 9.0 * F.one_hot(cells(pictures).gather(1, draw.asked), GRID.cells)

    return predict


def test_ordinary_photographs_have_no_cue(photographs: NDArray[np.uint8]) -> None:
    probes = probe_cues(torch.from_numpy(photographs), GRID)
    assert max(probe.low for probe in probes.values()) < THERE


def test_black_lines_on_white_can_be_looked_at() -> None:
    for seed in range(2):
        random = np.random.default_rng(seed)
        pictures = np.full((40, 96, 96, 3), 255, dtype=np.uint8)
        for picture in pictures:
            down, across = random.integers(96, size=2)
            picture[down], picture[:, across] = 0, 0
        probes = probe_cues(torch.from_numpy(pictures), GRID)
        assert max(probe.low for probe in probes.values()) < THERE


def test_light_from_above_is_no_lens(photographs: NDArray[np.uint8]) -> None:
    lit = torch.from_numpy(plants.planted(photographs, plants.layout))
    brightness = lit.float().mean(dim=(0, 2, 3))
    assert brightness[:8].mean() > 1.5 * brightness[-8:].mean()
    assert max(probe.low for probe in probe_cues(lit, GRID).values()) < THERE


@pytest.mark.parametrize("cue", list(PLANTS))
def test_a_planted_cue_is_found_and_gone_once_it_is_taken_out(
    photographs: NDArray[np.uint8], cue: Cue
) -> None:
    pictures = planted(photographs, cue)
    probes = probe_cues(pictures, GRID)
    assert [probe.cue for probe in probes.values() if probe.low > THERE] == [cue]
    if cue == "marks":
        # Where a mark drives pixels to black or white no subtraction takes it out: leave it room.
        pictures = planted(photographs // 2 + 64, cue)
    after = probe_cues(PLANTS[cue][1](pictures), GRID)[cue]
    assert after.low < THERE
    assert after.times_chance < probes[cue].times_chance / 1.5


def test_a_chimera_keeps_every_patch_in_its_cell_and_no_two_together() -> None:
    pictures = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(-1, 48, 48, 3)
    mixed = chimera(pictures, GRID, seed=0)
    cells = mixed[:, ::8, ::8, 0].flatten(1)
    assert (cells.sort(dim=0).values == torch.arange(40)[:, None]).all()
    assert all(len(row.unique()) == GRID.cells for row in cells)


def test_edits_leave_a_scene_without_cues_almost_as_it_was(
    photographs: NDArray[np.uint8],
) -> None:
    pictures = torch.from_numpy(photographs)
    for edit in (flatten_marks, flatten_fall_off):
        moved = (edit(pictures).float() - pictures.float()).abs().mean().item()
        assert moved < 8  # of 255


def test_who_reads_borders_is_found_out(photographs: NDArray[np.uint8]) -> None:
    def by_borders(pictures: Tensor) -> Tensor:
        """Know the rows and columns of the rim by darkness, and nothing else."""
        tiles = pictures.float().mean(dim=3).unflatten(2, (6, 8)).unflatten(1, (6, 8))
        dark = tiles < 10
        top, bottom = dark[:, :, 0].all(3), dark[:, :, -1].all(3)
        left, right = dark[:, :, :, :, 0].all(2), dark[:, :, :, :, -1].all(2)
        row = torch.where(top, 0, torch.where(bottom, 5, 2))
        column = torch.where(left, 0, torch.where(right, 5, 3))
        return (row * 6 + column).flatten(1)

    pictures = planted(photographs, "borders")
    report = measure_shortcuts(answers_of(by_borders), pictures, GRID, COUNTS)
    assert [cue.cue for cue in report.found] == ["borders"]
    assert report.survives is not None and report.survives.low > 0.9
    assert report.verdict.startswith("shortcut: borders")
    assert report.metrics()["shortcuts/found"] == 1
    again = measure_shortcuts(answers_of(by_borders), pictures, GRID, COUNTS, batch=7)
    assert again == report


def test_who_places_by_the_scene_is_let_through(photographs: NDArray[np.uint8]) -> None:
    # A thread of brightness through the whole picture: whoever follows it knows the order, but
    # only within one scene, since each picture's starts elsewhere.
    random = np.random.default_rng(0)
    starts = random.integers(0, 36, 180)
    values = (np.arange(36) + starts[:, None]) % 36
    large = values.reshape(-1, 6, 6).repeat(8, axis=1).repeat(8, axis=2) * 6
    noise = random.integers(0, 12, (180, 48, 48, 3))
    pictures = torch.from_numpy((large[..., None] + 20 + noise).astype(np.uint8))

    def by_scene(pictures: Tensor) -> Tensor:
        grey = pictures.float().mean(dim=3).unflatten(2, (6, 8)).unflatten(1, (6, 8))
        value = ((grey.mean(dim=(2, 4)) - 25.5) / 6).round().long().flatten(1)
        # The start is where most patches agree.
        start = ((value - torch.arange(36)) % 36).mode(dim=1, keepdim=True).values
        return (value - start) % 36

    report = measure_shortcuts(answers_of(by_scene), pictures, GRID, COUNTS)
    assert report.skill > 0.95
    assert report.survives is not None and report.survives.value < 0.1
    assert not report.found
    assert report.verdict.startswith("no shortcut")


def test_a_model_without_skill_takes_no_shortcut(photographs: NDArray[np.uint8]) -> None:
    report = measure_shortcuts(
        answers_of(lambda pictures: torch.zeros(len(pictures), 36, dtype=torch.int64)),
        planted(photographs, "marks"),
        GRID,
        COUNTS,
    )
    assert report.survives is None and not report.found
    assert "places nothing yet" in report.verdict and "fixed marks" in report.verdict


def test_skill_that_no_cue_explains_is_said_to_be_layout(photographs: NDArray[np.uint8]) -> None:
    # Each cell has a brightness of its own, not a lens's: sky, trees, water, grass.
    shades = np.random.default_rng(1).permutation(36).reshape(6, 6) * 6 + 20
    scene = shades.repeat(8, axis=0).repeat(8, axis=1)[None, :, :, None]
    noise = np.random.default_rng(0).integers(0, 12, (64, 48, 48, 3))
    pictures = torch.from_numpy((scene + noise).astype(np.uint8))

    def by_shade(pictures: Tensor) -> Tensor:
        grey = pictures.float().mean(dim=3).unflatten(2, (6, 8)).unflatten(1, (6, 8))
        seen = grey.mean(dim=(2, 4)).flatten(1, 2)
        return (seen[..., None] - torch.from_numpy(shades.flatten()) - 5.5).abs().argmin(dim=2)

    report = measure_shortcuts(answers_of(by_shade), pictures, GRID, COUNTS)
    assert report.survives is not None and report.survives.low > 0.9
    assert not report.found
    assert report.verdict.startswith("no known shortcut")
    assert "survives without a scene" in report.verdict
    assert "too few" not in report.verdict
    undecided = replace(report, survives=Share(0.59, 0.05, 1.42)).verdict
    assert undecided.startswith("not decided: 59 % (5 to 142)")
    few = measure_shortcuts(answers_of(by_shade), pictures[:20], GRID, GRID_COUNTS)
    assert "too few to take every scene apart" in few.verdict


def test_what_stands_in_the_middle_is_no_lens_and_no_mark() -> None:
    probes = probe_cues(torch.from_numpy(plants.centred(180, side=48)), GRID)
    assert max(probes["fall_off"].low, probes["marks"].low) < THERE


def test_what_cannot_be_looked_at_is_said() -> None:
    predict = answers_of(lambda pictures: torch.zeros(len(pictures), 36, dtype=torch.int64))
    few = torch.zeros(LEAST_PICTURES - 1, 48, 48, 3, dtype=torch.uint8)
    with pytest.raises(DataError, match="too few to look for shortcuts"):
        measure_shortcuts(predict, few, GRID, COUNTS)
    small = Grid(3, 6)
    with pytest.raises(ConfigError, match="too small to tell a frame"):
        measure_shortcuts(predict, few, small, METHOD.counts(small))


@pytest.mark.shares
def test_a_model_trained_on_letterboxes_takes_them(photographs: NDArray[np.uint8]) -> None:
    train = plants.tiles(TRAIN, each=100, side=48)
    held = plants.tiles(HOLDOUT, each=40, side=48, seed=1)
    model = trained(plants.planted(train, plants.letterbox), steps=150)
    report = measure_shortcuts(
        position_predictor(model), planted(held, "borders"), model.grid, COUNTS
    )
    assert [cue.cue for cue in report.found] == ["borders"]
