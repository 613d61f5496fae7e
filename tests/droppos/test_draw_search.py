from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from droppos.draw.search import draw_fields, draw_parallel
from droppos.draw.search_maps import draw_courses, draw_importance, draw_map
from droppos.draw.trials import Axis, Trial, folded, limits, words

MASK = Axis("mask_ratio", (0.5, 0.75), listed=True)
CLIP = Axis("clip", (None, 1.0, "adaptive"), listed=True)
RATE = Axis("lr_per_256", (1e-5, 1e-3), listed=False, log=True)


def trials() -> list[Trial]:
    return [
        Trial("a", (0.5, None, 1e-4), 0.3, done=True, history=[(10, 0.1), (20, 0.3)]),
        Trial("b", (0.75, 1.0, 1e-5), 0.5, done=True, best=True, history=[(10, 0.2), (20, 0.5)]),
        Trial("c", (0.75, "adaptive", 1e-3), 0.1, done=False, history=[(10, 0.1)]),
        Trial("d", (0.5, None, 5e-4), None, done=False),
    ]


def test_equal_ratios_are_equally_far_apart_on_a_logarithmic_axis() -> None:
    assert [RATE.place(value) for value in (1e-5, 1e-4, 1e-3)] == pytest.approx([0, 0.5, 1])
    assert RATE.value_at(0.5) == pytest.approx(1e-4)
    assert [text for _, text in RATE.ticks()] == ["1e-05", "0.0001", "0.001"]


def test_listed_values_share_an_axis_equally() -> None:
    places = [CLIP.place(value) for value in CLIP.values]
    assert [right - left for left, right in pairwise(places)] == pytest.approx([1 / 3, 1 / 3])
    assert [text for _, text in CLIP.ticks()] == ["none", "1", "adaptive"]


def test_values_are_written_as_a_person_types_them() -> None:
    assert [words(value) for value in (None, True, 3, 0.25, "epoch")] == [
        "none",
        "true",
        "3",
        "0.25",
        "epoch",
    ]


def test_limits_differ_even_around_equal_values() -> None:
    for value in (0.0, 0.3, -2.0):
        low, high = limits([value, value])
        assert low < value < high


def test_a_long_name_is_folded_and_nothing_of_it_lost() -> None:
    lines = folded("position_mask_ratio_" + "x" * 40, 16).splitlines()
    assert max(map(len, lines)) <= 16
    assert "".join(lines) == "position_mask_ratio_" + "x" * 40


def test_each_figure_is_drawn(tmp_path: Path) -> None:
    pair = [Trial(t.name, t.point[:2], t.objective, done=t.done, best=t.best) for t in trials()]
    figures = [
        draw_parallel([MASK, CLIP, RATE], trials(), "position skill"),
        draw_fields([MASK, CLIP, RATE], trials(), "position skill"),
        draw_map(MASK, CLIP, pair),
        draw_courses(trials(), "position skill"),
        draw_importance({"mask_ratio": 0.8, "clip": 0.2}, trusted=False),
    ]
    for number, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{number}.png", dpi=60)
        with Image.open(tmp_path / f"{number}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 5
