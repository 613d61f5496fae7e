"""What one step does, on one process."""

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import droppos.step
from droppos.config import Compute, Method, Optim
from droppos.errors import ConfigError
from droppos.loss import Metrics
from droppos.step import MicroBatch, TrainState, train_step
from tests.droppos import ranks
from tests.droppos.ranks import BATCH, MODEL, Case, everything, pictures, spoil, step, train


def create(accumulate: int = 1, **method: Any) -> TrainState:
    return ranks.create(Case("single", 1, accumulate), **method)


def weights(state: TrainState) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], torch.Tensor]:
    state = create()
    return train(state), weights(state)


def test_a_step_learns(alone: tuple[list[float], torch.Tensor]) -> None:
    losses, _ = alone
    assert losses[-1] < losses[0]


def test_the_same_seed_gives_the_same_run(alone: tuple[list[float], torch.Tensor]) -> None:
    state = create()
    assert train(state) == alone[0]
    assert (weights(state) == alone[1]).all()


@pytest.mark.parametrize("objective", ["position_pixels", "pixels"])
@pytest.mark.parametrize("unit", ["block", "model"])
def test_half_precision_reaches_every_part_of_a_model_that_is_sharded(
    objective: str, unit: Any
) -> None:
    """FSDP2 casts parameters, and a buffer of float32 would make float32 of what it is added to."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        compute = Compute(strategy="fsdp2", precision="bf16", device="cpu", shard_unit=unit)
        method: Any = {"objective": objective}
        optim = Optim(epochs=4, warmup_epochs=1, global_batch=BATCH)
        state = TrainState.create(
            MODEL, Method(**method), optim, compute, seed=0, steps_per_epoch=5
        )
        report = train_step(state, [MicroBatch(pictures(BATCH), torch.arange(BATCH))])
        assert report.metrics.loss.isfinite() and not report.skipped
    finally:
        dist.destroy_process_group()


def test_accumulation_is_the_large_batch(alone: tuple[list[float], torch.Tensor]) -> None:
    state = create(accumulate=4)
    ranks.alike(torch.tensor(train(state)), torch.tensor(alone[0]))
    assert ((weights(state) - alone[1]).norm() / alone[1].norm()).item() < 1e-3


def test_clipping_is_global_in_the_paper_and_per_tensor_in_the_reference() -> None:
    norms = {}
    for conformance in ("paper", "reference"):
        state = ranks.create(Case("single", 1, conformance=conformance))
        state.optim = Optim(epochs=4, warmup_epochs=1, global_batch=BATCH, clip_norm=1e-3)
        kept: dict[str, torch.Tensor] = {}
        state.optimizer.register_step_pre_hook(
            lambda *_, model=state.model, kept=kept: kept.update(
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            )
        )
        report = train_step(state, [MicroBatch(pictures(0), torch.arange(BATCH))])
        assert report.grad_norm.item() > 0.1
        norms[conformance] = torch.stack([g.norm() for g in kept.values()])
    assert norms["paper"].norm().item() == pytest.approx(1e-3, rel=1e-2)
    assert norms["reference"].max().item() == pytest.approx(1e-3, rel=1e-2)
    assert norms["reference"].norm() > 3e-3


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_activation_checkpointing_changes_no_value(precision: str) -> None:
    values = []
    for again in (False, True):
        state = create()
        state.compute = Compute(strategy="single", precision=precision, device="cpu")  # pyright: ignore[reportArgumentType]
        if again:
            compute = Compute(
                strategy="single", precision="float32", device="cpu", activation_checkpointing=True
            )
            state = TrainState.create(
                MODEL, state.method, state.optim, compute, seed=1, steps_per_epoch=5
            )
            state.compute = Compute(strategy="single", precision=precision, device="cpu")  # pyright: ignore[reportArgumentType]
        values.append(train(state, steps=3))
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=r"compute\.device"):
        TrainState.create(
            MODEL, Method(), Optim(), Compute(device="cuda"), seed=0, steps_per_epoch=1
        )


@pytest.mark.parametrize("conformance", ["paper", "reference"])
@pytest.mark.parametrize("first", [True, False])
def test_a_gradient_that_is_not_finite_changes_nothing(conformance: str, first: bool) -> None:
    state = ranks.create(Case("single", 1, conformance=conformance))
    if not first:
        assert not step(state).skipped
    before, done = everything(state), state.step
    hook = spoil(state.model)
    report = step(state)
    hook.remove()
    assert report.skipped and not report.grad_norm.isfinite()
    assert state.step == done + 1
    after = everything(state)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert not step(state).skipped
    assert not step(state).skipped
    assert all(value.isfinite().all() for value in everything(state).values())
    assert not torch.equal(everything(state)["encoder.norm.weight"], before["encoder.norm.weight"])


def test_an_infinite_loss_with_a_finite_gradient_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state, loss = create(), droppos.step.pretraining_loss

    def overflowing(*given: Any) -> Metrics:
        metrics = loss(*given)
        return metrics._replace(loss=metrics.loss + float("inf"))

    monkeypatch.setattr("droppos.step.pretraining_loss", overflowing)
    before = weights(state)
    assert step(state).skipped
    assert torch.equal(weights(state), before)


COMPILED = """
from sys import argv
from torch import nn
from torch._dynamo.utils import counters
from droppos.config import Compute, Method, Optim
from droppos.step import TrainState
from tests.droppos.ranks import BATCH, MODEL, train

