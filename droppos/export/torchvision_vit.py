"""Export to torchvision: a state dict of ``torchvision.models.VisionTransformer``.

    OUT/model.pth   the encoder; there is no classifier, so the model's ``heads`` become an Identity

torchvision's class knows square pictures only.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from droppos.config import Model, require
from droppos.export.flow import Features, Format
from droppos.export.folder import plain
from droppos.export.names import name_table, renamed
from droppos.trained import Trained

WEIGHTS = "model.pth"
STEMS = {
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj.": "conv_proj.",
    "blocks.{}.norm1.": "encoder.layers.encoder_layer_{}.ln_1.",
    "blocks.{}.attn.qkv.": "encoder.layers.encoder_layer_{}.self_attention.in_proj_",
    "blocks.{}.attn.proj.": "encoder.layers.encoder_layer_{}.self_attention.out_proj.",
    "blocks.{}.norm2.": "encoder.layers.encoder_layer_{}.ln_2.",
    "blocks.{}.mlp.fc1.": "encoder.layers.encoder_layer_{}.mlp.0.",
    "blocks.{}.mlp.fc2.": "encoder.layers.encoder_layer_{}.mlp.3.",
    "norm.": "encoder.ln.",
}


def require_square(model: Model, project: str) -> None:
    """Refuse pictures that are not square.

    Raises:
        ConfigError: If they are not.
    """
    height, width = model.image_size
    require(
        height == width,
        "model.image_size",
        model.image_size,
        f"square for {project}, which has no other",
        f"add --image-size {max(height, width)} {max(height, width)}, or take --format timm",
    )


def _check(model: Model) -> None:
    require_square(model, "torchvision's VisionTransformer")


def _arguments(model: Model) -> dict[str, Any]:
    shape = model.shape
    return {
        "image_size": model.image_size[0],
        "patch_size": shape.patch_size,
        "num_layers": shape.depth,
        "num_heads": shape.heads,
        "hidden_dim": shape.width,
        "mlp_dim": 4 * shape.width,
    }


def _write(trained: Trained, folder: Path) -> None:
    table = name_table(STEMS, trained.model.shape.depth)
    torch.save(renamed(plain(trained.encoder.state_dict()), table), folder / WEIGHTS)


def _read(folder: Path, model: Model) -> Iterator[Features]:
    from torchvision.models import VisionTransformer

    loaded = VisionTransformer(**_arguments(model))
    loaded.heads = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    loaded.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True))
    loaded.eval()

    @torch.no_grad()
    def tokens(pictures: Tensor) -> Tensor:
        """Take the class token as the model gives it, and the patches where its encoder ends."""
        seen: list[Any] = []
        hook = loaded.encoder.register_forward_hook(lambda _module, _input, out: seen.append(out))
        try:
            class_token = loaded(pictures)
        finally:
            hook.remove()
        return torch.cat([class_token[:, None], seen[0][:, 1:]], dim=1)

    yield tokens


def _code(folder: str, model: Model) -> str:
    arguments = ", ".join(f"{name}={value}" for name, value in _arguments(model).items())
    return "\n".join(
        [
            f"model = torchvision.models.VisionTransformer({arguments})",
            "model.heads = torch.nn.Identity()",
            f'model.load_state_dict(torch.load("{folder}/{WEIGHTS}", weights_only=True))',
        ]
    )


TORCHVISION = Format(
    name="torchvision",
    check=_check,
    write=_write,
    read=_read,
    code=_code,
    verified="all tokens, loaded strictly into torchvision.models.VisionTransformer",
)
