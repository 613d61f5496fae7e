"""What the class token looks at: the attention of the last block, head by head.

The block computes it inside a fused kernel that never shows it, so it is computed here again, from
the block's own weights and the tokens that reach it in an ordinary forward pass.

Axes in this file
    B  pictures
    T  tokens of a picture: the class token, then its N patches
    D  channels of a token
"""

from typing import Any

import torch
from jaxtyping import Float, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from droppos.model import normalise


@torch.no_grad()
def class_attention(
    encoder: VisionTransformer, pictures: UInt8[Tensor, "B rows columns 3"]
) -> Float[Tensor, "B heads T"]:
    """Give the attention of the class token in the last block, whole pictures with all positions.

    Args:
        encoder: A timm vision transformer with one class token, in eval mode.
        pictures: Pictures of the encoder's size.

    Returns:
        Each row is a distribution: first what the class token keeps for itself, then the patches.
        An even look is 1 / T everywhere.
    """
    block: Any = encoder.blocks[-1]
    reached: list[Tensor] = []
    hook = block.register_forward_pre_hook(lambda _, given: reached.append(given[0]))
    try:
        encoder.forward_features(normalise(pictures.to(next(encoder.parameters()).device)))
    finally:
        hook.remove()
    return attention(block.attn, block.norm1(reached[0]))[:, :, 0].float().cpu()


def attention(layer: Any, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "B heads T T"]:
    """Compute softmax(q k / sqrt(d)) of one of timm's attention layers; a row is a query's."""
    parts = layer.qkv(tokens).unflatten(-1, (3, layer.num_heads, layer.head_dim))
    query, key, _ = parts.permute(2, 0, 3, 1, 4).unbind(0)
    query, key = layer.q_norm(query) * layer.scale, layer.k_norm(key)
    return (query @ key.transpose(-2, -1)).softmax(dim=-1)
