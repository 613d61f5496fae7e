"""The trials of a search: what each one is, where it stands, and the table of all of them.

The search's driver alone writes the table, each time a trial begins, is measured or ends. A search
that goes on finds there what was tried, and so gives no trial twice and forgets none.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from droppos.config import Grid
from droppos.errors import ConfigError
from pipelines.order import Schedule
from pipelines.recipe import Objective, Recipe, Search
from pipelines.shards import load_manifest
from pipelines.space import Point, apply
from pipelines.storage import Place, open_place

FIGURES: Mapping[str, str] = {
    "position_skill": "holdout/position/skill",
    "knn": "holdout/features/knn_accuracy",
    "effective_rank": "holdout/features/effective_rank",
    "train_excess_nats": "train/position_excess_nats",
}
"""What trials are compared by, and the metric of a run that tells it. The last is no objective: it
is measured on the task that the trial itself chose."""

State = Literal["waiting", "running", "finished", "early", "failed", "stopped"]
"""early: ended by search.scheduler, for others did better. failed: its error is told. stopped: it
was interrupted, and goes on when the search does."""

FILE = "trials.json"


@dataclass(slots=True)
class Record:
    """Where a trial stands."""

    number: int
    name: str
    point: Point
    """Value of each searched field; population-based training changes them on the way."""
    drawn: Point = field(default_factory=dict)
    """The same as it was when the trial began."""
    state: State = "running"
    objective: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
    """Last value of each of FIGURES that it has."""
    history: list[tuple[int, float]] = field(default_factory=list)
    """Step and objective, each time it was measured."""
    step: int = 0
    steps: int = 0
    """Steps of the whole trial."""
    seconds: float = 0.0
    """Time it ran, over all its beginnings."""
    checkpoint: str | None = None
    """Folder of the last one that is known."""
    tracking_run: str | None = None
    """Identifier of the MLflow run."""
    error: str | None = None

    def __post_init__(self) -> None:
        self.drawn = self.drawn or dict(self.point)

    @property
    def ended(self) -> bool:
        """Whether it is not to be run again; a search that goes on tries failed ones again."""
        return self.state in {"finished", "early"}


class TrialTable:
    """All trials of a search, in storage."""

    def __init__(self, home: Place) -> None:
        """Read what is there.

        Args:
            home: Folder of the search.
        """
        self._file = home / FILE
        self.records: dict[str, Record] = {}
        """By name, in the order in which they began."""
        if self._file.exists():
            told = json.loads(self._file.read_bytes())
            for entry in told["trials"]:
                record = Record(**entry)
                record.history = [(step, value) for step, value in record.history]
                self.records[record.name] = record

    def write(self, objective: Objective) -> None:
        """Keep it as it is now."""
        self._file.write_bytes(self.text(objective).encode())

    def text(self, objective: Objective) -> str:
        """Write it for storage and MLflow."""
        trials = [asdict(record) for record in self]
        return json.dumps({"objective": FIGURES[objective], "trials": trials}, indent=1)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records.values())

    def __len__(self) -> int:
        return len(self.records)

    @property
    def unfinished(self) -> list[Record]:
        """Those that began and did not end, or failed."""
        return [record for record in self if not record.ended]


def objective_of(recipe: Recipe) -> Objective:
    """Tell by which figure the trials of a search are compared.

    By default k-NN where held-out pictures have labels, for that is what features are for, and
    position skill where they have none. Effective rank is never the default: noise has a high one.

    Raises:
        ConfigError: If the figure cannot be measured there.
    """
    if recipe.measure.aside:
        raise ConfigError(
            "measure.aside is True: a search compares its trials at the epoch where they are "
            "measured, so they have to wait for it; leave measure.aside out"
        )
    if recipe.data.holdout is None:
        raise ConfigError(
            "data.holdout is not set: a search compares its trials on held-out pictures; set it to "
            "a prepared data set that none of them trains on"
        )
    classes = load_manifest(open_place(recipe.data.holdout)).classes
    labelled = classes is not None and len(classes) > 1
    wanted = recipe.search.objective
    if wanted == "knn" and not labelled:
        raise ConfigError(
            f"search.objective is knn, but the pictures of data.holdout {recipe.data.holdout} have "
            "no two classes; prepare them from a folder with a sub-folder per class, or take "
            "position_skill"
        )
    if wanted != "auto":
        return wanted
    return "knn" if labelled else "position_skill"


def trial_recipe(recipe: Recipe, schedule: Schedule, number: int, point: Point) -> Recipe:
    """Write the recipe of a trial.

    Args:
        recipe: The search.
        schedule: Of the recipe.
        number: Of the trial, from 0.
        point: Value of each searched field.

    Returns:
        An ordinary run, below the search's home, under a name that tells the point.

    Raises:
        ConfigError: If it could not be run.
    """
    varied = apply(recipe, point)
    replace(
        schedule,
        global_batch=varied.optim.global_batch,
        window=varied.data.window,
        epochs=varied.optim.epochs,
    )  # refuses a batch larger than the data
    run = replace(varied.run, name=trial_name(recipe, number, point), storage=recipe.home)
    return replace(varied, run=run, search=Search())


def trial_name(recipe: Recipe, number: int, point: Point) -> str:
    """Name a trial by what a person wants to know of it: ratios-002-mask_ratio=0.5-sigma=1."""
    values = [
        f"{name.rpartition('.')[2]}={f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in point.items()
    ]
    return "-".join([recipe.run.name, f"{number:03d}", *values])


def require_comparable(trials: Iterable[Recipe], grid: Grid, objective: Objective) -> None:
    """Refuse trials that the objective could not compare.

    Raises:
        ConfigError: Naming the field.
    """
    for recipe in trials:
        if recipe.run.min_workers is not None:
            raise ConfigError(
                f"run.min_workers is {recipe.run.min_workers}: trials of a search have a fixed "
                "size, or they would grow into each other's room; leave it out"
            )
        if objective != "position_skill":
            continue
        if not recipe.method.predicts_positions:
            raise ConfigError(
                f"method.objective {recipe.method.objective} has no positions, and "
                "search.objective is position_skill; take knn or effective_rank, or a "
                "method.objective that predicts positions"
            )
        if recipe.model.grid != grid:
            raise ConfigError(
                f"model.size {recipe.model.size} has a patch grid of {tuple(recipe.model.grid)}, "
                f"the recipe {tuple(grid)}, so position skill would be another figure; set "
                "model.patch_size in the recipe"
            )


def figures_in(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Pick the figures out of a run's metrics."""
    return {name: metrics[metric] for name, metric in FIGURES.items() if metric in metrics}
