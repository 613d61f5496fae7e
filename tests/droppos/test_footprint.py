"""Memory by formula beside what a step on a CPU keeps, holds and needs at its highest point."""

from collections.abc import Iterator
from dataclasses import replace
from math import prod

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor

from droppos.config import Compute, Method, Model, Optim
from droppos.footprint import (
    Footprint,
    Weight,
    checkpoint_bytes,
    parameters,
    unit_sizes,
    weights,
    worker_footprint,
)
from droppos.model import DropPos
from droppos.step import MicroBatch, TrainState, train_step
from tests.droppos.live_bytes import LiveBytes, kept_for_backward
from tests.droppos.tiny import TINY

DEEP = replace(TINY, depth=4, width=96, decoder_width=48)
WIDE = Model(
    size="tiny", image_size=(64, 64), width=192, depth=4, heads=3, decoder_width=64, decoder_heads=4
)
METHODS = (
    Method(mask_ratio=0.5),
    Method(mask_ratio=0.25, attentive=False),
    Method(objective="position_pixels", mask_ratio=0.5),
    Method(objective="pixels", mask_ratio=0.5, dropped_token="zeros"),
)
WAYS = (
    Compute(strategy="single", precision="float32"),
    Compute(strategy="single", precision="float32", activation_checkpointing=True),
    Compute(strategy="single", precision="bf16"),
    Compute(strategy="ddp", precision="float32"),
    Compute(strategy="fsdp2", precision="float32"),
    Compute(strategy="fsdp2", precision="bf16"),
    Compute(strategy="fsdp2", precision="bf16", activation_checkpointing=True),
)


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Measured:
    """A second step, and what it took; the first one made the optimizer's state."""

    def __init__(
        self, model: Model, method: Method, compute: Compute, images: int, accumulate: int = 1
    ) -> None:
        compute = replace(compute, device="cpu", guide_precision="same")
        batch = images * accumulate
        state = TrainState.create(
            model,
            method,
            Optim(global_batch=batch, accumulate=accumulate),
            compute,
            seed=0,
            steps_per_epoch=1,
        )
        pixels = torch.zeros(images, *model.image_size, 3, dtype=torch.uint8)
        batches = [
            MicroBatch(pixels.clone(), torch.arange(images) + i * images) for i in range(accumulate)
        ]
        train_step(state, batches)
        held = [*state.model.parameters(), *state.model.buffers()]
        moments = [t for values in state.optimizer.state.values() for t in values.values()]
        self.weights = sum(local(t).nbytes for t in held)
        self.optimizer = sum(local(t).nbytes for t in moments)
        with kept_for_backward({local(t).untyped_storage().data_ptr() for t in held}) as kept:
            train_step(state, batches[:1])
        self.kept = kept.bytes
        live = LiveBytes()
        live.begin_with(*map(local, held), *map(local, moments), *(b.images for b in batches))
        with live:
            train_step(state, batches)
        self.peak = live.peak
        self.expected = worker_footprint(
            model, method, compute, images=images, accumulate=accumulate
        )


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", [TINY, DEEP, WIDE, Model()])
def test_every_weight_is_counted(model: Model, method: Method) -> None:
    with torch.device("meta"):
        real = DropPos(model, method)
    ours = list(weights(model, method))
    tensors = [*real.parameters(), *real.buffers()]
    assert sorted(
        weight.shape if len(weight.shape) != 2 else (weight.numbers,) for weight in ours
    ) == sorted(flat(tensor) for tensor in tensors)
    trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert parameters(model, method) == trained
    assert checkpoint_bytes(model, method) == 4 * (sum(t.numel() for t in tensors) + 2 * trained)
    assert sum(unit_sizes(model, method, Compute())) == trained
    blocks = model.shape.depth + model.decoder_depth * (
        method.predicts_positions + method.predicts_pixels
    )
    assert len(unit_sizes(model, method, Compute())) == 1 + blocks
    assert unit_sizes(model, method, Compute(strategy="ddp")) == [trained]


