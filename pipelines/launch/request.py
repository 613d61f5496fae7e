"""What is to run, and whether it could run on machines that are not this one."""

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from droppos.errors import ConfigError, StorageError
from pipelines.launch.check import Note, Wrong
from pipelines.recipe import Recipe
from pipelines.recipe_file import flatten, to_yaml
from pipelines.secrets import redact, redact_uris

JobKind = Literal["pretrain", "search", "drill"]

FILE = "droppos-launch.yaml"
"""The recipe as it was checked, in the working directory that is sent: file and flags in one."""
ELSEWHERE = ("s3://", "file:///", "timm:", "models:/")
"""Beginnings of what is the same on every machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One job, as a person asks for it."""

    recipe: Recipe
    job: JobKind = "pretrain"
    resume: bool = False
    allow_changes: bool = False

    @property
    def at_once(self) -> int:
        """Runs that the job has at the same time."""
        return self.recipe.search.max_concurrent if self.job == "search" else 1

    @property
    def entrypoint(self) -> str:
        """The job's command; it replaces the shell, which would not pass SIGTERM on."""
        command = ["python", "-m", "pipelines.cli", self.job, FILE]
        command += ["--resume"] if self.resume else []
        command += ["--allow-changes"] if self.allow_changes else []
        return f"exec {shlex.join(command)}"

    @property
    def files(self) -> Mapping[str, str]:
        """What is put into the working directory beside its own files."""
        return {FILE: to_yaml(self.recipe)}

    def check(self) -> None:
        """Refuse flags that the job does not have.

        Raises:
            ConfigError: Naming the flag.
        """
        if self.allow_changes and self.job != "pretrain":
            raise ConfigError(f"--allow-changes is for --job pretrain, got --job {self.job}")
        if self.resume and self.job == "drill":
            raise ConfigError("a drill begins anew each time; leave --resume out")


def places(recipe: Recipe) -> Mapping[str, str]:
    """Name every place of a recipe that its job reads or writes."""
    named = {
        "data.path": recipe.data.path,
        "data.holdout": recipe.data.holdout,
        "run.storage": recipe.run.storage,
        "run.init_from": recipe.run.init_from,
    }
    return {name: place for name, place in named.items() if place is not None}


def check_secrets(recipe: Recipe) -> str:
    """See that no field holds a secret: the recipe is sent, stored and shown.

    Raises:
        Wrong: Naming the first field that does.
    """
    for name, value in flatten(recipe).items():
        if isinstance(value, str) and redact(value) != value:
            raise Wrong(
                f"{name} is {redact(value)}",
                "no secret in a recipe, for it is sent, stored and shown",
                "give machines their rights by roles, and MLflow's password by "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the cluster",
            )
    return "none in the recipe"


def check_places(recipe: Recipe, *, remote: bool, job: JobKind = "pretrain") -> str:
    """See that the machines of the cluster would find what the recipe names.

    Args:
        recipe: The run.
        remote: Whether they are others than this one.
        job: What is done with it.

    Raises:
        Wrong: Naming the fields that mean this machine.
    """
    if recipe.data.path is None and job != "drill":  # which brings photographs of its own
        raise Wrong(
            "data.path is not set", "a prepared data set", "add --data.path s3://BUCKET/..."
        )
    here = {
        name: place
        for name, place in places(recipe).items()
        if not place.startswith(ELSEWHERE) and (remote or not Path(place).is_absolute())
    }
    if here:
        named = ", ".join(f"{name} {place}" for name, place in here.items())
        if remote:
            raise Wrong(
                named,
                "places that the cluster's machines see",
                "put them into s3://, or write file:///PATH if every machine has that PATH mounted",
            )
        # The job runs in an unpacked copy of the working directory, which goes when it ends.
        raise Wrong(named, "whole paths", "write them from / on")
    return ", ".join(f"{name} {place}" for name, place in places(recipe).items())


def check_data(recipe: Recipe, *, remote: bool = True) -> str:
    """See that the data sets are there, by their manifests.

    Args:
        recipe: The run.
        remote: Whether plain paths are those of other machines, where nobody can look from here.

    Raises:
        DataError: If one is not.
        Note: If storage does not let this machine look; it may let the cluster's.
    """
    from pipelines.shards import load_manifest
    from pipelines.storage import open_reachable

    said = []
    for place in filter(None, (recipe.data.path, recipe.data.holdout)):
        if remote and not place.startswith("s3://"):
            said.append(f"{place}: the cluster's own, not looked at")
            continue
        try:
            said.append(f"{place}: {load_manifest(open_reachable(place)).rows:,} pictures")
        except StorageError as error:
            raise Note(str(error), "not to be looked at from here; the cluster may") from error
    return "; ".join(said) or "its own photographs"


