"""Likeness: whether an export for timm holds a checkpoint's weights, to the last bit."""

from collections.abc import Iterator

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from droppos.errors import DataError
from droppos.export.timm_vit import HEAD, WEIGHTS
from pipelines import checkpoints, stored_state
from pipelines.storage import Place


def differing_weights(saved: checkpoints.Saved, export: Place) -> list[str]:
    """Compare an export's tensors with those of a checkpoint.

    Args:
        saved: The checkpoint.
        export: Folder that `droppos export` wrote.

    Returns:
        Each tensor that differs, and how; nothing if the export was made of this checkpoint.

    Raises:
        DataError: If a file of the export is missing or is no safetensors.
        DamagedError: If a file of the checkpoint is not what was written.
    """
    exported = {f"encoder.{name}": value for name, value in _tensors(export / WEIGHTS).items()}
    trained = stored_state.load_full(saved, {"model"})["model"]
    if (export / HEAD).exists():
        exported |= _tensors(export / HEAD)
    else:
        trained = {name: value for name, value in trained.items() if name.startswith("encoder.")}
    return list(_differences(trained, exported))


def _differences(trained: dict[str, Tensor], exported: dict[str, Tensor]) -> Iterator[str]:
    for name in sorted(trained.keys() | exported.keys()):
        if name not in exported:
            yield f"{name} is not in the export"
        elif name not in trained:
            yield f"{name} is not in the checkpoint"
        else:
            ours, theirs = trained[name].float(), exported[name]  # an export is in float32
            if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
                kinds = f"{tuple(ours.shape)} {ours.dtype}, {tuple(theirs.shape)} {theirs.dtype}"
                yield f"{name} is {kinds} in the export"
            elif wrong := int((_bits(ours) != _bits(theirs)).sum()):
                yield f"{name}: {wrong:,} of {ours.numel():,} values are others"


def _bits(weights: Tensor) -> Tensor:
    """Look at float32 as integers: 0 is not -0 then, and NaN is itself."""
    return weights.contiguous().view(torch.int32)


def _tensors(place: Place) -> dict[str, Tensor]:
    try:
        return load(place.read_bytes())
    except SafetensorError as error:
        raise DataError(
            f"{place} cannot be read as safetensors ({error}); export again from the checkpoint"
        ) from error
