"""Runs as MLflow knows them: which there are, what one did, and how two differ."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import yaml

from droppos.errors import ConfigError, DataError
from pipelines.attempt import FILE as ATTEMPT
from pipelines.ledger import HOME, fields_of
from pipelines.recipe import Recipe, Run, Tracking
from pipelines.recipe_file import flatten, from_dict
from pipelines.secrets import redact, redact_uris
from pipelines.storage import Place, open_place, open_reachable
from pipelines.tracking import Where, client_of, missing_database, reachable, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun
    from mlflow.tracking import MlflowClient

RECIPE = "recipe.yaml"
"""File of a run's folder with its recipe."""


@dataclass(frozen=True, slots=True)
class RunFacts:
    """One run."""

    run_id: str
    name: str
    status: str
    """MLflow's word: RUNNING (or killed with nobody to say so), FINISHED, FAILED, KILLED."""
    home: str
    """URI of the run's folder; empty if droppos did not make the run."""
    parent: str
    """Id of the search or run it is a part of; empty if of none."""
    started: datetime
    seconds: float
    """From its start to its end, or until now; pauses between starts count."""
    step: int
    """Last step that was logged; -1 if none was."""
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    """Last value of each."""

    @property
    def changed(self) -> dict[str, str]:
        """Fields that differ from the defaults, as the run has them now."""
        defaults = {name: str(value) for name, value in flatten(Recipe()).items()}
        return {
            name: value for name, value in self.fields.items() if value != defaults.get(name, value)
        }

    @property
    def fields(self) -> dict[str, str]:
        """All fields, those that a resume changed as they were changed to."""
        return fields_of(self.params, self.tags)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs side by side."""

    runs: Sequence[RunFacts]
    fields: Mapping[str, Sequence[str]]
    """Fields in which they differ, with each run's value; "-" where a run has none."""
    metrics: Mapping[str, Sequence[float | None]]
    """Each metric's last value in each run."""


