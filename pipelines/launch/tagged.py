"""Machines of a cluster, found by the tags that Ray gives them."""

from collections.abc import Sequence
from typing import Any

CLUSTER_TAG = "ray-cluster-name"
ALIVE = ("pending", "running", "stopping", "stopped")
"""States of a machine that is paid for, or whose disk is."""


def tagged(ec2: Any, cluster: str, states: Sequence[str], **tags: str) -> list[Any]:
    """List machines, as EC2 describes them.

    Args:
        ec2: boto3's client.
        cluster: Name of the cluster.
        states: Those that count.
        tags: Values that other tags have.
    """
    filters = [
        {"Name": "instance-state-name", "Values": list(states)},
        *(
            {"Name": f"tag:{name}", "Values": [value]}
            for name, value in {CLUSTER_TAG: cluster, **tags}.items()
        ),
    ]
    return [
        machine
        for page in ec2.get_paginator("describe_instances").paginate(Filters=filters)
        for reservation in page["Reservations"]
        for machine in reservation["Instances"]
    ]
