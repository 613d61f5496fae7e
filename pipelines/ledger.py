"""The ledger: MLflow's record of a run, kept by one writer, that never holds a step up.

One run is one MLflow run, found again by the tag `droppos.home`. A background thread sends
what is logged in batches and tries again when the server is away; what could not be sent in
time is spooled to disk and counted. A step that MLflow has already is not logged twice, so a
run that resumes, or goes back to a checkpoint, leaves the same history as one that did not.

MLflow takes four seconds to import, so it is imported in the functions that need it: whoever
only asks for help should not wait. The first SQLite file takes three more, for its tables.
"""

import json
import logging
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self
from urllib.parse import unquote, urlsplit

from droppos.errors import ConfigError
from pipelines.outbox import Ended, File, Names, Outbox, Point, Status, Text
from pipelines.recipe import Recipe
from pipelines.recipe_file import flatten
from pipelines.storage import open_place

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

    from pipelines.checkpoints import Saved

HOME = "droppos.home"
"""Tag by which a run is found again."""

_PARAM_CHARS, _TAG_CHARS = 6000, 8000
"""MLflow's limits (mlflow.utils.validation)."""

_log = logging.getLogger(__name__)


def local_folder(recipe: Recipe) -> Path:
    """Folder of this machine that a run may write to: its storage, or a stand-in for s3://."""
    scheme, separator, rest = recipe.run.storage.partition("://")
    if not separator:
        return Path(recipe.run.storage).expanduser().absolute()
    return Path(unquote(rest)) if scheme == "file" else Path("droppos-runs").absolute()


def tracking_uri(recipe: Recipe) -> str:
    """Find where MLflow is: the recipe, MLFLOW_TRACKING_URI, or an SQLite file with the runs."""
    given = recipe.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return given or f"sqlite:///{local_folder(recipe) / 'mlflow.db'}"


def open_command(uri: str) -> str:
    """Tell a person how to look at it: a command to type, or the address of a server."""
    safe = redact(uri)
    if urlsplit(uri).scheme in {"http", "https"}:
        return safe
    program = Path(sys.executable).with_name("mlflow")
    return shlex.join([str(program), "ui", "--backend-store-uri", safe])


def redact(text: str) -> str:
    """Blot out user:password@ and token-like query values of every URI in a text."""
    text = re.sub(r"(?<=://)[^/?#\s]*@", "***@", text)
    secret = r"token|secret|passw|pwd|key|signature|credential|sig\b|auth"
    return re.sub(rf"([?&;][^=&;\s]*(?:{secret})[^=&;\s]*=)[^&;#\s]+", r"\1***", text, flags=re.I)


def provenance() -> dict[str, str]:
    """Tell which code runs: versions, and the git revision when it runs from a checkout."""
    tags = {f"version.{name}": version(name) for name in ("droppos", "torch", "ray", "mlflow")}
    tags["version.python"] = sys.version.split()[0]
    root = Path(__file__).resolve().parent.parent
    # An installed package may lie inside a checkout of something else, its .venv say.
    if _git(root, "rev-parse", "--show-toplevel") == str(root):
        tags["mlflow.source.git.commit"] = _git(root, "rev-parse", "HEAD")
        tags["code.changed_files"] = str(len(_git(root, "status", "--porcelain").splitlines()))
    return tags


def _git(root: Path, *command: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *command], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine, or a slow disk
        return ""
    return done.stdout.strip()


