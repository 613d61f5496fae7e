"""Search: the same run with other settings, many times, and which of them is best.

Each trial is an ordinary `pretrain` of a recipe of its own, below the search's home; Ray Tune
runs them, some at once. What is tried follows from space, seed and number alone, so a search
that was killed, told to resume, repeats the same list: finished trials are in storage and are
not run again, others go on from their checkpoints.

Trials train on different tasks, so their losses cannot be compared. The objective is position
skill on held-out pictures under the fixed protocol of recipe.measure.
"""

import json
import logging
import os
import signal
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import Callback, ResultGrid, Stopper, TuneConfig, Tuner

from droppos.errors import ConfigError
from pipelines.cluster import buffer_mb_of, connect
from pipelines.facts import FIXED
from pipelines.heard import OnEvent
from pipelines.ledger import Ledger, local_folder, redact, tracking_uri
from pipelines.order import Schedule
from pipelines.pretrain import located, plan
from pipelines.recipe import Recipe
from pipelines.recipe import Search as SearchSection
from pipelines.recipe_file import flatten, to_yaml
from pipelines.resources import Fit
from pipelines.shards import load_manifest
from pipelines.storage import Place, open_place
from pipelines.supervisor import STOP_SIGNALS
from pipelines.trials import (
    OBJECTIVE,
    State,
    Trial,
    TrialOutcome,
    list_trials,
    read_record,
    run_trial,
)

DRIVER = {"CPU": 0, "memory": 1e6}
"""What Tune reserves for a trial's own process. It must be something; not a CPU, for those are
all shared out to training and decoding."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SearchOutcome:
    """Where a search ended."""

    home: str
    trials: list[TrialOutcome]
    """In the order of their numbers."""
    best: TrialOutcome | None
    """The finished one with the highest objective."""
    best_recipe: Path | None
    """Its recipe as a YAML file of this machine, for `droppos pretrain`."""
    tracking_run: str
    """Identifier of the MLflow run that the trials are shown under."""

    @property
    def finished(self) -> bool:
        """Whether every trial ran to its end, or failed."""
        return all(trial.state != "stopped" for trial in self.trials)


def search(
    recipe: Recipe, *, resume: bool = False, on_event: OnEvent | None = None
) -> SearchOutcome:
    """Run, or go on with, a search.

    Ctrl-C or SIGTERM ends the trials where they are; each keeps its newest checkpoint.

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
    trials = list_trials(recipe, schedule)
    home = open_place(recipe.home)
    home.check_reachable()
    begin(home, recipe, schedule, resume=resume)
    left = [trial for trial in trials if not trial.record.exists()]
    say = on_event or (lambda event: None)
    say({"kind": "search", "trials": [trial.recipe.run.name for trial in trials]})
    for trial in trials:
        if trial not in left:
            say(_event(trial, "finished", {"objective": read_record(trial).objective}))
    digest = schedule.manifest.digest
    with Ledger.open(recipe, digest, resume=resume) as ledger:
        errors = run_trials(recipe, left, ledger.run_id, say) if left else {}
        outcomes = [outcome_of(trial, errors) for trial in trials]
        outcome = conclude(recipe, trials, outcomes, ledger)
        if not outcome.finished:
            stopped = {trial.name for trial in outcomes if trial.state == "stopped"}
            end_children(ledger, stopped)
        ledger.finish("FINISHED" if outcome.finished else "KILLED")
    return outcome


def shared_tracking(recipe: Recipe) -> str | None:
    """Find the one place for all trials, whose processes have other folders and environments.

    A URI with a password stays in the environment: recipes are written to storage.
    """
    uri = tracking_uri(recipe)
    scheme, separator, path = uri.partition(":///")
    if scheme.startswith("sqlite") and separator and path:
        return f"{scheme}:///{Path(path).absolute()}"
    return uri if redact(uri) == uri else recipe.tracking.uri


def begin(home: Place, recipe: Recipe, schedule: Schedule, *, resume: bool) -> None:
    """Note what is searched, and refuse to go on with a search as if it were another.

    More trials may be asked for than before: the list begins with the same ones.

    Raises:
        ConfigError: Naming the search or each difference, and the way out.
    """
    assert recipe.data.holdout is not None
    holdout = load_manifest(open_place(recipe.data.holdout)).digest
    fixed = (*FIXED, "measure", "search.space", "search.algorithm")
    ours: dict[str, Any] = {
        name: value for name, value in flatten(recipe).items() if name.startswith(fixed)
    }
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


def _shared(recipe: Recipe, share: Fit, buffer_mb: float | None) -> Recipe:
    """Give a trial its part of the CPUs that decode and of the memory that holds pictures."""
    data = replace(recipe.data, decode_cpus=share.decoding, buffer_mb=buffer_mb)
    return replace(recipe, data=data)


def run_trials(
    recipe: Recipe, trials: Sequence[Trial], parent_run: str, say: OnEvent
) -> dict[str, str]:
    """Run trials on the cluster, search.max_concurrent at once.

    Returns:
        What went wrong, by the name of the trial. Those that are done have their records.

    Raises:
        ConfigError: If so many do not fit at once.
    """
    at_once = min(recipe.search.max_concurrent, len(trials))
    share = connect(recipe, at_once)
    buffer_mb = buffer_mb_of(recipe, at_once)
    trials = [replace(trial, recipe=_shared(trial.recipe, share, buffer_mb)) for trial in trials]

    def trainable(config: dict[str, Any]) -> dict[str, Any]:
        return run_trial(trials[config["number"]], parent_run)

    home = open_place(recipe.home)
    # Tune's own result files would repeat what MLflow has, its own table ours.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    with interruptible() as interruption:
        results = Tuner(
            tune.with_resources(trainable, DRIVER),
            param_space={"number": tune.grid_search(list(range(len(trials))))},
            tune_config=TuneConfig(max_concurrent_trials=at_once),
            run_config=tune.RunConfig(
                name="tune",  # Tune's own bookkeeping; ours are the records of the trials
                storage_path=home.path,
                storage_filesystem=home.fs,
                stop=interruption,
                callbacks=[Follower(trials, say)],
                verbose=0,
            ),
        ).fit()
    return _errors(trials, results)


