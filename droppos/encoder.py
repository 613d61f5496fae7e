"""The encoder: a timm vision transformer with fixed positions, asked for some tokens or for all.

Axes in this file
    B  images on this rank
    N  cells in the patch grid (rows * columns)
    V  patches of an image that are given
    T  tokens of an image: the class token and its patches
    Q  tokens that are asked for
    D  channels of a token
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import timm
import torch
from jaxtyping import Float, Int
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from droppos.config import SHAPES, Grid, Model

layer_norm: Any = partial(nn.LayerNorm, eps=1e-6)


class Block(TimmBlock):
    """timm's block, which can also be asked for some of its tokens only.

    Those cost keys and values of all tokens, but queries, projection and MLP of the asked. That
    is exact in a last block, whose other tokens nobody reads. It is a call of the module, not a
    method beside it, so that sharding, compilation and checkpointing see it.
    """

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        queries: Int[Tensor, "B Q"] | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Give the tokens at the indices ``queries``, in that order; all when not given."""
        if queries is None:
            return super().forward(x, attn_mask, is_causal)
        normed = self.norm1(x)
        x = take(x, queries) + attend(self.attn, take(normed, queries), normed)
        return x + self.mlp(self.norm2(x))


def attend(
    attention: Any, queries: Float[Tensor, "B Q D"], tokens: Float[Tensor, "B T D"]
) -> Float[Tensor, "B Q D"]:
    """Let some tokens look at all: timm's attention with rows of its query weights left out."""
    width = tokens.shape[-1]

    def project(tokens: Tensor, rows: slice) -> tuple[Tensor, ...]:
        """Give (B, heads, tokens, channels of a head) for each of query, key, value asked."""
        flat = F.linear(tokens, attention.qkv.weight[rows], attention.qkv.bias[rows])
        parts = flat.unflatten(-1, (-1, attention.num_heads, attention.head_dim))
        return parts.permute(2, 0, 3, 1, 4).unbind(0)

    (q,) = project(queries, slice(None, width))
    k, v = project(tokens, slice(width, None))
    mixed = F.scaled_dot_product_attention(q, k, v)
    return attention.proj(mixed.transpose(1, 2).flatten(2))


def run_blocks(
    blocks: Sequence[nn.Module],
    tokens: Float[Tensor, "B T D"],
    queries: Int[Tensor, "B Q"] | None = None,
) -> Float[Tensor, "B S D"]:
    """Run blocks one after another, the last only for the tokens asked for."""
    for block in blocks[:-1]:
        tokens = block(tokens)
    return blocks[-1](tokens) if queries is None else blocks[-1](tokens, queries=queries)


def encode(
    encoder: VisionTransformer,
    patches: Float[Tensor, "B V D"],
    queries: Int[Tensor, "B Q"] | None = None,
    depth: int | None = None,
) -> Float[Tensor, "B S D"]:
    """Put the class token before the patches, which have their positions, and encode all.

    Args:
        encoder: Of :func:`build_encoder`.
        patches: Embedded patches.
        queries: Which tokens to give, 0 the class token; all when not given.
        depth: Blocks to run, from the first; all when not given.
    """
    assert encoder.cls_token is not None
    first = encoder.cls_token + positions(encoder)[:, :1]
    tokens = torch.cat([first.expand(len(patches), -1, -1), patches], dim=1)
    return encoder.norm(run_blocks(list(encoder.blocks)[:depth], tokens, queries))


def positions(encoder: VisionTransformer) -> Float[Tensor, "1 T D"]:
    """Give the positions of the class token and of every cell."""
    assert encoder.pos_embed is not None
    return encoder.pos_embed


def sincos_positions(grid: Grid, width: int) -> Float[Tensor, "1 T width"]:
    """Build fixed 2-D positions, row 0 for the class token (zeros).

    The first half of the channels tells the column, the second the row; in each, sines then
    cosines of geometric frequencies from 1 to 1/10000.
    """
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def encode(places: Float[Tensor, "N"]) -> Float[Tensor, "N half"]:
        angles = places[:, None] * frequency
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    cell = torch.arange(grid.cells)
    cells = torch.cat(
        [encode((cell % grid.columns).double()), encode((cell // grid.columns).double())], dim=1
    )
    return torch.cat([torch.zeros(1, width), cells.float()])[None]


def resample_positions(
    table: Float[Tensor, "1 old D"], old: Grid, new: Grid
) -> Float[Tensor, "1 new D"]:
    """Stretch positions from one grid over another, as timm does (bicubic, antialiased).

    Args:
        table: Row 0 is the class token's, which stays.
        old: Grid that the other rows are of.
        new: Grid to stretch them over; the same one changes nothing.
    """
    return resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=1)


def timm_arguments(config: Model) -> tuple[str, dict[str, Any]]:
    """Name the timm architecture and the arguments that make it this encoder."""
    shape = config.shape
    standard = SHAPES[config.size]
    arguments: dict[str, Any] = {"img_size": config.image_size}
    for argument, value, usual in (
        ("patch_size", shape.patch_size, standard.patch_size),
        ("embed_dim", shape.width, standard.width),
        ("depth", shape.depth, standard.depth),
        ("num_heads", shape.heads, standard.heads),
    ):
        if value != usual:
            arguments[argument] = value
    return f"vit_{config.size}_patch{standard.patch_size}_224", arguments


def build_encoder(config: Model) -> VisionTransformer:
    """Make the timm encoder: no classes, fixed positions."""
    name, arguments = timm_arguments(config)
    encoder = timm.create_model(name, num_classes=0, block_fn=Block, **arguments)
    assert isinstance(encoder, VisionTransformer)
    encoder.pos_embed = nn.Parameter(
        sincos_positions(config.grid, config.shape.width), requires_grad=False
    )
    return encoder


def timm_classifier(config: Model, classes: int, drop_path: float = 0.0) -> VisionTransformer:
    """Make timm's own classifier in the encoder's shape; it averages its patches.

    Args:
        config: The encoder's.
        classes: Outputs of the head.
        drop_path: Share of images that leave out the last block's branches.
    """
    name, arguments = timm_arguments(config)
    model = timm.create_model(
        name, num_classes=classes, global_pool="avg", drop_path_rate=drop_path, **arguments
    )
    assert isinstance(model, VisionTransformer)
    return model


def exact(values: Tensor) -> Tensor:
    """Lift half precision to float32; float64 stays what it is."""
    return values if values.dtype == torch.float64 else values.float()


def take(tokens: Float[Tensor, "B N D"], cells: Int[Tensor, "B V"]) -> Float[Tensor, "B V D"]:
    """Pick the tokens of the given cells, image by image."""
    return tokens.gather(1, cells[..., None].expand(-1, -1, tokens.shape[-1]))
