"""Export to timm: a folder that ``timm.create_model`` loads, and nothing of droppos is needed.

    OUT/model.safetensors          encoder, timm's names, fixed positions included
    OUT/config.json                timm's hub format: architecture, arguments, normalisation
    OUT/position_head.safetensors  all other weights, so that position accuracy can be measured;
                                   only where there are such, and for the grid they are for
    OUT/droppos.json               model and method configuration

timm takes ``model.safetensors`` before any other weights in a folder, so the head beside it
does no harm.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from droppos.config import Method, Model
from droppos.encoder import build_encoder, timm_arguments
from droppos.errors import ConfigError, DataError
from droppos.export.flow import Features, Format, all_tokens
from droppos.export.folder import (
    OWN_CONFIG,
    plain,
    read_own,
    read_weights,
    write_json,
    write_weights,
)
from droppos.model import IMAGENET_MEAN, IMAGENET_STD, DropPos
from droppos.trained import Trained

WEIGHTS, TIMM_CONFIG, HEAD = "model.safetensors", "config.json", "position_head.safetensors"


def load_export(path: Path) -> Trained:
    """Load what was exported to timm.

    Raises:
        DataError: If a file is missing, unreadable, of another kind, or does not fit the others.
    """
    own = read_own(path)
    if own["for"] != TIMM.name:
        raise DataError(
            f"{path} is an export for {own['for']}, which only {own['for']} loads; export the "
            f"checkpoint with --format {TIMM.name}"
        )
    if own.get("classes"):
        raise DataError(
            f"{path} is an export of a fine-tuned classifier, which is no backbone; name the "
            "export, checkpoint or run that it began with (or, to export the classifier once more, "
            "the run of droppos finetune)"
        )
    try:
        model = model_of(own["model"])
        method = None if own["method"] is None else Method(**own["method"])
    except (KeyError, TypeError, ConfigError) as error:
        raise DataError(
            f"{path / OWN_CONFIG} does not describe a model ({error}); "
            "was it edited? Export again from the checkpoint"
        ) from error
    weights = {f"encoder.{name}": value for name, value in read_weights(path / WEIGHTS).items()}
    if method is not None:
        weights |= read_weights(path / HEAD)
    try:
        return assemble(weights, model, method)
    except RuntimeError as error:
        raise DataError(
            f"weights in {path} are not those of the model in {OWN_CONFIG}: {error}; "
            "are the files of one export? Export again from the checkpoint"
        ) from error


def model_of(said: Mapping[str, Any]) -> Model:
    """Read a model's configuration as JSON has it."""
    return Model(**{**said, "image_size": tuple(said["image_size"])})


def assemble(weights: dict[str, torch.Tensor], model: Model, method: Method | None) -> Trained:
    """Build a model from its weights, under the names of :class:`DropPos`.

    Args:
        weights: All of them; the encoder's only, without a method.
        model: What they are of.
        method: What they were trained by.

    Raises:
        RuntimeError: If they are not the weights of that model; it names each.
    """
    with torch.random.fork_rng(devices=[]):  # first values are overwritten: draw none of the run's
        if method is None:
            encoder = build_encoder(model)
            encoder.load_state_dict(
                {name.removeprefix("encoder."): value for name, value in weights.items()}
            )
            return Trained(encoder.eval(), model)
        task = DropPos(model, method).eval()
    task.load_state_dict(weights)
    return Trained(task.encoder, model, task)


def _write(trained: Trained, folder: Path) -> None:
    write_weights(folder / WEIGHTS, plain(trained.encoder.state_dict()))
    write_json(folder / TIMM_CONFIG, timm_config(trained.model))
    if trained.task is not None:
        weights = trained.task.state_dict().items()
        others = {name: value for name, value in weights if not name.startswith("encoder.")}
        write_weights(folder / HEAD, plain(others))


def timm_config(config: Model, classes: int = 0) -> dict[str, Any]:
    """Write what timm is to make, and what pictures it takes; without classes, an encoder."""
    architecture, arguments = timm_arguments(config)
    return {
        "architecture": architecture,
        "num_classes": classes,
        "num_features": config.shape.width,
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "droppos",
            "custom_load": False,
            "input_size": [3, *config.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "num_classes": classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _read(folder: Path, config: Model) -> Iterator[Features]:
    architecture, arguments = timm_arguments(config)
    for loaded in (
        timm.create_model(f"local-dir:{folder}", pretrained=True),
        timm.create_model(
            architecture, num_classes=0, checkpoint_path=folder / WEIGHTS, **arguments
        ),
    ):
        assert isinstance(loaded, VisionTransformer)
        encoder = loaded.eval()
        yield lambda pictures, encoder=encoder: all_tokens(encoder, pictures)


def _code(folder: str, _model: Model) -> str:
    return f'timm.create_model("local-dir:{folder}", pretrained=True)'


TIMM = Format(
    name="timm",
    write=_write,
    read=_read,
    code=_code,
    verified="all tokens, loaded by timm from the folder and by checkpoint_path",
    tolerance=1e-5,
)
