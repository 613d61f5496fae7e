"""A step is the same however it is spread: real processes on gloo, float32."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from droppos.config import Compute, Method, Model, Optim
from droppos.errors import ConfigError
from droppos.step import MicroBatch, TrainState, train_step

MODEL = Model(
    size="tiny",
    image_size=(32, 32),
    patch_size=8,
    width=48,
    depth=2,
    heads=4,
    decoder_width=32,
    decoder_heads=4,
)
STEPS, BATCH = 20, 8


def create(strategy: str = "single", accumulate: int = 1, **method: object) -> TrainState:
    return TrainState.create(
        MODEL,
        Method(mask_ratio=0.25, **method),  # pyright: ignore[reportArgumentType]
        Optim(
            epochs=4,
            warmup_epochs=1,
            global_batch=BATCH,
            accumulate=accumulate,
            lr_per_256=3e-2,
        ),
        Compute(strategy=strategy, precision="float32", device="cpu"),  # pyright: ignore[reportArgumentType]
        seed=1,
        steps_per_epoch=5,
    )


def pictures(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 256, (BATCH, 32, 32, 3), generator=generator, dtype=torch.uint8)


def train(state: TrainState, rank: int = 0, world: int = 1, steps: int = STEPS) -> list[float]:
    """Deal the images of each step round robin, as the stream does with blocks."""
    losses = []
    for step in range(state.step, state.step + steps):
        own = torch.arange(BATCH)[rank::world]
        parts = own.chunk(state.optim.accumulate)
        report = train_step(state, [MicroBatch(pictures(step)[part], part) for part in parts])
        losses.append(report.metrics.loss.item())
    return losses


def weights(state: TrainState) -> torch.Tensor:
    flat = [p.detach().flatten() for p in state.model.parameters()]
    return torch.cat(flat)


def assert_same_weights(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """As a whole: Adam divides a gradient by its size, so where one is 0 but for rounding, that
    rounding decides the weight's sign of travel; a few in a thousand weights differ by a step."""
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-4


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


def test_accumulation_is_the_large_batch(alone: tuple[list[float], torch.Tensor]) -> None:
    state = create(accumulate=4)
    torch.testing.assert_close(torch.tensor(train(state)), torch.tensor(alone[0]))
    assert_same_weights(weights(state), alone[1])


def test_clipping_is_global_in_the_paper_and_per_tensor_in_the_reference() -> None:
    norms = {}
    for conformance in ("paper", "reference"):
        state = create(conformance=conformance)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "world", "accumulate"),
    [
        ("ddp", 2, 1),
        ("fsdp2", 1, 1),
        ("fsdp2", 2, 1),
        ("fsdp2", 4, 1),
        ("fsdp2", 2, 2),
        ("ddp", 2, 2),
    ],
)
def test_spread_over_processes_a_step_is_the_same(
    strategy: str,
    world: int,
    accumulate: int,
    alone: tuple[list[float], torch.Tensor],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out.json"
    launch = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"
    ]  # fmt: skip
    result = subprocess.run(
        [*launch, __file__, strategy, str(accumulate), str(out)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(out.read_text())
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(alone[0]))
    assert_same_weights(torch.tensor(found["weights"]), alone[1])


def main(strategy: str, accumulate: str, out: str) -> None:
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    dist.init_process_group("gloo")
    state = create(strategy, int(accumulate))
    losses = torch.tensor(train(state, dist.get_rank(), dist.get_world_size()))
    dist.all_reduce(losses)
    whole = get_model_state_dict(
        state.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if dist.get_rank() == 0:
        names = [name for name, _ in named(state.model)]
        flat = torch.cat([whole[name].flatten() for name in names])
        mean = (losses / dist.get_world_size()).tolist()
        Path(out).write_text(json.dumps({"losses": mean, "weights": flat.tolist()}))
    dist.destroy_process_group()


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name.removeprefix("module."), p) for name, p in model.named_parameters()]


if __name__ == "__main__":
    main(*sys.argv[1:])
