"""The registry: backbones as MLflow's registered models, found by name with a version or an alias.

`models:/NAME/3` is a version for ever; `models:/NAME@champion` is whatever its alias points at now.
:mod:`pipelines.register` makes versions. Opening one takes the export out of it, that
:mod:`droppos.export.timm_vit` reads: code that lies in a registry is not run.

Imports no torch.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from droppos.errors import ConfigError, DataError
from pipelines.recipe import Recipe
from pipelines.secrets import redact
from pipelines.tracking import client_of, for_files, missing_database, reachable, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel
    from mlflow.tracking import MlflowClient

SCHEME = "models:/"
EXPORT = "export"
"""Artifact of a version: the folder that timm loads."""
SHOWN = 10
"""Names that an error lists at most."""


class ModelName(NamedTuple):
    """What a models:/ URI names."""

    name: str
    version: str | None
    alias: str | None
    """One of the two."""


def parse(uri: str) -> ModelName:
    """Read models:/NAME/VERSION or models:/NAME@ALIAS.

    Raises:
        ConfigError: If it is neither.
    """
    found = re.fullmatch(rf"{SCHEME}([^/@]+)(?:/(\d+)|@([^/@]+))", uri)
    if found is None:
        raise ConfigError(
            f"{uri} names no registered model; write models:/NAME@ALIAS (models:/droppos@champion) "
            "or models:/NAME/VERSION (models:/droppos/3)"
        )
    return ModelName(*found.groups())


def existing(uri: str | None) -> "tuple[str, MlflowClient]":
    """Reach an MLflow that has models; its address, and what reaches it.

    Args:
        uri: Server or database; MLFLOW_TRACKING_URI, or that of ./droppos-runs, when not given.

    Raises:
        DataError: If it is a database that does not exist.
    """
    where = uri or tracking_uri(Recipe())
    if file := missing_database(where):
        raise DataError(
            f"there are no registered models: {file} does not exist; name the server or database "
            "by MLFLOW_TRACKING_URI"
        )
    return where, client_of(where)


def find(client: "MlflowClient", where: str, model: ModelName) -> "ModelVersion":
    """Find a version of a registered model.

    Raises:
        DataError: If there is none; the message says what is there.
        ConfigError: If MLflow cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    with reachable(where):
        try:
            if model.alias is not None:
                return client.get_model_version_by_alias(model.name, model.alias)
            return client.get_model_version(model.name, str(model.version))
        except MlflowException as error:
            # The second is what it says of an alias that is not there.
            if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
                raise
            known = {each.name: each for each in client.search_registered_models(max_results=1000)}
            versions = client.search_model_versions(f"name = '{model.name}'", max_results=SHOWN)
    if model.name not in known:
        names = ", ".join(sorted(known)[:SHOWN]) or "none"
        raise DataError(
            f"MLflow at {redact(where)} has no registered model {model.name!r}; it has: {names}. "
            "`droppos register BACKBONE NAME` makes one; --uri or MLFLOW_TRACKING_URI names "
            "another MLflow"
        )
    wanted = f"alias {model.alias!r}" if model.alias is not None else f"version {model.version}"
    raise DataError(
        f"registered model {model.name} has no {wanted}; it has {_there(known[model.name])} and "
        f"versions {', '.join(str(each.version) for each in versions) or 'none'} (the newest "
        f"{SHOWN}, if there are more)"
    )


def _there(model: "RegisteredModel") -> str:
    aliases = ", ".join(f"{alias} (version {n})" for alias, n in sorted(model.aliases.items()))
    return f"aliases {aliases}" if aliases else "no aliases"


def fetch(uri: str, folder: Path, tracking: str | None = None) -> Path:
    """Download the export of a registered model.

    Args:
        uri: models:/NAME@ALIAS or models:/NAME/VERSION.
        folder: Where to, on this machine.
        tracking: MLflow, as of `existing`.

    Returns:
        Folder of the export.

    Raises:
        DataError: If there is no such model, or it holds no export.
        ConfigError: If MLflow cannot be reached.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    model = parse(uri)
    where, client = existing(tracking)
    version = find(client, where, model)
    with reachable(where):
        source = client.get_model_version_download_uri(model.name, str(version.version))
    try:
        with for_files():
            fetched = download_artifacts(
                artifact_uri=f"{source}/artifacts/{EXPORT}",
                dst_path=str(folder),
                tracking_uri=where,
            )
    except (MlflowException, OSError) as error:
        raise DataError(
            f"{uri} (version {version.version}) has no export at {redact(source)}: "
            f"{redact(str(error))}; was it made by `droppos register`, and are its artifacts there?"
        ) from error
    return Path(fetched)


def point(client: "MlflowClient", where: str, version: "ModelVersion", alias: str) -> "str | None":
    """Have an alias point at a version.

    Returns:
        The version that it pointed at before; None if it was not there.
    """
    with reachable(where):
        before = client.get_registered_model(version.name).aliases.get(alias)
        client.set_registered_model_alias(version.name, alias, str(version.version))
    return None if before is None else str(before)


def check_alias(alias: str) -> None:
    """Refuse what MLflow would take for something else, before anything is uploaded.

    Raises:
        ConfigError: If it cannot be an alias.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", alias) or re.fullmatch(r"v\d+|latest", alias.lower()):
        raise ConfigError(
            f"--alias must be letters, digits, - and _, and neither v1 nor latest, which MLflow "
            f"has meanings for; got {alias!r}: candidate or champion, say"
        )


def check_name(name: str) -> None:
    """Refuse a name that no models:/ URI could spell.

    Raises:
        ConfigError: If it cannot be a name.
    """
    if not re.fullmatch(r"[^/:@'\"\s]+", name):
        raise ConfigError(
            f"a registered model's name must be without spaces, quotes, /, : and @, got {name!r}"
        )
