"""Register: an export becomes a version of one of MLflow's models, under a name and an alias.

A version holds the export for timm, code that loads it without droppos
(:mod:`pipelines.timm_pyfunc`, no pickles), its signature, an example, the packages it needs, and as
tags the checkpoint it was made of. It counts only after it was loaded and compared.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from droppos.errors import ConfigError, DataError, TrainingError
from droppos.export.folder import OWN_CONFIG
from droppos.export.timm_vit import TIMM, TIMM_CONFIG, load_export
from droppos.measure.features import extract_features
from pipelines import checkpoints
from pipelines.checkpoints import Saved
from pipelines.export import export_checkpoint
from pipelines.ledger import pointer
from pipelines.likeness import differing_weights
from pipelines.recipe import Recipe
from pipelines.recipe_file import from_dict
from pipelines.registry import (
    EXPORT,
    SCHEME,
    check_alias,
    check_name,
    existing,
    find,
    parse,
    point,
)
from pipelines.secrets import redact
from pipelines.storage import open_place
from pipelines.tracking import (
    active_run,
    client_of,
    experiment_id,
    for_files,
    reachable,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

CODE = Path(__file__).with_name("timm_pyfunc.py")
NEEDS = ("torch", "timm", "numpy", "safetensors")
TOLERANCE = TIMM.tolerance
"""Largest difference of a feature for a model to count as the export."""


@dataclass(frozen=True, slots=True)
class Registered:
    """A version of a registered model."""

    name: str
    version: str
    alias: str | None
    before: str | None
    """Version that the alias pointed at until now."""
    tracking: str
    """MLflow, without secrets."""
    run_id: str
    """MLflow run that it belongs to."""
    checkpoint: str | None
    """What it was made of, where that is known."""

    @property
    def uri(self) -> str:
        """How it is opened."""
        end = f"/{self.version}" if self.alias is None else f"@{self.alias}"
        return f"{SCHEME}{self.name}{end}"


def register(
    backbone: str,
    name: str,
    alias: str | None = None,
    *,
    checkpoint: str | None = None,
    uri: str | None = None,
    experiment: str,
) -> Registered:
    """Make a new version of a registered model; or move an alias to one that is there.

    Args:
        backbone: Folder of an export, of a checkpoint, or of a run; or models:/NAME@ALIAS or
            models:/NAME/VERSION, and then only the alias is set.
        name: Name of the registered model, made when missing.
        alias: Points at the version from now on.
        checkpoint: For an export: the checkpoint or run it was made of; the weights are compared.
        uri: MLflow server or database; that of the run when not given.
        experiment: Experiment of a backbone whose run MLflow does not know.

    Raises:
        ConfigError: If the name or the alias cannot be one, or MLflow cannot be reached.
        DataError: If there is no such backbone, or it was not made of that checkpoint.
        TrainingError: If what was logged does not compute what the export does.
    """
    check_name(name)
    if alias is not None:
        check_alias(alias)
    if backbone.startswith(SCHEME):
        return _promote(backbone, name, alias, uri)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / EXPORT
        saved = _export_to(folder, backbone, checkpoint)
        where = uri or _tracking_of(saved)
        client = client_of(where)
        model = Path(scratch) / "model"
        with reachable(where), _run(client, where, saved, name, experiment) as run_id:
            logged = _log(client, run_id, folder, model, saved)
            version = _create_version(client, name, logged, run_id, _tags(saved))
    before = None if alias is None else point(client, where, version, alias)
    return _told(version, alias, before, where)


def _promote(backbone: str, name: str, alias: str | None, uri: str | None) -> Registered:
    model = parse(backbone)
    if alias is None:
        raise ConfigError(f"{backbone} is registered already; --alias names what is to point at it")
    if model.name != name:
        raise ConfigError(
            f"{backbone} is a version of {model.name}, not of {name}; an alias points at versions "
            f"of its own model: droppos register {backbone} {model.name} --alias {alias}"
        )
    where, client = existing(uri)
    version = find(client, where, model)
    return _told(version, alias, point(client, where, version, alias), where)


def _told(version: "ModelVersion", alias: str | None, before: str | None, where: str) -> Registered:
    return Registered(
        version.name,
        str(version.version),
        alias,
        before,
        redact(where),
        version.run_id or "",
        version.tags.get("droppos.checkpoint.uri"),
    )


def _export_to(folder: Path, backbone: str, checkpoint: str | None) -> Saved | None:
    """Have the export in a folder; give the checkpoint it was made of, if that is known."""
    place = open_place(backbone)
    if not (place / OWN_CONFIG).exists():
        if checkpoint is not None:
            raise ConfigError(f"--checkpoint is for an export; {backbone} is a checkpoint itself")
        saved = checkpoints.at(backbone)
        export_checkpoint(saved.uri, str(folder))
        return saved
    saved = None if checkpoint is None else checkpoints.at(checkpoint)
    if saved is not None and (differing := differing_weights(saved, place)):
        raise DataError(f"{backbone} was not exported from {saved.uri}: {differing[0]}")
    place.download(folder)
    return saved


def _tracking_of(saved: Saved | None) -> str:
    recipe = saved.record.get("recipe") if saved is not None else None
    return tracking_uri(Recipe() if recipe is None else from_dict(recipe))


@contextmanager
def _run(
    client: "MlflowClient", where: str, saved: Saved | None, name: str, experiment: str
) -> Iterator[str]:
    """Find the MLflow run that trained the backbone, or make one for the model alone."""
    known = {} if saved is None else pointer(saved.home)
    if known.get("uri") == redact(where) and active_run(client, known["run_id"]):
        yield known["run_id"]  # it keeps its status and its end
        return
    run = client.create_run(experiment_id(client, where, experiment), run_name=name)
    try:
        yield run.info.run_id
    except BaseException:
        client.set_terminated(run.info.run_id, "FAILED")
        raise
    client.set_terminated(run.info.run_id)


def _log(
    client: "MlflowClient", run_id: str, export: Path, folder: Path, saved: Saved | None
) -> str:
    """Log an export as a model of a run, and compare; give the model's id."""
    from mlflow.entities import LoggedModelOutput

    run = client.get_run(run_id)
    logged = client.create_logged_model(
        run.info.experiment_id,
        name="backbone",
        source_run_id=run_id,
        tags=_tags(saved),
        params=dict(run.data.params),
    )
    try:
        example = _save(export, folder, logged.model_id, run_id)
        _compare(export, folder, example)
        with for_files():
            client.log_model_artifacts(logged.model_id, str(folder))
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    step = 0 if saved is None else saved.step
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=step)])
    return logged.model_id


