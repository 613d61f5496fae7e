"""The shipped recipes of the experiment, as the command line reads them."""

import tyro

from pipelines import recipe_file
from pipelines.recipe import Recipe


def load_recipe(name: str = "cifar") -> Recipe:
    """Read a shipped recipe."""
    flags = list(recipe_file.flags(recipe_file.read(name)))
    return tyro.cli(Recipe, args=flags, config=(tyro.conf.FlagConversionOff,))
