"""Search: the same run with other settings, many times, and which of them is best.

Each trial is an ordinary `pretrain` of a recipe of its own, below the search's home; Ray Tune
runs them, some at once. The table of trials is in storage, so a search that was killed goes on:
what has ended is not run again, what was under way goes on from its checkpoints.

Trials train on different tasks, so their losses cannot be compared. The objective is measured on
held-out pictures under one protocol for all (recipe.measure); docs/figures.md tells of it.
"""

import json
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

import ray
from ray import tune
from ray.tune import Callback, FailureConfig, TuneConfig, Tuner

from droppos.errors import ConfigError, DataError
from pipelines.attempt import Attempt, SupersededError, claim_for_driver
from pipelines.cluster import buffer_mb_of, connect
from pipelines.facts import FIXED, FREE
from pipelines.findings import Findings, Row
from pipelines.heard import OnEvent
from pipelines.ledger import Ledger, local_folder, redact, tracking_uri
from pipelines.memory import Footprint
from pipelines.order import Schedule
from pipelines.pretrain import located, plan
from pipelines.proposals import Proposals, Source, scheduler_of, source_of
from pipelines.recipe import Objective, Recipe
from pipelines.recipe import Search as SearchSection
from pipelines.recipe_file import flatten, to_yaml
from pipelines.resources import Fit
from pipelines.search_report import search_report
from pipelines.shards import load_manifest
from pipelines.sharing import Shared, Sharing
from pipelines.space import corners, grid_points, parse_space
from pipelines.storage import Place, open_place
from pipelines.supervisor import STOP_SIGNALS
from pipelines.trial_run import Bell, Common, TrialRun
from pipelines.trials import FILE as TABLE_FILE
from pipelines.trials import (
    Record,
    TrialTable,
    make_trial,
    objective_of,
    require_comparable,
)

DRIVER = {"CPU": 0, "memory": 1e6}
"""What Tune reserves for a trial's own process. It must be something; not a CPU, for those are
all shared out to training and decoding."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SearchOutcome:
    """Where a search ended."""

    home: str
    objective: Objective
    trials: list[Record]
    """In the order in which they began."""
    best: Record | None
    """The finished one with the highest objective."""
    folder: Path
    """Where report.html, trials.json and best.yaml are, on this machine."""
    tracking_run: str
    """Identifier of the MLflow run that the trials are shown under."""
    left: int
    """Trials that did not end or fail: the search was interrupted."""
    shared: Shared | None
    """What the trials of this process read together; None if they did not."""
    at_once: int

    @property
    def best_recipe(self) -> Path | None:
        """The best trial's recipe, for `droppos pretrain`."""
        return self.folder / "best.yaml" if self.best else None

    @property
    def finished(self) -> bool:
        """Whether every trial ran to its end, or failed."""
        return self.left == 0

    @property
    def storage_reads_ratio(self) -> float | None:
        """Windows read for every window that one trial alone would have read; 1 is perfect.

        Trials that run at once by themselves read as many times as much as there are of them.
        """
        if self.shared is None or not self.shared.taken:
            return None
        return self.shared.decoded * self.at_once / self.shared.taken


def search(
    recipe: Recipe, *, resume: bool = False, on_event: OnEvent | None = None
) -> SearchOutcome:
    """Run, or go on with, a search.

    Ctrl-C or SIGTERM ends the trials where they are; each saves a last checkpoint.

    Args:
        recipe: What trials have in common, and in its `search` section what they try.
        resume: Go on with the search of run.storage/run.name, if there is one.
        on_event: Hears of each trial's state, step and objective.

    Raises:
        ConfigError: If the space is impossible, nothing could be compared, or the trials do not
            fit the cluster.
        DataError: If data or storage cannot be read.
    """
    recipe = located(recipe)
    recipe = replace(recipe, tracking=replace(recipe.tracking, uri=shared_tracking(recipe)))
    schedule = plan(recipe)
    objective = objective_of(recipe)
    check(recipe, schedule, objective)
    home = open_place(recipe.home)
    home.check_reachable()
    begin(home, recipe, schedule, objective, resume=resume)
    table = TrialTable(home)
    source, new = source_of(recipe, table)
    left = len(table.unfinished) + new
    run = Driver(recipe, schedule, objective, table, on_event or (lambda event: None))
    run.tell_plan(left)
    shared = None
    with Ledger.open(recipe, schedule.manifest.digest, resume=resume) as ledger:
        if left:
            shared = run.run(source, new, ledger)
        outcome = conclude(run, shared, ledger)
        ledger.finish("FINISHED" if outcome.finished else "KILLED")
    return outcome


