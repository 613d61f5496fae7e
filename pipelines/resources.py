"""Does it fit? Solved before anything starts, since what does not fit waits for ever, silently.

A training worker holds its CPUs and its GPU for as long as it trains, and they must be whole on
one machine. Decoding takes tasks of one CPU each, on any machine. Workers that hold every CPU wait
for pictures that nobody can decode, and Ray tells no error: so at least one CPU stays out of
training. Ray's own processes for a run (Train's controller, the process of a Tune trial) reserve
none.

All bundles of a demand are equal, so packing them is exact: each machine takes so many whole ones,
and each CPU beside them decodes.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rich.box import SIMPLE_HEAD
from rich.table import Table

from droppos.errors import ConfigError
from pipelines.machines import Cluster, Machine
from pipelines.recipe import Recipe
from pipelines.words import counted


class FitError(ConfigError):
    """A demand that a cluster cannot meet."""

    def __init__(self, found: str, way_out: str) -> None:
        super().__init__(found, way_out)  # as they are, or Ray could not send it
        self.found, self.way_out = found, way_out

    def __str__(self) -> str:
        return f"{self.found}; {self.way_out}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What one run, or one trial of a search, holds while it trains."""

    workers: int = 1
    cpus_per_worker: int = 1
    gpu: bool = False
    """Whether each worker has a GPU."""
    aside_cpus: int = 0
    """CPUs that measure checkpoints beside it."""
    decode_cpus: int | None = None
    """CPUs that decode; None takes all that training leaves, and needs one."""
    shared_decoding: bool = False
    """Whether these decode for all trials at once, not each trial's for itself."""
    sizes: tuple[int, ...] = ()
    """Smaller numbers of workers that could do the same run."""
    workers_field: str = "run.workers"
    """What to change for another number of workers."""

    @classmethod
    def of(cls, recipe: Recipe, *, gpu: bool, shared_decoding: bool = False) -> "Demand":
        """Take it from a recipe; an elastic run (run.min_workers) at its smallest size."""
        elastic = recipe.run.min_workers is not None
        workers = min(recipe.sizes)
        ranks = 1 if elastic else recipe.optim.accumulate
        return cls(
            workers=workers,
            cpus_per_worker=recipe.run.cpus_per_worker,
            gpu=gpu,
            aside_cpus=recipe.aside_cpus,
            decode_cpus=recipe.data.decode_cpus,
            shared_decoding=shared_decoding,
            sizes=tuple(
                size
                for size in range(1, workers)
                if recipe.optim.global_batch % (size * ranks) == 0
                and size % (recipe.compute.shard_ranks or 1) == 0
            ),
            workers_field="run.min_workers" if elastic else "run.workers",
        )

    @property
    def training(self) -> int:
        """CPUs that train."""
        return self.workers * self.cpus_per_worker

    def decoding(self, at_once: int) -> int:
        """Count the CPUs that must decode for so many trials, all together."""
        return (self.decode_cpus or 1) * (1 if self.shared_decoding else at_once)

    def cpus(self, at_once: int) -> int:
        """Count the CPUs that so many trials need."""
        return at_once * (self.training + self.aside_cpus) + self.decoding(at_once)

    def bundles(self, machine: Machine) -> int:
        """Count the workers that one machine has room for."""
        fit = machine.cpus // self.cpus_per_worker
        return min(fit, machine.gpus) if self.gpu else fit


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """A demand that fits, and how a cluster is parted by it."""

    demand: Demand
    at_once: int
    decoding: int
    """CPUs that decode for one trial; for all of them where they share their decoding."""
    cpus: int
    """Of the cluster, at the largest it can grow to."""
    gpus: int
    added: Mapping[str, int] = field(default_factory=dict)
    """Machines, by kind, that an autoscaler has to add before all of it runs at once."""
    only_totals: bool = False
    """Whether of what it may add only totals were known."""

    @property
    def training(self) -> int:
        """CPUs that train in one trial."""
        return self.demand.training

    @property
    def training_gpus(self) -> int:
        """GPUs of one trial."""
        return self.demand.workers if self.demand.gpu else 0

    @property
    def decoding_at_once(self) -> int:
        """CPUs that decode for all trials together."""
        return self.decoding * (1 if self.demand.shared_decoding else self.at_once)

    @property
    def left(self) -> int:
        """CPUs that nobody holds."""
        held = self.training + self.demand.aside_cpus
        return self.cpus - self.at_once * held - self.decoding_at_once

    @property
    def notes(self) -> list[str]:
        """What a person should know beside the numbers."""
        notes = []
        if self.added:
            kinds = ", ".join(f"{count} {name}" for name, count in self.added.items())
            notes.append(f"all at once only when the autoscaler has added {kinds}")
        if self.only_totals:
            notes.append("of the autoscaler only totals are known, not the size of a machine")
        return notes


