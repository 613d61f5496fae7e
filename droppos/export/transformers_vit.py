"""Export to Hugging Face transformers: a folder that ``ViTModel.from_pretrained`` loads.

    OUT/model.safetensors        the encoder; names as transformers keeps them on disk, which its
                                 releases 4 and 5 both read
    OUT/config.json              ViTConfig
    OUT/preprocessor_config.json size, mean and deviation for AutoImageProcessor

A picture that is not square is fine at the very size exported. ``interpolate_pos_encoding=True``
takes the positions for a square grid's: export with --image-size instead.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from droppos.config import Model
from droppos.errors import ConfigError, TrainingError
from droppos.export.flow import Features, Format
from droppos.export.folder import plain, write_json, write_weights
from droppos.export.names import name_table, renamed
from droppos.model import IMAGENET_MEAN, IMAGENET_STD
from droppos.trained import Trained

STEMS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "blocks.{}.norm1.": "encoder.layer.{}.layernorm_before.",
    "blocks.{}.attn.query.": "encoder.layer.{}.attention.attention.query.",
    "blocks.{}.attn.key.": "encoder.layer.{}.attention.attention.key.",
    "blocks.{}.attn.value.": "encoder.layer.{}.attention.attention.value.",
    "blocks.{}.attn.proj.": "encoder.layer.{}.attention.output.dense.",
    "blocks.{}.norm2.": "encoder.layer.{}.layernorm_after.",
    "blocks.{}.mlp.fc1.": "encoder.layer.{}.intermediate.dense.",
    "blocks.{}.mlp.fc2.": "encoder.layer.{}.output.dense.",
    "norm.": "layernorm.",
}


def _write(trained: Trained, folder: Path) -> None:
    shape = trained.model.shape
    weights = _split(plain(trained.encoder.state_dict()))
    named = renamed(weights, name_table(STEMS, shape.depth))
    write_weights(folder / "model.safetensors", named)
    height, width = trained.model.image_size
    config = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": 4 * shape.width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-6,  # transformers' own default is 1e-12
        "image_size": height if height == width else [height, width],
        "patch_size": shape.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "dtype": "float32",
    }
    write_json(folder / "config.json", config)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }
    write_json(folder / "preprocessor_config.json", processor)


def _split(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take timm's joint query, key and value apart."""
    apart = {}
    for name, value in weights.items():
        if ".attn.qkv." not in name:
            apart[name] = value
            continue
        for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
            apart[name.replace(".qkv.", f".{part}.")] = rows.clone()
    return apart


def _read(folder: Path, _model: Model) -> Iterator[Features]:
    try:
        from transformers import ViTModel
        from transformers.utils import logging
    except ImportError as error:
        raise ConfigError(
            "an export to transformers is compared by loading it with transformers, which is not "
            "installed: pip install 'droppos[export]'"
        ) from error
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = ViTModel.from_pretrained(
            folder, add_pooling_layer=False, output_loading_info=True
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    model, told = loaded
    if wrong := {kind: names for kind, names in told.items() if names}:
        raise TrainingError(
            f"transformers does not load the export as it stands: {wrong}; "
            "does its release know ViTModel under other names? Please report it"
        )
    model.eval()

    @torch.no_grad()
    def tokens(pictures: Tensor) -> Tensor:
        return model(pictures).last_hidden_state

    yield tokens


def _code(folder: str, _model: Model) -> str:
    return (
        f'transformers.ViTModel.from_pretrained("{folder}", add_pooling_layer=False)'
        ".eval()  # .last_hidden_state has the class token first"
    )


TRANSFORMERS = Format(
    name="transformers",
    write=_write,
    read=_read,
    code=_code,
    verified="all tokens, loaded by ViTModel.from_pretrained with no key missing or left over",
)
