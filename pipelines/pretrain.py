"""The main job: pictures stream in, a vision transformer comes out.

The driver supervises the workers (:mod:`pipelines.supervisor`, :mod:`pipelines.worker`), hears of
their progress and keeps the ledger. A job is a function of its recipe: the command line, a Tune
trial, a test and a submitted Ray job call the same one.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from droppos.errors import ConfigError, DataError, DropposError
from pipelines import checkpoints, history
from pipelines.aside import Aside
from pipelines.attempt import taken_over
from pipelines.backbone import from_checkpoint
from pipelines.cluster import connect, with_device
from pipelines.facts import check_resume
from pipelines.gallery import draw_gallery
from pipelines.heard import Heard, OnEvent
from pipelines.holdout import load_pictures
from pipelines.ledger import Ledger
from pipelines.order import Schedule
from pipelines.passed import FILE as PASSED_FILE
from pipelines.provenance import cluster_hardware
from pipelines.recipe import HELD_OUT, Recipe
from pipelines.recipe_file import flatten, to_yaml
from pipelines.secrets import redact_uris
from pipelines.shards import Manifest, load_manifest
from pipelines.sharing import Sharing
from pipelines.skipped import Skipped
from pipelines.source import join
from pipelines.start import clear, located_start, read_start
from pipelines.storage import Place, open_place, open_reachable
from pipelines.supervisor import Supervisor
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
    with (
        taken_over(home) as taken,  # before the ledger does: who trains and who logs are one
        Ledger.open(
            recipe, schedule.manifest.digest, resume=resume, parent_run=parent_run
        ) as ledger,
    ):
        taken.begun = True  # what MLflow is told comes from here now
        # From here on nobody else's group reads what is in the home.
        (home / "recipe.yaml").write_bytes(to_yaml(recipe).encode())
        if saved is None:
            clear(home)
            (home / PASSED_FILE).delete()  # of an earlier try, that another learning rate may mend
        if start is not None:
            start.keep(home)
        skipped = Skipped(
            home,
            schedule.manifest.rows,
            recipe.data.skip_limit,
            resumed=saved is not None and saved.record["manifest"] == schedule.manifest.digest,
        )
        if saved is not None:
            replay(ledger, home, saved)
        ledger.tag(cluster_hardware())
        aside = Aside(recipe, schedule) if recipe.aside_cpus else None
        heard = Heard(ledger, skipped, recipe.tracking.price_per_worker_hour, on_event, aside)
        heard.event(
            {
                "kind": "plan",
                "step": saved.step if saved else 0,
                "steps": schedule.steps,
                "tracking_run": ledger.run_id,
            }
        )
        if start is not None:
            heard.event({"kind": "started_from", "said": start.said})
        if aside is not None and saved is not None:
            aside.offer(saved)  # an earlier driver may have ended before it was measured
        if saved is not None and saved.step >= schedule.steps:
            logger.warning(
                "run %s has finished already, at step %d; `--optim.epochs N --allow-changes` "
                "trains it for longer",
                *(recipe.home, saved.step),
            )
        if saved is None or saved.step < schedule.steps:
            if sharing is not None:
                join(sharing, recipe, schedule)
            supervisor = Supervisor(
                with_device(recipe),
                schedule,
                heard,
                driver=taken.driver,
                stop=stop,
                sharing=sharing,
            )
            try:
                supervisor.run()
            finally:
                heard.keep_skipped(last=True)
        newest = checkpoints.newest(home)
        finished = newest is not None and newest.step == schedule.steps
        heard.conclude(wait=finished)
        pictures = draw_run(recipe, newest) if newest else []
        for picture in pictures:
            ledger.picture(picture, f"pictures/{picture.name}")
        ledger.finish("FINISHED" if finished else "KILLED")
    return Outcome(recipe.home, newest, schedule.steps, heard.last, pictures, ledger.run_id)


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
    return Schedule(
        manifest=manifest,
        seed=recipe.run.seed,
        global_batch=recipe.optim.global_batch,
        window=recipe.data.window,
        epochs=recipe.optim.epochs,
    )


def _check_holdout(recipe: Recipe, train: Manifest, holdout: Manifest) -> None:
    """Look whether the held-out pictures are held out, and can tell what they are asked."""
    known = {shard.content for shard in train.shards}
    if same := sum(shard.content in known for shard in holdout.shards):
        logger.warning(
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


def replay(ledger: Ledger, home: Place, saved: checkpoints.Saved) -> None:
    """Make MLflow whole up to a checkpoint: it lacks what a killed driver had not sent."""
    try:
        ledger.replay(history.read(home, saved.step, ledger.last_step("train/loss")))
    except DataError as error:
        logger.warning("MLflow may lack steps before %d: %s", saved.step, error)


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