@dataclass(frozen=True, slots=True)
class _Room:
    """What the largest choice of machines offers."""

    cpus: int
    bundles: int
    counts: tuple[int, ...] = ()
    """Machines of each kind that are added for it."""

    def holds(self, demand: Demand, at_once: int) -> bool:
        return self.bundles >= at_once * demand.workers and self.cpus >= demand.cpus(at_once)


def solve(cluster: Cluster, demand: Demand, at_once: int = 1) -> Fit:
    """Fit a demand into a cluster, so many times at once.

    Args:
        cluster: Its machines, with those that may be added.
        demand: Of one trial, or of a run.
        at_once: Trials at the same time.

    Raises:
        FitError: If it does not fit; names the one number to change, and to what.
    """
    if not _fits(cluster, demand, at_once):
        raise _refusal(cluster, demand, at_once)
    largest = _largest(cluster, demand, at_once)
    parts = 1 if demand.shared_decoding else at_once
    spare = (largest.cpus - at_once * (demand.training + demand.aside_cpus)) // parts
    return Fit(
        demand=demand,
        at_once=at_once,
        decoding=demand.decode_cpus or spare,
        cpus=largest.cpus,
        gpus=sum(machine.gpus * machine.count for machine in _chosen(cluster, largest)),
        added=_added(cluster, demand, at_once),
        only_totals=cluster.only_totals,
    )


def most_cpus(cluster: Cluster) -> int:
    """Count the CPUs of a cluster at its largest."""
    return _largest(cluster, Demand(), 0).cpus


def _fits(cluster: Cluster, demand: Demand, at_once: int) -> bool:
    return _largest(cluster, demand, at_once).holds(demand, at_once)


def _chosen(cluster: Cluster, room: _Room) -> list[Machine]:
    grown = zip(cluster.growth, room.counts, strict=True)
    return [*cluster.standing, *(replace(kind, count=count) for kind, count in grown)]


def _largest(cluster: Cluster, demand: Demand, at_once: int) -> _Room:
    """Choose the machines to add: as many CPUs as can be, once all workers have room."""
    possible = sum(kind.count for kind in cluster.growth)
    if cluster.most_added is None or possible <= cluster.most_added:
        counts = tuple(kind.count for kind in cluster.growth)
        return replace(_standing(cluster.machines, demand), counts=counts)
    wanted = at_once * demand.workers
    rooms = _rooms(cluster, demand, wanted, cluster.most_added)
    return max(rooms.values(), key=lambda room: (min(room.bundles, wanted), room.cpus))


def _standing(machines: Sequence[Machine], demand: Demand) -> _Room:
    return _Room(
        cpus=sum(machine.count * machine.cpus for machine in machines),
        bundles=sum(machine.count * demand.bundles(machine) for machine in machines),
    )


