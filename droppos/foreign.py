"""Weights that other projects wrote: whose names they have, and what model they are of.

Understood are the reference implementation of DropPos (encoder, position head, pixel head), MAE
(pre-training files with their decoder, and the encoder alone), and timm's vision transformers of
the plain kind: class token, one table of positions for it and the patches, LayerNorm, GELU.
Everything the encoder has must be there, and nothing that would change what it computes.

Two things such a file cannot tell: the activation (taken for GELU) and the epsilon of its norms
(taken for 1e-6, which all three projects use).
"""

import argparse
import pickle
import re
from collections.abc import Iterable, Mapping
from io import BytesIO
from math import isqrt
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from droppos.config import SHAPES, Heads, Method, Model, Size
from droppos.encoder import build_encoder
from droppos.errors import ConfigError, DataError
from droppos.export.timm_vit import assemble
from droppos.model import DropPos
from droppos.trained import Trained

SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
"""Endings of files of weights."""
WRAPPERS = ("model", "state_dict", "model_state")
"""Keys under which training scripts keep the weights, beside optimizer and arguments."""
PAPER_DECODER = (512, 16)
"""Channels and heads of the decoder, in the paper, its reference code and MAE."""

FOREIGN_PARTS = {
    "reg_token": "register tokens",
    "norm_pre": "a norm before the blocks",
    "fc_norm": "a norm after pooling",
    "attn_pool": "attention pooling",
    "attn.q_norm": "normalised queries and keys",
    "attn.q_bias": "queries and values with a bias of their own",
    "rel_pos": "relative positions",
    "relative_position": "relative positions",
    "rope": "rotary positions",
    "mlp.w12": "SwiGLU",
    "mlp.fc1_g": "SwiGLU",
    "mlp.norm": "a norm inside the MLP",
    "ls1": "layer scale",
    "gamma_1": "layer scale",
    "attn.norm": "a norm inside attention",
}
"""What other kinds of vision transformer have, by a part of the names of their weights."""


_OF_TORN_PICKLES = (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError)
"""What torch raises, too, for bytes that are no pickle."""


def read_weights(name: str, data: bytes) -> dict[str, Tensor]:
    """Read a file of weights; nothing in it is run.

    Args:
        name: Of the file; its ending tells the format.
        data: All of it.

    Returns:
        Float32 weights under the file's own names, without wrapper.

    Raises:
        DataError: If it is no file of weights, or holds what only running its code would load.
    """
    try:
        if name.endswith(".safetensors"):
            found: Any = load_safetensors(data)
        else:
            # Training scripts keep their arguments beside the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                found = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, *_OF_TORN_PICKLES) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{name} cannot be read as weights ({first}); expected a state dict written by "
            "torch.save, alone or under `model`, or safetensors"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
            break
    if (
        not isinstance(found, Mapping)
        or not found
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items())
    ):
        keys = ", ".join(map(str, list(found)[:5])) if isinstance(found, Mapping) else ""
        kind = f"keys {keys}" if keys else "nothing" if found == {} else ""
        raise DataError(
            f"{name} holds {kind or type(found).__name__}, expected a state dict, alone or under "
            f"one of {', '.join(WRAPPERS)}"
        )
    wrapped = all(
        key.startswith("module.") for key in found
    )  # saved inside DistributedDataParallel
    cut = len("module.") if found and wrapped else 0
    return {key[cut:]: value.float() for key, value in found.items()}


