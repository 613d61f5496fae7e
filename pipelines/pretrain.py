"""The main job: pictures stream in, a vision transformer comes out.

A driver (:mod:`pipelines.driver`) supervises the workers (:mod:`pipelines.worker`), hears of their
progress and keeps the ledger. A job is a function of its recipe: the command line, a Tune trial, a
test and a submitted Ray job call the same one.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from droppos.errors import DropposError
from pipelines import checkpoints, history
from pipelines.aside import Aside
from pipelines.backbone import from_checkpoint
from pipelines.cluster import connect
from pipelines.driver import driving
from pipelines.facts import check_resume
from pipelines.gallery import draw_gallery
from pipelines.groundwork import located, plan
from pipelines.heard import OnEvent
from pipelines.holdout import load_pictures
from pipelines.passed import FILE as PASSED_FILE
from pipelines.recipe import Recipe
from pipelines.recipe_file import to_yaml
from pipelines.sharing import Sharing
from pipelines.source import join
from pipelines.start import clear, read_start
from pipelines.storage import open_place, open_reachable
from pipelines.tracking import local_folder

logger = logging.getLogger(__name__)

DRAWN = 256
"""Held-out pictures that the driver, which has no GPU, looks at for its drawings."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where a run ended."""

    home: str
    checkpoint: checkpoints.Saved | None
    """Newest complete one."""
    steps: int
    """Steps the whole run has."""
    metrics: dict[str, float]
    """Last value of each, of what this process heard."""
    pictures: list[Path]
    """Files drawn at the end, on this machine."""
    tracking_run: str
    """Identifier of the MLflow run."""

    @property
    def finished(self) -> bool:
        """Whether the last step is done and kept."""
        return self.checkpoint is not None and self.checkpoint.step == self.steps


def pretrain(
    recipe: Recipe,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    on_event: OnEvent | None = None,
    parent_run: str | None = None,
    stop: Callable[[], bool] = lambda: False,
    sharing: Sharing | None = None,
) -> Outcome:
    """Run, or go on with, one pre-training.

    Ctrl-C or SIGTERM asks the workers for one more checkpoint and ends the run there; a second
    one ends it at once.

    Args:
        recipe: The run.
        resume: Go on from the newest checkpoint of run.storage/run.name, if there is one.
        allow_changes: Resume even if data or recipe differ from the checkpoint's.
        on_event: Hears of progress.
        parent_run: MLflow run that this one is shown under.
        stop: Asked now and then; once it says yes, the run ends as after Ctrl-C.
        sharing: Decode together with other trials that read the same.

    Raises:
        ConfigError: If the recipe cannot be run here.
        DataError: If data or storage cannot be read.
        TrainingError: If the workers failed more often than run.max_failures.
    """
    recipe = located(recipe)
    schedule = plan(recipe)
    home = open_reachable(recipe.home)
    saved = checkpoints.newest(home)
    check_resume(recipe, schedule, saved, resume=resume, allow_changes=allow_changes)
    start = read_start(recipe) if saved is None else None
    connect(recipe)
    aside = Aside(recipe, schedule) if recipe.aside_cpus else None
    with driving(
        recipe,
        schedule,
        saved,
        resume=resume,
        parent_run=parent_run,
        on_event=on_event,
        aside=aside,
    ) as driver:
        # From here on nobody else's group reads what is in the home.
        (home / "recipe.yaml").write_bytes(to_yaml(recipe).encode())
        if saved is None:
            clear(home)
            (home / PASSED_FILE).delete()  # of an earlier try, that another learning rate may mend
        if start is not None:
            start.keep(home)
            driver.heard.event({"kind": "started_from", "said": start.said})
        if aside is not None and saved is not None:
            aside.offer(saved)  # an earlier driver may have ended before it was measured
        if saved is None or saved.step < schedule.steps:
            if sharing is not None:
                join(sharing, recipe, schedule)
            driver.train(stop=stop, sharing=sharing)
        else:
            logger.warning(
                "run %s has finished already, at step %d; `--optim.epochs N --allow-changes` "
                "trains it for longer",
                *(recipe.home, saved.step),
            )
        newest = checkpoints.newest(home)
        finished = newest is not None and newest.step == schedule.steps
        driver.heard.conclude(wait=finished)
        pictures = draw_run(recipe, newest) if newest else []
        for picture in pictures:
            driver.ledger.picture(picture, f"pictures/{picture.name}")
        driver.ledger.finish("FINISHED" if finished else "KILLED")
        metrics, tracking_run = driver.heard.last, driver.ledger.run_id
    return Outcome(recipe.home, newest, schedule.steps, metrics, pictures, tracking_run)


def draw_run(recipe: Recipe, saved: checkpoints.Saved) -> list[Path]:
    """Draw what the newest checkpoint makes of the held-out pictures, if there are any.

    A picture that cannot be drawn is a warning: the run itself is done and kept.
    """
    if recipe.data.holdout is None or not recipe.method.predicts_positions:
        return []
    folder = local_folder(recipe) / recipe.run.name / "pictures"
    try:
        model = from_checkpoint(saved).whole
        pictures = load_pictures(
            recipe.data.holdout, recipe.model.image_size, min(recipe.measure.pictures, DRAWN)
        )
        drawn = history.curves(open_place(recipe.home), saved.step)
        return draw_gallery(
            model, recipe.measure, pictures, lambda name: drawn.get(name, []), folder
        )[1]
    except (DropposError, OSError, RuntimeError) as error:
        logger.warning("the run's pictures could not be drawn: %s", error)
        return []