def _rooms(
    cluster: Cluster, demand: Demand, wanted: int, most: int
) -> dict[tuple[int, int], _Room]:
    """Find, for each number of machines added and of workers they have room for, the most CPUs.

    Room for more workers than are wanted counts as room for these.
    """
    rooms = {(0, 0): _standing(cluster.standing, demand)}
    for kind in cluster.growth:
        each = demand.bundles(kind)
        longer: dict[tuple[int, int], _Room] = {}
        for (machines, bundles), room in rooms.items():
            for count in range(min(kind.count, most - machines) + 1):
                key = (machines + count, min(wanted, bundles + count * each))
                grown = _Room(
                    room.cpus + count * kind.cpus,
                    room.bundles + count * each,
                    (*room.counts, count),
                )
                if key not in longer or longer[key].cpus < grown.cpus:
                    longer[key] = grown
        rooms = _useful(longer)
    return rooms


def _useful(rooms: Mapping[tuple[int, int], _Room]) -> dict[tuple[int, int], _Room]:
    """Drop what as many machines surpass in CPUs and workers both, or there would be too many."""
    kept: dict[tuple[int, int], _Room] = {}
    most: dict[int, int] = {}
    for key in sorted(rooms, reverse=True):
        if rooms[key].cpus > most.get(key[0], -1):
            kept[key] = rooms[key]
            most[key[0]] = rooms[key].cpus
    return kept


def _added(cluster: Cluster, demand: Demand, at_once: int) -> dict[str, int]:
    """Choose machines that an autoscaler has to add: none of them could be left out.

    It fits with all it may add. Those with GPUs are dearest, so as few as can be of them.
    """
    counts = list(_largest(cluster, demand, at_once).counts)

    def fits(which: int, count: int) -> bool:
        tried = [*counts[:which], count, *counts[which + 1 :]]
        grown = [replace(kind, count=n) for kind, n in zip(cluster.growth, tried, strict=True)]
        return _standing((*cluster.standing, *grown), demand).holds(demand, at_once)

    kinds = cluster.growth
    for which in sorted(range(len(kinds)), key=lambda i: (-kinds[i].gpus, -kinds[i].cpus)):
        counts[which] = bisect_left(
            range(counts[which]), True, key=lambda count, which=which: fits(which, count)
        )
    return {kind.name: count for kind, count in zip(kinds, counts, strict=True) if count}


def _refusal(cluster: Cluster, demand: Demand, at_once: int) -> FitError:
    """Say what is needed, what there is, and the one number to change."""
    fewer = _most_below(at_once, lambda trials: _fits(cluster, demand, trials))
    if fewer:
        return FitError(
            f"search.max_concurrent {at_once}: so many trials need "
            f"{_needs(demand, at_once)}, {_has(cluster, demand, at_once)}",
            f"lower search.max_concurrent to {fewer}",
        )
    who = "the run" if at_once == 1 else "already one trial"
    return FitError(
        f"{who} needs {_needs(demand, 1)}, {_has(cluster, demand, 1)}", _way_out(cluster, demand)
    )


def _most_below(number: int, fits: Callable[[int], bool]) -> int:
    """Find the largest smaller number that fits, 0 if none does; smaller ones need no more."""
    low, high = 0, number - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _way_out(cluster: Cluster, demand: Demand) -> str:
    """Name the one number that makes one trial fit; first what costs training least."""

    def fits(**changed: int) -> bool:
        return _fits(cluster, replace(demand, **changed), 1)

    if fewer := _most_below(demand.decode_cpus or 1, lambda cpus: fits(decode_cpus=cpus)):
        return f"lower data.decode_cpus to {fewer}"
    if fewer := _most_below(demand.cpus_per_worker, lambda cpus: fits(cpus_per_worker=cpus)):
        return f"lower run.cpus_per_worker to {fewer}"
    if fewer := max((size for size in demand.sizes if fits(workers=size)), default=0):
        return f"lower {demand.workers_field} to {fewer}"
    return f"add {_missing(cluster, demand)}"


def _missing(cluster: Cluster, demand: Demand) -> str:
    """Tell what one more machine would have to bring."""
    room = _largest(cluster, demand, 1)
    bundles = max(0, demand.workers - room.bundles)
    cpus = max(demand.cpus(1) - room.cpus, bundles * demand.cpus_per_worker)
    if not bundles:
        return counted(cpus, "CPU")
    if demand.gpu:
        return f"a machine with {counted(bundles, 'GPU')} and {counted(cpus, 'CPU')}"
    return f"a machine with {counted(cpus, 'CPU')}"


