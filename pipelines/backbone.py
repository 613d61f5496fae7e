"""Trained models by name: an export, a checkpoint, a run, or a model of MLflow's registry."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from timm.models.vision_transformer import VisionTransformer

from droppos.config import Method, Model
from droppos.errors import DataError, TrainingError
from droppos.export.timm_vit import OWN_CONFIG, Export, load_export
from droppos.model import DropPos
from pipelines import checkpoints, stored_state
from pipelines.recipe_file import from_dict
from pipelines.registry import SCHEME, fetch
from pipelines.storage import Place, open_place


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
    _whole: DropPos | None = None

    @property
    def whole(self) -> DropPos:
        """Encoder and every decoder, as they were trained.

        Raises:
            DataError: If this is an export of a run without a position head: it has no decoder.
        """
        if self._whole is None:
            raise DataError(f"{self.uri} is an export without a decoder; name the checkpoint")
        return self._whole


def open_backbone(uri: str) -> Backbone:
    """Load an export's folder, a checkpoint's, a run's newest checkpoint, or a registered model.

    Args:
        uri: Path, s3:// URI, models:/NAME@ALIAS or models:/NAME/VERSION.

    Raises:
        DataError: If it is none of these; the message says what is there.
    """
    if uri.startswith(SCHEME):
        with TemporaryDirectory() as folder:
            return _of_export(uri, load_export(fetch(uri, Path(folder))))
    place = open_place(uri)
    if (place / OWN_CONFIG).exists():
        return _of_export(uri, _load(place))
    return from_checkpoint(checkpoints.at(uri))


def _of_export(uri: str, export: Export) -> Backbone:
    droppos = export.droppos
    return Backbone(uri, export.encoder, droppos, export.model, export.method, droppos)


def _load(place: Place) -> Export:
    if not place.is_s3:
        return load_export(Path(place.path))
    with TemporaryDirectory() as folder:
        for name in place.children():
            (Path(folder) / name).write_bytes((place / name).read_bytes())
        return load_export(Path(folder))


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
    weights = stored_state.load_full(saved, {"model"})["model"]
    try:
        droppos.load_state_dict(weights)
    except RuntimeError as error:
        raise TrainingError(f"checkpoint {saved.uri} does not fit its recipe: {error}") from error
    droppos.eval()
    placed = droppos if recipe.method.predicts_positions else None
    return Backbone(saved.uri, droppos.encoder, placed, recipe.model, recipe.method, droppos)
