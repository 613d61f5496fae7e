"""The shipped recipes of the experiment, as the command line reads them."""

from functools import cache

import tyro

from pipelines import recipe_file
from pipelines.recipe import Recipe


@cache
def load_recipe(name: str = "cifar") -> Recipe:
    """Read a shipped recipe, once in a process: a file that is edited under a study is another."""
    flags = list(recipe_file.flags(recipe_file.read(name)))
    return tyro.cli(Recipe, args=flags, config=(tyro.conf.FlagConversionOff,))
