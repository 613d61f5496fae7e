"""Export to timm: a folder that ``timm.create_model`` loads, and nothing of droppos is needed.

    OUT/model.safetensors          encoder, timm's names, fixed positions included
    OUT/config.json                timm's hub format: architecture, arguments, normalisation
    OUT/position_head.safetensors  all other weights, so that position accuracy can be measured
    OUT/droppos.json               model and method configuration

timm takes ``model.safetensors`` before any other weights in a folder, so the head beside it
does no harm.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import timm
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from droppos.config import Method, Model
from droppos.encoder import timm_arguments
from droppos.errors import ConfigError, DataError, TrainingError
from droppos.model import IMAGENET_MEAN, IMAGENET_STD, DropPos

WEIGHTS, TIMM_CONFIG = "model.safetensors", "config.json"
HEAD, OWN_CONFIG = "position_head.safetensors", "droppos.json"
FILES = {WEIGHTS, TIMM_CONFIG, HEAD, OWN_CONFIG}
FORMAT = "droppos export 1"
TOLERANCE = 1e-5
"""Largest difference of a feature for the export to count as the trained encoder."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written, and how near it is to what was trained."""

    path: Path
    architecture: str
    """timm's name."""
    arguments: dict[str, Any]
    """What ``timm.create_model`` must be told besides, when it is not given the folder."""
    parameters: int
    """Of the encoder, fixed positions included."""
    size: int
    """Bytes of the whole folder."""
    largest_difference: float
    """Largest absolute difference of any feature from the trained encoder's on random
    pictures, over both ways of loading."""

    @property
    def command(self) -> str:
        """Python that loads the export."""
        return f'timm.create_model("local-dir:{self.path}", pretrained=True)'


@dataclass(frozen=True, slots=True)
class Export:
    """An export, loaded."""

    encoder: VisionTransformer
    """In eval mode, on the CPU."""
    droppos: DropPos | None
    """The same encoder with its position head; None if the run trained none (pixels)."""
    model: Model
    method: Method