def flat(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape, but of matrices (a convolution's is one) only the number of values."""
    return (tensor.numel(),) if tensor.ndim in {2, 4} else tuple(tensor.shape)


def name(compute: Compute) -> str:
    again = "-recomputed" if compute.activation_checkpointing else ""
    return f"{compute.strategy}-{compute.precision}{again}"


@pytest.mark.parametrize("compute", WAYS, ids=name)
def test_a_step_keeps_and_holds_what_the_formula_says(compute: Compute) -> None:
    check(TINY, 16, compute)


@pytest.mark.shares
@pytest.mark.parametrize("compute", [WAYS[0], WAYS[5]], ids=name)
@pytest.mark.parametrize(("model", "images"), [(DEEP, 3), (WIDE, 8)])
def test_a_larger_step_does_too(model: Model, images: int, compute: Compute) -> None:
    check(model, images, compute)


def check(model: Model, images: int, compute: Compute) -> None:
    found = Measured(model, METHODS[0], compute, images)
    expect = found.expected
    assert found.weights == expect.weights
    assert found.optimizer == pytest.approx(expect.optimizer, rel=0.01)  # and AdamW's step counts
    assert found.kept == pytest.approx(kept(model, images, compute, expect), rel=0.02)
    # Never less than is needed, but for a hundredth, and at most a fifth more.
    assert 0.99 * found.peak <= expect.peak <= 1.2 * found.peak


def kept(model: Model, images: int, compute: Compute, expect: Footprint) -> int:
    if compute.precision == "float32":  # the convolution keeps the images themselves
        return expect.activations + images * 3 * prod(model.image_size) * 4
    copies = expect.gathered if compute.strategy == "single" else 0
    return expect.activations + copies


@pytest.mark.parametrize("method", METHODS[1:])
def test_other_objectives_keep_what_the_formula_says(method: Method) -> None:
    compute = WAYS[0]
    found = Measured(TINY, method, compute, 4)
    assert found.kept == pytest.approx(kept(TINY, 4, compute, found.expected), rel=0.02)
    assert 0.99 * found.peak <= found.expected.peak <= 1.2 * found.peak


@pytest.mark.parametrize("compute", [WAYS[0], WAYS[5]], ids=name)
def test_accumulated_micro_batches_hold_their_gradients_meanwhile(compute: Compute) -> None:
    found = Measured(TINY, METHODS[0], compute, 8, accumulate=2)
    assert 0.99 * found.peak <= found.expected.peak <= 1.2 * found.peak
    alone = worker_footprint(TINY, METHODS[0], compute, images=8)
    assert found.expected.peak > alone.peak


@given(rows=st.integers(1, 100), columns=st.integers(1, 8), ranks=st.integers(1, 64))
def test_the_first_rank_holds_the_first_chunk_of_rows(rows: int, columns: int, ranks: int) -> None:
    chunk = torch.zeros(rows, columns).chunk(ranks)[0]
    assert Weight((rows, columns), 0).rows_of(ranks) == chunk.numel()


@given(images=st.integers(1, 4096), ranks=st.sampled_from([1, 2, 8, 64, 4096]))
def test_more_images_never_need_less_and_more_ranks_never_more(images: int, ranks: int) -> None:
    def peak(images: int, workers: int) -> int:
        return worker_footprint(Model(), Method(), Compute(), images=images, workers=workers).peak

    assert peak(images, ranks) <= peak(images + 1, ranks)
    assert peak(images, 2 * ranks) <= peak(images, ranks)


def test_ddp_does_not_shard_and_groups_of_shards_hold_a_copy_each() -> None:
    def held(compute: Compute) -> int:
        return worker_footprint(Model(), Method(), compute, images=8, workers=64).weights

    everything = held(Compute(strategy="ddp"))
    # Not 64: small tensors have fewer rows than ranks.
    assert held(Compute()) < everything / 55
    assert everything / 8 <= held(Compute(shard_ranks=8)) < everything / 7.9
