"""Rings: what the workers send one another in a step, by formula.

Each of k ranks sends (k - 1) / k of what is gathered or scattered, once around (Patarasuk and Yuan
2009), and a ring through several machines runs at the pace of their network. FSDP2 gathers each
unit twice and scatters its gradient once; where groups of ranks shard (compute.shard_ranks),
replicas then reduce their rows across the groups. DDP is the replicas' ring alone, of all ranks.
"""

from dataclasses import dataclass
from math import ceil, log2

from droppos.activations import widths
from droppos.footprint import FLOAT, unit_sizes
from pipelines.instances import Instance
from pipelines.recipe import Recipe

LINE_SHARE = 0.8
"""Share of a network's rate that is reached, an assumption."""
NETWORK_HOP_S = 15e-6
"""Seconds from one machine to the next beyond the bytes' own, an assumption."""
LINK_HOP_S = 3e-6
"""Seconds from one GPU to the next within a machine, an assumption."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ring:
    """Ranks in a ring, as many as there is room for on each machine."""

    ranks: int
    per_machine: int
    """Of its ranks on one machine, at most."""
    sharing: int
    """Such rings through one machine, which share its network."""
    network_bytes_s: float
    """Of one machine."""
    link_bytes_s: float
    """Of one GPU to another in the machine."""

    @property
    def machines(self) -> int:
        """Machines that it goes through."""
        return ceil(self.ranks / self.per_machine)

    def sent(self, size: float) -> float:
        """Give the bytes on each hop when so many are gathered or scattered."""
        return (self.ranks - 1) / self.ranks * size

    def pass_s(self, size: float) -> float:
        """Gather or scatter so many bytes, once around."""
        return self._bytes_s(size) + self._around_s

    def reduce_s(self, size: float) -> float:
        """Reduce them on all ranks: twice around, or, if its hops take less, through a tree."""
        hop = NETWORK_HOP_S if self.machines > 1 else LINK_HOP_S
        tree = 2 * ceil(log2(self.ranks)) * hop
        return 2 * self._bytes_s(size) + min(2 * self._around_s, tree)

    @property
    def _around_s(self) -> float:
        """Seconds of the hops once around, beyond the bytes' own."""
        between = self.machines - 1
        return between * NETWORK_HOP_S + (self.ranks - 1 - between) * LINK_HOP_S

    def _bytes_s(self, size: float) -> float:
        network = self.network_bytes_s / self.sharing
        link = self.link_bytes_s or network
        return self.sent(size) / (min(network, link) if self.machines > 1 else link)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rings:
    """Both kinds of a step: either may be of one rank, which sends nothing."""

    shards: Ring
    """Ranks that share one copy of the weights."""
    replicas: Ring
    """Ranks with the same rows of it."""
    units: tuple[float, ...]
    """Weights that are sent together."""
    gathers: int
    """Times that each is gathered in a step."""
    gathered: int
    """Bytes of a weight when it is."""

    @property
    def seconds(self) -> float:
        """All of a step's, if nothing hid them."""
        total = 0.0
        for unit in self.units:
            total += self.gathers * self.shards.pass_s(self.gathered * unit)
            total += self.shards.pass_s(FLOAT * unit)
            total += self.replicas.reduce_s(FLOAT * ceil(unit / self.shards.ranks))
        return total

    @property
    def crossing_bytes(self) -> float:
        """Bytes of a step between one machine and all others: each ring goes in and out of it."""
        weights = sum(self.units)
        sizes = (
            (self.shards, (self.gathers * self.gathered + FLOAT) * weights),
            (self.replicas, 2 * FLOAT * weights / self.shards.ranks),
        )
        return sum(2 * ring.sharing * ring.sent(size) for ring, size in sizes if ring.machines > 1)


def rings(recipe: Recipe, machine: Instance, per_machine: int, efa: bool) -> Rings:
    """Lay the rings of a recipe's workers.

    Args:
        recipe: With its workers and micro-batches.
        machine: They run on.
        per_machine: Workers on one of them.
        efa: Whether the machines have EFA between them.
    """
    compute, workers = recipe.compute, recipe.run.workers
    shards = (compute.shard_ranks or workers) if compute.strategy == "fsdp2" else 1
    network = LINE_SHARE * machine.between_gbit(efa) * 1e9 / 8
    link = LINE_SHARE * machine.link_gbyte_s * 1e9

    def ring(ranks: int, on_one: int, sharing: int) -> Ring:
        return Ring(
            ranks=ranks,
            per_machine=on_one,
            sharing=sharing,
            network_bytes_s=network,
            link_bytes_s=link,
        )

    groups = max(1, per_machine // shards)  # on one machine
    again = compute.reshard_after_forward and compute.shard_unit == "block"
    return Rings(
        shards=ring(shards, per_machine, groups),
        # Ranks of one place in different groups: they all reduce at once, over the same network.
        replicas=ring(workers // shards, groups, min(per_machine, shards)),
        units=tuple(unit_sizes(recipe.model, recipe.method, compute)),
        gathers=recipe.optim.accumulate * (1 + again),
        gathered=widths(compute).inner,
    )
