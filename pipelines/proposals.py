"""What a search tries next: every combination, draws, or what Optuna makes of what it has seen.

Tune asks for one point after another. What has ended is in the search's table and is not tried
again; what was under way is handed out first, and goes on from its checkpoints.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Protocol, cast

from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher

from droppos.errors import ConfigError
from pipelines.order import Schedule
from pipelines.recipe import Recipe
from pipelines.space import Point, Space, grid_points, random_points, read_space, to_tune
from pipelines.trials import Record, TrialTable, trial_recipe

OBJECTIVE = "objective"
"""Key of a trial's result."""
ASKED_AGAIN = 100
"""Times Optuna is asked for a point that was not tried yet, before the space is taken for empty."""

_log = logging.getLogger(__name__)


class Source(Protocol):
    """Where points come from."""

    def next(self) -> Point | None:
        """Give a point that was not given yet; None when there is none left."""

    def told(self, point: Point, objective: float | None) -> None:
        """Learn how good a point was; None if it failed."""


class Listed:
    """Points that are known from the start."""

    def __init__(self, points: Sequence[Point], tried: Sequence[Point]) -> None:
        self._left = deque(point for point in points if point not in tried)

    def next(self) -> Point | None:
        """Give the next of the list."""
        return self._left.popleft() if self._left else None

    def told(self, point: Point, objective: float | None) -> None:
        """Learn nothing."""


