"""Checkpoints by formula: their size, and how long they take.

All ranks write at once, each an equal part (docs/faults.md). A step waits for the copy to host
memory alone: of the rank's shard under FSDP2, of everything under DDP.
"""

from dataclasses import dataclass

from droppos.footprint import checkpoint_bytes
from pipelines.instances import Instance
from pipelines.plan.rings import LINE_SHARE
from pipelines.recipe import Recipe

COPY_BYTES_S = 10e9
"""From a GPU to host memory through PCIe, an assumption."""
UPLOAD_BYTES_S = 150e6
"""Of one worker's stream into object storage, an assumption."""
CEREMONY_S = 1.0
"""What a checkpoint takes however small: plans between ranks, a listing, complete.json; an
assumption."""


@dataclass(frozen=True, slots=True)
class Saving:
    """One checkpoint."""

    bytes: int
    """Over all ranks."""
    blocked_s: float
    """For which training waits."""
    write_s: float
    """Until it is complete, after that."""


def saving(recipe: Recipe, machine: Instance, per_machine: int) -> Saving:
    """Estimate a checkpoint.

    Args:
        recipe: With its workers.
        machine: They run on.
        per_machine: Workers on one of them.
    """
    size, workers = checkpoint_bytes(recipe.model, recipe.method), recipe.run.workers
    sharded = recipe.compute.strategy == "fsdp2"
    copied = size / ((recipe.compute.shard_ranks or workers) if sharded else 1)
    network = LINE_SHARE * machine.network_gbit * 1e9 / 8 / per_machine
    written = size / workers / min(UPLOAD_BYTES_S, network)
    return Saving(size, copied / COPY_BYTES_S, CEREMONY_S + written)
