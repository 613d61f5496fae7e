"""The machines of a Ray cluster: those that stand, and those that its autoscaler may add.

Ray 2.60 has a place for an autoscaler's limits (`get_cluster_config`), but its own autoscaler
leaves that empty: only hosted ones fill it in. The one that `ray up` starts reads a file on the
head, which it was told the name of; so we look there.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import ray
import ray._private.state
import yaml
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

HEAD = "node:__internal_head__"
"""Resource that only the head has."""
HEAD_S = 20
"""Seconds to wait for the head to tell what its autoscaler may add."""
UNLIMITED = 1000
"""Machines that an autoscaler without a limit is taken to add at most."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Machine:
    """So many machines of one kind."""

    name: str
    resources: Mapping[str, float]
    """Of one of them, as Ray calls them."""
    count: int = 1

    @property
    def cpus(self) -> int:
        """Whole CPUs of one of them."""
        return int(self.resources.get("CPU", 0))

    @property
    def gpus(self) -> int:
        """Whole GPUs of one of them."""
        return int(self.resources.get("GPU", 0))

    def is_like(self, other: "Machine") -> bool:
        """Tell whether both offer the same."""
        return (self.cpus, self.gpus) == (other.cpus, other.gpus)


@dataclass(frozen=True, slots=True)
class Limits:
    """What an autoscaler may make of a cluster."""

    kinds: tuple[Machine, ...] = ()
    """Beside the head; counts are of all there may be at once, standing ones included."""
    machines: int | None = None
    """All of them at once, beside the head; None if only the kinds are limited."""
    resources: Mapping[str, float] | None = None
    """Totals of the whole cluster; None if they are not limited."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where something is to fit."""

    standing: tuple[Machine, ...]
    growth: tuple[Machine, ...] = ()
    """What an autoscaler may add to these."""
    most_added: int | None = None
    """How many of these it may add at once; None if each kind's own count is the only limit."""
    only_totals: bool = False
    """Whether of the growth only totals are known, so that it is taken for one large machine."""

    @property
    def machines(self) -> tuple[Machine, ...]:
        """All of them."""
        return self.standing + self.growth


