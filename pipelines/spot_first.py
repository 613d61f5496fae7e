"""Ray's node provider for AWS, with a way out when there is no spot machine, and a zone to stay in.

Ray 2.60 goes on asking for a type that is sold out: neither of its autoscalers counts a launch
that EC2 refuses against the type (its `priority` is obeyed, so spot would be asked for for ever).
Here the same machine is then asked for on demand.

And it takes each machine in whichever zone has one. Between zones a GB costs a cent each way, and
workers exchange gradients at each step: one of eight machines in another zone can cost more than
all of them. So once a worker stands, the others are asked for beside it first, on spot and on
demand, and elsewhere only then.
"""

import logging
from collections.abc import Sequence
from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND

NOT_HERE = frozenset(
    {
        "InsufficientInstanceCapacity",
        "MaxSpotInstanceCountExceeded",
        "SpotMaxPriceTooLow",
        "UnfulfillableCapacity",
        "Unsupported",  # a zone that has not the type at all
        "VcpuLimitExceeded",  # of the one market: the other has a quota of its own
    }
)
"""What EC2 says when a machine can't be had so, and may well be in another zone or on demand."""
MARKET = "InstanceMarketOptions"

_log = logging.getLogger(__name__)


class SpotFirst(AWSNodeProvider):
    """Asks for spot machines, and then for the same on demand; near the others, and then elsewhere.

    cluster.yaml names it as provider.module. Whoever had rather wait than pay the price on demand
    says `type: aws` there.
    """

    def _create_node(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int
    ) -> dict[str, Any]:
        """Start machines of one type.

        Raises:
            NodeLaunchException: If there are none at all, or EC2 refuses for another reason.
        """
        tries = self._tries(node_config)
        for number, asked in enumerate(tries, 1):
            try:
                return super()._create_node(asked, tags, count)
            except NodeLaunchException as refusal:
                if refusal.category not in NOT_HERE or number == len(tries):
                    raise
                _log.warning(
                    "no %s %s in %s (%s)",
                    asked["InstanceType"],
                    "on spot" if MARKET in asked else "on demand",
                    ", ".join(asked["SubnetIds"]),
                    refusal.category,
                )
        raise AssertionError("there is always one to try")

    def _tries(self, node_config: dict[str, Any]) -> list[dict[str, Any]]:
        """List what is asked for, best first.

        One subnet at a time: of several, Ray tells only what the last one refused for.
        """
        on_demand = {name: value for name, value in node_config.items() if name != MARKET}
        markets = [node_config, on_demand] if MARKET in node_config else [on_demand]
        near, far = self._near(node_config["SubnetIds"])
        return [
            {**market, "SubnetIds": [subnet]}
            for subnets in (near, far)
            for market in markets
            for subnet in subnets
        ]

    def _near(self, subnets: Sequence[str]) -> tuple[list[str], list[str]]:
        """Part subnets into those where workers of the cluster stand, and the others."""
        workers = self.non_terminated_nodes({TAG_RAY_NODE_KIND: NODE_KIND_WORKER})
        stand = {self._get_cached_node(worker).subnet_id for worker in workers}
        near = [subnet for subnet in subnets if subnet in stand]
        return near, [subnet for subnet in subnets if subnet not in stand]
