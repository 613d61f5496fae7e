"""The kinds of machine that a cluster's file names: do they fit a recipe, and what do they cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.launch.account import Account
from pipelines.launch.clusterfile import falls_back
from pipelines.launch.cost import Cost, Kind
from pipelines.launch.fit import fitted
from pipelines.launch.prices import PRICE_LIST, on_demand_price, spot_price
from pipelines.launch.quotas import Market, Use
from pipelines.machines import Cluster, Machine, cluster_of, limits_of
from pipelines.recipe import Recipe
from pipelines.resources import Fit


@dataclass(frozen=True, slots=True)
class Group:
    """One kind of machine of the file."""

    name: str
    machine: str
    """EC2's type."""
    market: Market
    standing: int
    most: int
    falls_back: bool
    """Whether one that cannot be had on spot is bought on demand."""


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
                _is_spot(kind["node_config"]) and falls_back(config),
            )
            for name, kind in kinds.items()
        ]
        return cls(groups, cluster_of([head], [], limits), limits.machines)

    @property
    def types(self) -> list[str]:
        """EC2's types, each once."""
        return sorted({group.machine for group in self.groups})

    def fit(self, recipe: Recipe, at_once: int = 1) -> Fit:
        """Fit a recipe into it, so many times at once.

        Raises:
            Wrong: If it does not; with the one number to change.
        """
        return fitted(recipe, self.cluster, "the cluster's file", at_once)

    def uses(self, recipe: Recipe, at_once: int = 1) -> list[Use]:
        """Tell of each kind how many there may be, and how many the recipe needs.

        What falls back to on demand may be there in any mixture; that it is needed cannot be said.
        """
        added = self.fit(recipe, at_once).added
        uses = [
            Use(
                group.machine,
                group.market,
                group.most,
                max(group.standing, added.get(group.name, 0)),
            )
            for group in self.groups
        ]
        fallbacks = [group for group in self.groups if group.falls_back]
        return uses + [Use(group.machine, "on demand", group.most, 0) for group in fallbacks]

    def cost(self, account: Account) -> Cost:
        """Ask for the prices."""
        return Cost(
            [self._priced(group, account) for group in self.groups],
            note="disks, traffic and storage come on top",
            most_machines=self.most_added,
        )

    def _priced(self, group: Group, account: Account) -> Kind:
        on_demand = on_demand_price(
            account.client("pricing", PRICE_LIST), group.machine, account.region
        )
        price, dearest, market = on_demand, None, str(group.market)
        if group.market == "spot":
            price = spot_price(account.client("ec2"), group.machine, account.zones)
        if group.falls_back:
            dearest, market = on_demand.dollars, "spot, else on demand"
        return Kind(
            name=group.name,
            machine=f"{group.machine}, {market}",
            standing=group.standing,
            most=group.most,
            dollars=price.dollars,
            source=price.source if dearest is None else f"{price.source}; {on_demand.source}",
            dearest=dearest,
        )


def _is_spot(machine: Mapping[str, Any]) -> bool:
    return machine.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