def export(model: DropPos, config: Model, out: Path) -> ExportReport:
    """Write the encoder for timm, load it back in both ways, and compare.

    The folder appears at once and complete, or not at all; a previous export there is
    replaced.

    Args:
        model: Trained model with all of its weights in this process, on any device.
        config: The configuration it was made from.
        out: Folder to write.

    Raises:
        ConfigError: If ``out`` holds anything but a previous export.
        TrainingError: If what was written does not compute what was trained.
    """
    _refuse_foreign(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.parent / f".{out.name}-{uuid4().hex}"
    draft.mkdir()
    try:
        _write(model, config, draft)
        difference = _verify(model.encoder, config, draft)
        if not difference <= TOLERANCE:  # NaN is a failure, too
            raise TrainingError(
                f"the exported encoder's features differ from the trained one's by {difference:g}, "
                f"expected at most {TOLERANCE:g}; nothing was written to {out}. Are the weights "
                "finite, and is this the configuration the model was made from?"
            )
        _put_in_place(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    architecture, arguments = timm_arguments(config)
    return ExportReport(
        path=out,
        architecture=architecture,
        arguments={**arguments, "num_classes": 0},
        parameters=sum(weight.numel() for weight in model.encoder.state_dict().values()),
        size=sum(file.stat().st_size for file in out.iterdir()),
        largest_difference=difference,
    )


def load_export(path: Path) -> Export:
    """Load what `export` wrote.

    Raises:
        DataError: If a file is missing, unreadable, of another kind, or does not fit the others.
    """
    own = _read_json(path / OWN_CONFIG)
    if not isinstance(own, dict) or own.get("format") != FORMAT:
        found = own.get("format") if isinstance(own, dict) else own
        raise DataError(
            f"{path / OWN_CONFIG} says format {found!r}, expected {FORMAT!r}; "
            "is it another thing, or from another version? Export again from the checkpoint"
        )
    try:
        model = Model(**{**own["model"], "image_size": tuple(own["model"]["image_size"])})
        method = Method(**own["method"])
    except (KeyError, TypeError, ConfigError) as error:
        raise DataError(
            f"{path / OWN_CONFIG} does not describe a model ({error}); "
            "was it edited? Export again from the checkpoint"
        ) from error
    weights = {f"encoder.{name}": value for name, value in _read_weights(path / WEIGHTS).items()}
    weights |= _read_weights(path / HEAD)
    with torch.random.fork_rng(devices=[]):  # first values are overwritten: draw none of the run's
        droppos = DropPos(model, method).eval()
    try:
        droppos.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(
            f"weights in {path} are not those of the model in {OWN_CONFIG}: {error}; "
            "are the files of one export? Export again from the checkpoint"
        ) from error
    return Export(droppos.encoder, droppos if method.predicts_positions else None, model, method)


def _write(model: DropPos, config: Model, folder: Path) -> None:
    encoder, others = {}, {}
    for name, value in model.state_dict().items():
        # Safetensors refuses memory that is shared or strided.
        value = value.detach().to("cpu", torch.float32, copy=True).contiguous()
        if name.startswith("encoder."):
            encoder[name.removeprefix("encoder.")] = value
        else:
            others[name] = value
    # The metadata is what Hugging Face's loaders look for.
    save_file(encoder, folder / WEIGHTS, metadata={"format": "pt"})
    save_file(others, folder / HEAD, metadata={"format": "pt"})
    _write_json(folder / TIMM_CONFIG, _timm_config(config))
    own = {"format": FORMAT, "model": asdict(config), "method": asdict(model.method)}
    _write_json(folder / OWN_CONFIG, own)


def _timm_config(config: Model) -> dict[str, Any]:
    architecture, arguments = timm_arguments(config)
    return {
        "architecture": architecture,
        "num_classes": 0,
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
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


@torch.no_grad()
def _verify(encoder: VisionTransformer, config: Model, folder: Path) -> float:
    """Compare all tokens of two random pictures over both ways of loading."""
    architecture, arguments = timm_arguments(config)
    device = next(encoder.parameters()).device
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(2, 3, *config.image_size, generator=generator).to(device)
    with torch.random.fork_rng(devices=[]):  # timm draws first values that the weights replace
        loaded = (
            timm.create_model(f"local-dir:{folder}", pretrained=True),
            timm.create_model(
                architecture, num_classes=0, checkpoint_path=folder / WEIGHTS, **arguments
            ),
        )
    expected = _tokens(encoder, pictures)
    return max(
        (_tokens(cast(VisionTransformer, one).to(device), pictures) - expected).abs().max().item()
        for one in loaded
    )


def _tokens(
    encoder: VisionTransformer, pictures: Float[Tensor, "B 3 rows columns"]
) -> Float[Tensor, "B tokens D"]:
    training = encoder.training
    try:
        return encoder.eval().forward_features(pictures).float()
    finally:
        encoder.train(training)


def _refuse_foreign(out: Path) -> None:
    """Let only a new folder, an empty one or a previous export be (over)written."""
    if not out.exists():
        return
    found = {file.name for file in out.iterdir()} if out.is_dir() else {out.name}
    if found and (OWN_CONFIG not in found or found - FILES):
        raise ConfigError(
            f"{out} is not a previous export, so it is not replaced: it holds "
            f"{', '.join(sorted(found - FILES or found)[:3])}; name a new or empty folder"
        )


def _put_in_place(draft: Path, out: Path) -> None:
    """Swap folders by renaming, the one step that cannot be half done.

    Killed between the two renames, the previous export still lies beside, under a hidden name.
    """
    previous = draft.with_name(f"{draft.name}-previous")
    if out.exists():
        out.rename(previous)
    draft.rename(out)
    shutil.rmtree(previous, ignore_errors=True)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); expected the folder that "
            "`droppos export CHECKPOINT OUT` wrote"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{path} is not JSON ({error}); export again from the checkpoint"
        ) from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path} cannot be read as safetensors ({error}); is the export complete? "
            "Export again from the checkpoint"
        ) from error
