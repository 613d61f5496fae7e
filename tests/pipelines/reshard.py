"""Train on 1, 2, 4 ranks and 1 again, each going on from the checkpoint before, on real gloo.

Run by test_reshard.py: ``python -m tests.pipelines.reshard FOLDER``. Torch is imported once,
before the processes fork.
"""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes  # pyright: ignore[reportPrivateImportUsage]

from pipelines import checkpoints, stored_state
from pipelines.checkpoints import Retention
from pipelines.kept_state import kept_state, restore
from pipelines.storage import open_place
from tests.droppos.ranks import Case, create, everything, train

LEGS = (
    Case("single", 1),
    Case("ddp", 2),
    Case("fsdp2", 4),
    Case("fsdp2", 4, shard_ranks=2),
    Case("ddp", 2, accumulate=2),
    Case("fsdp2", 1),
)
STEPS = 3
"""Of each leg."""


def leg(number: int, case: Case, rank: int, folder: Path) -> dict[str, Any]:
    """Go on from the newest checkpoint, and make the next."""
    home = open_place(str(folder / "run"))
    state = create(case)
    saved = checkpoints.newest(home)
    # What a rank that was there before draws next, it draws after a restart.
    torch.manual_seed(1000 + 10 * number + rank)
    restore(state, saved)
    # To ask a fresh optimizer for its state makes torch take a step, with no gradient.
    begun = everything(state) if saved else {}
    found = {"step": state.step, "begun": begun, "random": torch.rand(3)}
    losses = torch.tensor(train(state, rank, case.world, STEPS))
    dist.all_reduce(losses)
    facts = {"random_states": case.world}
    stored_state.save(home, state.step, kept_state(state), facts, Retention(len(LEGS)))
    return {
        **found,
        "losses": losses / case.world,
        "ended": everything(state),
        "next": torch.rand(3),
    }


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    found = []
    for number, case in enumerate(LEGS):
        if rank >= case.world:
            continue
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous-{number}",
            rank=rank,
            world_size=case.world,
            timeout=timedelta(seconds=60),
        )
        found.append(leg(number, case, rank, Path(folder)))
        dist.destroy_process_group()
    torch.save(found, Path(folder) / f"found-{rank}.pt")


if __name__ == "__main__":
    start_processes(work, args=(sys.argv[1],), nprocs=4, start_method="fork")