def check_run(asked: Request, *, remote: bool = True) -> str:
    """See that a new run would not find an old one in its folder, which it refuses.

    Raises:
        Wrong: If there is one, and it is not to be resumed.
        Note: If storage does not let this machine look.
    """
    from pipelines.checkpoints import COMPLETE
    from pipelines.storage import open_reachable

    home = asked.recipe.home
    if asked.job != "pretrain" or asked.resume or (remote and not home.startswith("s3://")):
        return home
    kept = open_reachable(home) / "checkpoints"
    try:
        names = kept.children() if kept.exists() else []
        whole = [name for name in names if (kept / name / COMPLETE).exists()]
    except StorageError as error:
        raise Note(str(error), "not to be looked at from here; the cluster may") from error
    if whole:
        raise Wrong(
            f"{home} has checkpoints, the newest {max(whole)}",
            "a run that is new",
            "add --resume to go on with it, or choose another run.name",
        )
    return f"{home} is new"


def check_search(recipe: Recipe, *, resume: bool, remote: bool = True) -> str:
    """See that `droppos search` would not refuse what it is given, on machines that are paid for.

    Args:
        recipe: The search.
        resume: Whether it is to go on with what is there.
        remote: Whether plain paths are those of other machines, where nobody can look from here.

    Raises:
        ConfigError: If the search would be refused.
        DataError: If its data cannot be read.
        Note: If storage does not let this machine look; it may let the cluster's.
    """
    from pipelines.search import ready
    from pipelines.space import read_space

    read_space(recipe)
    holdout = recipe.data.holdout
    needed = (recipe.data.path, recipe.home, holdout)
    if holdout and remote and not all(str(place).startswith("s3://") for place in needed):
        return "its space is one; its data are the cluster's own, not looked at"
    try:
        _, objective, fixed = ready(recipe, resume=resume)
    except StorageError as error:
        raise Note(str(error), "not to be looked at from here; the cluster may") from error
    return f"by {objective}, over {', '.join(fixed['search.space'])}"


def tracking(recipe: Recipe, env: Mapping[str, str]) -> Mapping[str, str]:
    """Choose what tells the job where MLflow is, by what the cluster's own machines were told.

    Args:
        recipe: The run.
        env: Of the cluster: with MLFLOW_TRACKING_URI where its stack has a server.

    Returns:
        MLFLOW_TRACKING_URI, or nothing.
    """
    own = os.environ.get("MLFLOW_TRACKING_URI")
    if recipe.tracking.uri is not None or "MLFLOW_TRACKING_URI" in env:
        return {}  # the recipe goes along, and its word counts most
    if own and not is_local(own) and redact_uris(own) == own:
        return {"MLFLOW_TRACKING_URI": own}
    return {}


def check_tracking(recipe: Recipe, env: Mapping[str, str], *, remote: bool) -> str:
    """See where the job will write its record to.

    Raises:
        Wrong: If the recipe names an MLflow that only this machine reaches.
        Note: If the record will be a file on the cluster, which goes with it.
    """
    uri = recipe.tracking.uri or {**env, **tracking(recipe, env)}.get("MLFLOW_TRACKING_URI")
    if uri and not (remote and is_local(uri)):
        return redact(uri)
    if uri:
        raise Wrong(
            f"tracking.uri {redact(uri)}",
            "an MLflow that the cluster reaches",
            "name a server, or leave it out",
        )
    if not remote:
        return "an SQLite file in run.storage"
    raise Note(
        "an SQLite file on the cluster's head, which goes with it",
        "the history stays in run.storage, too; for a record that stays, name a server by "
        "MLFLOW_TRACKING_URI or --tracking.uri (without a password in it)",
    )


def is_local(uri: str) -> bool:
    """Tell whether an MLflow can be reached from this machine only."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        return parts.hostname in ("localhost", "127.0.0.1", "::1")
    return "sqlite" in parts.scheme or parts.scheme in ("", "file")
