"""First weights from another model: what a run takes of it, and what stays new.

The encoder is taken whole or not at all. A decoder is taken where the other model has the same one:
of the same shape, and, for the position head, for the same grid.

Positions come along. Those of a timm backbone were learnt, and its blocks know no others; they
stay fixed from here on, as sine and cosine do. For another grid they are resampled, and so are
sine and cosine: :mod:`droppos.export.sizes` tells why.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from droppos.config import Grid, Method, Model
from droppos.encoder import positions, resample_positions, sincos_positions
from droppos.errors import ConfigError
from droppos.export.folder import plain
from droppos.foreign import require_fit
from droppos.model import DropPos
from droppos.trained import Trained

NEAR = 1e-4
"""Largest difference of a position from sine and cosine for it to count as computed."""


@dataclass(frozen=True, slots=True)
class FirstWeights:
    """What a run begins with."""

    weights: dict[str, Tensor]
    """By the names of :class:`DropPos`: all of the encoder, and of the decoders what fits."""
    notice: str
    """What is new, what was not used, and what became of the positions."""


def first_weights(name: str, trained: Trained, model: Model, method: Method) -> FirstWeights:
    """Take all that fits of a trained model.

    Args:
        name: What the other model is called, for messages.
        trained: The other model.
        model: The run's.
        method: The run's.

    Raises:
        ConfigError: If the encoders differ in anything but the grid; it names each difference.
    """
    _require_same_shape(name, trained.model, model)
    with torch.device("meta"):
        expected = {key: v.shape for key, v in DropPos(model, method).state_dict().items()}
    encoder = plain(trained.encoder.state_dict())
    encoder["pos_embed"] = resample_positions(
        positions(trained.encoder).detach(), trained.model.grid, model.grid
    ).contiguous()
    weights = {f"encoder.{key}": value for key, value in encoder.items()}
    shapes = {key: shape for key, shape in expected.items() if key.startswith("encoder.")}
    require_fit(name, {key: value.shape for key, value in weights.items()}, shapes)

    others = {} if trained.task is None else trained.task.state_dict()
    parts = {_part(key) for key in expected} - {"encoder"}
    taken = {part for part in parts if _fits(part, others, expected, trained, model, method)}
    weights |= plain({key: value for key, value in others.items() if _part(key) in taken})
    unused = {_part(key) for key in others} - {"encoder"} - taken
    return FirstWeights(weights, _notice(trained, model, parts - taken, unused))


def _require_same_shape(name: str, theirs: Model, ours: Model) -> None:
    different = [
        f"{field} {there} there, {here} in the recipe"
        for field, there, here in zip(ours.shape._fields, theirs.shape, ours.shape, strict=True)
        if there != here
    ]
    if different:
        raise ConfigError(
            f"{name} is another encoder: {', '.join(different)}; set model.size, or model.width, "
            "model.depth, model.heads and model.patch_size, to its values"
        )


def _part(name: str) -> str:
    return name.partition(".")[0]


def _fits(
    part: str,
    others: Mapping[str, Tensor],
    expected: Mapping[str, torch.Size],
    trained: Trained,
    model: Model,
    method: Method,
) -> bool:
    """Tell whether a part besides the encoder can be taken."""
    found = {key: value.shape for key, value in others.items() if _part(key) == part}
    if found != {key: shape for key, shape in expected.items() if _part(key) == part}:
        return False
    if part == "dropped_token":  # zeros where it is not learnt
        before = trained.droppos
        learnt = before is not None and before.method.dropped_token == "learnt"
        return learnt and method.predicts_positions and method.dropped_token == "learnt"
    same_heads = trained.model.decoder_heads == model.decoder_heads
    return same_heads and (part != "position_decoder" or trained.model.grid == model.grid)


def _notice(trained: Trained, model: Model, new: set[str], unused: set[str]) -> str:
    said = ["the encoder is taken whole"]
    if new:
        said.append(f"new: {', '.join(sorted(new))}")
    if unused:
        said.append(f"not used: {', '.join(sorted(unused))}")
    if not _computed(trained, trained.model.grid):
        said.append("its positions are not computed ones; they stay fixed")
    if trained.model.grid != model.grid:
        old, now = trained.model.grid, model.grid
        said.append(
            f"positions resampled from {old.rows} x {old.columns} to {now.rows} x {now.columns}"
        )
    return "; ".join(said)


def _computed(trained: Trained, grid: Grid) -> bool:
    """Tell whether positions are sine and cosine."""
    table = positions(trained.encoder)
    ours = sincos_positions(grid, table.shape[-1])
    return (table.detach() - ours).abs().max().item() < NEAR
