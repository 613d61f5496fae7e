"""The drill: a real run on real nodes, disturbed on purpose, beside an undisturbed twin.

Each fault strikes when the run has calmed down from the one before. What the run committed is then
held against its schedule, picture by picture, and its loss against the twin's.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from droppos.errors import ConfigError, DropposError
from pipelines import checkpoints
from pipelines.audit import schedule_of
from pipelines.demo_pictures import write_demo_pictures
from pipelines.drill_faults import Fault, faults_for
from pipelines.drill_stage import Stage, Worker, stage_for
from pipelines.groundwork import located
from pipelines.heard import OnEvent
from pipelines.ids import id_files, read_ids
from pipelines.prepare import prepare
from pipelines.pretrain import Outcome, pretrain
from pipelines.recipe import Recipe
from pipelines.retries import LONGEST_PAUSE
from pipelines.storage import Place, open_place
from pipelines.tally import Plan
from pipelines.tracking import client_of, local_folder, tracking_uri

TILES = 32
"""Tiles of each embedded photograph, when no data set is named."""
RECOVERY_S = 300
"""Seconds after which a fault counts as not recovered from."""
CALM_STEPS = 2
"""Steps after a checkpoint at which the next fault strikes, so that there is something to lose."""
LOSS_TOLERANCE = 0.01
"""Largest relative difference of the last loss from the twin's. Not zero: fewer workers add up the
same images in another order, and rounding grows from step to step."""


@dataclass
class Bout:
    """One fault, and how the run took it."""

    fault: str
    step: int
    """Steps done when it struck."""
    struck_at: float
    noticed_s: float | None = None
    """Seconds until the run told of it."""
    recovered_s: float | None = None
    """Seconds until it was further than it had been, with the fault over."""
    redone: int = 0
    """Steps that were done a second time."""
    workers: int = 0
    """Workers it went on with."""
    missing: int = 0
    """Pictures of the schedule that were not trained on, from this fault to the next."""
    repeated: int = 0
    """Pictures that were trained on besides the schedule's."""


@dataclass(frozen=True, slots=True)
class DrillReport:
    """How a run took what was done to it."""

    recipe: Recipe
    """The disturbed run, where it was."""
    bouts: list[Bout]
    not_struck: list[str]
    """Faults that the run did not live to see."""
    error: str
    """Why it ended early, if it did."""
    steps: int
    """Steps committed."""
    missing: int
    """Pictures of the schedule, up to that step, that were not trained on."""
    repeated: int
    """Pictures that were trained on besides."""
    logged: int | None
    """Steps whose loss MLflow has; None if the run ended early."""
    loss: float | None
    twin_loss: float | None
    """Loss of the last step, and of the same step of the undisturbed run."""

    @property
    def recovered(self) -> int:
        """Faults that were recovered from."""
        return sum(bout.recovered_s is not None for bout in self.bouts)

    @property
    def passed(self) -> bool:
        """Whether nothing was lost."""
        return not (
            self.error
            or self.not_struck
            or self.recovered < len(self.bouts)
            or self.missing
            or self.repeated
            or self.logged != self.steps
            or self.loss is None
            or self.twin_loss is None
            or not abs(self.loss - self.twin_loss) <= LOSS_TOLERANCE * abs(self.twin_loss)
        )

    @property
    def line(self) -> str:
        """All of it for a script."""
        faults = len(self.bouts) + len(self.not_struck)
        return (
            f"drill faults={faults} recovered={self.recovered} lost={self.missing} "
            f"repeated={self.repeated}"
        )


def drill(
    recipe: Recipe,
    *,
    outage_s: float = 30,
    only: Collection[str] = (),
    say: Callable[[str], None],
    on_event: OnEvent | None = None,
) -> DrillReport:
    """Disturb a run with every fault in turn, and hold it against a twin.

    Args:
        recipe: The run; a suffix of the time is added to its name. Without data.path it trains on
            embedded photographs.
        outage_s: Seconds that storage and MLflow are away.
        only: Keys of the faults that are wanted; all when empty.
        say: Told what is done, and what came of it.
        on_event: Hears of both runs' progress.

    Raises:
        ConfigError: If the recipe cannot be drilled.
        TrainingError: If already the undisturbed run failed.
    """
    recipe = _drillable(recipe, outage_s)
    folder = local_folder(recipe) / recipe.run.name
    folder.mkdir(parents=True, exist_ok=True)
    say("starting nodes, storage and MLflow")
    # Ray prints the log of whatever dies to standard output.
    with (
        (folder / "ray.log").open("w") as log,
        redirect_stdout(log),
        stage_for(recipe, folder) as stage,
    ):
        recipe = located(_with_data(stage, folder))
        faults = faults_for(stage, open_place(recipe.home), outage_s, only)
        referee = Referee(faults, recipe.run.workers, stage, say, on_event)
        error, outcome = "", None
        try:
            outcome = pretrain(recipe, on_event=referee, stop=referee.is_over)
        except DropposError as failure:
            error = str(failure)
            say(f"the run ended early: {error}")
        say("the same run without faults")
        twin = Twin(referee.step, on_event)
        quiet = replace(recipe, run=replace(recipe.run, name=f"{recipe.run.name}-twin"))
        pretrain(quiet, on_event=twin, stop=twin.is_over)
        return _report(recipe, referee, twin, outcome, error)