def _needs(demand: Demand, at_once: int) -> str:
    trials = "" if at_once == 1 else f"{at_once} x "
    gpus = f" and {counted(at_once * demand.workers, 'GPU')}" if demand.gpu else ""
    decoders = "" if demand.shared_decoding else trials
    aside = f", {trials}{demand.aside_cpus} to measure" if demand.aside_cpus else ""
    return (
        f"{counted(demand.cpus(at_once), 'CPU')}{gpus} "
        f"({trials}{demand.workers_field} {demand.workers} x run.cpus_per_worker "
        f"{demand.cpus_per_worker} to train, {decoders}{demand.decode_cpus or 1} to decode{aside})"
    )


def _has(cluster: Cluster, demand: Demand, at_once: int) -> str:
    room = _largest(cluster, demand, at_once)
    machines = _chosen(cluster, room)
    gpus = sum(machine.count * machine.gpus for machine in machines)
    has = f"the cluster has {counted(room.cpus, 'CPU')}"
    if demand.gpu:
        has += f" and {counted(gpus, 'GPU')}"
    if cluster.growth:
        has += " at its largest"
    wanted = at_once * demand.workers
    enough = room.cpus >= demand.cpus(at_once) and gpus >= wanted * demand.gpu
    if enough and room.bundles < wanted:  # so it is not for what they have in sum
        bundle = _bundle(demand)
        has += (
            f", but a worker's {bundle} must be on one machine: "
            f"{_listed(machines)} have room for {room.bundles} of {wanted}"
        )
    return has


def _bundle(demand: Demand) -> str:
    return counted(demand.cpus_per_worker, "CPU") + (" + 1 GPU" if demand.gpu else "")


def _listed(machines: Iterable[Machine]) -> str:
    shapes: dict[str, int] = {}
    for machine in machines:
        if not (machine.cpus or machine.gpus):
            continue
        shape = counted(machine.cpus, "CPU")
        shape += f" + {counted(machine.gpus, 'GPU')}" if machine.gpus else ""
        shapes[shape] = shapes.get(shape, 0) + machine.count
    return ", ".join(f"{count} x {shape}" for shape, count in shapes.items() if count)


def _aside_row(fit: Fit) -> list[tuple[str, str, str, int, int]]:
    cpus = fit.demand.aside_cpus
    if not cpus:
        return []
    return [("measuring", counted(cpus, "CPU"), str(fit.at_once), fit.at_once * cpus, 0)]


def table(fit: Fit) -> Table:
    """Show how the cluster is parted."""
    demand = fit.demand
    shared = demand.shared_decoding and fit.at_once > 1
    rows: Sequence[tuple[str, str, str, int, int]] = (
        (
            "training",
            f"{demand.workers} x {_bundle(demand)}",
            str(fit.at_once),
            fit.at_once * fit.training,
            fit.at_once * fit.training_gpus,
        ),
        (
            "decoding",
            "shared" if shared else counted(fit.decoding, "CPU"),
            "" if shared else str(fit.at_once),
            fit.decoding_at_once,
            0,
        ),
        *_aside_row(fit),
        ("left over", "", "", fit.left, fit.gpus - fit.at_once * fit.training_gpus),
        ("of the cluster", "", "", fit.cpus, fit.gpus),
    )
    title = "Resources" + (", with all that the autoscaler may add" if fit.added else "")
    shown = Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption="\n".join(fit.notes) or None,
        caption_justify="left",
    )
    shown.add_column("")
    for name in ("per trial", "at once", "CPUs", "GPUs"):
        shown.add_column(name, justify="right")
    for label, each, at_once, cpus, gpus in rows:
        shown.add_row(label, each, at_once, f"{cpus:,}", f"{gpus:,}")
    return shown
