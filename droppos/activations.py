"""Activations by formula: bytes of one image that a step keeps for its backward pass.

Counted is what autograd saves, operation by operation, each storage once: of a transformer block
its input, both norms' outputs, queries, keys, values, what attention mixes, and the MLP before and
after its GELU. That is 16 times the tokens, in line with Korthikanti et al. 2022 (section 4.1)
less what fused attention recomputes and what dropout would keep. A test holds the sum against
the tensors that autograd packs.

Axes in this file
    N  cells in the patch grid; V of them visible, S of those scored, H hidden
    T  tokens that a block reads, Q of which it is asked for
    D  channels of a token
"""

from typing import NamedTuple

from droppos.config import Compute, Counts, Method, Model

INDEX = 8
"""Bytes of an int64."""
FLOAT = 4
"""Bytes of a float32: images, losses, statistics."""


class Width(NamedTuple):
    """Bytes of a number, by where it is."""

    inner: int
    """Inside a block: what products read and write."""
    residual: int
    """Between blocks. Autocast adds bf16 to float32 positions, so it stays float32 there; FSDP2
    casts the whole model."""
    added: int
    """Between blocks of a decoder that adds no positions."""


def widths(compute: Compute) -> Width:
    """Tell the bytes of a number under a strategy and a precision."""
    if compute.precision == "float32":
        return Width(4, 4, 4)
    return Width(2, 2, 2) if compute.strategy == "fsdp2" else Width(2, 4, 2)


def kept_per_image(model: Model, method: Method, compute: Compute) -> int:
    """Count the bytes of one image that wait for the backward pass."""
    counts, shape, width = method.counts(model.grid), model.shape, widths(compute)
    tokens = 1 + counts.visible
    wide = tokens * shape.width
    kept = _embedding(model, counts, width)
    kept += _blocks(shape.depth, tokens, tokens, shape.width, shape.heads, width, compute)
    kept += wide * (width.residual + width.inner) + _statistics(
        tokens
    )  # the norm, and what it gives
    if method.predicts_positions:
        narrow = width._replace(residual=width.added)
        kept += _decoder(model, tokens, counts.scored, narrow, compute)
        kept += counts.scored * (2 * counts.cells * FLOAT + FLOAT)  # target and log-probability
    if method.predicts_pixels:
        hidden, values = counts.cells - counts.visible, 3 * shape.patch_size**2
        kept += _decoder(model, 1 + counts.cells, hidden, width, compute)
        kept += 2 * hidden * values * FLOAT + (counts.cells + hidden) * INDEX
        if method.predicts_positions and width.inner != width.residual:
            kept += wide * width.inner  # autocast casts what both decoders read for each of them
    return kept


def working_per_image(model: Model, method: Method, compute: Compute) -> int:
    """Count the bytes of one image that come and go while one block is passed backward.

    That is the gradients before and after its GELU and beside them, and, under activation
    checkpointing, all that the block keeps, which is then computed anew.
    """
    width = widths(compute)
    rows = [(1 + method.counts(model.grid).visible, model.shape.width, model.shape.heads)]
    if method.predicts_pixels:
        rows.append((1 + model.grid.cells, model.decoder_width, model.decoder_heads))
    most = 0
    for tokens, channels, heads in rows:
        passing = tokens * channels * (8 * width.inner + 2 * width.residual)
        if compute.activation_checkpointing:
            passing += block(tokens, tokens, channels, heads, width)
        most = max(most, passing)
    return most


def guide_per_image(model: Model, method: Method, compute: Compute) -> int:
    """Count the bytes of one image while the guide looks, which keeps nothing of them.

    Before the student, so these are in memory in place of its activations, not beside them.
    """
    if not method.guided or method.guide == "student":
        return 0
    width, channels = widths(compute), model.shape.width
    cells = model.grid.cells
    tokens = 1 + {"half": cells // 4, "picture": cells}.get(
        method.guide, method.counts(model.grid).visible
    )
    embedded = cells * channels * (width.inner + width.residual)
    return embedded + tokens * channels * (9 * width.inner + 2 * width.residual)


def images_per_image(model: Model) -> int:
    """Count the bytes of one image itself: pixels as they came, and normalised."""
    height, width = model.image_size
    return 3 * height * width * (1 + FLOAT)


def block(tokens: int, asked: int, channels: int, heads: int, width: Width) -> int:
    """Count what a block that reads T tokens and gives Q keeps."""
    inner, residual = width.inner, width.residual
    if asked == tokens:
        of_token = channels * (2 * residual + 14 * inner) + heads * FLOAT
        return tokens * of_token + 2 * _statistics(tokens)
    read = channels * (residual + 3 * inner)  # the input, its norm, keys and values
    of_asked = channels * (residual + 12 * inner) + heads * FLOAT + INDEX
    return tokens * read + asked * of_asked + _statistics(tokens) + _statistics(asked)


def _blocks(
    depth: int, tokens: int, asked: int, channels: int, heads: int, width: Width, compute: Compute
) -> int:
    if compute.activation_checkpointing:
        return depth * tokens * channels * width.residual
    whole = block(tokens, tokens, channels, heads, width)
    return (depth - 1) * whole + block(tokens, asked, channels, heads, width)


def _decoder(model: Model, tokens: int, asked: int, width: Width, compute: Compute) -> int:
    """Count blocks, norm, and what the head reads; what the embedding reads is the encoder's."""
    channels, heads = model.decoder_width, model.decoder_heads
    kept = _blocks(model.decoder_depth, tokens, asked, channels, heads, width, compute)
    return kept + asked * channels * (width.residual + width.inner) + _statistics(asked)


def _embedding(model: Model, counts: Counts, width: Width) -> int:
    """Count what embedding and picking the visible patches keep beside the images.

    In float32 the convolution keeps the images themselves, which are counted apart.
    """
    height, wide = model.image_size
    cast = 3 * height * wide * width.inner if width.inner != FLOAT else 0
    patches = counts.cells * model.shape.width * width.inner
    return cast + patches + counts.cells * INDEX + counts.visible


def _statistics(tokens: int) -> int:
    """Count a layer norm's means and deviations."""
    return 2 * tokens * FLOAT
