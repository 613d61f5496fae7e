"""Ray's node provider for AWS, with a way out when there is no spot machine to be had.

Ray 2.60 goes on asking for a type that is sold out: neither of its autoscalers counts a launch
that EC2 refuses against the type (its `priority` is obeyed, so spot would be asked for for ever).
Here the same machine is then asked for on demand.
"""

import logging
from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException

NOT_ON_SPOT = frozenset(
    {"InsufficientInstanceCapacity", "MaxSpotInstanceCountExceeded", "SpotMaxPriceTooLow"}
)
"""What EC2 says when a machine can't be had on spot, and may well be on demand."""
MARKET = "InstanceMarketOptions"

_log = logging.getLogger(__name__)


class SpotFirst(AWSNodeProvider):
    """Asks for spot machines in all subnets, and then for the same on demand.

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
        try:
            return super()._create_node(node_config, tags, count)
        except NodeLaunchException as refusal:
            if MARKET not in node_config or refusal.category not in NOT_ON_SPOT:
                raise
            _log.warning(
                "no %s on spot (%s): asking for it on demand",
                node_config["InstanceType"],
                refusal.category,
            )
        on_demand = {name: value for name, value in node_config.items() if name != MARKET}
        return super()._create_node(on_demand, tags, count)
