"""Export for MMSegmentation: the weights of its backbone ``VisionTransformer``.

    OUT/model.pth   {"state_dict": {"patch_embed.projection.weight": ..., ...}}

For ``mmseg.models.backbones.VisionTransformer`` with ``final_norm=True`` (its ``ln1``) and
``norm_cfg=dict(type="LN", eps=1e-6)``: mmseg's default of 1e-5 is another model. Its class ``MAE``
has relative positions and other names, and is not this one. Where ``img_size`` is another,
mmseg resizes the positions, and takes them for a square grid's.

MMSegmentation is not needed to write this, nor used to check it: the file is mapped back to our
names and compared.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from droppos.config import Model
from droppos.encoder import build_encoder
from droppos.export.flow import Features, Format, all_tokens
from droppos.export.folder import plain
from droppos.export.names import name_table, renamed
from droppos.trained import Trained

WEIGHTS = "model.pth"
STEMS = {
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "patch_embed.proj.": "patch_embed.projection.",
    "blocks.{}.norm1.": "layers.{}.ln1.",
    "blocks.{}.attn.qkv.": "layers.{}.attn.attn.in_proj_",
    "blocks.{}.attn.proj.": "layers.{}.attn.attn.out_proj.",
    "blocks.{}.norm2.": "layers.{}.ln2.",
    "blocks.{}.mlp.fc1.": "layers.{}.ffn.layers.0.0.",
    "blocks.{}.mlp.fc2.": "layers.{}.ffn.layers.1.",
    "norm.": "ln1.",
}


def _write(trained: Trained, folder: Path) -> None:
    table = name_table(STEMS, trained.model.shape.depth)
    weights = renamed(plain(trained.encoder.state_dict()), table)
    torch.save({"state_dict": weights}, folder / WEIGHTS)


def _read(folder: Path, model: Model) -> Iterator[Features]:
    back = {theirs: ours for ours, theirs in name_table(STEMS, model.shape.depth).items()}
    encoder = build_encoder(model).eval()
    encoder.load_state_dict(
        renamed(torch.load(folder / WEIGHTS, weights_only=True)["state_dict"], back)
    )
    yield lambda pictures: all_tokens(encoder, pictures)


def _code(folder: str, model: Model) -> str:
    shape = model.shape
    return (
        f'backbone=dict(type="VisionTransformer", img_size={model.image_size}, '
        f"patch_size={shape.patch_size}, embed_dims={shape.width}, num_layers={shape.depth}, "
        f"num_heads={shape.heads}, final_norm=True, "
        'norm_cfg=dict(type="LN", eps=1e-6), interpolate_mode="bicubic", '
        f'init_cfg=dict(type="Pretrained", checkpoint="{folder}/{WEIGHTS}"))'
    )


MMSEG = Format(
    name="mmseg",
    write=_write,
    read=_read,
    code=_code,
    verified="names mapped back, all tokens; MMSegmentation itself was not run",
    tolerance=1e-5,
)
