"""The guide: how alike each visible patch is to the class token of the whole picture.

Attentive reconstruction (paper section 3.3) weighs a patch by that likeness. It needs a second
pass of the encoder, over four times as many patches at the published ratios, so it is more than
half of a step; it has no gradient, and only what is read of it is computed.

method.guide offers cheaper passes, which answer a slightly other question. Weights kept from an
earlier step are not among them: a picture comes back once an epoch, with another crop and other
patches, so there are none to keep.

Axes in this file
    B  images on this rank
    N  cells in the patch grid (rows * columns)
    V  visible patches of an image
    T  tokens of an image: the class token and its patches
    D  channels of a token
"""

import torch
from jaxtyping import Float, Int
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from droppos.config import Grid, Method
from droppos.encoder import encode, exact, positions, take
from droppos.masking import Draw


@torch.no_grad()
def similarity(
    encoder: VisionTransformer,
    method: Method,
    grid: Grid,
    images: Float[Tensor, "B 3 rows columns"],
    patches: Float[Tensor, "B N D"],
    draw: Draw,
    dtype: torch.dtype | None,
) -> Float[Tensor, "B V"]:
    """Give the cosine of class token and each visible patch, as ``method.guide`` sees them.

    Args:
        encoder: With the current weights.
        method: Its guide is any but ``student``, whose features are not of this pass.
        grid: Of the images' patches.
        images: Normalised.
        patches: The images' embedded patches, without positions.
        draw: Which of them are visible.
        dtype: Precision to autocast to; that of the caller when not given.
    """
    placed = patches + positions(encoder)[:, 1:]
    with _autocast(patches.device, dtype):
        if method.guide == "visible":
            tokens = encode(encoder, take(placed, draw.visible), depth=method.guide_depth)
        elif method.guide == "half":
            halved = halved_patches(encoder, grid, images)
            tokens = encode(encoder, halved, depth=method.guide_depth)
        else:
            asked = F.pad(draw.visible + 1, (1, 0))  # the class token, then the visible patches
            tokens = encode(encoder, placed, asked, method.guide_depth)
    alike = cosine(tokens)
    return alike.gather(1, halved_cells(grid, draw.visible)) if method.guide == "half" else alike


def cosine(tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "B V"]:
    """Compare every patch with the class token, which comes first."""
    tokens = exact(tokens)
    return F.cosine_similarity(tokens[:, 1:], tokens[:, :1], dim=-1)


def halved_patches(
    encoder: VisionTransformer, grid: Grid, images: Float[Tensor, "B 3 rows columns"]
) -> Float[Tensor, "B quarter D"]:
    """Embed the pictures at half their size; a patch's position is the mean of its four cells'."""
    embedded = encoder.patch_embed.proj(F.avg_pool2d(images, 2)).flatten(2).transpose(1, 2)
    cells = positions(encoder)[:, 1:].unflatten(1, tuple(grid)).permute(0, 3, 1, 2)
    return embedded + F.avg_pool2d(cells, 2).flatten(2).transpose(1, 2)


def halved_cells(grid: Grid, cells: Int[Tensor, "B V"]) -> Int[Tensor, "B V"]:
    """Find the cell of the halved picture in which each cell lies."""
    return cells // grid.columns // 2 * (grid.columns // 2) + cells % grid.columns // 2


def _autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Open the guide's arithmetic.

    Never with autocast's cache of cast weights: in older releases of torch (2.15 is mended) it is
    filled, without gradient, with copies that lead nowhere, and the student's weights, taken from
    it, would get no gradient.
    """
    return torch.autocast(
        device.type,
        enabled=dtype is not None or torch.is_autocast_enabled(device.type),
        dtype=dtype or torch.get_autocast_dtype(device.type),
        cache_enabled=False,
    )