class Ledger:
    """One MLflow run, from `with` to the end of its block.

    Leaving the block sends what is left, for a bounded time, and sets the run's status: an
    exception is FAILED, Ctrl-C is KILLED, all else FINISHED.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        home: str,
        spool: Path,
        *,
        resume: bool = False,
        parent_run: str | None = None,
        patience_s: float = 60,
    ) -> None:
        """Describe the run; nothing is asked of MLflow yet.

        Args:
            uri: Tracking server or database.
            experiment: MLflow experiment, made when missing.
            run_name: Name shown in MLflow.
            home: URI of the run's folder; with `resume`, its newest MLflow run goes on.
            spool: Folder of this machine for what could not be sent.
            resume: Go on with the run of this home, if there is one.
            parent_run: Id of the MLflow run this one is a trial of.
            patience_s: Seconds to go on trying before values are spooled.
        """
        self.uri = uri
        self.experiment = experiment
        self.run_name = run_name
        self.home = redact(home)
        self.spool = spool
        self.resume = resume
        self.parent_run = parent_run
        self.patience_s = patience_s
        self.run_id = ""
        """MLflow's id of the run, once entered."""
        self._ended = False
        self._client: MlflowClient
        self._outbox: Outbox
        self._params: dict[str, str] = {}
        self._last: dict[str, int] = {}
        self._resumed: dict[str, int] = {}
        self._logged: dict[str, list[tuple[int, float]]] = {}

    @classmethod
    @contextmanager
    def open(
        cls,
        recipe: Recipe,
        manifest: str,
        *,
        resume: bool = True,
        parent_run: str | None = None,
    ) -> Iterator[Self]:
        """Keep the ledger of a recipe's run: its fields, the code's versions, the data's digest.

        Args:
            recipe: The run.
            manifest: Digest of the data's manifest.
            resume: Go on with the MLflow run of this home, if there is one.
            parent_run: Id of the MLflow run this one is a trial of.
        """
        ledger = cls(
            tracking_uri(recipe),
            recipe.tracking.experiment,
            recipe.run.name,
            open_place(recipe.home).uri,
            local_folder(recipe) / "spool",
            resume=resume,
            parent_run=parent_run,
        )
        with ledger:
            ledger.describe(recipe, {**provenance(), "data.manifest": manifest})
            yield ledger

    def __enter__(self) -> Self:
        """Reach MLflow and find or make the run.

        Raises:
            ConfigError: If MLflow cannot be reached, within about 15 s.
        """
        with _reachable(self.uri):
            self._client = _connect(self.uri)
            experiment_id = _experiment(self._client, self.uri, self.experiment)
            run = self._find(experiment_id) if self.resume else None
            if run is None:
                run = self._client.create_run(experiment_id, run_name=self.run_name, tags=self._own)
            else:
                self._client.update_run(run.info.run_id, status="RUNNING")
        self.run_id = run.info.run_id
        self._params = dict(run.data.params)
        # Only the protocol form of a run tells the steps of its newest values; the histories
        # would too, at a request for every 25,000 values.
        self._last = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        self._resumed = dict(self._last)
        spool_file = self.spool / f"{self.run_id}.jsonl"
        self._outbox = Outbox(self._client, self.run_id, spool_file, self.patience_s)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Send what is left and end the run."""
        if not self._ended:
            killed = kind is not None and issubclass(kind, KeyboardInterrupt)
            self.finish("KILLED" if killed else "FAILED" if kind else "FINISHED")

    @property
    def last_step(self) -> int:
        """Highest step that has a metric; -1 when there is none."""
        return max(self._last.values(), default=-1)

    @property
    def away(self) -> bool:
        """Whether MLflow does not answer at the moment; what is logged waits for it."""
        return self._outbox.failing

    def describe(self, recipe: Recipe, tags: Mapping[str, str]) -> None:
        """Record every field of a recipe, and tags: `provenance`, digests.

        MLflow never changes a parameter; what a resumed run changed is a tag `changed.<field>`.
        """
        fields = {
            name: _cut(redact(str(value)), _PARAM_CHARS) for name, value in flatten(recipe).items()
        }
        changed = {
            f"changed.{name}": value
            for name, value in fields.items()
            if self._params.get(name, value) != value
        }
        new = {name: value for name, value in fields.items() if name not in self._params}
        self._params |= new
        self._outbox.put(Names(new, _tags({**tags, **changed})))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics of a step, named with their units; at once, whatever the server does.

        Values of a step that a metric has already, or has passed, are left out.
        """
        new = {name: float(value) for name, value in values.items() if step > self._step(name)}
        if new:
            self._last |= dict.fromkeys(new, step)
            for name, value in new.items():
                self._logged.setdefault(name, []).append((step, value))
                self._outbox.put(Point(name, value, step, _now_ms()))

    def history(self, name: str) -> list[tuple[int, float]]:
        """Give steps and values of a metric, those of the run before it was resumed included."""
        return [*self._before(name), *self._logged.get(name, [])]

    def _before(self, name: str) -> list[tuple[int, float]]:
        if name not in self._resumed:
            return []
        from mlflow.exceptions import MlflowException

        try:
            found = self._client.get_metric_history(self.run_id, name)
        except MlflowException as error:
            _log.warning("the earlier history of %s cannot be read: %s", name, redact(str(error)))
            return []
        last = self._resumed[name]
        return sorted((metric.step, metric.value) for metric in found if metric.step <= last)

    def picture(self, path: Path, name: str) -> None:
        """Keep a file as artifact `name`, such as `pictures/reassembly.png`.

        The file is read later, by the thread: leave it where it is.
        """
        self._outbox.put(File(name, path))

    def text(self, name: str, text: str) -> None:
        """Keep a text as artifact `name`; a later one takes its place."""
        self._outbox.put(Text(name, redact(text)))

    def checkpoint(self, saved: "Saved") -> None:
        """Record where a checkpoint is, its size, and the hash of its last file."""
        pointer = {
            "uri": redact(saved.uri),
            "step": saved.step,
            "bytes": saved.size,
            "complete_sha256": saved.sha256,
        }
        tags = {f"droppos.checkpoint.{name}": str(value) for name, value in pointer.items()}
        self._outbox.put(Names({}, _tags(tags)))
        name = f"checkpoints/{saved.place.name}.json"
        self._outbox.put(Text(name, json.dumps(pointer, indent=1)))

    def finish(self, status: Status) -> None:
        """Send what is left, for at most the patience, and set how the run ended."""
        self._ended = True
        self._outbox.close(Ended(status, _now_ms()))
        if self._outbox.spooled:
            _log.warning(
                "%d values did not reach MLflow at %s; they are in %s",
                self._outbox.spooled,
                redact(self.uri),
                self._outbox.spool_file,
            )

    def _step(self, name: str) -> int:
        return self._last.get(name, -1)

    @property
    def _own(self) -> dict[str, str]:
        nested = {"mlflow.parentRunId": self.parent_run} if self.parent_run else {}
        return {HOME: self.home, **nested}

    def _find(self, experiment_id: str) -> "Run | None":
        return run_of(self._client, experiment_id, self.home)