class Tpe:
    """Optuna's tree-structured Parzen estimator, through Ray Tune."""

    def __init__(self, space: Space, seed: int, trials: int, table: TrialTable) -> None:
        """Begin with what is known.

        Args:
            space: What may be tried.
            seed: Of the draws.
            trials: Of the whole search; a third of them, at most ten, are drawn at random first.
            table: What was tried before.
        """
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        self._points: dict[str, Point] = {}
        self._tried: list[Point] = []
        self._asked = 0
        # Another seed when it goes on: the same one would draw what was tried before.
        sampler = optuna.samplers.TPESampler(
            seed=seed + len(table),
            n_startup_trials=max(3, min(10, trials // 3)),
            constant_liar=True,  # or those side by side would be drawn near one another
        )
        self._search = OptunaSearch(
            OptunaSearch.convert_search_space(dict(to_tune(space))),
            metric=OBJECTIVE,
            mode="max",
            sampler=sampler,
        )
        for record in table:
            self._tried.append(record.point)
            if record.ended and record.objective is not None:
                self._search.add_evaluated_point(dict(record.point), record.objective)

    def next(self) -> Point | None:
        """Ask Optuna, again if need be."""
        for _ in range(ASKED_AGAIN):
            self._asked += 1
            name = str(self._asked)
            drawn: Any = self._search.suggest(name)
            point = {one.field: one.rounded(drawn[one.field]) for one in self._space}
            if point not in self._tried:
                self._tried.append(point)
                self._points[name] = point
                return point
            self._search.on_trial_complete(name, error=True)
        return None

    def told(self, point: Point, objective: float | None) -> None:
        """Hand on how good it was."""
        for name, asked in list(self._points.items()):
            if asked == point:
                del self._points[name]
                result = None if objective is None else {OBJECTIVE: objective}
                self._search.on_trial_complete(name, result, error=objective is None)
                return
        if objective is not None:  # of a trial that an earlier process began
            self._search.add_evaluated_point(dict(point), objective)


def source_of(recipe: Recipe, table: TrialTable) -> tuple[Source, int]:
    """Choose where points come from, and count those that are left to try.

    Raises:
        ConfigError: If the space is impossible.
    """
    space = read_space(recipe)
    tried = [record.drawn for record in table]
    search = recipe.search
    if search.algorithm == "tpe":
        left = max(0, search.trials - len(table))
        return Tpe(space, recipe.run.seed, search.trials, table), left
    if search.algorithm == "grid":
        points = grid_points(space, recipe)
    else:
        points = random_points(space, search.trials, recipe.run.seed)
    listed = Listed(points, tried)
    return listed, sum(point not in tried for point in points)


class Proposals(Searcher):
    """What Tune asks for the next trial."""

    def __init__(
        self,
        recipe: Recipe,
        schedule: Schedule,
        table: TrialTable,
        source: Source,
        left: int,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(metric=OBJECTIVE, mode="max")
        self.stopped = stopped
        """Whether no trial is to begin any more."""
        self._recipe = recipe
        self._schedule = schedule
        self._table = table
        self._source = source
        self.left = left
        """Trials that may still begin; 0 as soon as there is nothing left to try."""
        self._again = deque(table.unfinished)
        self._points: dict[str, Point] = {}

    def suggest(self, trial_id: str) -> Any:
        """Give a trial to go on with, or a new one."""
        if self.stopped():
            return Searcher.FINISHED
        record = self._again.popleft() if self._again else self._new()
        if record is None:
            return Searcher.FINISHED
        self._points[trial_id] = dict(record.point)
        return {"number": record.number, "name": record.name, "point": dict(record.point)}

    def _new(self) -> Record | None:
        while self.left > 0:
            point = self._source.next()
            if point is None:
                self.left = 0
                break
            self.left -= 1
            number = len(self._table)
            try:
                name = trial_recipe(self._recipe, self._schedule, number, point).run.name
            except ConfigError as error:  # corners are checked before; what lies between may be odd
                _log.warning("passed over: %s", error)
                self._source.told(point, None)
                continue
            record = Record(number, name, point)
            self._table.records[name] = record
            return record
        return None

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Hand on how good it was."""
        objective = (result or {}).get(OBJECTIVE)
        self._source.told(self._points.pop(trial_id), None if error else objective)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Wait for the end."""

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Take nothing from Tune: all is known."""
        return True

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: a search that goes on reads its own table."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing, likewise."""


def scheduler_of(recipe: Recipe, table: TrialTable) -> TrialScheduler:
    """Make what ends trials early, and have it know of those that ended before.

    Raises:
        ConfigError: If the scheduler cannot work on this space.
    """
    search = recipe.search
    every = search.grace_epochs or recipe.measure.every_epochs
    if search.scheduler == "none":
        return FIFOScheduler()
    if search.scheduler == "pbt":
        return _population(recipe, every)
    if any(dimension.field == "optim.epochs" for dimension in read_space(recipe)):
        raise ConfigError(
            "search.scheduler asha compares trials at the same epoch, so optim.epochs may not "
            "vary; take it out of search.space, or take search.scheduler none"
        )
    if every > recipe.optim.epochs:
        raise ConfigError(
            f"search.scheduler asha looks at trials from epoch {every} on, but they have "
            f"{recipe.optim.epochs} epochs; lower search.grace_epochs or measure.every_epochs"
        )
    asha = Asha(
        time_attr="epoch",
        metric=OBJECTIVE,
        mode="max",
        max_t=recipe.optim.epochs,
        grace_period=every,
        reduction_factor=search.reduction_factor,
        stop_last_trials=False,
    )
    for record in table:
        if record.steps:  # those that go on, too, or the rungs would know the losers alone
            known: Any = SimpleNamespace(config={"name": record.name})
            nobody: Any = None
            asha.on_trial_add(nobody, known)
            for step, objective in record.history:
                result = {"epoch": recipe.optim.epochs * step / record.steps, OBJECTIVE: objective}
                asha.on_trial_result(nobody, known, result)
    return asha


class Asha(ASHAScheduler):
    """Ray's asynchronous successive halving, which would also end a trial at its last step.

    And which knows trials by Tune's own identifier: one that goes on in another process has another
    and would be held against itself.
    """

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take a trial by its name."""
        super().on_trial_add(tune_controller, _named(trial))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Forget a trial."""
        super().on_trial_complete(tune_controller, _named(trial), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Forget a trial."""
        super().on_trial_remove(tune_controller, _named(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide on a trial, unless it is done."""
        action = super().on_trial_result(tune_controller, _named(trial), result)
        done = result.get("step", 0) == result.get("steps")
        return TrialScheduler.CONTINUE if done else action


def _named(trial: Any) -> Any:
    return SimpleNamespace(trial_id=trial.config["name"])


class Population(PopulationBasedTraining):
    """Ray's population-based training, for trials that have names and folders of their own."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take a trial; Ray's refuses those that a searcher proposed, though it could change them.

        What a searcher makes of a point that changes later is the searcher's affair: ours, that
        know all points beforehand, make nothing of it.
        """

        class WithoutSearcher:
            search_alg = None

        super().on_trial_add(cast(Any, WithoutSearcher()), trial)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> Any:
        """Take over another trial's values, not its name."""
        config, operations = super()._get_new_config(trial, trial_to_clone)
        own = {key: trial.config[key] for key in ("name", "number")}
        return {**config, **own}, operations


MUTABLE = (
    "method.sigma",
    "method.mask_ratio",
    "method.position_mask_ratio",
    "method.tau",
    "method.position_weight",
    "optim.lr_per_256",
    "optim.clip_norm",
)
"""Fields that may change while a run trains: weights, optimizer state and order stay what they are.
"""


def _population(recipe: Recipe, every: int) -> TrialScheduler:
    space = read_space(recipe)
    if recipe.search.algorithm == "tpe":
        raise ConfigError(
            "search.scheduler pbt changes values on the way, so tpe would learn from points that "
            "were left; take search.algorithm random or grid"
        )
    for dimension in space:
        if dimension.field not in MUTABLE:
            raise ConfigError(
                f"search.scheduler pbt changes values while trials train, which {dimension.field} "
                f"does not allow; search only {', '.join(MUTABLE)}, or take search.scheduler asha"
            )
    grid = recipe.search.algorithm == "grid"
    trials = len(grid_points(space, recipe)) if grid else recipe.search.trials
    if recipe.search.max_concurrent < trials:
        raise ConfigError(
            f"search.scheduler pbt trains its whole population of {trials} at once, but "
            f"search.max_concurrent is {recipe.search.max_concurrent}; make it {trials}, or search "
            "fewer"
        )

    def inside(config: dict[str, Any]) -> dict[str, Any]:
        """Bring values that Tune has multiplied back into the space."""
        point = {one.field: one.rounded(config["point"][one.field]) for one in space}
        return {**config, "point": point}

    mutations = {one.field: list(one.values) if one.listed else one.domain for one in space}
    return Population(
        time_attr="epoch",
        metric=OBJECTIVE,
        mode="max",
        perturbation_interval=every,
        hyperparam_mutations={"point": mutations},
        custom_explore_fn=inside,
        require_attrs=False,
        log_config=False,
    )
