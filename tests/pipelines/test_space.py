"""The space of a search: anything in it is a valid recipe, and the same one each time."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppos.errors import ConfigError
from pipelines.recipe import Recipe, Search
from pipelines.space import (
    Dimension,
    Space,
    apply,
    grid_points,
    parse_space,
    random_points,
    to_tune,
)


def space_of(*texts: str, recipe: Recipe | None = None) -> Space:
    return parse_space(replace(recipe or Recipe(), search=Search(space=texts)))


@pytest.mark.parametrize(
    ("text", "dimension"),
    [
        ("method.sigma=uniform(0, 2)", Dimension("method.sigma", "uniform", (0.0, 2.0))),
        ("method.sigma=grid(0,1,2)", Dimension("method.sigma", "grid", (0.0, 1.0, 2.0))),
        (
            "optim.lr-per-256 = loguniform(1e-5, 1e-3)",
            Dimension("optim.lr_per_256", "loguniform", (1e-5, 1e-3)),
        ),
        ("run.seed=uniform(0, 9)", Dimension("run.seed", "uniform", (0, 9))),
        (
            "method.attentive=choice(true, false)",
            Dimension("method.attentive", "choice", (True, False)),
        ),
        (
            "method.sigma_decay=choice(constant, 'epoch')",
            Dimension("method.sigma_decay", "choice", ("constant", "epoch")),
        ),
        ("optim.clip_norm=choice(none, 5)", Dimension("optim.clip_norm", "choice", (None, 5.0))),
    ],
)
def test_values_have_their_fields_types(text: str, dimension: Dimension) -> None:
    (found,) = space_of(text)
    assert found == dimension
    assert [type(value) for value in found.values] == [type(value) for value in dimension.values]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("method.sigma", "expected FIELD=KIND"),
        ("method.sigma=uniform(0, 2", "expected FIELD=KIND"),
        ("method.sigma=unifrom(0, 2)", "did you mean uniform"),
        ("method.sigma=normal(0, 2)", "must be choice, grid, uniform, loguniform"),
        ("method.sigma=uniform(0)", "needs two numbers"),
        ("method.sigma=uniform(0, 1, 2)", "needs two numbers"),
        ("method.sigma=uniform(2, 1)", "needs low < high, got 2 and 1"),
        ("method.sigma=uniform(0, inf)", "needs low < high"),
        ("method.sigma=loguniform(0, 1)", "above 0"),
        ("method.sigma=choice()", "distinct values"),
        ("method.sigma=choice(1, 1.0)", "distinct values"),
        ("method.sigma=choice(one)", "is a number, got 'one'"),
        ("run.seed=choice(1.5)", "is a whole number, got '1.5'"),
        ("method.sigma_decay=choice(epohc)", "is one of constant, epoch, step"),
        ("method.attentive=uniform(true, false)", "needs two numbers"),
        ("method.mask_ration=choice(0.5)", "did you mean method.mask_ratio"),
        ("mask_ratio=choice(0.5)", "did you mean method.mask_ratio"),
        ("data.path=choice(a, b)", "may not vary: all trials learn from the same pictures"),
        ("run.name=choice(a, b)", "may not vary"),
        ("run.storage=choice(a, b)", "may not vary"),
        ("measure.mask_ratio=choice(0.5)", "under one protocol"),
        ("optim.betas=choice(0.9)", "several values"),
        ("method.mask_ratio=uniform(0.5, 1)", r"method.mask_ratio must be in \[0, 1\), got 1.0"),
        ("optim.warmup_epochs=choice(10, 900)", "between 0 and optim.epochs"),
        ("method.mask_ratio=uniform(0.5, 0.999)", "leaves no visible patch"),
    ],
)
def test_what_is_impossible_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        space_of(text)


def test_an_empty_space_and_a_field_named_twice_are_refused() -> None:
    with pytest.raises(ConfigError, match="empty"):
        space_of()
    with pytest.raises(ConfigError, match=r"names method\.sigma twice"):
        space_of("method.sigma=choice(0)", "method.sigma=choice(1)")


def test_corners_are_checked_together() -> None:
    """Each of these is right alone."""
    both = ("optim.epochs=choice(20, 800)", "optim.warmup_epochs=choice(10, 40)")
    for text in both:
        space_of(text)
    with pytest.raises(ConfigError, match=r"optim\.epochs=20, optim\.warmup_epochs=40\.0"):
        space_of(*both)


def test_a_grid_is_every_combination() -> None:
    points = grid_points(
        space_of("method.sigma=grid(0, 1)", "method.mask_ratio=choice(0.5, 0.75)"), Recipe()
    )
    assert [tuple(point.values()) for point in points] == [
        (0.0, 0.5),
        (0.0, 0.75),
        (1.0, 0.5),
        (1.0, 0.75),
    ]
    with pytest.raises(ConfigError, match="grid needs"):
        grid_points(space_of("method.sigma=uniform(0, 1)"), Recipe())


def test_several_grids_keep_the_recipes_values_beside_their_own() -> None:
    texts = (
        "method.sigma=grid(0, 1)",
        "or method.mask_ratio=grid(0.5, 0.75)",
        "run.seed=grid(0, 1)",
    )
    recipe = replace(Recipe(), search=Search(space=texts, algorithm="grid"))
    points = [tuple(point.values()) for point in grid_points(parse_space(recipe), recipe)]
    assert points == [
        (0, 0.75, 0),
        (1, 0.75, 0),
        (1, 0.5, 0),
        (1, 0.5, 1),
        (1, 0.75, 1),
    ]
    with pytest.raises(ConfigError, match=r"several grids .* random does not take"):
        space_of(*texts)


MIXED = (
    "method.sigma=uniform(0, 2)",
    "optim.lr_per_256=loguniform(1e-5, 1e-3)",
    "run.seed=uniform(0, 3)",
)


@given(number=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_draws_are_distinct_inside_and_follow_from_the_seed(number: int, seed: int) -> None:
    space = space_of(*MIXED)
    points = random_points(space, number, seed)
    assert len(points) == number
    assert points == random_points(space, number + 5, seed)[:number]
    for point in points:
        assert not any(point == other for other in points if other is not point)
        for dimension in space:
            low, high = dimension.values
            assert low <= point[dimension.field] <= high  # type: ignore[operator]
        apply(Recipe(), point)


def test_a_small_space_is_drawn_out() -> None:
    points = random_points(space_of("method.sigma=choice(0, 1)"), 10, seed=0)
    assert sorted(point["method.sigma"] for point in points) == [0.0, 1.0]  # type: ignore[type-var]


def test_both_ends_of_whole_numbers_are_drawn() -> None:
    points = random_points(space_of("run.seed=uniform(0, 3)"), 4, seed=0)
    assert {point["run.seed"] for point in points} == {0, 1, 2, 3}


def test_applying_changes_what_is_named_and_nothing_else() -> None:
    recipe: Any = apply(Recipe(), {"method.sigma": 2.0, "run.seed": 7})
    assert (recipe.method.sigma, recipe.run.seed) == (2.0, 7)
    back = apply(recipe, {"method.sigma": Recipe().method.sigma, "run.seed": 0})
    assert back == Recipe()


def test_tune_takes_the_space() -> None:
    domains = to_tune(space_of(*MIXED))
    assert list(domains) == ["method.sigma", "optim.lr_per_256", "run.seed"]
    assert all(domain.is_valid(domain.sample()) for domain in domains.values())
