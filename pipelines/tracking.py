"""Where MLflow is, and how it is reached.

MLflow takes four seconds to import, so it is imported in the functions that need it: whoever
only asks for help should not wait. The first SQLite file takes three more, for its tables.
"""

import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from droppos.errors import ConfigError
from pipelines.recipe import Recipe, Run, Tracking
from pipelines.secrets import redact

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun
    from mlflow.tracking import MlflowClient

FILE_S = 600
"""Seconds for one file of a model to go through a server."""


@dataclass(frozen=True, slots=True)
class Where:
    """Where runs are looked for by name."""

    uri: str | None = None
    """MLflow server or database, where runs of `storage` are tracked when not given."""
    experiment: str = Tracking().experiment
    """MLflow experiment."""
    storage: str = Run().storage
    """Folder of runs."""


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


@contextmanager
def reachable(uri: str) -> Iterator[None]:
    """Turn whatever an MLflow that cannot be used raises into one error."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        reason = (redact(str(error)).splitlines() or [repr(error)])[0][:500]
        raise ConfigError(
            f"MLflow at {redact(uri)} cannot be used: {reason}; start or correct it "
            "(tracking.uri, or MLFLOW_TRACKING_URI), or unset both to use an SQLite file"
        ) from error


def client_of(uri: str) -> "MlflowClient":
    """Make what reaches an MLflow; nothing is asked of a server yet."""
    # MLflow's own defaults try for minutes. The outbox does the trying again here, so a
    # request of ours is one request. Who has set these variables knows better.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # that is for scripts
    from mlflow.tracking import MlflowClient

    # Making the tables of a new SQLite file (3 s) is told in lines that mean nothing to users.
    # So are those about examples and versions that are just being made.
    for name in (
        "mlflow.store.db.utils",
        "alembic.runtime.migration",
        "mlflow.pyfunc",
        "mlflow.store.model_registry.abstract_store",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    if (file := sqlite_file(uri)) is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


@contextmanager
def for_files() -> Iterator[None]:
    """Let a request take minutes inside the block: a server passes a file on before it answers."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(name)
    os.environ[name] = str(max(FILE_S, int(before or 0)))
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def sqlite_file(uri: str) -> Path | None:
    """Find the file of a database without a server; None for a server."""
    scheme, _, rest = uri.partition(":///")
    path = rest.partition("?")[0]
    return Path(path).absolute() if scheme.startswith("sqlite") and path else None


def missing_database(uri: str) -> Path | None:
    """Name the file of a database that does not exist: who only reads must not make one."""
    file = sqlite_file(uri)
    return None if file is None or file.exists() else file


def experiment_id(client: "MlflowClient", uri: str, name: str) -> str:
    """Find or make an experiment.

    One in an SQLite file keeps its artifacts beside the file; MLflow would put them into the
    current folder, wherever that is.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        file = sqlite_file(uri)
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


def active_run(client: "MlflowClient", run_id: str) -> "MlflowRun | None":
    """Find a run by its id; None if there is none, or it was deleted.

    Raises:
        MlflowException: If that cannot be asked.
    """
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


@contextmanager
def open_experiment(uri: str, name: str) -> "Iterator[tuple[MlflowClient, str]]":
    """Reach MLflow, and find or make an experiment, for who writes a few figures at once.

    Yields:
        A client, and the experiment's identifier.

    Raises:
        ConfigError: If MLflow cannot be reached, also inside the block, or the experiment was
            deleted.
    """
    with reachable(uri):
        client = client_of(uri)
        yield client, experiment_id(client, uri, name)
