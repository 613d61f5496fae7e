"""Export for Detectron2's ViTDet: the weights of ``detectron2.modeling.ViT`` in a feature pyramid.

    OUT/model.pth   {"model": {"backbone.net.patch_embed.proj.weight": ..., ...}}

For the configurations of Detectron2's projects/ViTDet: a ``SimpleFeaturePyramid`` (``backbone``)
around a ``ViT`` (``net``) with ``pretrain_use_cls_token=True``. That ViT has no class token and no
last norm; only its positions keep the class token's slot, which it cuts off. Its relative positions
start anew, as they do from MAE's weights. Positions are for a square picture of
``pretrain_img_size``, and ViTDet stretches them to its own.

Detectron2 is not needed to write this, nor used to check it: the file is mapped back to our names
and compared on what that ViT computes, the patches alone before the last norm, with attention over
the whole picture.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from droppos.config import Model
from droppos.encoder import build_encoder, positions, run_blocks
from droppos.export.flow import Features, Format
from droppos.export.folder import plain
from droppos.export.names import name_table, renamed
from droppos.export.torchvision_vit import require_square
from droppos.trained import Trained

WEIGHTS = "model.pth"
STEMS = {
    "pos_embed": "backbone.net.pos_embed",
    "patch_embed.proj.": "backbone.net.patch_embed.proj.",
    "blocks.{}.norm1.": "backbone.net.blocks.{}.norm1.",
    "blocks.{}.attn.qkv.": "backbone.net.blocks.{}.attn.qkv.",
    "blocks.{}.attn.proj.": "backbone.net.blocks.{}.attn.proj.",
    "blocks.{}.norm2.": "backbone.net.blocks.{}.norm2.",
    "blocks.{}.mlp.fc1.": "backbone.net.blocks.{}.mlp.fc1.",
    "blocks.{}.mlp.fc2.": "backbone.net.blocks.{}.mlp.fc2.",
}


def _check(model: Model) -> None:
    require_square(model, "Detectron2's ViT")


def _write(trained: Trained, folder: Path) -> None:
    table = name_table(STEMS, trained.model.shape.depth)
    torch.save({"model": renamed(plain(trained.encoder.state_dict()), table)}, folder / WEIGHTS)


def _read(folder: Path, model: Model) -> Iterator[Features]:
    back = {theirs: ours for ours, theirs in name_table(STEMS, model.shape.depth).items()}
    weights = renamed(torch.load(folder / WEIGHTS, weights_only=True)["model"], back)
    encoder = build_encoder(model).eval()
    # What ViTDet has no place for stays at its first value here, and is not looked at.
    encoder.load_state_dict(
        {name: encoder.state_dict()[name] for name in ("cls_token", "norm.weight", "norm.bias")}
        | weights
    )
    yield lambda pictures: _patches_alone(encoder, pictures)


@torch.no_grad()
def _patches_alone(encoder: VisionTransformer, pictures: Tensor) -> Tensor:
    patches = encoder.patch_embed(pictures) + positions(encoder)[:, 1:]
    return run_blocks(list(encoder.blocks), patches)


def _code(folder: str, model: Model) -> str:
    shape = model.shape
    return "\n".join(
        [
            "# in a configuration of Detectron2's projects/ViTDet",
            f"model.backbone.net.update(patch_size={shape.patch_size}, embed_dim={shape.width}, "
            f"depth={shape.depth}, num_heads={shape.heads}, "
            f"pretrain_img_size={model.image_size[0]}, pretrain_use_cls_token=True)",
            f'train.init_checkpoint = "{folder}/{WEIGHTS}"',
        ]
    )


DETECTRON2 = Format(
    name="detectron2",
    check=_check,
    write=_write,
    read=_read,
    code=_code,
    expected=_patches_alone,
    verified="names mapped back, patches before the last norm; Detectron2 itself was not run",
    tolerance=1e-5,
)
