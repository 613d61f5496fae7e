"""Recipes as files: what is written is what is read, and a slip in a file is named."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import tyro

from droppos.config import Method, Model
from droppos.errors import ConfigError
from pipelines.recipe import Data, Recipe, Search
from pipelines.recipe_file import flags, flatten, from_dict, read, shipped, to_yaml

UNUSUAL = Recipe(
    model=Model(size="small", image_size=(48, 96), patch_size=8),
    method=Method(sigma=1e-5, attentive=False, dropped_token="zeros"),
    data=Data(path="s3://bucket/a folder", crop_scale=(0.5, 0.75)),
    search=Search(space=("method.sigma=choice(0, 1)", "method.mask_ratio=uniform(0.5, 0.75)")),
)
"""Pairs, an empty field, a number in scientific notation, blanks, strings with commas."""


def parse(content: dict[str, object]) -> Recipe:
    """Parse as the command line does."""
    return tyro.cli(Recipe, args=list(flags(content)), config=(tyro.conf.FlagConversionOff,))


@pytest.mark.parametrize("recipe", [Recipe(), UNUSUAL])
def test_what_is_written_is_what_is_read(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe))
    assert parse(read(str(file))) == recipe
    assert from_dict(read(str(file))) == recipe
    assert from_dict(json.loads(json.dumps(asdict(recipe)))) == recipe


def test_every_field_has_a_dotted_name() -> None:
    flat = flatten(UNUSUAL)
    assert flat["model.image_size"] == [48, 96]
    assert flat["optim.clip_norm"] == 5.0
    assert flatten(json.loads(json.dumps(asdict(UNUSUAL)))) == flat


def test_fields_may_be_merged_in_and_replaced(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("run: &run {seed: 1, workers: 2}\nmeasure:\n  <<: *run\n  seed: 3\n")
    assert read(str(file))["measure"] == {"seed": 3, "workers": 2}


def test_a_file_goes_before_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "search_ratios" in shipped()
    Path("search_ratios").write_text("run: {seed: 7}")
    assert read("search_ratios") == {"run": {"seed": 7}}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("run: [unclosed", "is not YAML"),
        ("run: {seed: 1, seed: 2}", "seed comes twice"),
        ("", "is empty, so all would be as by default"),
        ("- run\n- model", "must hold sections"),
        ("seed: 7", "must hold sections"),
        ("just words", "must hold sections"),
    ],
)
def test_what_is_no_recipe_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        read(str(file))


def test_a_file_of_bytes_is_no_recipe(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"run: {name: caf\xe9}")
    with pytest.raises(ConfigError, match="is not YAML"):
        read(str(file))


def test_a_recipe_that_is_nowhere_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"no recipe vit_bas; .*vit_base_imagenet"):
        read("vit_bas")


def test_a_recipe_of_another_version_is_refused() -> None:
    with pytest.raises(ConfigError, match="another version"):
        from_dict({"method": {"mask_ration": 0.5}})


@pytest.mark.shares
def test_an_unknown_field_in_a_file_suggests_the_right_flag(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("method:\n  mask_ration: 0.5\n")
    run = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "pretrain", str(file)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert "--method.mask-ratio " in run.stdout + run.stderr


def test_an_impossible_value_in_a_file_is_refused_by_the_recipe_itself() -> None:
    with pytest.raises(ConfigError, match=r"method\.mask_ratio must be in \[0, 1\), got 2"):
        parse({"method": {"mask_ratio": 2}})
