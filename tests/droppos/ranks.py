"""Train on real gloo processes: four are started once, and take all cases in turn.

Run by tests/droppos/test_ranks.py: ``python -m tests.droppos.ranks FILE``. Importing torch takes
longer than all the training here, so it is imported once, before the processes fork.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.multiprocessing import start_processes  # pyright: ignore[reportPrivateImportUsage]

from droppos.config import Compute, Method, Optim
from droppos.errors import ConfigError
from droppos.step import MicroBatch, StepReport, TrainState, train_step
from tests.droppos.tiny import TINY

MODEL = replace(TINY, image_size=(32, 32))
STEPS, BATCH, WORLD = 20, 8, 4


@dataclass(frozen=True)
class Case:
    """A way to spread a step."""

    strategy: str
    world: int
    accumulate: int = 1
    shard_ranks: int | None = None
    conformance: str = "paper"

    @property
    def name(self) -> str:
        """Say it in the name of a test."""
        hybrid = f"-shards_of_{self.shard_ranks}" if self.shard_ranks else ""
        conformance = "" if self.conformance == "paper" else f"-{self.conformance}"
        return f"{self.strategy}-{self.world}x{self.accumulate}{hybrid}{conformance}"


SAME = (
    Case("ddp", 4),
    Case("fsdp2", 4),
    Case("fsdp2", 4, shard_ranks=2),
    Case("ddp", 2),
    Case("ddp", 2, accumulate=2),
    Case("fsdp2", 2),
    Case("fsdp2", 2, accumulate=2),
    Case("ddp", 1),
    Case("fsdp2", 1),
)
"""Cases whose run is that of one process."""
SPOILT = (
    Case("fsdp2", 4, shard_ranks=2),
    Case("ddp", 2),
    Case("fsdp2", 2),
    Case("fsdp2", 2, conformance="reference"),
)
"""Cases in which the last rank meets a batch without a finite gradient."""


def run_program(module: str, folder: Path) -> None:
    """Run a program of ranks, such as this one, in processes of its own; it leaves files."""
    result = subprocess.run(
        [sys.executable, "-m", module, str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]


def alike(losses: Tensor, expected: Tensor) -> None:
    """Compare the losses of two runs that are one but for rounding.

    How a matrix is cut up decides the last bits of a product, and Adam makes a step of full size of
    a gradient that is 0 but for them: on some processors losses after 20 steps are 4e-4 apart.
    """
    torch.testing.assert_close(losses[:2], expected[:2])
    torch.testing.assert_close(losses, expected, rtol=2e-3, atol=0)


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Compare two states as a whole, as a fraction of the second's norm.

    Not tensor by tensor: Adam divides a gradient by its size, so where one is 0 but for rounding,
    that rounding decides the weight's sign of travel; a few in a thousand weights differ by a step.
    """
    a, b = (
        torch.cat([value.flatten().double() for _, value in sorted(state.items())])
        for state in (ours, theirs)
    )
    return ((a - b).norm() / b.norm()).item()


def create(case: Case, **method: Any) -> TrainState:
    return TrainState.create(
        MODEL,
        Method(mask_ratio=0.25, conformance=case.conformance, **method),  # pyright: ignore[reportArgumentType]
        Optim(
            epochs=4,
            warmup_epochs=1,
            global_batch=BATCH,
            accumulate=case.accumulate,
            lr_per_256=3e-2,
        ),
        Compute(
            strategy=case.strategy,  # pyright: ignore[reportArgumentType]
            precision="float32",
            device="cpu",
            shard_ranks=case.shard_ranks,
        ),
        seed=1,
        steps_per_epoch=5,
    )


def pictures(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 256, (BATCH, 32, 32, 3), generator=generator, dtype=torch.uint8)


def step(state: TrainState, rank: int = 0, world: int = 1) -> StepReport:
    """Deal the images of a step round robin, as the stream does with blocks."""
    own = torch.arange(BATCH)[rank::world]
    parts = own.chunk(state.optim.accumulate)
    images = pictures(state.step)
    return train_step(state, [MicroBatch(images[part], part) for part in parts])


def train(state: TrainState, rank: int = 0, world: int = 1, steps: int = STEPS) -> list[float]:
    return [step(state, rank, world).metrics.loss.item() for _ in range(steps)]


def spoil(model: nn.Module) -> Any:
    """Make the next images that a model sees NaN, as a broken kernel or memory would."""
    return model.register_forward_pre_hook(lambda _, given: (given[0] * float("nan"), *given[1:]))


def everything(state: TrainState) -> dict[str, Tensor]:
    """Give whole weights, moments and step counters, by name."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(state.model, options=options)
    moments: Any = get_optimizer_state_dict(state.model, state.optimizer, options=options)
    flat = {f"{n}/{k}": v for n, of in moments.get("state", {}).items() for k, v in of.items()}
    return {n: v.clone() for n, v in {**weights, **flat}.items() if isinstance(v, Tensor)}


def same_run(case: Case, rank: int) -> dict[str, Any]:
    state = create(case)
    losses = torch.tensor(train(state, rank, case.world))
    dist.all_reduce(losses)
    return {"losses": losses / case.world, "state": everything(state)}


def spoilt_run(case: Case, rank: int) -> dict[str, Any]:
    """Train twice, meet a bad batch, and train once more."""
    state = create(case)
    train(state, rank, case.world, steps=2)
    before = everything(state)
    hook = spoil(state.model) if rank == case.world - 1 else None
    report = step(state, rank, case.world)
    if hook is not None:
        hook.remove()
    skipped = [torch.zeros(()) for _ in range(case.world)]
    dist.all_gather(skipped, report.skipped.float())
    after = everything(state)
    again = step(state, rank, case.world)
    return {
        "skipped": torch.stack(skipped),
        "steps": state.step,
        "before": before,
        "after": after,
        "skipped_again": again.skipped,
        "at_last": everything(state),
    }


def refusal(case: Case) -> str:
    """Say why a case cannot be."""
    try:
        create(case)
    except ConfigError as error:
        return str(error)
    return ""


def groups(rank: int, folder: str) -> Iterator[int]:
    """Be in a gloo group of 4, then of 2, then of 1, as long as this rank is in one; tell which."""
    for world in (4, 2, 1):
        if rank >= world:
            return
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous-{world}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=60),
        )
        yield world
        dist.destroy_process_group()


def work(rank: int, folder: str) -> None:
    """Take part in every case; the groups of 4, of 2 and of 1 come one after another."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"same": {}, "spoilt": {}}
    for world in groups(rank, folder):
        for case in (case for case in SAME if case.world == world):
            found["same"][case.name] = same_run(case, rank)
        for case in (case for case in SPOILT if case.world == world):
            found["spoilt"][case.name] = spoilt_run(case, rank)
        if world == 4:
            found["refused"] = refusal(Case("fsdp2", 4, shard_ranks=3))
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")


if __name__ == "__main__":
    start_processes(work, args=(sys.argv[1],), nprocs=WORLD, start_method="fork")
