"""The recipes that are shipped: each is valid, says what it is, and is what was published."""

import re
from pathlib import Path

import pytest
import tyro

from droppos.errors import ConfigError
from pipelines.recipe import Recipe, Tracking
from pipelines.recipe_file import SHIPPED, flags, read, shipped, to_yaml
from pipelines.space import grid_points, parse_space, random_points

IMAGENET = {"vit_base_imagenet": ("base", 10), "vit_large_imagenet": ("large", 40)}


def load(name: str) -> Recipe:
    """Read as the command line does."""
    return tyro.cli(Recipe, args=list(flags(read(name))), config=(tyro.conf.FlagConversionOff,))


@pytest.mark.parametrize("name", shipped())
def test_it_is_a_valid_recipe_and_survives_being_written(name: str, tmp_path: Path) -> None:
    recipe = load(name)
    assert recipe != Recipe()
    file = tmp_path / "written.yaml"
    file.write_text(to_yaml(recipe))
    assert load(str(file)) == recipe


@pytest.mark.parametrize("name", shipped())
def test_its_header_tells_command_hardware_and_hours(name: str) -> None:
    text = (SHIPPED / f"{name}.yaml").read_text()
    header = text[: re.search(r"^\w", text, re.MULTILINE).start()]  # type: ignore[union-attr]
    assert re.search(r"droppos|make", header)
    assert name in header or f"make {name}" in header
    assert re.search(r"hour|minute|second", header, re.IGNORECASE)


@pytest.mark.parametrize("name", shipped())
def test_it_names_no_place(name: str) -> None:
    """Data and credentials are the user's."""
    recipe = load(name)
    assert recipe.data.path is None
    assert recipe.data.holdout is None
    assert recipe.tracking.uri is None


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_has_the_published_figures(name: str) -> None:
    recipe = load(name)
    size, warmup = IMAGENET[name]
    assert (recipe.model.size, recipe.optim.warmup_epochs) == (size, warmup)
    assert recipe.counts == (196, 49, 12)
    assert (recipe.method.sigma, recipe.method.tau, recipe.method.attentive) == (1, 0.1, True)
    assert recipe.method.conformance == "paper"
    assert (recipe.optim.epochs, recipe.optim.betas) == (800, (0.9, 0.95))
    assert (recipe.optim.weight_decay, recipe.optim.clip_norm) == (0.05, 5)
    assert recipe.optim.peak_lr == pytest.approx(1.5e-4 * recipe.optim.global_batch / 256)
    assert (recipe.compute.device, recipe.compute.precision) == ("cuda", "bf16")
    assert recipe.compute.strategy == "fsdp2"
    assert "Not yet run here" in (SHIPPED / f"{name}.yaml").read_text()


def test_the_ablations_are_three_grids_around_the_published_recipe() -> None:
    recipe = load("ablations")
    assert recipe.optim.epochs == 200
    points = [tuple(point.values()) for point in grid_points(parse_space(recipe), recipe)]
    assert points[:4] == [(ratio, 0.75, 1, "epoch") for ratio in (0.25, 0.5, 0.75, 1)]
    ratios = [point for point in points if point[0] == 0.75 and point[2:] == (1, "epoch")]
    assert [point[1] for point in ratios] == [0.75, 0, 0.25, 0.5]
    sigmas = {point[2:] for point in points if point[:2] == (0.75, 0.75)}
    assert sigmas == {(sigma, decay) for sigma in (0, 1, 2) for decay in ("constant", "epoch")}
    assert len(points) == 4 + 3 + 5


def test_the_search_searches_ratios_and_sigma() -> None:
    recipe = load("search_ratios")
    space = parse_space(recipe)
    assert {dimension.field for dimension in space} == {
        "method.mask_ratio",
        "method.position_mask_ratio",
        "method.sigma",
    }
    points = random_points(space, recipe.search.trials, recipe.run.seed)
    assert len(points) == recipe.search.trials
    assert len(grid_points(parse_space(Recipe()), Recipe())) == 18


def test_a_password_has_no_place_in_a_recipe() -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_USERNAME") as caught:
        Tracking(uri="https://me:hunter2@mlflow.example")
    assert "hunter2" not in str(caught.value)