class Registry:
    """The runs of one MLflow experiment."""

    def __init__(self, where: Where) -> None:
        """Reach MLflow.

        Args:
            where: Which MLflow, and its experiment.

        Raises:
            ConfigError: If MLflow cannot be reached.
            DataError: If there is no database, or no such experiment.
        """
        recipe = Recipe(run=Run(storage=where.storage), tracking=Tracking(uri=where.uri))
        self.uri = tracking_uri(recipe)
        if file := missing_database(self.uri):
            raise DataError(
                f"there are no runs: {file} does not exist; name the server or database with "
                "--uri (or MLFLOW_TRACKING_URI), or the folder of runs with --storage; if it is "
                "lost, `droppos resume FOLDER` goes on with the run of a folder"
            )
        with reachable(self.uri):
            self._client: MlflowClient = client_of(self.uri)
            experiments = {each.name: each for each in self._client.search_experiments()}
        if where.experiment not in experiments:
            known = ", ".join(sorted(experiments))
            raise DataError(
                f"MLflow has no experiment {where.experiment!r}; it has {known}: name one with "
                "--experiment"
            )
        self._experiment = experiments[where.experiment].experiment_id

    def newest(self, most: int) -> list[RunFacts]:
        """List the newest runs, the newest first, trials of searches left out."""
        return list(self._found("", most, parts=False))

    def run(self, name: str) -> RunFacts:
        """Find a run by its name (the newest of that name), its id, or the id's beginning.

        Raises:
            DataError: If there is none, or an id's beginning fits several.
        """
        quote = '"' if "'" in name else "'"
        for run in self._found(f"attributes.run_name = {quote}{name}{quote}", 1, parts=True):
            return run
        fitting = [run for run in self._found("", 1000, parts=True) if run.run_id.startswith(name)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise DataError(f"{len(fitting)} runs have an id that begins with {name}; write more")
        known = ", ".join(run.name for run in self.newest(5)) or "none"
        raise DataError(
            f"MLflow at {redact(self.uri)} has no run {name!r}; the newest are: {known}"
        )

    def compare(self, names: Sequence[str]) -> Comparison:
        """Put runs side by side.

        Raises:
            DataError: As of `run`.
        """
        runs = [self.run(name) for name in names]
        fields = {
            name: [run.fields.get(name, "-") for run in runs]
            for name in sorted({name for run in runs for name in run.fields})
        }
        metrics = {
            name: [run.metrics.get(name) for run in runs]
            for name in sorted({name for run in runs for name in run.metrics})
        }
        differing = {name: values for name, values in fields.items() if len(set(values)) > 1}
        return Comparison(runs, differing, metrics)

    def _found(self, condition: str, most: int, *, parts: bool) -> Iterator[RunFacts]:
        """Search, the newest first, page by page."""
        token: str | None = None
        while most > 0:
            with reachable(self.uri):
                page = self._client.search_runs(
                    [self._experiment],
                    filter_string=condition,
                    order_by=["attributes.start_time DESC"],
                    max_results=min(max(most, 50), 1000),
                    page_token=token,
                )
            for run in page:
                facts = facts_of(run)
                if (parts or not facts.parent) and most > 0:
                    most -= 1
                    yield facts
            token = page.token
            if not token:
                return


def facts_of(run: "MlflowRun") -> RunFacts:
    """Read one of MLflow's runs."""
    began, ended = run.info.start_time, run.info.end_time
    until = datetime.now(UTC).timestamp() * 1000 if ended is None else ended
    steps = [metric.step for metric in run.data.to_proto().metrics]
    return RunFacts(
        run_id=run.info.run_id,
        name=run.info.run_name or "",
        status=run.info.status,
        home=run.data.tags.get(HOME, ""),
        parent=run.data.tags.get("mlflow.parentRunId", ""),
        started=datetime.fromtimestamp(began / 1000, UTC),
        seconds=(until - began) / 1000,
        step=max(steps, default=-1),
        params=dict(run.data.params),
        tags=dict(run.data.tags),
        metrics=dict(run.data.metrics),
    )


def next_command(run: RunFacts, where: Where) -> str:
    """Say what goes on with a run; only a pre-training keeps its whole recipe in its folder."""
    command = run.tags.get("command", "")
    words = command.split()
    if words[1:2] in (["search"], ["finetune"]):
        if words[0] != "droppos":  # a launched job's, in a folder that went with the job
            return f"droppos launch RECIPE --job {words[1]} --resume"
        return command if "--resume" in words else f"{command} --resume"
    flags = [
        f"--{name} {shlex.quote(value)}"
        for name, value in asdict(where).items()
        if value != getattr(Where(), name) and redact_uris(value) == value
    ]
    return " ".join(["droppos resume", shlex.quote(run.name), *flags])


def resumable(run: str, where: Where) -> Recipe:
    """Find the recipe that goes on with a run.

    Args:
        run: The run's folder, which is all that is needed where MLflow's database is lost; or its
            name, or its id.
        where: Where runs are looked for by name.

    Raises:
        ConfigError: If the recipe is of another version of droppos, or MLflow cannot be reached.
        DataError: If there is no such run, or it has no recipe.
    """
    home = open_reachable(run)
    began = run != "" and (home / ATTEMPT).exists()
    if "/" not in run and not began:
        return recipe_of(Registry(where).run(run))
    recipe = _recipe_in(home) if began else None
    if recipe is None:
        raise DataError(
            f"{home} is no run's folder: name that of a pre-training, run.storage/run.name, which "
            f"holds {RECIPE} and {ATTEMPT}; a search or a fine-tuning goes on by its own command "
            "and --resume"
        )
    storage = home.uri.rpartition("/")[0] or "/"  # it may have moved since
    return replace(recipe, run=replace(recipe.run, storage=storage, name=home.name))


def recipe_of(run: RunFacts) -> Recipe:
    """Read the recipe of a run from its folder, to go on with it.

    Raises:
        ConfigError: If the recipe is of another version of droppos.
        DataError: If the run has no folder, or that has no recipe.
    """
    if not run.home:
        raise DataError(f"run {run.name} ({run.run_id}) names no folder; droppos did not make it")
    recipe = _recipe_in(open_place(run.home))
    if recipe is None:
        raise DataError(
            f"run {run.name} has no {run.home}/{RECIPE}: its folder has moved (`droppos resume "
            "FOLDER` goes on with it there) or is not to be seen from this machine, or it is a "
            "search or a fine-tuning, which goes on by its own command and --resume "
            f"(`droppos runs {run.name}` names it)"
        )
    return recipe


def _recipe_in(home: Place) -> Recipe | None:
    kept = home / RECIPE
    if not kept.exists():
        return None
    try:
        return from_dict(yaml.safe_load(kept.read_bytes()))
    except (yaml.YAMLError, AttributeError) as error:
        raise ConfigError(f"{kept} is no recipe: {error}") from error