def our_names(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Translate names to those of :class:`DropPos`.

    Returns:
        The weights, and the names of those left out: fixed positions of a decoder, which we
        compute, a mask token of a task the file has no decoder for, and a classifier.
    """
    ours: dict[str, Tensor] = {}
    left: list[str] = []
    for name, value in weights.items():
        if (translated := our_name(name, weights)) is None:
            left.append(name)
        else:
            ours[translated] = value
    return ours, left


def our_name(name: str, among: Iterable[str]) -> str | None:
    """Translate one name; None for what has no place with us.

    Args:
        name: In the file.
        among: All names in the file, which tell whose it is.
    """
    if name in ("decoder_pos_embed", "aux_decoder_pos_embed") or name.startswith("head."):
        return None
    if name == "mask_token" and not {"aux_decoder_embed.weight", "decoder_pos_embed"} & set(among):
        return None
    # MAE's only decoder is for pixels; it alone gives that decoder positions under this name.
    main = "pixel_decoder" if "decoder_pos_embed" in among else "position_decoder"
    for prefix, ours in (
        ("aux_decoder_pred", "pixel_decoder.head"),
        ("aux_decoder_", "pixel_decoder."),
        ("mask_token", "pixel_decoder.mask_token"),
        ("mask_pos_token", "dropped_token"),
        ("decoder_pred", f"{main}.head"),
        ("decoder_", f"{main}."),
    ):
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    return f"encoder.{name}"


def understand(name: str, weights: Mapping[str, Tensor], heads: Heads) -> Trained:
    """Build the model that a file's weights are of.

    Args:
        name: Of the file, for messages.
        weights: Under the file's own names.
        heads: What the file can't tell.

    Raises:
        ConfigError: If they are not the weights of a plain vision transformer, with what is
            missing, left over and of another shape; or if the heads must be told.
    """
    ours, _ = our_names(weights)
    _refuse_other_kinds(name, ours)
    decoders = [part for part in ("position_decoder", "pixel_decoder") if _has(ours, part)]
    model = _model(name, ours, decoders, heads)
    method = _method(decoders)
    if method is not None and not _has(ours, "dropped_token"):
        ours["dropped_token"] = torch.zeros(1, 1, model.shape.width)  # MAE drops no position
    with torch.device("meta"):
        expected = (
            nn.ModuleDict({"encoder": build_encoder(model)})
            if method is None
            else (DropPos(model, method))
        )
    shapes = {key: value.shape for key, value in expected.state_dict().items()}
    require_fit(name, {key: value.shape for key, value in ours.items()}, shapes)
    return assemble(ours, model, method)


def require_fit(
    name: str, found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]
) -> None:
    """Refuse weights that are not exactly those expected.

    Raises:
        ConfigError: Naming the first of what is missing, left over and of another shape.
    """
    missing = [key for key in expected if key not in found]
    left = [key for key in found if key not in expected]
    other = [
        f"{key} {tuple(found[key])} for {tuple(shape)}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    wrong = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unknown", left), ("of another shape", other))
        if names
    ]
    if wrong:
        raise ConfigError(
            f"{name} does not fit: of {len(expected)} weights, {'; '.join(wrong)}; expected "
            "the weights of a plain vision transformer (class token, a position for it and each "
            "patch, LayerNorm, MLP of 4 times the width), named as by timm, MAE or the DropPos "
            "reference"
        )


def _refuse_other_kinds(name: str, ours: Mapping[str, Tensor]) -> None:
    encoder = [key for key in ours if key.startswith("encoder.")]
    found = {part: key for key in encoder for part in FOREIGN_PARTS if part in key}
    if found:
        said = sorted({f"{FOREIGN_PARTS[part]} ({key})" for part, key in found.items()})
        raise ConfigError(
            f"{name} is another kind of vision transformer: it has {', '.join(said)}, and this "
            "encoder has not; expected a plain one, such as timm's vit_base_patch16_224"
        )


def _has(weights: Mapping[str, Tensor], part: str) -> bool:
    return any(name.startswith(part) for name in weights)


def _model(name: str, ours: Mapping[str, Tensor], decoders: list[str], heads: Heads) -> Model:
    try:
        width = ours["encoder.cls_token"].shape[-1]
        patch = ours["encoder.patch_embed.proj.weight"].shape[-1]
        cells = ours["encoder.pos_embed"].shape[1] - 1
    except (KeyError, IndexError) as error:
        raise ConfigError(
            f"{name} has no {error}, so it is not the weights of a vision transformer we know: "
            f"found {', '.join(list(ours)[:3])}, ...; expected names as by timm, MAE or the "
            "DropPos reference, with a class token"
        ) from error
    side = isqrt(cells)
    if side * side != cells or cells == 0:
        raise ConfigError(
            f"{name} has {cells + 1} positions, expected one for the class token and a square "
            "grid of others; weights without a position for the class token, and other than "
            "square ones that don't tell their grid, cannot be taken"
        )
    depth = _blocks(ours, "encoder")
    size = _size(width, depth)
    number = heads.encoder or standard_heads(width, depth)
    if number is None:
        known = ", ".join(f"{name} {s.width} x {s.depth}" for name, s in SHAPES.items())
        raise ConfigError(
            f"{name} has {depth} blocks of {width} channels, which is no standard size ({known}), "
            "so its attention heads are not known; tell them with --heads.encoder"
        )
    standard = SHAPES[size or "tiny"]
    values = {"width": width, "depth": depth, "heads": number, "patch_size": patch}
    decoder = _decoder(name, ours, decoders[0], heads) if decoders else {}
    return Model(
        size=size or "tiny",
        image_size=(side * patch, side * patch),
        **{key: value for key, value in values.items() if value != getattr(standard, key)},
        **decoder,
    )


def standard_heads(width: int, depth: int) -> int | None:
    """Give the attention heads of the standard size with this width and depth, if there is one."""
    size = _size(width, depth)
    return None if size is None else SHAPES[size].heads


def _size(width: int, depth: int) -> Size | None:
    for size, shape in SHAPES.items():
        if (shape.width, shape.depth) == (width, depth):
            return size
    return None


def _decoder(name: str, ours: Mapping[str, Tensor], part: str, heads: Heads) -> dict[str, int]:
    width = ours[f"{part}.embed.weight"].shape[0] if f"{part}.embed.weight" in ours else 0
    usual, usual_heads = PAPER_DECODER
    number = heads.decoder or (usual_heads if width == usual else None)
    if number is None:
        raise ConfigError(
            f"{name} has a decoder of {width} channels, not the usual {usual}, so its attention "
            "heads are not known; tell them with --heads.decoder"
        )
    return {
        "decoder_width": width,
        "decoder_depth": _blocks(ours, part),
        "decoder_heads": number,
    }


def _blocks(ours: Mapping[str, Tensor], part: str) -> int:
    """Count the blocks of a part: one more than the highest number, so that a gap is missing."""
    numbers = [
        int(match[1]) for name in ours if (match := re.match(rf"{part}\.blocks\.(\d+)\.", name))
    ]
    return max(numbers, default=-1) + 1


def _method(decoders: list[str]) -> Method | None:
    """Give what a file tells of its task, as the reference computes it; the rest is usual."""
    match decoders:
        case []:
            return None
        case ["position_decoder"]:
            return Method(conformance="reference")
        case ["pixel_decoder"]:
            return Method(conformance="reference", objective="pixels")
        case _:
            return Method(conformance="reference", objective="position_pixels")
