"""Seconds of a training step by formula: arithmetic, and what the network must carry.

Arithmetic is the step's FLOPs (:mod:`droppos.flops`) over a share of the GPU's peak, but no less
than it takes to launch the kernels. Communication is of rings: each of k ranks sends (k - 1) / k
of what is gathered or scattered (Patarasuk and Yuan 2009), and a ring through several machines
runs at the pace of their network. FSDP2 gathers each unit twice and scatters its gradient once;
DDP reduces gradients, which is a scatter and a gather.
"""

from dataclasses import dataclass
from math import ceil, log2

from droppos.activations import widths
from droppos.config import Compute
from droppos.flops import step_flops
from droppos.footprint import FLOAT, unit_sizes
from pipelines.instances import Instance
from pipelines.recipe import Recipe

CPU_FLOPS = 39e9
"""Operations per second of one CPU in a training step: measured, docs/step.md (ViT-B, float32, 2
CPUs of an AMD EPYC, 6.2 s for 8 images)."""
LAUNCH_S = 0.5e-3
"""Seconds to launch one block's kernels, forward and backward, an assumption: some 60 of them."""
GUIDE_LAUNCH_S = 0.15e-3
"""Seconds for a block of the guide, an assumption."""
LINE_SHARE = 0.8
"""Share of a network's rate that is reached, an assumption."""
OVERLAP = 0.6
"""Share of the arithmetic behind which communication hides, an assumption."""
NETWORK_HOP_S = 15e-6
"""Seconds from one machine to the next beyond the bytes' own, an assumption."""
LINK_HOP_S = 3e-6
"""Seconds from one GPU to the next within a machine, an assumption."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """One optimizer step of all workers, in seconds."""

    arithmetic_s: float
    """Forward and backward, by FLOPs."""
    launch_s: float
    """Least time of these, however few the images."""
    communication_s: float
    """Of gradients and weights, hidden or not."""

    @property
    def compute_s(self) -> float:
        """What a worker takes when it is alone."""
        return max(self.arithmetic_s, self.launch_s)

    @property
    def exposed_s(self) -> float:
        """Communication that hides behind nothing."""
        return max(0.0, self.communication_s - OVERLAP * self.compute_s)

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.compute_s + self.exposed_s

    @property
    def bound(self) -> str:
        """Name what most of the step is."""
        if self.exposed_s > self.compute_s:
            return "communication"
        return "GPU step" if self.arithmetic_s >= self.launch_s else "kernel launches"


def step_time(
    recipe: Recipe,
    machine: Instance,
    per_machine: int,
    mfu: float,
    images_per_worker_s: float | None = None,
) -> StepTime:
    """Estimate a step.

    Args:
        recipe: With its workers and micro-batches.
        machine: They run on.
        per_machine: Workers on one of them.
        mfu: Share of the peak that arithmetic reaches.
        images_per_worker_s: Measured; in place of arithmetic and launches.
    """
    images = recipe.optim.global_batch / recipe.run.workers
    depth = recipe.model.shape.depth + recipe.model.decoder_depth
    launch = LAUNCH_S * depth
    if recipe.method.guided:
        launch += GUIDE_LAUNCH_S * (recipe.method.guide_depth or recipe.model.shape.depth)
    arithmetic = images * step_flops(recipe.model, recipe.method) / _speed(recipe, machine, mfu)
    if images_per_worker_s is not None:
        arithmetic, launch = images / images_per_worker_s, 0.0
    return StepTime(
        arithmetic_s=arithmetic,
        launch_s=launch * recipe.optim.accumulate,
        communication_s=communication_s(recipe, machine, per_machine),
    )


def _speed(recipe: Recipe, machine: Instance, mfu: float) -> float:
    """Operations per second of one worker."""
    half = recipe.compute.precision == "bf16"
    tflops = machine.bf16_tflops if half else machine.float32_tflops
    if tflops is None:
        return CPU_FLOPS * recipe.run.cpus_per_worker
    return mfu * tflops * 1e12


def communication_s(recipe: Recipe, machine: Instance, per_machine: int) -> float:
    """Add up what one step sends, in seconds, if nothing hid it."""
    compute, workers = recipe.compute, recipe.run.workers
    if compute.strategy == "single" or workers == 1:
        return 0.0
    units = unit_sizes(recipe.model, recipe.method, compute)
    if compute.strategy == "ddp":
        ring = _Ring(machine, workers, per_machine, sharing=1)
        return sum(ring.reduce_s(FLOAT * unit) for unit in units)
    shards = compute.shard_ranks or workers
    inner = _Ring(machine, shards, per_machine, sharing=max(1, per_machine // shards))
    # Ranks of one place in different groups: they all reduce at once, over the same network.
    outer = _Ring(machine, workers // shards, 1, sharing=min(per_machine, shards))
    gathers = recipe.optim.accumulate * (1 + _gathers_again(compute))
    total = 0.0
    for unit in units:
        total += gathers * inner.pass_s(widths(compute).inner * unit)
        total += inner.pass_s(FLOAT * unit) + outer.reduce_s(FLOAT * ceil(unit / shards))
    return total


def _gathers_again(compute: Compute) -> bool:
    return compute.reshard_after_forward and compute.shard_unit == "block"


@dataclass(frozen=True, slots=True)
class _Ring:
    """Ranks in a ring, as many as there is room for on each machine."""

    machine: Instance
    ranks: int
    per_machine: int
    sharing: int
    """Rings that share the machine's network."""

    @property
    def _machines(self) -> int:
        return ceil(self.ranks / self.per_machine)

    @property
    def _around_s(self) -> float:
        """Seconds of the hops once around, beyond the bytes' own."""
        between = self._machines - 1
        return between * NETWORK_HOP_S + (self.ranks - 1 - between) * LINK_HOP_S

    def pass_s(self, size: float) -> float:
        """Gather or scatter so many bytes, once around."""
        return self._bytes_s(size) + self._around_s

    def reduce_s(self, size: float) -> float:
        """Reduce them on all ranks: twice around, or, if its hops take less, through a tree."""
        hop = NETWORK_HOP_S if self._machines > 1 else LINK_HOP_S
        tree = 2 * ceil(log2(self.ranks)) * hop
        return 2 * self._bytes_s(size) + min(2 * self._around_s, tree)

    def _bytes_s(self, size: float) -> float:
        network = LINE_SHARE * self.machine.network_gbit * 1e9 / 8 / self.sharing
        link = LINE_SHARE * self.machine.link_gbyte_s * 1e9 or network
        rate = min(network, link) if self._machines > 1 else link
        return (self.ranks - 1) / self.ranks * size / rate