def _save(export: Path, folder: Path, model_id: str, run_id: str) -> np.ndarray:
    """Write the model as MLflow lays it out; give its example."""
    with _quiet():
        import mlflow.pyfunc
        from mlflow.models import Model, ModelSignature
        from mlflow.types import Schema, TensorSpec

    config = json.loads((export / TIMM_CONFIG).read_text())
    _, rows, columns = config["pretrained_cfg"]["input_size"]
    example = np.arange(rows * columns * 3, dtype=np.uint8).reshape(1, rows, columns, 3)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("uint8"), (-1, rows, columns, 3))]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, config["num_features"]))]),
    )
    with _quiet():
        mlflow.pyfunc.save_model(
            path=str(folder),
            mlflow_model=Model(model_id=model_id, run_id=run_id),
            python_model=str(CODE),
            artifacts={EXPORT: str(export)},
            signature=signature,
            input_example=example,
            # Without what torch adds for its build (+cu128): no index has that by this name.
            pip_requirements=[f"{name}=={installed(name).partition('+')[0]}" for name in NEEDS],
        )
    return example


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep MLflow from recommending type hints: the signature is given, and says more."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*type hint", UserWarning)
        yield


def _compare(export: Path, folder: Path, example: np.ndarray) -> None:
    """Load the model as others will, and compare what it computes.

    Raises:
        TrainingError: If that is something else than what the export computes.
    """
    import mlflow.pyfunc

    with _quiet():
        found = torch.from_numpy(mlflow.pyfunc.load_model(str(folder)).predict(example))
    pictures = torch.from_numpy(example)
    expected = extract_features(load_export(export).encoder, pictures)
    difference = (found - expected).abs().max().item()
    if not difference <= TOLERANCE:
        raise TrainingError(
            f"the model that MLflow loads computes features that differ by {difference:g} from the "
            f"export's, expected at most {TOLERANCE:g}; nothing was registered"
        )


def _create_version(
    client: "MlflowClient", name: str, model_id: str, run_id: str, tags: dict[str, str]
) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # By its location: an SQLite store looks models:/ID up where MLFLOW_TRACKING_URI says, and not
    # in itself.
    source = client.get_logged_model(model_id).artifact_location
    return client.create_model_version(
        name, source=source, run_id=run_id, tags=tags, model_id=model_id
    )


def _tags(saved: Saved | None) -> dict[str, str]:
    if saved is None:
        return {}
    told: dict[str, Any] = {
        "uri": redact(saved.uri),
        "step": saved.step,
        "complete_sha256": saved.sha256,
    }
    return {f"droppos.checkpoint.{name}": str(value) for name, value in told.items()}
