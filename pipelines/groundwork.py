"""What is settled before a run begins: where everything lies, and every batch of every epoch."""

import logging
import re
from dataclasses import replace
from difflib import get_close_matches

from droppos.errors import ConfigError
from pipelines.order import Schedule
from pipelines.recipe import HELD_OUT, Recipe
from pipelines.recipe_file import flatten
from pipelines.secrets import redact_uris
from pipelines.shards import Manifest, load_manifest
from pipelines.start import located_start
from pipelines.storage import open_place, open_reachable

_log = logging.getLogger(__name__)


def located(recipe: Recipe) -> Recipe:
    """Spell out every place: workers have another current folder than the driver.

    Raises:
        ConfigError: If an address holds a secret, for recipes are written to storage.
    """
    for name, value in flatten(recipe).items():
        if isinstance(value, str) and redact_uris(value) != value:
            raise ConfigError(
                f"{name} must hold no secret, for recipes are written to storage: "
                f"{redact_uris(value)}; put it into the environment (AWS_..., MLFLOW_TRACKING_...)"
            )

    def spelt(uri: str | None) -> str | None:
        return None if uri is None else open_place(uri).uri

    return replace(
        recipe,
        data=replace(recipe.data, path=spelt(recipe.data.path), holdout=spelt(recipe.data.holdout)),
        run=replace(
            recipe.run,
            storage=open_place(recipe.run.storage).uri,
            init_from=located_start(recipe.run.init_from),
        ),
    )


def plan(recipe: Recipe) -> Schedule:
    """Lay out the whole run: every batch of every epoch.

    Raises:
        ConfigError: If no data is named, or a batch is larger than the data.
        DataError: If the data set cannot be read.
    """
    if recipe.data.path is None:
        raise ConfigError(
            "data.path is not set; name a prepared data set: `droppos prepare PICTURES DATA`, "
            "then `droppos pretrain --data.path DATA`"
        )
    manifest = load_manifest(open_reachable(recipe.data.path))
    if recipe.data.holdout is not None:  # missing now is better than missing later
        _check_holdout(recipe, manifest, load_manifest(open_reachable(recipe.data.holdout)))
    return Schedule.of(recipe, manifest)


def _check_holdout(recipe: Recipe, train: Manifest, holdout: Manifest) -> None:
    """Look whether the held-out pictures are held out, and can tell what they are asked."""
    known = {shard.content for shard in train.shards}
    if same := sum(shard.content in known for shard in holdout.shards):
        _log.warning(
            "%d of the %d shards of data.holdout %s hold the very pictures of data.path %s: what "
            "is measured on them is not of pictures that were kept out of training",
            *(same, len(holdout.shards), recipe.data.holdout, recipe.data.path),
        )
    best = recipe.run.keep_best
    if best is not None and re.sub("_(low|high)_95$", "", best) not in HELD_OUT:
        near = get_close_matches(best, HELD_OUT, 1, 0.5) or [HELD_OUT[0]]
        raise ConfigError(
            f"run.keep_best {best} is nothing that is measured on held-out pictures; did you mean "
            f"{near[0]}? There are {', '.join(HELD_OUT)}"
        )
    if best is not None and "knn" in best and len(holdout.classes or ()) < 2:
        raise ConfigError(
            f"run.keep_best is {best}, but the pictures of data.holdout {recipe.data.holdout} have "
            "no two classes; prepare them from a folder with a sub-folder per class, or take "
            "holdout/position/skill"
        )