def run_of(client: "MlflowClient", experiment_id: str, home: str) -> "Run | None":
    """Find the newest MLflow run of a run's folder."""
    quote = '"' if "'" in home else "'"
    runs = client.search_runs(
        [experiment_id],
        filter_string=f"tags.`{HOME}` = {quote}{redact(home)}{quote}",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return runs[0] if runs else None


@contextmanager
def open_experiment(uri: str, name: str) -> "Iterator[tuple[MlflowClient, str]]":
    """Reach MLflow, and find or make an experiment, for who writes a few figures at once.

    Yields:
        A client, and the experiment's identifier.

    Raises:
        ConfigError: If MLflow cannot be reached, also inside the block, or the experiment was
            deleted.
    """
    with _reachable(uri):
        client = _connect(uri)
        yield client, _experiment(client, uri, name)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _cut(text: str, most: int) -> str:
    mark = f" …[{len(text)} characters]"
    return text if len(text) <= most else text[: most - len(mark)] + mark


def _tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: _cut(redact(value), _TAG_CHARS) for name, value in tags.items()}


@contextmanager
def _reachable(uri: str) -> Iterator[None]:
    """Turn whatever an MLflow that cannot be used raises into one error."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        reason = redact(str(error)).splitlines()[0][:500]
        raise ConfigError(
            f"MLflow at {redact(uri)} cannot be used: {reason}; start or correct it "
            "(tracking.uri, or MLFLOW_TRACKING_URI), or unset both to use an SQLite file"
        ) from error


def _connect(uri: str) -> "MlflowClient":
    # MLflow's own defaults try for minutes. The outbox does the trying again here, so a
    # request of ours is one request. Who has set these variables knows better.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    from mlflow.tracking import MlflowClient

    # Making the tables of a new SQLite file (3 s) is told in lines that mean nothing to users.
    for name in ("mlflow.store.db.utils", "alembic.runtime.migration"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if (file := _sqlite_file(uri)) is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


def _sqlite_file(uri: str) -> Path | None:
    scheme, _, rest = uri.partition(":///")
    path = rest.partition("?")[0]
    return Path(path).absolute() if scheme.startswith("sqlite") and path else None


def _experiment(client: "MlflowClient", uri: str, name: str) -> str:
    """Find or make an experiment.

    One in an SQLite file keeps its artifacts beside the file; MLflow would put them into the
    current folder, wherever that is.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        file = _sqlite_file(uri)
        artifacts = None if file is None else (file.parent / "mlflow-artifacts").as_uri()
        try:
            return client.create_experiment(name, artifact_location=artifacts)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another process was quicker
    assert found is not None
    if found.lifecycle_stage == "deleted":
        raise ConfigError(
            f"tracking.experiment {name!r} was deleted in MLflow at {redact(uri)}; "
            "restore it there, or take another name"
        )
    return found.experiment_id
