"""Measure one model on 1, 2 and 4 ranks, however it is spread, on real gloo.

Run by test_holdout.py: ``python -m tests.pipelines.holdout_ranks FOLDER``. Torch is imported once,
before the processes fork.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes  # pyright: ignore[reportPrivateImportUsage]

from droppos.config import Compute, Method
from droppos.parallel import build
from pipelines.holdout import Holdout, Pictures
from pipelines.recipe import MeasureProtocol
from tests.droppos.ranks import MODEL, Case, groups

COMPUTE = Compute(strategy="single", precision="float32", device="cpu")
MEASURE = MeasureProtocol(mask_ratio=0.25)
PICTURES = 75
"""Three batches, the last of them short."""
CASES = (
    Case("fsdp2", 4, shard_ranks=2),
    Case("ddp", 4),
    Case("fsdp2", 2),
    Case("ddp", 2),
    Case("fsdp2", 1),
)


def make_pictures() -> Pictures:
    """Noise, whose contrast tells the class, though not without doubt."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(PICTURES) % 3
    contrast = 30 * (labels + 1) + 25 * torch.randn(PICTURES, generator=random)
    noise = torch.randn(PICTURES, *MODEL.image_size, 3, generator=random)
    pixels = (128 + contrast[:, None, None, None] * noise).clamp(0, 255).to(torch.uint8)
    return Pictures(pixels, [str(i) for i in range(PICTURES)], labels.tolist(), ("a", "b", "c"))


def measure(compute: Compute) -> dict[str, float]:
    cpu = torch.device("cpu")
    model = build(MODEL, Method(), compute, seed=1, device=cpu)
    return Holdout(MEASURE, compute, make_pictures(), cpu).measure(model)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {"alone": measure(COMPUTE)}
    for world in groups(rank, folder):
        for case in (case for case in CASES if case.world == world):
            figures = measure(
                replace(COMPUTE, strategy=case.strategy, shard_ranks=case.shard_ranks)
            )
            of_ranks: list[Any] = [None] * world
            dist.all_gather_object(of_ranks, figures)
            found[case.name] = of_ranks
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")


if __name__ == "__main__":
    start_processes(work, args=(sys.argv[1],), nprocs=4, start_method="fork")
