"""The guide: how alike each visible patch is to the class token of the whole picture.

Attentive reconstruction (paper section 3.3) weighs a patch by that likeness. It needs a second
pass of the encoder, over four times as many patches at the published ratios, so it is more than
half of a step; it has no gradient, and only what is read of it is computed.

Axes in this file
    B  images on this rank
    N  cells in the patch grid (rows * columns)
    V  visible patches of an image
    D  channels of a token
"""

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from droppos.encoder import encode, exact, positions
from droppos.masking import Draw


@torch.no_grad()
def similarity(
    encoder: VisionTransformer,
    patches: Float[Tensor, "B N D"],
    draw: Draw,
    dtype: torch.dtype | None,
) -> Float[Tensor, "B V"]:
    """Give the cosine of class token and each visible patch when the whole picture is seen.

    Args:
        encoder: With the current weights.
        patches: Embedded patches of the whole picture, without positions.
        draw: Which of them are visible.
        dtype: Precision to autocast to; that of the caller when not given.
    """
    queries = F.pad(draw.visible + 1, (1, 0))  # the class token, then the visible patches
    with _autocast(patches.device, dtype):
        tokens = encode(encoder, patches + positions(encoder)[:, 1:], queries)
    tokens = exact(tokens)
    return F.cosine_similarity(tokens[:, 1:], tokens[:, :1], dim=-1)


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