# What inductor makes of a graph is torch's to test, and takes it a minute.
compile_block = nn.Module.compile
nn.Module.compile = lambda block, **told: compile_block(block, backend="aot_eager", **told)
losses = []
for compiled in (False, True):
    compute = Compute(
        strategy="single",
        precision=argv[1],
        device="cpu",
        compile=compiled,
        activation_checkpointing=argv[2] == "True",
    )
    optim = Optim(epochs=4, warmup_epochs=1, global_batch=BATCH, lr_per_256=3e-2)
    method = Method(mask_ratio=0.25, objective="position_pixels")
    state = TrainState.create(MODEL, method, optim, compute, seed=1, steps_per_epoch=5)
    assert not counters["stats"]["unique_graphs"]
    losses.append(train(state, steps=3))
assert counters["stats"]["unique_graphs"] >= 5, counters
assert not counters["graph_break"], counters
assert all(abs(a - b) < 1e-5 for a, b in zip(*losses)), losses
"""


@pytest.mark.shares
@pytest.mark.parametrize(("precision", "again"), [("float32", True), ("bf16", False)])
def test_compiled_blocks_change_no_value(precision: str, again: bool) -> None:
    """In a process of its own: shapes are not checked there, which can't be traced."""
    command = [sys.executable, "-c", COMPILED, precision, str(again)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr[-2000:]


class NoReads(TorchDispatchMode):
    """Refuse what would read a tensor's value: on a GPU, the host would wait for it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        aten = torch.ops.aten
        reads = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal)
        by_mask = func.overloadpacket in (aten.index, aten.index_put_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        assert func.overloadpacket not in reads and not by_mask, f"reads a tensor: {func}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("conformance", ["paper", "reference"])
def test_a_step_reads_no_tensor_on_the_host(conformance: str) -> None:
    case = Case("single", 1, accumulate=2, conformance=conformance)
    state = ranks.create(case, objective="position_pixels", ignore_confident=True, shuffle=False)
    mirrored = torch.arange(4) % 2 == 0
    batches = [
        MicroBatch(pictures(i)[:4], torch.arange(4) + 4 * i, mirrored.clone()) for i in range(2)
    ]
    with NoReads():
        train_step(state, batches)
        with pytest.raises(AssertionError, match="reads a tensor"):
            bool(torch.ones(2).sum() > 1)
        with pytest.raises(AssertionError, match="reads a tensor"):
            torch.ones(2)[torch.ones(2) > 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
def test_a_step_does_not_wait_for_the_gpu() -> None:
    compute = Compute(strategy="single", precision="bf16", device="cuda")
    method = Method(mask_ratio=0.25, sigma_decay="step")
    optim = Optim(epochs=4, warmup_epochs=1, global_batch=BATCH)
    state = TrainState.create(MODEL, method, optim, compute, seed=1, steps_per_epoch=5)
    batch = MicroBatch(pictures(0).pin_memory(), torch.arange(BATCH).pin_memory())
    train_step(state, [batch])  # the first one loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(state, [batch])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_shards_that_do_not_fill_the_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"compute\.shard_ranks.*positive"):
        Compute(shard_ranks=0)
    with pytest.raises(ConfigError, match=r"compute\.strategy.*only fsdp2 shards"):
        Compute(strategy="ddp", shard_ranks=2)