def _drillable(recipe: Recipe, outage_s: float) -> Recipe:
    """Name the run anew, and have it notice what hangs before long.

    Raises:
        ConfigError: If nothing could be seen of what a fault does.
    """
    if recipe.run.log_every != 1 or not recipe.run.record_ids:
        raise ConfigError(
            f"a drill looks at every step, got run.log_every={recipe.run.log_every} and "
            f"run.record_ids={recipe.run.record_ids}; add --run.log-every 1 --run.record-ids True"
        )
    if recipe.run.checkpoint_every <= CALM_STEPS:
        raise ConfigError(
            f"a drill strikes {CALM_STEPS} steps after a checkpoint, got run.checkpoint_every="
            f"{recipe.run.checkpoint_every}; take {CALM_STEPS + 1} or more"
        )
    name = f"{recipe.run.name}-{datetime.now():%Y%m%d-%H%M%S}"
    # Storage that is away must not look like workers that hang: after it is back, a read may still
    # pause, and wait for another that pauses.
    hang_s = min(recipe.run.hang_timeout_s, outage_s + 3 * LONGEST_PAUSE)
    return replace(recipe, run=replace(recipe.run, name=name, hang_timeout_s=hang_s))


def _with_data(stage: Stage, folder: Path) -> Recipe:
    """Give the run embedded photographs, unless it has data of its own."""
    recipe = stage.recipe
    if recipe.data.path is not None:
        return recipe
    pictures = write_demo_pictures(folder / "pictures", TILES, holdout_tiles=1)
    data = f"{recipe.run.storage}/{recipe.run.name}-data"
    prepare(str(pictures.train), data, group_rows=16)
    return replace(recipe, data=replace(recipe.data, path=data))


