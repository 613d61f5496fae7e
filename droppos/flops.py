"""Arithmetic of a step by formula, and what the device could do: together, how well it is used.

Only matrix products are counted, a multiplication and an addition as two operations, as
``torch.utils.flop_counter`` does; the rest (softmax, norms, the optimizer) is below a hundredth
of a ViT-B's step. These are "model FLOPs": what the method needs, so recomputation under
activation checkpointing is left out.

Axes in this file
    N  cells in the patch grid; V of them visible, S of those scored
    T  tokens that a block reads, Q of which it is asked for
    D  channels of a token
    P  pixels of a patch, times 3
"""

from time import perf_counter

import torch

from droppos.config import Method, Model

FORWARD_BACKWARD = 3
"""A product x @ w has two in its backward pass: the gradient of x, and that of w."""
SECONDS = 0.4
"""Time for which :func:`matmul_peak` repeats its product."""


def step_flops(model: Model, method: Method) -> float:
    """Count the operations of one image's step: forward, backward and, if attentive, the guide."""
    shape, counts = model.shape, method.counts(model.grid)
    tokens = 1 + counts.visible
    embedding = linear(counts.cells, _patch_values(model), shape.width)
    trained = blocks(shape.depth, tokens, tokens, shape.width) + _decoders(model, method)
    flops = 2 * embedding + FORWARD_BACKWARD * trained  # no one needs the gradient of the pixels
    if method.guided:
        flops += guide_flops(model, method)
    return float(flops)


def guide_flops(model: Model, method: Method) -> int:
    """Count the pass that the attentive weights are read from; it has no backward pass."""
    width, counts = model.shape.width, method.counts(model.grid)
    depth = method.guide_depth or model.shape.depth
    seen = 1 + counts.visible
    if method.guide == "picture":
        return blocks(depth, 1 + counts.cells, seen, width)
    if method.guide == "visible":
        return blocks(depth, seen, seen, width)
    if method.guide == "half":
        cells = counts.cells // 4
        embedding = linear(cells, _patch_values(model), width)
        return embedding + blocks(depth, 1 + cells, 1 + cells, width)
    return 0


def linear(rows: int, channels_in: int, channels_out: int) -> int:
    """Count the product of (rows, channels_in) and (channels_in, channels_out)."""
    return 2 * rows * channels_in * channels_out


def block(tokens: int, queries: int, width: int) -> int:
    """Count a transformer block's forward pass that reads T tokens and gives Q of them.

    Keys and values (T, D) x (D, 2D); queries (Q, D) x (D, D); scores (Q, D) x (D, T) and the mix
    (Q, T) x (T, D); projection (Q, D) x (D, D); MLP (Q, D) x (D, 4D) and back.
    """
    return (
        linear(tokens, width, 2 * width)
        + linear(queries, width, width)
        + 2 * linear(queries, width, tokens)
        + linear(queries, width, width)
        + 2 * linear(queries, width, 4 * width)
    )


def blocks(depth: int, tokens: int, queries: int, width: int) -> int:
    """Count the forward pass of some blocks, the last of which gives Q of the T tokens."""
    return (depth - 1) * block(tokens, tokens, width) + block(tokens, queries, width)


def _decoders(model: Model, method: Method) -> int:
    """Count the forward pass of the decoders: a linear, blocks, a head on what is asked."""
    counts, width, depth = method.counts(model.grid), model.decoder_width, model.decoder_depth
    seen = 1 + counts.visible
    embed = linear(seen, model.shape.width, width)
    flops = 0
    if method.predicts_positions:
        flops += embed + blocks(depth, seen, counts.scored, width)
        flops += linear(counts.scored, width, counts.cells)
    if method.predicts_pixels:
        hidden = counts.cells - counts.visible
        flops += embed + blocks(depth, 1 + counts.cells, hidden, width)
        flops += linear(hidden, width, _patch_values(model))
    return flops


def _patch_values(model: Model) -> int:
    return 3 * model.shape.patch_size**2


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the operations per second of a large square matrix product: the best of several.

    Takes about half a second.
    """
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    _seconds(a, b)  # the first loads the library
    best, end = float("inf"), perf_counter() + SECONDS
    while perf_counter() < end:
        best = min(best, _seconds(a, b))
    return linear(side, side, side) / best


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    start = perf_counter()
    torch.mm(a, b)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return perf_counter() - start
