"""Drains a node of a Ray of its own that works; tells what Ray and our reading of it say.

In a process apart: one that has joined the tests' shared Ray can join no other, and leaving this
one would leave that one too.

python tests/pipelines/drained.py
"""

import json
import time
from typing import Any

import ray
from ray.cluster_utils import Cluster

from droppos.errors import DropposError
from pipelines import notices
from pipelines.crew import Room


@ray.remote(num_cpus=1)
class Worker:
    """Holds a node: an idle one would go at once."""


def main() -> None:
    told: dict[str, Any] = {}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    node = cluster.add_node(num_cpus=1).node_id
    ray.init(cluster.address, log_to_driver=False, logging_level="error")
    assert cluster.address is not None
    try:
        notices.own_node(cluster.address)
    except DropposError as error:  # both nodes are on this machine
        told["refused"] = str(error)
    worker = Worker.remote()
    ray.get(worker.__ray_ready__.remote())

    told["rebalance"] = notices.drain_node(cluster.address, node, "EC2 rebalance notice", None)
    told["no_time"] = Room.look().going == {node: float("inf")}
    at = time.time() + 100
    told["interruption"] = notices.drain_node(cluster.address, node, "EC2 interruption notice", at)
    told["nodes_going"] = list(Room.look().going) == [node]
    told["late_by_s"] = Room.look().going[node] - at
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(told))


if __name__ == "__main__":
    main()
