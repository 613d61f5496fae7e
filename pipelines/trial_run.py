"""A trial while it runs: an ordinary `pretrain`, in a process of Ray Tune's."""

import json
from collections.abc import Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Condition, Event
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError

from droppos.errors import ConfigError
from pipelines import checkpoints
from pipelines.attempt import SupersededError, claim_for_driver
from pipelines.background import in_background
from pipelines.holdout import measure_checkpoint
from pipelines.ledger import begin_anew
from pipelines.order import Schedule
from pipelines.pretrain import Outcome, pretrain
from pipelines.recipe import Objective, Recipe
from pipelines.sharing import Sharing
from pipelines.storage import open_place
from pipelines.trials import figures_in, trial_recipe

REPORT_EVERY_S = 1.0
"""Seconds between two reports of a trial's steps; measurements are reported at once."""
LEAVE_S = 120.0
"""Seconds a trial has to save a last checkpoint and end."""
SAVED_S = 60.0
"""Seconds to wait for the checkpoint of a measurement, before another trial starts from it."""

POINTER = "checkpoint.json"
"""What Tune keeps of a checkpoint: where ours is."""

ADOPTED = "adopted"
"""Names the checkpoint of another trial that this one went on from last, and its own values."""


@dataclass(frozen=True, slots=True)
class Common:
    """What all trials of a search are told."""

    recipe: Recipe
    """The search, with each trial's part of CPUs and memory in its data section."""
    schedule: Schedule
    objective: Objective
    parent_run: str
    """MLflow run that trials are shown under."""
    sharing: Sharing | None
    bell: Any
    """Handle of the `pipelines.bell.Bell`."""


class Progress:
    """What a run tells, gathered for Tune, which asks from another thread."""

    def __init__(self, objective: Objective, epochs: int) -> None:
        self._objective = objective
        self._epochs = epochs
        self._measured: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._saved = Condition()
        self._step = self._steps = self._saved_step = 0
        self._figures: dict[str, float] = {}
        self._known: dict[str, str] = {}
        self.unmeasured = ""
        """Why nothing will be measured."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Take one event of the run."""
        match event["kind"]:
            case "plan":
                self._step, self._steps = event["step"], event["steps"]
                self._known["tracking_run"] = event["tracking_run"]
            case "metrics":
                self._step = event["step"]
                found = figures_in(event["values"])
                self._figures |= found
                if self._objective in found:
                    epoch = self._epochs * event["step"] / self._steps
                    objective = {"objective": found[self._objective], "epoch": epoch}
                    self._measured.put(self._told | objective)
            case "not_measured":
                self.unmeasured = event["error"]
            case "checkpoint":
                with self._saved:
                    self._saved_step = event["saved"].step
                    self._known["checkpoint"] = event["saved"].uri
                    self._saved.notify_all()

    def next(self, timeout_s: float) -> dict[str, Any]:
        """Wait for the next measurement; without one in time, tell how far the run is."""
        try:
            return self._measured.get(timeout=timeout_s)
        except Empty:
            return self._told

    def measured(self) -> dict[str, Any] | None:
        """Give a measurement that was not told yet, if there is one."""
        return None if self._measured.empty() else self._measured.get()

    def await_saved(self, timeout_s: float) -> None:
        """Wait until what was measured last is in a checkpoint."""
        step = self._step
        with self._saved:
            self._saved.wait_for(lambda: self._saved_step >= step, timeout_s)

    @property
    def _told(self) -> dict[str, Any]:
        figures = {"figures": dict(self._figures)}
        return {"step": self._step, "steps": self._steps, **self._known, **figures}