def check(recipe: Recipe, schedule: Schedule, objective: Objective) -> None:
    """Refuse what could not be compared or run, at every corner of the space.

    Raises:
        ConfigError: Naming the field.
    """
    space = parse_space(recipe)
    if recipe.search.algorithm == "grid":
        grid_points(space, recipe)
    points = list(corners(space))
    trials = [make_trial(recipe, schedule, 0, point).recipe for point in points]
    require_comparable([recipe, *trials], recipe.model.grid, objective)
    scheduler_of(recipe, TrialTable(open_place(recipe.home)))


def shared_tracking(recipe: Recipe) -> str | None:
    """Find the one place for all trials, whose processes have other folders and environments.

    A URI with a password stays in the environment: recipes are written to storage.
    """
    uri = tracking_uri(recipe)
    scheme, separator, path = uri.partition(":///")
    if scheme.startswith("sqlite") and separator and path:
        return f"{scheme}:///{Path(path).absolute()}"
    return uri if redact(uri) == uri else recipe.tracking.uri


def begin(
    home: Place, recipe: Recipe, schedule: Schedule, objective: Objective, *, resume: bool
) -> None:
    """Note what is searched, and refuse to go on with a search as if it were another.

    More trials may be asked for than before.

    Raises:
        ConfigError: Naming the search or each difference, and the way out.
    """
    assert recipe.data.holdout is not None
    holdout = load_manifest(open_place(recipe.data.holdout)).digest
    fixed = (*FIXED, "measure", "search.space", "search.algorithm")
    ours: dict[str, Any] = {
        name: value
        for name, value in flatten(recipe).items()
        if name.startswith(fixed) and name not in FREE
    }
    ours |= {"search.objective": objective}
    ours |= {"data (manifest digest)": schedule.manifest.digest}
    ours |= {"held-out data (manifest digest)": holdout}
    record = home / "search.json"
    if record.exists():
        if not resume:
            raise ConfigError(
                f"{recipe.home} already has a search; add --resume to go on with it, or choose "
                "another run.name"
            )
        theirs = json.loads(record.read_bytes())
        changed = [
            f"{name}: {theirs.get(name)!r} there, {value!r} now"
            for name, value in ours.items()
            if theirs.get(name) != value
        ]
        if changed:
            raise ConfigError(
                f"the search in {recipe.home} was begun with other settings; "
                f"{'; '.join(changed)}; put them back, or choose another run.name"
            )
    record.write_bytes(json.dumps(ours, indent=1).encode())


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
        self._interruption = Interruption()
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

    def tell_plan(self, left: int) -> None:
        """Tell what is known before anything runs."""
        waiting = left - len(self.table.unfinished)
        self._say(
            {
                "kind": "search",
                "trials": len(self.table) + waiting,
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
        self._bell = ray.remote(num_cpus=0)(Bell).remote()
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
        proposals = Proposals(
            recipe, self.schedule, self.table, source, new, lambda: self._interruption.asked
        )
        with interruptible(self._interruption):
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
        self.not_begun = proposals.left if self._interruption.asked else 0
        if self._superseded is not None:
            raise self._superseded
        return self._sharing.shared if self._sharing else None

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Pass a request to stop on to the trials, which end by themselves."""
        if self._interruption.asked and self._bell is not None:
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
            self._superseded, self._interruption.asked = error, True
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
    searched = {dimension.field for dimension in parse_space(recipe)}
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


class Interruption:
    """Whether somebody wants the search to end."""

    def __init__(self) -> None:
        self.asked = False


@contextmanager
def interruptible(interruption: Interruption) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into an end of all trials; the second one is as without this.

    Only a main thread is sent signals; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def on_signal(number: int, frame: object) -> None:
        logger.warning(
            "%s: ending the trials, each after a last checkpoint; --resume goes on from there",
            signal.Signals(number).name,
        )
        interruption.asked = True
        for other, handler in before.items():
            signal.signal(other, handler)

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def conclude(run: Driver, shared: Shared | None, ledger: Ledger) -> SearchOutcome:
    """Write table, report and best recipe: on this machine, to storage and to MLflow."""
    recipe, table = run.recipe, run.table
    finished = [record for record in table if record.state == "finished"]
    best = max(finished, key=lambda record: record.objective or 0.0, default=None)
    files = {TABLE_FILE: table.text(run.objective)}
    if best is not None and best.objective is not None:
        ledger.log(len(finished), {f"search/best_{run.objective}": best.objective})
        point = {f"best.{name}": str(value) for name, value in best.point.items()}
        ledger.describe(recipe, {**point, "best.trial": best.name})
        files["best.yaml"] = (
            f"# Best of {len(finished)} finished trials: {run.objective} {best.objective:.4f}, "
            f"{best.name}.\n# `droppos pretrain best.yaml` runs it anew.\n"
            + to_yaml(best_recipe(recipe, run.schedule, best))
        )
    outcome = SearchOutcome(
        home=recipe.home,
        objective=run.objective,
        trials=list(table),
        best=best,
        folder=local_folder(recipe) / recipe.run.name,
        tracking_run=ledger.run_id,
        left=run.not_begun + sum(not (r.ended or r.state == "failed") for r in table),
        shared=shared,
        at_once=run.at_once,
    )
    files["report.html"] = search_report(findings_of(recipe, outcome, files.get("best.yaml")))
    outcome.folder.mkdir(parents=True, exist_ok=True)
    home = open_place(recipe.home)
    for name, text in files.items():
        (outcome.folder / name).write_text(text)
        ledger.picture(outcome.folder / name, f"search/{name}")
        try:
            (home / name).write_bytes(text.encode())
        except DataError as error:
            logger.warning("%s is here and in MLflow, but not in storage: %s", name, error)
    return outcome


def findings_of(recipe: Recipe, outcome: SearchOutcome, best_yaml: str | None) -> Findings:
    """Tell the report what there is to tell."""
    measure = recipe.measure
    notes = []
    if outcome.left:
        notes.append(f"The search was interrupted: {outcome.left} of its trials did not end.")
    if recipe.search.scheduler == "asha":
        notes.append("Trials that ended early were behind others at the same epoch.")
    shared = outcome.shared
    return Findings(
        name=recipe.run.name,
        objective=outcome.objective,
        dimensions=parse_space(recipe),
        rows=[row_of(record) for record in outcome.trials],
        best=outcome.best.name if outcome.best else None,
        best_yaml=best_yaml,
        protocol=(
            f"All trials were measured on the same held-out pictures (at most "
            f"{measure.pictures:,}), which none of them trained on; for positions with the same "
            f"masks: {measure.mask_ratio:.0%} of the patches hidden, the position of "
            f"{measure.position_mask_ratio:.0%} of the others dropped."
        ),
        notes=notes,
        sharing=None
        if shared is None
        else {
            "windows read and decoded": shared.decoded,
            "windows that trials took": shared.taken,
            "trials at once": outcome.at_once,
            "reads, of one trial's": outcome.storage_reads_ratio or 0.0,
        },
    )


def row_of(record: Record) -> Row:
    """Tell the report of a trial."""
    ended: Any = record.state if record.ended else "stopped"
    return Row(
        name=record.name,
        point=record.point,
        state=ended,
        figures=record.figures,
        history=record.history,
        step=record.step,
        steps=record.steps,
        seconds=record.seconds,
        error=record.error,
        tracking_run=record.tracking_run,
    )


def best_recipe(recipe: Recipe, schedule: Schedule, best: Record) -> Recipe:
    """Make an ordinary run of a trial: beside the search, under a name of its own."""
    trial = make_trial(recipe, schedule, best.number, best.point)
    run = replace(trial.recipe.run, name=f"{recipe.run.name}-best", storage=recipe.run.storage)
    return replace(trial.recipe, run=run, search=SearchSection())