@dataclass
class Referee:
    """Hears of the disturbed run, strikes when it is calm, and takes the times."""

    faults: list[Fault]
    """Those to come."""
    workers: int
    stage: Stage
    say: Callable[[str], None]
    on_event: OnEvent | None
    bouts: list[Bout] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    step: int = 0
    """Steps done, of the run as it stands."""
    _crew: dict[int, Worker] = field(default_factory=dict)
    _size: int = 0
    _saved: int = -1
    _fault: Fault | None = None
    _over: Any = None
    _restarted: bool = False
    _came_back: bool = False
    _changed_at: float = field(default_factory=monotonic)
    """When a fault last struck or was recovered from."""

    def is_over(self) -> bool:
        """Whether the run may end: all is recovered from, or something was not."""
        late = monotonic() - self._changed_at > RECOVERY_S
        return late or (self._fault is None and not self.faults)

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take one event of the run, and strike if it is time to."""
        if self._fault is not None:
            self._follow(self._fault, self.bouts[-1], event)
        match event["kind"]:
            case "group":
                self._crew, self._size, self._saved = {}, event["workers"], -1
            case "started":
                self._crew[event["rank"]] = (event["node"], event["pid"])
                if event["rank"] == 0:  # once, or what is done again would not be seen
                    self.step = event["step"]
            case "checkpoint":
                self._saved = event["step"]
            case "metrics" if "train/loss" in event["values"]:
                self.step = event["step"]
                self.losses[self.step] = event["values"]["train/loss"]
        if self.on_event is not None:
            self.on_event(event)
        if self._fault is None and self.faults and self._is_time(self.faults[0], event["kind"]):
            self._strike(self.faults.pop(0))

    def _is_time(self, fault: Fault, kind: str) -> bool:
        if len(self._crew) < self._size or self._saved < 0:
            return False
        if self._size < self.workers and not fault.any_size:
            return False
        return kind == "metrics" and self.step >= self._saved + CALM_STEPS

    def _strike(self, fault: Fault) -> None:
        self.say(f"step {self.step}: {fault.name}")
        self.bouts.append(Bout(fault.name, self.step, monotonic()))
        self._fault, self._restarted, self._came_back = fault, False, False
        self._changed_at = monotonic()
        self._over = fault.strike([self._crew[rank] for rank in sorted(self._crew)])

    def _follow(self, fault: Fault, bout: Bout, event: Mapping[str, Any]) -> None:
        kind, since = event["kind"], monotonic() - bout.struck_at
        if kind in fault.notices and bout.noticed_s is None:
            bout.noticed_s = since
        if kind == "started" and event["rank"] == 0:
            bout.redone += max(0, self.step - event["step"])
            bout.workers = event["workers"]
            self._restarted = True
        if kind == fault.back and self._over.is_set():
            self._came_back = True
        if (
            kind == "metrics"
            and "train/loss" in event["values"]
            and event["step"] > bout.step
            and (self._restarted or not fault.restarts)
            and (self._came_back or not fault.back)
            and self._over.is_set()
        ):
            bout.recovered_s = since
            self._changed_at = monotonic()
            bout.workers = bout.workers or self._size
            noticed = "not told of" if bout.noticed_s is None else f"told of {bout.noticed_s:.1f} s"
            self.say(f"  {noticed} after, recovered {since:.1f} s after, {bout.redone} steps again")
            self._fault = None


@dataclass
class Twin:
    """Hears of the run without faults, and ends it where the other ended."""

    steps: int
    on_event: OnEvent | None
    losses: dict[int, float] = field(default_factory=dict)

    def is_over(self) -> bool:
        """Whether it has come as far."""
        return max(self.losses, default=0) >= self.steps

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take one event of the run."""
        if event["kind"] == "metrics" and "train/loss" in event["values"]:
            self.losses[event["step"]] = event["values"]["train/loss"]
        if self.on_event is not None:
            self.on_event(event)


def _report(
    recipe: Recipe, referee: Referee, twin: Twin, outcome: Outcome | None, error: str
) -> DrillReport:
    home = open_place(recipe.home)
    saved = checkpoints.newest(home)
    steps = saved.step if saved else 0
    missing = repeated = 0
    starts = [bout.step for bout in referee.bouts]
    for step, lost, again in differences(home, saved) if saved else ():
        missing += lost
        repeated += again
        if not referee.bouts:  # it ended before anything was struck
            continue
        # Steps up to the first fault are its own, too: they have to be somebody's.
        bout = referee.bouts[max(0, int(np.searchsorted(starts, step, side="right")) - 1)]
        bout.missing += lost
        bout.repeated += again
    if not error and referee.bouts and referee.bouts[-1].recovered_s is None:
        error = f"{referee.bouts[-1].fault} was not recovered from within {RECOVERY_S} s"
    logged = _logged(recipe, outcome) if outcome else None
    if logged is not None and len(set(logged)) != len(logged):
        error = error or f"MLflow has some of the {len(logged)} losses twice"
    return DrillReport(
        recipe=recipe,
        bouts=referee.bouts,
        not_struck=[fault.name for fault in referee.faults],
        error=error,
        steps=steps,
        missing=missing,
        repeated=repeated,
        logged=None if logged is None else len(set(logged)),
        loss=referee.losses.get(steps),
        twin_loss=twin.losses.get(steps),
    )


def differences(home: Place, saved: checkpoints.Saved) -> Iterator[tuple[int, int, int]]:
    """Compare each committed step's pictures with the schedule's.

    Yields:
        Step, counted from 0, pictures that are missing in it, and pictures it has besides.
    """
    schedule = schedule_of(saved)
    seen: dict[int, list[int]] = {}
    for file in id_files(home):
        if file.end <= saved.step:
            table = read_ids(file)
            for step, row in zip(table["step"].to_pylist(), table["row"].to_pylist(), strict=True):
                seen.setdefault(step, []).append(row)
    plan = Plan(schedule)
    for step in range(saved.step):
        planned, found = plan.rows(step), np.array(seen.get(step, []), np.int64)
        there = np.isin(planned, found).sum()
        yield step, int(len(planned) - there), int(len(found) - there)


def _logged(recipe: Recipe, outcome: Outcome) -> list[int]:
    """List the steps whose loss MLflow has."""
    client = client_of(tracking_uri(recipe))
    history = client.get_metric_history(outcome.tracking_run, "train/loss")
    return [point.step for point in history]
