"""Trained models by name: an export, a checkpoint, or a run."""

from dataclasses import dataclass
from pathlib import Path

from timm.models.vision_transformer import VisionTransformer

from droppos.config import Method, Model
from droppos.errors import DataError, TrainingError
from droppos.export.timm_vit import OWN_CONFIG, load_export
from droppos.model import DropPos
from pipelines import checkpoints
from pipelines.recipe_file import from_dict


@dataclass(frozen=True, slots=True)
class Backbone:
    """A trained encoder on the CPU, in eval mode."""

    uri: str
    """Where it came from."""
    encoder: VisionTransformer
    droppos: DropPos | None
    """With its position head, if it has one."""
    model: Model
    method: Method


def open_backbone(uri: str) -> Backbone:
    """Load an export's folder, a checkpoint's, or a run's newest checkpoint.

    Raises:
        DataError: If it is none of these; the message says what is there.
    """
    if (Path(uri) / OWN_CONFIG).is_file():
        export = load_export(Path(uri))
        return Backbone(uri, export.encoder, export.droppos, export.model, export.method)
    return from_checkpoint(checkpoints.at(uri))


def from_checkpoint(saved: checkpoints.Saved) -> Backbone:
    """Build the model of a checkpoint in this process, whatever the world size that saved it.

    Raises:
        DataError: If it does not tell what model it is of.
        TrainingError: If its weights are not those of that model.
    """
    if "recipe" not in saved.record:
        raise DataError(
            f"checkpoint {saved.uri} names no recipe, so its model is unknown; "
            "was it written by droppos pretrain?"
        )
    recipe = from_dict(saved.record["recipe"])
    droppos = DropPos(recipe.model, recipe.method)
    weights = checkpoints.load_full(saved, {"model"})["model"]
    try:
        droppos.load_state_dict(weights)
    except RuntimeError as error:
        raise TrainingError(f"checkpoint {saved.uri} does not fit its recipe: {error}") from error
    droppos.eval()
    placed = droppos if recipe.method.predicts_positions else None
    return Backbone(saved.uri, droppos.encoder, placed, recipe.model, recipe.method)
