"""The kinds of machine that a cluster's file names: do they fit a recipe, and what do they cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from droppos.errors import ConfigError
from pipelines.launch.account import Account
from pipelines.launch.check import Wrong
from pipelines.launch.cost import Cost, Kind
from pipelines.launch.prices import PRICE_LIST, Price, on_demand_price, spot_price
from pipelines.launch.quotas import Market, Use
from pipelines.machines import Cluster, Machine, cluster_of, limits_of
from pipelines.recipe import Recipe
from pipelines.resources import Demand, Fit, solve


@dataclass(frozen=True, slots=True)
class Group:
    """One kind of machine of the file."""

    name: str
    machine: str
    """EC2's type."""
    market: Market
    standing: int
    most: int


@dataclass(frozen=True, slots=True)
class Fleet:
    """All of them."""

    groups: Sequence[Group]
    cluster: Cluster
    """As `droppos pretrain` sees it, before anything has grown."""
    most_added: int | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Fleet":
        """Read a file for Ray's cluster launcher."""
        limits = limits_of(config)
        head_type = config["head_node_type"]
        kinds = config["available_node_types"]
        most = {kind.name: kind.count for kind in limits.kinds}
        head = Machine("head", kinds[head_type].get("resources") or {})
        groups = [
            Group(
                name,
                kind["node_config"]["InstanceType"],
                "spot" if _is_spot(kind["node_config"]) else "on demand",
                1 if name == head_type else kind.get("min_workers", 0),
                1 if name == head_type else min(most[name], limits.machines or most[name]),
            )
            for name, kind in kinds.items()
        ]
        return cls(groups, cluster_of([head], [], limits), limits.machines)

    @property
    def types(self) -> list[str]:
        """EC2's types, each once."""
        return sorted({group.machine for group in self.groups})

    @property
    def has_gpus(self) -> bool:
        """Whether machines with GPUs may be added."""
        return any(machine.gpus for machine in self.cluster.machines)

    def fit(self, recipe: Recipe) -> Fit:
        """Fit a recipe into it.

        Raises:
            Wrong: If it does not; with the one number to change.
        """
        gpu = recipe.compute.device == "cuda"
        try:
            return solve(self.cluster, Demand.of(recipe, gpu=gpu))
        except ConfigError as error:
            what, _, way_out = str(error).rpartition("; ")
            raise Wrong(what, "a recipe that fits the cluster's file", way_out) from error

    def uses(self, recipe: Recipe) -> list[Use]:
        """Tell of each kind how many there may be, and how many the recipe needs."""
        added = self.fit(recipe).added
        return [
            Use(
                group.machine,
                group.market,
                group.most,
                max(group.standing, added.get(group.name, 0)),
            )
            for group in self.groups
        ]

    def cost(self, account: Account) -> Cost:
        """Ask for the prices."""
        return Cost(
            [self._priced(group, account) for group in self.groups],
            note="disks, traffic and storage come on top",
            most_machines=self.most_added,
        )

    def _priced(self, group: Group, account: Account) -> Kind:
        price = _price(group, account)
        return Kind(
            name=group.name,
            machine=f"{group.machine}, {group.market}",
            standing=group.standing,
            most=group.most,
            dollars=price.dollars,
            source=price.source,
        )


def describe(fit: Fit) -> str:
    """Say how a recipe fits."""
    grown = ", ".join(f"{count} x {name}" for name, count in fit.added.items())
    return f"needs {grown} beside the head" if grown else "fits on what stands"


def _price(group: Group, account: Account) -> Price:
    if group.market == "spot":
        return spot_price(account.client("ec2"), group.machine, account.zones)
    return on_demand_price(account.client("pricing", PRICE_LIST), group.machine, account.region)


def _is_spot(machine: Mapping[str, Any]) -> bool:
    return machine.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
