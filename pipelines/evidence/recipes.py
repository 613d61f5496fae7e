"""The shipped recipes of the experiment, as the command line reads them. Imports no torch."""

from dataclasses import replace
from functools import cache

import tyro

from pipelines import recipe_file
from pipelines.evidence.arms import Arm
from pipelines.recipe import Recipe


@cache
def load_recipe(name: str = "cifar") -> Recipe:
    """Read a shipped recipe, once in a process."""
    flags = list(recipe_file.flags(recipe_file.read(name)))
    return tyro.cli(Recipe, args=flags, config=(tyro.conf.FlagConversionOff,))


def changed(recipe: Recipe, arm: Arm) -> Recipe:
    """Give the recipe of an arm, for the recipe's own epochs."""
    return replace(recipe, method=replace(recipe.method, **dict(arm.method)))