class TrialRun(tune.Trainable):
    """What Tune runs. Its `step` is not one of the run, which goes on by itself meanwhile."""

    def setup(self, config: dict[str, Any], common: Common | None = None) -> None:
        """Prepare; the run begins with the first `step`, for Tune may still give a checkpoint."""
        assert common is not None
        self._point = config["point"]
        trial = trial_recipe(common.recipe, common.schedule, config["number"], self._point)
        # Named by its first values, though they may have changed since.
        self._recipe = replace(trial, run=replace(trial.run, name=config["name"]))
        self._common = common
        self._sharing = common.sharing.of(config["name"]) if common.sharing else None
        self._progress = Progress(common.objective, trial.optim.epochs)
        self._stop = Event()
        self._running: Future[Outcome] | None = None
        # Its newest checkpoint may be another trial's, of other values, that an earlier process
        # of this one went on from and was killed before it made one of its own.
        self._adopted = common.recipe.search.scheduler == "pbt"

    def step(self) -> dict[str, Any]:
        """Tell of the next measurement, or after a second how far the run is."""
        rung = self._rung()
        if self._running is None:
            if rung:
                return {"stopped": True, "done": True}
            self._running = in_background(self._run)
        if rung and not self._running.done():
            self.cleanup()
            return self._progress.next(0) | {"stopped": True, "done": True}
        if self._progress.unmeasured and not self._running.done():
            self.cleanup()  # a trial that is not measured is compared with none
            return {"error": self._progress.unmeasured, "done": True}
        if not self._running.done():
            return self._progress.next(REPORT_EVERY_S)
        if (measured := self._progress.measured()) is not None:
            return measured
        try:
            return self._conclude(self._running.result())
        except (ConfigError, SupersededError) as error:  # as it would be the next time
            return {"error": str(error), "done": True}

    def _rung(self) -> bool:
        with suppress(RayError):  # the search's driver is gone, and this process with it, soon
            return bool(ray.get(self._common.bell.rung.remote(), timeout=5))
        return False

    def _run(self) -> Outcome:
        try:
            return pretrain(
                self._recipe,
                resume=True,
                allow_changes=self._adopted,
                on_event=self._progress.event,
                parent_run=self._common.parent_run,
                stop=self._stop.is_set,
                sharing=self._sharing,
            )
        finally:
            if self._sharing is not None:
                self._sharing.leave()

    def _conclude(self, outcome: Outcome) -> dict[str, Any]:
        assert outcome.checkpoint is not None
        figures = figures_in(outcome.metrics)
        if self._common.objective not in figures:  # measured by an earlier process, since killed
            figures |= figures_in(measure_checkpoint(self._recipe, outcome.checkpoint))
        return {
            "step": outcome.checkpoint.step,
            "steps": outcome.steps,
            "figures": figures,
            "objective": figures[self._common.objective],
            "finished": True,
            "checkpoint": outcome.checkpoint.uri,
            "tracking_run": outcome.tracking_run,
            "done": True,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Tell Tune where the newest checkpoint is; the weights stay where they are."""
        self._progress.await_saved(SAVED_S)
        newest = checkpoints.newest(open_place(self._recipe.home))
        pointer = {"uri": newest.uri if newest else None}
        (Path(checkpoint_dir) / POINTER).write_text(json.dumps(pointer))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Start from a checkpoint, of this trial or of a better one."""
        uri = json.loads((Path(checkpoint) / POINTER).read_text())["uri"]
        home = open_place(self._recipe.home)
        self._adopted = True
        known = home / ADOPTED
        if uri is None or uri.startswith(f"{home.uri}/"):
            return
        # With the values that it is told to go on with: the same weights may be taken twice.
        adoption = json.dumps([uri, self._point], sort_keys=True).encode()
        if known.exists() and known.read_bytes() == adoption:
            return  # and went on from there, before its process died
        claim_for_driver(home)  # what an older process of this trial still saves counts no more
        checkpoints.adopt(home, checkpoints.at(uri))
        begin_anew(home)  # its steps from here on are not those of the weights it had
        known.write_bytes(adoption)

    def cleanup(self) -> None:
        """Have the run save a last checkpoint, and end."""
        self._stop.set()
        if self._running is not None:
            wait([self._running], LEAVE_S)