def read_cluster() -> Cluster:
    """Look at the cluster this process has joined.

    What other jobs hold is counted as there: they end, and it is waited for.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    heads = [node for node in nodes if HEAD in node["Resources"]]
    head = _machine("head", heads[0]) if heads else Machine("head", {}, 0)
    others = [_machine("node", node) for node in nodes if HEAD not in node["Resources"]]
    limits = _reported(head) or (_of_head(heads[0]["NodeID"]) if heads else None)
    return cluster_of([head] if heads else [], others, limits)


def _machine(name: str, node: Mapping[str, Any]) -> Machine:
    has = node["Resources"]
    return Machine(name, {key: has[key] for key in ("CPU", "GPU") if key in has})


def cluster_of(
    head: Iterable[Machine], others: Iterable[Machine], limits: Limits | None
) -> Cluster:
    """Find what may be added to the machines that stand.

    Args:
        head: The head, if it is one of the cluster.
        others: Every other machine.
        limits: The autoscaler's; None without one.
    """
    head, unnamed = list(head), list(others)
    if limits is None:
        return Cluster(tuple([*head, *_alike(unnamed)]))
    named: list[Machine] = []
    growth: list[Machine] = []
    for kind in limits.kinds:
        here = [machine for machine in unnamed if machine.is_like(kind)][: kind.count]
        for machine in here:
            unnamed.remove(machine)
        if here:
            named.append(replace(kind, count=len(here)))
        growth.append(replace(kind, count=kind.count - len(here)))
    standing = tuple([*head, *named, *_alike(unnamed)])
    stand = sum(machine.count for machine in standing) - len(head)
    most = None if limits.machines is None else max(0, limits.machines - stand)
    if limits.resources is not None and not limits.kinds:
        return Cluster(standing, _as_one(standing, limits.resources), only_totals=True)
    growth = _within(growth, standing, limits.resources or {})
    return Cluster(standing, tuple(kind for kind in growth if kind.count), most)


def _alike(machines: Iterable[Machine]) -> list[Machine]:
    kinds: list[Machine] = []
    for machine in machines:
        same = next((i for i, kind in enumerate(kinds) if machine.is_like(kind)), None)
        if same is None:
            kinds.append(machine)
        else:
            kinds[same] = replace(kinds[same], count=kinds[same].count + machine.count)
    return kinds


def _total(machines: Iterable[Machine], resource: str) -> float:
    return sum(machine.count * machine.resources.get(resource, 0) for machine in machines)


def _as_one(standing: Iterable[Machine], most: Mapping[str, float]) -> tuple[Machine, ...]:
    standing = list(standing)
    missing = {name: max(0.0, all_ - _total(standing, name)) for name, all_ in most.items()}
    return (Machine("growth", missing),) if any(missing.values()) else ()


def _within(
    growth: Iterable[Machine], standing: Iterable[Machine], most: Mapping[str, float]
) -> list[Machine]:
    """Leave so many machines of each kind that together they stay below the totals."""
    standing = list(standing)
    left = {name: max(0.0, all_ - _total(standing, name)) for name, all_ in most.items()}
    kept = []
    for kind in growth:
        fit = [
            int(left[name] // each)
            for name, each in kind.resources.items()
            if each and name in left
        ]
        count = min([kind.count, *fit])
        for name, each in kind.resources.items():
            if name in left:
                left[name] -= count * each
        kept.append(replace(kind, count=count))
    return kept


def _reported(head: Machine) -> Limits | None:
    """Read what a hosted autoscaler has written down; Ray's own libraries read this."""
    config = ray._private.state.state.get_cluster_config()
    if config is None or not (config.node_group_configs or config.max_resources):
        return None
    kinds = [
        Machine(
            group.name or "node",
            dict(group.resources),
            UNLIMITED if group.max_count < 0 else group.max_count,
        )
        for group in config.node_group_configs
    ]
    # The head has a group of its own, which is not to be added once more.
    kinds = [kind for kind in kinds if not (kind.count == 1 and kind.is_like(head))]
    return Limits(tuple(kinds), resources=dict(config.max_resources) or None)


def _of_head(head: str) -> Limits | None:
    """Ask the head for the file of the autoscaler that `ray up` has started there, if there is one.

    Only a process on the head can see it; a trial of a search may be on any node.
    """
    here = ray.get_runtime_context()
    port = here.gcs_address.rpartition(":")[2]
    if here.get_node_id() == head:
        return launcher_limits(port)
    task = ray.remote(num_cpus=0)(launcher_limits)
    asked = task.options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(head, soft=False)
    ).remote(port)
    try:
        return ray.get(asked, timeout=HEAD_S)
    except RayError as error:
        _log.warning("the cluster's head does not tell what its autoscaler may add: %s", error)
        return None


def launcher_limits(gcs_port: str) -> Limits | None:
    """Find the autoscaler of Ray's cluster launcher among this machine's processes, and its file.

    Args:
        gcs_port: Of the cluster; there may be others on this machine.
    """
    for process in psutil.process_iter(["cmdline"]):
        flags = dict(
            word.removeprefix("--").split("=", 1)
            for word in process.info["cmdline"] or []
            if word.startswith("--") and "=" in word
        )
        file = flags.get("autoscaling-config")
        if file and flags.get("gcs-address", "").endswith(f":{gcs_port}"):
            try:
                return limits_of(yaml.safe_load(Path(file).expanduser().read_text()))
            except (OSError, yaml.YAMLError) as error:
                _log.warning("what the autoscaler may add cannot be read: %s", error)
    return None


def limits_of(config: Mapping[str, Any]) -> Limits:
    """Read a cluster launcher's file, such as cluster.yaml."""
    machines = config.get("max_workers", 2)  # as many as Ray adds when it is not said
    kinds = tuple(
        Machine(name, kind.get("resources") or {}, kind.get("max_workers", machines))
        for name, kind in config["available_node_types"].items()
        if name != config["head_node_type"]
    )
    return Limits(kinds, machines)
