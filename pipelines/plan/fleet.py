"""A fleet: which machines a run would have, of given types.

Workers take GPUs (or CPUs, of types without); the CPUs that they leave decode, and machines
without GPUs are added until decoding keeps up, a fifth to spare. A small head stands beside.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import yaml

from droppos.errors import ConfigError
from pipelines.bottleneck import HEAD_ROOM
from pipelines.instances import Instance, find
from pipelines.plan.question import Question
from pipelines.recipe import Recipe

CLUSTER = Path("cluster.yaml")
COMMON = (
    "g6.12xlarge",
    "g6e.2xlarge",
    "g6e.12xlarge",
    "g6e.48xlarge",
    "p4d.24xlarge",
    "p4de.24xlarge",
    "p5.48xlarge",
    "p5en.48xlarge",
)
DECODE, HEAD = "c7i.4xlarge", "m7i.xlarge"


@dataclass(frozen=True, slots=True)
class Choice:
    """Machine types to choose from."""

    training: tuple[Instance, ...]
    decoding: tuple[Instance, ...]
    head: Instance
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """Machines of one run."""

    machine: Instance
    """Where workers are."""
    machines: int
    workers: int
    per_machine: int
    """Workers on one machine, at most."""
    own_cpus: int
    """CPUs beside the workers' on their machines: they decode."""
    decoder: Instance
    decoders: int
    """Machines that only decode."""
    head: Instance
    decode_cpus: int
    """CPUs that decode, on either."""

    @property
    def remote(self) -> float:
        """Share of the pictures that are decoded on other machines than the workers'."""
        return max(0, self.decode_cpus - self.own_cpus) / self.decode_cpus

    @property
    def carried(self) -> float:
        """Share of the crops that go to a worker on another machine than they were decoded on.

        Ray deals them out in the order of the run, wherever they were made.
        """
        return 1 - (1 - self.remote) / self.machines

    def usd_per_hour(self, spot: bool) -> float | None:
        """Price it: workers on spot or on demand, the rest on demand, as in cluster.yaml.

        Returns:
            None if there is no spot price.
        """
        price = self.machine.spot if spot else self.machine.on_demand
        if price is None:
            return None
        beside = self.decoders * self.decoder.on_demand + self.head.on_demand
        return self.machines * price + beside


def choice(recipe: Recipe, question: Question) -> Choice:
    """Decide which machine types there are to choose from.

    Raises:
        ConfigError: If one is not known, or none can train this recipe.
    """
    head = find(HEAD, question.catalogue)
    if question.machines:
        names, source = question.machines, "given"
    elif CLUSTER.is_file():
        names, head = _of_cluster(question.catalogue)
        source = f"those of {CLUSTER}"
    else:
        names, source = COMMON, "a choice of common ones"
    known = [find(name, question.catalogue) for name in dict.fromkeys(names)]
    gpu = tuple(each for each in known if each.gpus)
    cpu = tuple(each for each in known if not each.gpus)
    on_gpu = recipe.compute.device == "cuda" or (recipe.compute.device == "auto" and bool(gpu))
    if on_gpu and not gpu:
        raise ConfigError(
            f"compute.device is cuda, but no machine type among {', '.join(names)} has a GPU; add "
            "one to --machines, such as g6e.2xlarge"
        )
    decoding = cpu or (find(DECODE, question.catalogue),)
    return Choice(gpu if on_gpu else cpu or decoding, decoding, head, source)


def fleet(
    recipe: Recipe, machine: Instance, chosen: Choice, images_per_s: float, decode_s: float
) -> Fleet:
    """Put a run on machines of one type, with as many that decode as the workers' pace needs.

    Args:
        recipe: The run.
        machine: Type for the workers.
        chosen: Where types that decode, and the head, are from.
        images_per_s: That the workers could train on.
        decode_s: CPU seconds of a picture.

    Raises:
        ConfigError: As :func:`slots`.
    """
    run, per_machine = recipe.run, slots(recipe, machine)
    machines = ceil(run.workers / per_machine)
    own = machines * machine.cpus - run.workers * run.cpus_per_worker
    wanted = recipe.data.decode_cpus or ceil(HEAD_ROOM * images_per_s * decode_s) or 1
    decoder, decoders = _decoders(chosen.decoding, wanted - own)
    return Fleet(
        machine=machine,
        machines=machines,
        workers=run.workers,
        per_machine=per_machine,
        own_cpus=own,
        decoder=decoder,
        decoders=decoders,
        head=chosen.head,
        decode_cpus=recipe.data.decode_cpus or own + decoders * decoder.cpus,
    )


def slots(recipe: Recipe, machine: Instance) -> int:
    """Count the workers of a run on one machine: as many as have a GPU and CPUs there.

    Raises:
        ConfigError: If not even one has room.
    """
    run = recipe.run
    fits = machine.cpus // run.cpus_per_worker
    if not fits:
        raise ConfigError(
            f"run.cpus_per_worker {run.cpus_per_worker} is more than the {machine.cpus} CPUs of a "
            f"{machine.name}; lower it, or take a larger machine"
        )
    return min(machine.gpus or fits, fits, run.workers)


def _decoders(types: Sequence[Instance], cpus: int) -> tuple[Instance, int]:
    """Choose the type that brings so many CPUs for the least money."""

    def price(each: Instance) -> float:
        return ceil(max(cpus, 1) / each.cpus) * each.on_demand

    cheapest = min(types, key=price)
    return cheapest, ceil(max(cpus, 0) / cheapest.cpus)


def _of_cluster(catalogue: str | None) -> tuple[tuple[str, ...], Instance]:
    """Read the machine types of a cluster launcher's file, and its head's."""
    try:
        config: Any = yaml.safe_load(CLUSTER.read_text())
        types = {
            name: str(kind["node_config"]["InstanceType"])
            for name, kind in config["available_node_types"].items()
        }
        head = types.pop(config["head_node_type"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{CLUSTER} does not tell its machine types (available_node_types, node_config, "
            f"InstanceType): {error!r}; correct it, or name types with --machines"
        ) from error
    return tuple(types.values()), find(head, catalogue)
