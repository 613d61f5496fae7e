"""Runs and searches: begun, and gone on with."""

import os
import sys
from dataclasses import replace
from typing import Annotated

import tyro

from pipelines.commands.flags import RecipeFlags, RecipeName, WhereFlags
from pipelines.commands.speech import announce, conclude_search, console, refuse_late, searching
from pipelines.recipe import Recipe
from pipelines.secrets import redact_uris
from pipelines.tracking import Where


def pretrain(
    file: RecipeName = "",
    resume: bool = False,
    allow_changes: bool = False,
    init_from: str | None = None,
    recipe: RecipeFlags = Recipe(),  # noqa: B008 - frozen
) -> None:
    """Pre-train a vision transformer; Ctrl-C saves a last checkpoint and ends.

    Args:
        file: A YAML file, or the name of a recipe that is shipped.
        resume: Go on from the newest checkpoint of run.storage/run.name, if there is one.
        allow_changes: Resume even if data or recipe differ from the checkpoint's.
        init_from: Trained weights to begin with, in place of run.init_from.
        recipe: Fields given here override the file's.
    """
    refuse_late(file, "pretrain")
    if init_from is not None:
        recipe = replace(recipe, run=replace(recipe.run, init_from=init_from))
    announce()
    from pipelines.pretrain import pretrain as job
    from pipelines.report import show_outcome
    from pipelines.screen import Screen

    with Screen(recipe, console) as screen:
        outcome = job(recipe, resume=resume, allow_changes=allow_changes, on_event=screen.event)
    show_outcome(console, recipe, outcome)
    if not outcome.finished:
        sys.exit(130)


def resume(
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")],
    allow_changes: bool = False,
    where: WhereFlags = Where(),  # noqa: B008 - frozen
) -> None:
    """Go on with a pre-training run, as its recipe says.

    Args:
        run: Folder of the run, or its name or id in MLflow.
        allow_changes: Go on even if the data differ from the checkpoint's.
        where: Where runs are looked for by name.
    """
    from pipelines.runs import resumable

    recipe = resumable(run, where)
    if where.uri:  # where the history is; a password stays out of the recipe, which is stored
        public = redact_uris(where.uri) == where.uri
        if not public:
            os.environ["MLFLOW_TRACKING_URI"] = where.uri
        tracking = replace(recipe.tracking, uri=where.uri if public else None)
        recipe = replace(recipe, tracking=tracking)
    pretrain("", resume=True, allow_changes=allow_changes, recipe=recipe)


def search(
    file: RecipeName = "",
    space: tuple[str, ...] = (),
    resume: bool = False,
    recipe: RecipeFlags = Recipe(),  # noqa: B008 - frozen
) -> None:
    """Try a recipe with other settings, and write the best one as a recipe.

    Args:
        file: A YAML file, or the name of a recipe that is shipped.
        space: What may vary, in place of search.space: FIELD=choice(...), grid(...),
            uniform(low, high) or loguniform(low, high), such as 'method.sigma=uniform(0, 2)'.
        resume: Go on with the search of run.storage/run.name; trials that ended stay as they are.
        recipe: Fields given here override the file's.
    """
    refuse_late(file, "search")
    if space:
        recipe = replace(recipe, search=replace(recipe.search, space=space))
    announce()
    from pipelines.search import search as job

    with searching() as screen:
        outcome = job(recipe, resume=resume, on_event=screen.event)
    conclude_search(recipe, outcome)
