"""The driver of a search: has Tune run the trials, and keeps the table of what it tells of them."""

import logging
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic
from typing import Any

import ray
from ray import tune
from ray.tune import Callback, FailureConfig, TuneConfig, Tuner

from droppos.errors import DataError
from pipelines.attempt import Attempt, SupersededError, claim_for_driver
from pipelines.background import stop_on_signal
from pipelines.bell import Bell
from pipelines.cluster import buffer_mb_of, connect
from pipelines.crew import AT_HEAD
from pipelines.heard import OnEvent
from pipelines.ledger import Ledger
from pipelines.memory import Footprint
from pipelines.order import Schedule
from pipelines.proposals import Proposals, Source, scheduler_of
from pipelines.recipe import Objective, Recipe
from pipelines.resources import Fit
from pipelines.secrets import redact
from pipelines.sharing import Shared, Sharing
from pipelines.space import read_space
from pipelines.storage import open_place
from pipelines.trial_run import Common, TrialRun
from pipelines.trials import Record, TrialTable

DRIVER = {"CPU": 0, "memory": 1e6}
"""What Tune reserves for a trial's own process. It must be something; not a CPU, for those are
all shared out to training and decoding."""

logger = logging.getLogger(__name__)


class Driver(Callback):
    """Runs the trials, and keeps the table of what Tune tells of them."""

    def __init__(
        self,
        recipe: Recipe,
        schedule: Schedule,
        objective: Objective,
        table: TrialTable,
        say: OnEvent,
    ) -> None:
        self.recipe = recipe
        self.schedule = schedule
        self.objective: Objective = objective
        self.table = table
        self._say = say
        self._sharing: Sharing | None = None
        self._asked_to_end = threading.Event()
        self._bell: Any = None
        self._attempt: Attempt | None = None
        self._superseded: SupersededError | None = None
        self._since: dict[str, float] = {}
        self.at_once = 1
        """Trials that run at the same time, at most."""
        self.not_begun = 0
        """Trials that are still to begin when the search ends: it was interrupted."""

    def __getstate__(self) -> dict[str, Any]:
        """Be empty in the copy that Tune keeps in storage: a terminal cannot go there."""
        return {}

    def tell_plan(self, new: int) -> None:
        """Tell what is known before anything runs, and how many trials are to begin."""
        self._say(
            {
                "kind": "search",
                "trials": len(self.table) + new,
                "objective": self.objective,
            }
        )
        for record in self.table:
            if not record.ended:
                record.state = "waiting"
            self._tell(record)

    def run(self, source: Source, new: int, ledger: Ledger) -> Shared | None:
        """Run all trials that are left, search.max_concurrent at once.

        Raises:
            ConfigError: If so many do not fit at once.
        """
        left = len(self.table.unfinished) + new
        self.at_once = at_once = min(self.recipe.search.max_concurrent, left)
        sharing = at_once > 1 and may_share(self.recipe)
        fit = connect(self.recipe, at_once, shared_decoding=sharing)
        self._say({"kind": "fit", "fit": fit})
        recipe, capacity = _parted(self.recipe, fit, at_once, sharing)
        if sharing:
            # Well before a trial that waits is itself taken to hang.
            self._sharing = Sharing.start(capacity, self.recipe.run.hang_timeout_s / 4)
        # At the head: a spot machine that goes would take it along, and nobody could end the
        # search. One that starts again is rung again.
        self._bell = (
            ray.remote(Bell).options(num_cpus=0, resources=AT_HEAD, max_restarts=-1).remote()
        )
        common = Common(
            recipe, self.schedule, self.objective, ledger.run_id, self._sharing, self._bell
        )
        home = open_place(self.recipe.home)
        self._attempt = Attempt(home, claim_for_driver(home))
        # Tune's own result files would repeat what MLflow has, its own table ours.
        os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
        # Between two measurements a trial tells its step alone.
        os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
        # Each trial has a process of its own: one that is used again would have a run to end first.
        warnings.filterwarnings("ignore", "Consider boosting PBT", UserWarning)
        # A lambda of this object, and not the event's own method: Tune pickles the searcher, too.
        proposals = Proposals(
            recipe, self.schedule, self.table, source, new, lambda: self._asked_to_end.is_set()
        )
        with interruptible(self._asked_to_end):
            Tuner(
                tune.with_resources(tune.with_parameters(TrialRun, common=common), DRIVER),
                tune_config=TuneConfig(
                    search_alg=proposals,
                    scheduler=scheduler_of(self.recipe, self.table),
                    num_samples=left,
                    max_concurrent_trials=at_once,
                ),
                run_config=tune.RunConfig(
                    name="tune",  # Tune's own bookkeeping; ours is the table
                    storage_path=home.path,
                    storage_filesystem=home.fs,
                    failure_config=FailureConfig(max_failures=self.recipe.search.retries),
                    callbacks=[self],
                    verbose=0,
                ),
            ).fit()
        self.not_begun = proposals.left if self._asked_to_end.is_set() else 0
        shared = self._sharing.shared if self._sharing else None
        ray.kill(self._bell)
        if self._sharing is not None:
            ray.kill(self._sharing.pool)
            self._sharing = None
        if self._superseded is not None:
            raise self._superseded
        return shared

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Pass a request to stop on to the trials, which end by themselves."""
        if self._asked_to_end.is_set() and self._bell is not None:
            self._bell.ring.remote()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note that a trial has begun, or goes on."""
        record = self._record(trial)
        record.state, record.error = "running", None
        record.point = dict(trial.config["point"])
        self._since[record.name] = monotonic()
        self._keep(record)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Note how far a trial is, and what it has measured."""
        record = self._record(trial)
        self._take(record, result)
        if "objective" in result:
            self._keep(record)
        else:
            self._tell(record)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note how a trial ended."""
        record = self._record(trial)
        result = trial.last_result or {}
        if "error" in result:
            record.state, record.error = "failed", result["error"]
        elif "finished" in result:
            record.state = "finished"
        else:
            record.state = "stopped" if "stopped" in result else "early"
        self._end(record)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note that a trial failed, and is started again."""
        record = self._record(trial)
        record.state = "waiting"
        record.error = _last_line(trial)
        self._end(record)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note that a trial failed for good."""
        record = self._record(trial)
        record.state = "failed"
        record.error = _last_line(trial)
        self._end(record)

    def _record(self, trial: Any) -> Record:
        return self.table.records[trial.config["name"]]

    def _take(self, record: Record, result: Mapping[str, Any]) -> None:
        if result.get("steps"):  # it has begun
            record.step, record.steps = result["step"], result["steps"]
        record.figures |= result.get("figures", {})
        record.checkpoint = result.get("checkpoint", record.checkpoint)
        record.tracking_run = result.get("tracking_run", record.tracking_run)
        if "objective" in result:
            record.objective = result["objective"]
            if record.step not in dict(record.history):  # the last one is told again at the end
                record.history.append((record.step, result["objective"]))

    def _end(self, record: Record) -> None:
        if self._sharing is not None:
            self._sharing.dismiss(record.name)
        record.seconds += monotonic() - self._since.pop(record.name, monotonic())
        self._keep(record)

    def _keep(self, record: Record) -> None:
        try:
            if self._attempt is not None:
                self._attempt.check(group_too=False)
            self.table.write(self.objective)
        except SupersededError as error:  # the newer one's table counts, and its trials
            self._superseded = error
            self._asked_to_end.set()
        except DataError as error:  # the next one has all of it
            logger.warning("the table of trials could not be written now: %s", error)
        self._tell(record)

    def _tell(self, record: Record) -> None:
        told = {
            "kind": "trial",
            "trial": record.name,
            "state": record.state,
            "step": record.step,
            "steps": record.steps,
        }
        known = {"objective": record.objective, "error": record.error}
        self._say(told | {name: value for name, value in known.items() if value is not None})


