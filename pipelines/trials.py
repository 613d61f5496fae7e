"""One run of a search: an ordinary pretrain, its place in a list that never changes, its record.

What is tried follows from space, seed and number alone, so a resumed search finds its trials
again by their names.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from time import monotonic
from typing import Any, Literal

from ray import tune

from droppos.config import Grid
from droppos.errors import ConfigError, DropposError
from pipelines.holdout import measure_checkpoint, protocol
from pipelines.order import Schedule
from pipelines.pretrain import pretrain
from pipelines.recipe import Recipe, Search
from pipelines.space import Point, apply, grid_points, parse_space, random_points
from pipelines.storage import Place, open_place

OBJECTIVE = "holdout/position/skill"
"""Metric that is compared: 0 looks at no picture, 1 is always right."""

REPORT_EVERY_S = 1.0
"""Seconds between two reports of a trial's steps; measurements are reported at once."""

State = Literal["finished", "failed", "stopped"]


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a search."""

    point: Point
    """Value of each searched field."""
    recipe: Recipe

    @property
    def record(self) -> Place:
        """Written when the trial is finished."""
        return open_place(self.recipe.home) / "trial.json"


@dataclass(frozen=True, slots=True)
class TrialOutcome:
    """Where a trial ended."""

    name: str
    point: Point
    state: State
    """failed: its error is told. stopped: it was interrupted, or never began."""
    objective: float | None = None
    """Position skill on the held-out pictures, at most 1."""
    checkpoint: str | None = None
    """Folder of the last checkpoint."""
    tracking_run: str | None = None
    """Identifier of the MLflow run."""
    error: str | None = None


def list_trials(recipe: Recipe, schedule: Schedule) -> list[Trial]:
    """Write the recipe of each trial: the same list whenever it is asked for.

    Raises:
        ConfigError: If the space is impossible, or a trial could not be compared or run.
    """
    space = parse_space(recipe)
    if recipe.search.algorithm == "grid":
        points = grid_points(space)
    else:
        points = random_points(space, recipe.search.trials, recipe.run.seed)
    trials = []
    for number, point in enumerate(points):
        varied = apply(recipe, point)
        run = replace(recipe.run, name=trial_name(recipe, number, point), storage=recipe.home)
        run = replace(run, seed=varied.run.seed)
        trial = Trial(point, replace(varied, run=run, search=Search()))
        _require_comparable(trial.recipe, recipe.model.grid)
        replace(
            schedule,
            global_batch=varied.optim.global_batch,
            window=varied.data.window,
            epochs=varied.optim.epochs,
        )  # refuses a batch larger than the data
        trials.append(trial)
    return trials


def trial_name(recipe: Recipe, number: int, point: Point) -> str:
    """Name a trial by what a person wants to know of it: ratios-002-mask_ratio=0.5-sigma=1."""
    values = [
        f"{name.rpartition('.')[2]}={f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in point.items()
    ]
    return "-".join([recipe.run.name, f"{number:03d}", *values])


def _require_comparable(recipe: Recipe, grid: Grid) -> None:
    way_out = (
        "a search compares position skill on held-out pictures; "
        "set data.holdout to a prepared data set, and a method.objective that predicts positions"
    )
    if recipe.data.holdout is None:
        raise ConfigError(f"data.holdout is not set; {way_out}")
    if recipe.run.min_workers is not None:
        raise ConfigError(
            f"run.min_workers is {recipe.run.min_workers}: trials of a search have a fixed size, "
            "or they would grow into each other's room; leave it out"
        )
    if not recipe.method.predicts_positions:
        raise ConfigError(f"method.objective {recipe.method.objective} has no positions; {way_out}")
    if recipe.model.grid != grid:
        raise ConfigError(
            f"model.size {recipe.model.size} has a patch grid of {tuple(recipe.model.grid)}, the "
            f"recipe {tuple(grid)}, so position skill would be another figure; set "
            "model.patch_size in the recipe"
        )
    protocol(recipe.measure).counts(grid)  # refuses a protocol that asks nothing


def run_trial(trial: Trial, parent_run: str) -> dict[str, Any]:
    """Be one trial: in a process of its own, called by Tune.

    Returns:
        Its objective, or the error that a person can mend. Others are raised, for Tune to tell.
    """
    recipe = trial.recipe
    try:
        outcome = pretrain(
            recipe, resume=True, on_event=Reporter(monotonic).event, parent_run=parent_run
        )
        assert outcome.checkpoint is not None
        objective = outcome.metrics.get(OBJECTIVE)
        if objective is None:  # trained in an earlier process, which was killed since
            objective = measure_checkpoint(recipe, outcome.checkpoint)[OBJECTIVE]
    except DropposError as error:
        return {"error": str(error)}
    done = TrialOutcome(
        name=recipe.run.name,
        point=trial.point,
        state="finished",
        objective=objective,
        checkpoint=outcome.checkpoint.uri,
        tracking_run=outcome.tracking_run,
    )
    trial.record.write_bytes(json.dumps(asdict(done), indent=1).encode())
    return {"objective": objective, "step": outcome.steps, "steps": outcome.steps}


class Reporter:
    """Hands a trial's progress to Tune, and so to the search's driver."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._told = -REPORT_EVERY_S
        self._steps = 0

    def event(self, event: Mapping[str, Any]) -> None:
        """Take one event of the run."""
        if event["kind"] == "plan":
            self._steps = event["steps"]
        elif event["kind"] != "metrics":
            return
        values = event.get("values", {})
        if OBJECTIVE in values:
            self._report(event["step"], {"objective": values[OBJECTIVE]})
        elif self._now() - self._told >= REPORT_EVERY_S:
            self._report(event["step"], {})

    def _report(self, step: int, values: dict[str, float]) -> None:
        self._told = self._now()
        tune.report({"step": step, "steps": self._steps, **values})


def read_record(trial: Trial) -> TrialOutcome:
    """Read what a finished trial wrote."""
    return TrialOutcome(**json.loads(trial.record.read_bytes()))
