"""Memory of a training worker by formula: weights, optimizer, gradients, activations.

Bytes of one rank's device at the highest point of a step. Weights and AdamW's two moments are
float32 and stay; gradients grow while activations go, so the larger of these counts. FSDP2
cuts each tensor into rows (ZeRO stage 3, Rajbhandari et al. 2020) and gathers a block at a time.
What a framework adds besides (contexts, workspaces, fragments) is not in here.

Axes in this file
    N  cells in the patch grid
    D  channels of a token in the encoder; d in the decoders
    P  pixels of a patch, times 3
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod
from typing import NamedTuple

from droppos.activations import (
    guide_per_image,
    images_per_image,
    kept_per_image,
    widths,
    working_per_image,
)
from droppos.config import Compute, Method, Model

FLOAT = 4
"""Bytes of a weight, a moment, a gradient."""
MOMENTS = 2
"""AdamW keeps as many numbers of each weight."""
GATHERED_BLOCKS = 2
"""FSDP2 has the block it computes, and fetches the next."""


class Weight(NamedTuple):
    """One tensor of weights."""

    shape: tuple[int, ...]
    unit: int
    """Number of the block it belongs to; -1 for what is in no block."""
    trained: bool = True

    @property
    def numbers(self) -> int:
        """Count its values."""
        return prod(self.shape)

    def rows_of(self, ranks: int) -> int:
        """Count the values that the first rank holds, which has the most."""
        return ceil(self.shape[0] / ranks) * prod(self.shape[1:])


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Bytes of one worker's device, by what they are."""

    weights: int
    """Its share of them."""
    optimizer: int
    """Two moments of each trained weight of its share."""
    gradients: int
    """Its share; whole ones where FSDP2 adds up micro-batches before it scatters them."""
    gathered: int
    """What communication and precision hold beside the shares: FSDP2's gathered blocks, DDP's
    buckets, autocast's copies of weights."""
    images: int
    """The micro-batch, as it came and normalised."""
    activations: int
    """What the backward pass needs of the forward pass."""
    working: int
    """What comes and goes within a block."""
    guide: int
    """What the attentive guide needs, before there are activations."""
    accumulates: bool
    """Whether gradients of one micro-batch wait while the next is computed."""

    @property
    def peak(self) -> int:
        """Bytes at the highest point of a step."""
        always = self.weights + self.optimizer + self.gathered + self.images
        if self.accumulates:
            return always + self.gradients + max(self.activations + self.working, self.guide)
        return always + max(max(self.activations, self.gradients) + self.working, self.guide)


def worker_footprint(
    model: Model,
    method: Method,
    compute: Compute,
    *,
    images: int,
    workers: int = 1,
    accumulate: int = 1,
) -> Footprint:
    """Count the memory of one worker.

    Args:
        model: Shapes.
        method: What is computed.
        compute: How it is spread, and in which precision.
        images: Of one micro-batch on one worker.
        workers: Ranks.
        accumulate: Micro-batches of a step.
    """
    every = list(weights(model, method))
    ranks = workers if compute.strategy == "fsdp2" else 1
    ranks = min(ranks, compute.shard_ranks or ranks)
    trained = [weight for weight in every if weight.trained]
    own = sum(weight.rows_of(ranks) for weight in trained)
    whole = sum(weight.numbers for weight in trained)
    unscattered = accumulate > 1 and compute.strategy == "fsdp2"
    return Footprint(
        weights=FLOAT * sum(weight.rows_of(ranks) for weight in every),
        optimizer=FLOAT * MOMENTS * own,
        gradients=FLOAT * (whole if unscattered else own),
        gathered=_gathered(every, compute),
        images=images * images_per_image(model),
        activations=images * kept_per_image(model, method, compute),
        working=images * working_per_image(model, method, compute),
        guide=images * guide_per_image(model, method, compute),
        accumulates=accumulate > 1,
    )


def parameters(model: Model, method: Method) -> int:
    """Count the trained weights."""
    return sum(weight.numbers for weight in weights(model, method) if weight.trained)


def checkpoint_bytes(model: Model, method: Method) -> int:
    """Count the tensors of a checkpoint: all weights, and the moments of the trained ones."""
    every = sum(weight.numbers for weight in weights(model, method))
    return FLOAT * (every + MOMENTS * parameters(model, method))


def unit_sizes(model: Model, method: Method, compute: Compute) -> list[int]:
    """Count the trained weights of each unit that is communicated at once."""
    sizes: dict[int, int] = {}
    by_block = compute.strategy == "fsdp2" and compute.shard_unit == "block"
    for weight in weights(model, method):
        if weight.trained:
            unit = weight.unit if by_block else -1
            sizes[unit] = sizes.get(unit, 0) + weight.numbers
    return list(sizes.values())


def weights(model: Model, method: Method) -> Iterator[Weight]:
    """List the tensors of :class:`droppos.model.DropPos`, in no particular order."""
    width, decoder, shape = model.shape.width, model.decoder_width, model.shape
    values, tokens = 3 * shape.patch_size**2, 1 + model.grid.cells
    learnt = method.dropped_token == "learnt"
    yield from _linear(values, width)
    yield Weight((1, 1, width), -1)  # the class token
    yield Weight((1, tokens, width), -1, trained=False)  # fixed positions
    yield Weight((1, 1, width), -1, trained=learnt and method.predicts_positions)
    yield from _norm(width)
    unit = 0
    for unit in range(shape.depth):
        yield from _block(width, unit)
    heads = [model.grid.cells] if method.predicts_positions else []
    heads += [values] if method.predicts_pixels else []
    for outputs in heads:
        yield from _linear(width, decoder)
        yield from _norm(decoder)
        yield from _linear(decoder, outputs)
        for _ in range(model.decoder_depth):
            unit += 1
            yield from _block(decoder, unit)
    if method.predicts_pixels:
        frozen = method.conformance != "paper" and not learnt
        yield Weight((1, 1, decoder), -1, trained=not frozen)
        yield Weight((1, tokens, decoder), -1, trained=False)


def _linear(inputs: int, outputs: int, unit: int = -1) -> Iterator[Weight]:
    yield Weight((outputs, inputs), unit)
    yield Weight((outputs,), unit)


def _norm(channels: int, unit: int = -1) -> Iterator[Weight]:
    yield Weight((channels,), unit)
    yield Weight((channels,), unit)


def _block(channels: int, unit: int) -> Iterator[Weight]:
    yield from _norm(channels, unit)
    yield from _linear(channels, 3 * channels, unit)
    yield from _linear(channels, channels, unit)
    yield from _norm(channels, unit)
    yield from _linear(channels, 4 * channels, unit)
    yield from _linear(4 * channels, channels, unit)


def _gathered(every: list[Weight], compute: Compute) -> int:
    size = widths(compute).inner
    if compute.strategy != "fsdp2":
        products = sum(weight.numbers for weight in every if len(weight.shape) == 2)
        buckets = sum(weight.numbers for weight in every if weight.trained)
        copies = size * products if compute.precision == "bf16" else 0
        return copies + (FLOAT * buckets if compute.strategy == "ddp" else 0)
    units: dict[int, int] = {}
    for weight in every:
        units[weight.unit] = units.get(weight.unit, 0) + weight.numbers
    if compute.shard_unit == "model" or not compute.reshard_after_forward:
        return size * sum(units.values())
    root = units.pop(-1)
    return size * (root + sum(sorted(units.values())[-GATHERED_BLOCKS:]))
