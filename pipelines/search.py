"""Search: the same run with other settings, many times, and which of them is best.

Each trial is an ordinary `pretrain` of a recipe of its own, below the search's home; Ray Tune
runs them, some at once. The table of trials is in storage, so a search that was killed goes on:
what has ended is not run again, what was under way goes on from its checkpoints.

Trials train on different tasks, so their losses cannot be compared. The objective is measured on
held-out pictures under one protocol for all (recipe.measure); docs/figures.md tells of it.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from droppos.errors import ConfigError, DataError
from pipelines.facts import FIXED, FREE
from pipelines.groundwork import located, plan
from pipelines.heard import OnEvent
from pipelines.ledger import Ledger
from pipelines.order import Schedule
from pipelines.proposals import scheduler_of, source_of
from pipelines.ranking import Setting, settings_of
from pipelines.recipe import Objective, Recipe
from pipelines.recipe_file import flatten, to_yaml
from pipelines.search_driver import Driver
from pipelines.search_outcome import SearchOutcome, findings_of
from pipelines.search_report import search_report
from pipelines.secrets import redact
from pipelines.shards import load_manifest
from pipelines.sharing import Shared
from pipelines.space import corners, grid_points, read_space
from pipelines.storage import open_place, open_reachable
from pipelines.tracking import local_folder, tracking_uri
from pipelines.trials import FILE as TABLE_FILE
from pipelines.trials import Record, TrialTable, objective_of, require_comparable, trial_recipe

RECORD = "search.json"
"""What a search is of, in its home."""

logger = logging.getLogger(__name__)


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
    schedule, objective, fixed = ready(recipe, resume=resume)
    home = open_place(recipe.home)
    (home / RECORD).write_bytes(json.dumps(fixed, indent=1).encode())
    table = TrialTable(home)
    source, new = source_of(recipe, table)
    run = Driver(recipe, schedule, objective, table, on_event or (lambda event: None))
    run.tell_plan(new)
    shared = None
    with Ledger.open(recipe, schedule.manifest.digest, resume=resume) as ledger:
        if new or table.unfinished:
            shared = run.run(source, new, ledger)
        outcome = conclude(run, shared, ledger)
        ledger.finish("FINISHED" if outcome.finished else "KILLED")
    return outcome


def check(recipe: Recipe, schedule: Schedule, objective: Objective) -> None:
    """Refuse what could not be compared or run, at every corner of the space.

    Raises:
        ConfigError: Naming the field.
    """
    space = read_space(recipe)
    if recipe.search.algorithm == "grid":
        grid_points(space, recipe)
    trials = [trial_recipe(recipe, schedule, 0, point) for point in corners(space)]
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


def ready(recipe: Recipe, *, resume: bool) -> tuple[Schedule, Objective, dict[str, Any]]:
    """Refuse what could not be searched, or would go on with a search as if it were another.

    Nothing is written, and no cluster is asked.

    Returns:
        The order of the pictures, what trials are compared by, and what has to stay as it is for
        the search to go on: more trials may be asked for.

    Raises:
        ConfigError: Naming the field, the search or each difference, and the way out.
        DataError: If data or storage cannot be read.
    """
    objective = objective_of(recipe)
    schedule = plan(recipe)
    check(recipe, schedule, objective)
    assert recipe.data.holdout is not None
    holdout = load_manifest(open_place(recipe.data.holdout)).digest
    home = open_reachable(recipe.home)
    fixed = (*FIXED, "measure", "search.space", "search.algorithm")
    ours: dict[str, Any] = {
        name: value
        for name, value in flatten(recipe).items()
        if name.startswith(fixed) and name not in FREE
    }
    ours |= {"search.objective": objective}
    ours |= {"data (manifest digest)": schedule.manifest.digest}
    ours |= {"held-out data (manifest digest)": holdout}
    record = home / RECORD
    if record.exists():
        if not resume:
            raise ConfigError(
                f"{recipe.home} already has a search; add --resume to go on with it, or choose "
                "another run.name"
            )
        theirs = json.loads(record.read_bytes())
        # A field that the record does not know is newer than it: it was searched as by default.
        theirs = flatten(Recipe()) | theirs
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
    return schedule, objective, ours


def conclude(run: Driver, shared: Shared | None, ledger: Ledger) -> SearchOutcome:
    """Write table, report and best recipe: on this machine, to storage and to MLflow."""
    recipe, table = run.recipe, run.table
    finished = [record for record in table if record.state == "finished"]
    judged = [(record, record.objective) for record in finished if record.objective is not None]
    settings = settings_of([record.point for record, _ in judged], [value for _, value in judged])
    best, score = judged[settings[0].trials[0]] if settings else (None, 0.0)
    files = {TABLE_FILE: table.text(run.objective)}
    if best is not None:
        ledger.log(len(finished), {f"search/best_{run.objective}": score})
        point = {f"best.{name}": str(value) for name, value in best.point.items()}
        ledger.tag({**point, "best.trial": best.name})
        told = _told_of_best(recipe, best, run.objective, settings)
        files["best.yaml"] = told + to_yaml(best_recipe(recipe, run.schedule, best))
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


def _told_of_best(
    recipe: Recipe, best: Record, objective: Objective, settings: Sequence[Setting]
) -> str:
    """Head the best trial's recipe with what it scored, and what to expect of it."""
    first = settings[0]
    trials = sum(len(setting.trials) for setting in settings)
    lines = [f"Best of {trials} finished trials: {objective} {first.values[0]:.4f}, {best.name}."]
    if len(first.trials) > 1:
        lines.append(f"Its setting has {first.mean:.4f} on average over {len(first.trials)} seeds.")
    if recipe.search.scheduler == "pbt":
        lines.append(
            "Values changed on the way, and these are the last ones: its weights, which came of "
            f"all of them, are in {best.checkpoint}."
        )
    lines.append(
        "`droppos pretrain best.yaml` runs it anew; the best of several is lucky, too: expect less."
    )
    return "".join(f"# {line}\n" for line in lines)


def best_recipe(recipe: Recipe, schedule: Schedule, best: Record) -> Recipe:
    """Make an ordinary run of a trial: beside the search, under a name of its own."""
    trial = trial_recipe(recipe, schedule, best.number, best.point)
    run = replace(trial.run, name=f"{recipe.run.name}-best", storage=recipe.run.storage)
    return replace(trial, run=run)