UNLIKE = {
    "run.seed",
    "optim.global_batch",
    "data.window",
    "data.crop_scale",
    "data.flip",
    "data.scaled_decoding",
    "model.image_size",
}
"""Fields that make two trials read different streams."""


def may_share(recipe: Recipe) -> bool:
    """Tell whether the trials of a search read the same, and are to read it together."""
    searched = {dimension.field for dimension in read_space(recipe)}
    return recipe.search.share_stream and not searched & UNLIKE


def _parted(recipe: Recipe, fit: Fit, at_once: int, sharing: bool) -> tuple[Recipe, int]:
    """Give each trial its part of the CPUs that decode and of the memory that holds pictures.

    Returns:
        The recipe of one, and the decoded windows that may be held for all.
    """
    parts = at_once + sharing
    buffer_mb = buffer_mb_of(recipe, parts)
    data = replace(recipe.data, decode_cpus=fit.decoding, buffer_mb=buffer_mb)
    room = float("inf") if buffer_mb is None else buffer_mb * 1e6
    windows = min(room / Footprint.of(recipe).window, 1000)
    return replace(recipe, data=data), max(2, int(windows))


def _last_line(trial: Any) -> str:
    """Give the reason, of the whole traceback that Tune has."""
    error = trial.get_error()
    lines = str(error).strip().splitlines() if error is not None else []
    return redact(lines[-1].strip()) if lines else "its process died"


@contextmanager
def interruptible(asked: threading.Event) -> Iterator[None]:
    """Set an event on Ctrl-C or SIGTERM; a second one raises KeyboardInterrupt."""

    def abort() -> None:
        raise KeyboardInterrupt

    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    words = "ending the trials, each after a last checkpoint; --resume goes on from there"
    with stop_on_signal(asked.set, abort, words):
        yield