class Follower(Callback):
    """Tells the driver what Tune hears of its trials."""

    def __init__(self, trials: Sequence[Trial], say: OnEvent) -> None:
        self._trials = trials
        self._say = say

    def __getstate__(self) -> dict[str, Any]:
        """Be empty in the copy that Tune keeps in storage: a terminal cannot go there."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell that a trial has begun."""
        self._tell(trial, "running", {})

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Tell how far a trial is."""
        self._tell(trial, "failed" if "error" in result else "running", result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell how a trial ended."""
        done = self._trials[trial.config["number"]].record.exists()
        state = "finished" if done else "failed" if "error" in trial.last_result else "stopped"
        self._tell(trial, state, trial.last_result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell that a trial's process died."""
        self._tell(trial, "failed", {})

    def _tell(self, trial: Any, state: str, result: Mapping[str, Any]) -> None:
        self._say(_event(self._trials[trial.config["number"]], state, result))


def _event(trial: Trial, state: str, result: Mapping[str, Any]) -> dict[str, Any]:
    known = {key: result[key] for key in ("step", "steps", "objective", "error") if key in result}
    return {"kind": "trial", "trial": trial.recipe.run.name, "state": state, **known}


class Interruption(Stopper):
    """Ends all trials once it is asked to; Tune looks several times a second."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stop no single trial."""
        return False

    def stop_all(self) -> bool:
        """Tell whether to stop them all."""
        return self.asked


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Turn Ctrl-C and SIGTERM into an end of all trials; the second one is as without this.

    Only a main thread is sent signals; elsewhere nothing changes.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def on_signal(number: int, frame: object) -> None:
        logger.warning(
            "%s: ending the trials; --resume goes on from their newest checkpoints",
            signal.Signals(number).name,
        )
        interruption.asked = True
        for other, handler in before.items():
            signal.signal(other, handler)

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _errors(trials: Sequence[Trial], results: ResultGrid) -> dict[str, str]:
    errors = {}
    for result in results:
        name = trials[(result.config or {})["number"]].recipe.run.name
        if result.error is not None:
            errors[name] = str(result.error).strip().splitlines()[-1]
        elif "error" in (result.metrics or {}):
            errors[name] = (result.metrics or {})["error"]
    return errors


def outcome_of(trial: Trial, errors: Mapping[str, str]) -> TrialOutcome:
    """Find where a trial stands: in its record, among the errors, or nowhere yet."""
    if trial.record.exists():
        return read_record(trial)
    name = trial.recipe.run.name
    state: State = "failed" if name in errors else "stopped"
    return TrialOutcome(name, trial.point, state, error=errors.get(name))


def conclude(
    recipe: Recipe, trials: Sequence[Trial], outcomes: list[TrialOutcome], ledger: Ledger
) -> SearchOutcome:
    """Write the table and the best recipe: on this machine, to storage and to MLflow."""
    scored = [
        (outcome.objective, number)
        for number, outcome in enumerate(outcomes)
        if outcome.objective is not None
    ]
    best = max(scored, default=None)
    table = {"objective": OBJECTIVE, "trials": [asdict(outcome) for outcome in outcomes]}
    files = {"trials.json": json.dumps(table, indent=1)}
    if best is not None:
        objective, number = best
        outcome = outcomes[number]
        ledger.log(len(scored), {"search/best_position_skill": objective})
        point = {f"best.{name}": str(value) for name, value in outcome.point.items()}
        ledger.describe(recipe, {**point, "best.trial": outcome.name})
        files["best.yaml"] = (
            f"# Best of {len(scored)} trials: {OBJECTIVE} {objective:.4f}, {outcome.name}.\n"
            f"# `droppos pretrain best.yaml` runs it anew.\n"
            + to_yaml(best_recipe(recipe, trials[number]))
        )
    folder = local_folder(recipe) / recipe.run.name
    folder.mkdir(parents=True, exist_ok=True)
    home = open_place(recipe.home)
    for name, text in files.items():
        (home / name).write_bytes(text.encode())
        (folder / name).write_text(text)
        ledger.picture(folder / name, f"search/{name}")
    return SearchOutcome(
        home=recipe.home,
        trials=outcomes,
        best=outcomes[best[1]] if best else None,
        best_recipe=folder / "best.yaml" if best else None,
        tracking_run=ledger.run_id,
    )


def best_recipe(recipe: Recipe, trial: Trial) -> Recipe:
    """Make an ordinary run of a trial: beside the search, under a name of its own."""
    run = replace(trial.recipe.run, name=f"{recipe.run.name}-best", storage=recipe.run.storage)
    return replace(trial.recipe, run=run, search=SearchSection())


def end_children(ledger: Ledger, stopped: Collection[str]) -> None:
    """Mark the MLflow runs of interrupted trials, which run on or failed as far as MLflow knows."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    client = MlflowClient(ledger.uri)
    try:
        experiment = client.get_run(ledger.run_id).info.experiment_id
        children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{ledger.run_id}'")
        for child in children:
            if child.info.run_name in stopped:
                client.set_terminated(child.info.run_id, "KILLED")
    except MlflowException as error:
        logger.warning("interrupted trials still show as running in MLflow: %s", error)
