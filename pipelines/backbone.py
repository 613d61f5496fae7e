"""Trained models by name: an export, a checkpoint, a run, a registered or a foreign model."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer

from droppos.config import Heads
from droppos.errors import ConfigError, DataError, TrainingError
from droppos.export.classifiers import assemble_classifier
from droppos.export.folder import OWN_CONFIG
from droppos.export.timm_vit import TIMM_CONFIG, WEIGHTS, assemble, load_export, model_of
from droppos.foreign import SUFFIXES, read_weights, understand
from droppos.trained import Trained
from pipelines import checkpoints, stored_state
from pipelines.recipe_file import from_dict
from pipelines.registry import SCHEME, fetch
from pipelines.storage import Place, open_reachable

TIMM_PREFIX = "timm:"
"""What stands before the name of a model that timm downloads."""


@dataclass(frozen=True, slots=True)
class Backbone(Trained):
    """A trained model, and where it came from."""

    uri: str = ""
    sha256: str = ""
    """Hash of the file of its weights; of a checkpoint, of its complete.json, which names the hash
    of each of its files; empty for what timm downloaded."""


def open_backbone(
    uri: str,
    heads: Heads = Heads(),  # noqa: B008 - frozen
    classifiers: bool = False,
) -> Backbone:
    """Load a trained model, as much of it as is there.

    Args:
        uri: An export to timm, a checkpoint, a run (its newest checkpoint), a file of weights of
            timm, MAE or the DropPos reference, a folder that timm wrote, ``timm:NAME``, or a model
            of MLflow's registry: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
        heads: Attention heads, for files of weights that don't tell.
        classifiers: Load also what `droppos finetune` made, with its classes.

    Raises:
        DataError: If it is none of these; the message says what is there.
        ConfigError: If it is another kind of model.
    """
    if uri.startswith(TIMM_PREFIX):
        return _downloaded(uri, heads)
    if uri.startswith(SCHEME):
        with TemporaryDirectory() as folder:
            return _load(fetch(uri, Path(folder)), uri)
    place = open_reachable(uri)
    if place.name.endswith(SUFFIXES):
        return _foreign(place, place, heads)
    found = place.children()
    if OWN_CONFIG in found:
        return _export(place)
    if TIMM_CONFIG in found:
        return _timm_folder(place, found, heads)
    saved = checkpoints.at(uri)
    if classifiers and "finetune" in saved.record:
        return _classifier(saved)
    return from_checkpoint(saved)


def from_checkpoint(saved: checkpoints.Saved) -> Backbone:
    """Build the model of a checkpoint in this process, whatever the world size that saved it.

    Raises:
        DataError: If it does not tell what model it is of.
        TrainingError: If its weights are not those of that model.
    """
    checkpoints.require_recipe(saved)
    recipe = from_dict(saved.record["recipe"])
    weights = stored_state.load_full(saved, {"model"})["model"]
    try:
        trained = assemble(weights, recipe.model, recipe.method)
    except RuntimeError as error:
        raise TrainingError(f"checkpoint {saved.uri} does not fit its recipe: {error}") from error
    return _named(trained, saved.uri, saved.sha256)


def _classifier(saved: checkpoints.Saved) -> Backbone:
    """Build what was fine-tuned.

    Raises:
        DataError: If it does not tell what its classes are.
        TrainingError: If its weights are not those of its model.
    """
    said = saved.record.get("classifier")
    if said is None:
        raise DataError(
            f"checkpoint {saved.uri} does not name its classes: an older droppos made it; "
            "fine-tune again under another --name, or load its state with "
            "pipelines.stored_state.load_full"
        )
    weights = stored_state.load_full(saved, {"model"})["model"]
    try:
        trained = assemble_classifier(weights, model_of(said["model"]), said["classes"])
    except RuntimeError as error:
        raise TrainingError(f"checkpoint {saved.uri} does not fit its model: {error}") from error
    return _named(trained, saved.uri, saved.sha256)


def _export(place: Place) -> Backbone:
    if not place.is_s3:
        return _load(Path(place.path), place.uri)
    with TemporaryDirectory() as folder:
        place.download(Path(folder))
        return _load(Path(folder), place.uri)


def _load(folder: Path, uri: str) -> Backbone:
    trained = load_export(folder)
    return _named(trained, uri, hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest())


def _foreign(place: Place, file: Place, heads: Heads) -> Backbone:
    data = file.read_bytes()
    trained = understand(place.uri, read_weights(file.uri, data), heads)
    return _named(trained, place.uri, hashlib.sha256(data).hexdigest())


def _timm_folder(place: Place, found: list[str], heads: Heads) -> Backbone:
    """Load what timm, or somebody for timm, saved for its ``local-dir:``."""
    try:
        config = json.loads((place / TIMM_CONFIG).read_bytes())
        architecture, arguments = config["architecture"], config.get("model_args") or {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{place / TIMM_CONFIG} names no timm architecture ({error!r}); expected a folder "
            "that timm saved, or name the file of weights itself"
        ) from error
    file = next((name for name in (WEIGHTS, "pytorch_model.bin") if name in found), None)
    if file is None:
        raise DataError(
            f"{place} is a timm folder ({architecture}) without weights: found "
            f"{', '.join(found)}, expected {WEIGHTS} or pytorch_model.bin"
        )
    told = arguments.get("num_heads", heads.encoder)
    return _foreign(place, place / file, replace(heads, encoder=told))


def _downloaded(uri: str, heads: Heads) -> Backbone:
    name = uri.removeprefix(TIMM_PREFIX)
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(
            f"timm gives no pretrained {name!r} ({error}); timm.list_pretrained() lists the "
            "names, and Hugging Face's hub must be reachable from here"
        ) from error
    if not isinstance(model, VisionTransformer):
        raise ConfigError(
            f"timm's {name} is a {type(model).__name__}, expected a VisionTransformer, such as "
            "vit_base_patch16_224.mae"
        )
    attention: Any = model.blocks[0].attn
    trained = understand(uri, model.state_dict(), replace(heads, encoder=attention.num_heads))
    return _named(trained, uri, "")


def _named(trained: Trained, uri: str, sha256: str) -> Backbone:
    return Backbone(
        trained.encoder, trained.model, trained.task, trained.classes, uri=uri, sha256=sha256
    )
