"""Two trials whose workers hold every CPU of a private Ray; tells what came of them, and of one.

python tests/pipelines/starved.py FOLDER
"""

import json
import logging
import sys
import time
from typing import Any

import ray
from ray.data import DataIterator
from ray.util import placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from droppos.errors import ConfigError
from pipelines.machines import read_cluster
from pipelines.order import Schedule
from pipelines.resources import Demand, solve
from pipelines.shards import load_manifest
from pipelines.source import data_config, make_dataset
from pipelines.storage import Place, open_place
from pipelines.stream import batches
from pipelines.windows import CropOptions

CPUS = 2
TRIALS = 2
BATCH = 8
STARVED_S = 10
"""Much longer than what is read takes to come once there is a CPU to read it with."""


@ray.remote(num_cpus=1, max_concurrency=2)
class Worker:
    """Takes batches, and tells how many there were so far."""

    def __init__(self) -> None:
        self._taken = 0

    def train(self, shard: DataIterator, steps: int) -> int:
        self._taken = 0
        for _ in batches(shard, worker_batch=BATCH, start_step=0, stop_step=steps):
            self._taken += 1
        return self._taken

    def taken(self) -> int:
        return self._taken


def start_worker() -> tuple[PlacementGroup, Any]:
    """Reserve a CPU and put a worker there, as Ray Train does."""
    group = placement_group([{"CPU": 1}])
    ray.get(group.ready())
    there = PlacementGroupSchedulingStrategy(group)
    return group, Worker.options(scheduling_strategy=there).remote()


def stream(data: Place, schedule: Schedule, decode_tasks: int) -> DataIterator:
    crop = CropOptions((32, 32), (0.2, 1.0), flip=True)
    dataset = make_dataset(schedule, data, crop, worker_batch=BATCH, decode_tasks=decode_tasks)
    (shard,) = data_config().configure({"train": dataset}, 1, None, None)
    return shard["train"]


def main() -> None:
    data = open_place(sys.argv[1])
    schedule = Schedule(
        manifest=load_manifest(data), seed=0, global_batch=BATCH, window=2 * BATCH, epochs=1
    )
    ray.init(
        address="local",
        num_cpus=CPUS,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    told: dict[str, Any] = {"steps": schedule.steps}

    began = time.process_time()
    try:
        solve(read_cluster(), Demand(), TRIALS)
    except ConfigError as error:
        told["refused"] = str(error)
    told["refused_cpu_s"] = time.process_time() - began

    groups, workers = zip(*[start_worker() for _ in range(TRIALS)], strict=True)
    ray.get([worker.taken.remote() for worker in workers])  # both are there
    runs = [worker.train.remote(stream(data, schedule, 1), schedule.steps) for worker in workers]
    told["ended"] = len(ray.wait(runs, num_returns=1, timeout=STARVED_S)[0])
    told["starved"] = ray.get([worker.taken.remote() for worker in workers])

    ray.kill(workers[1])
    remove_placement_group(groups[1])
    told["freed"] = ray.get(runs[0], timeout=300)

    fit = solve(read_cluster(), Demand(), 1)
    shard = stream(data, schedule, fit.decoding)
    told["accepted"] = ray.get(workers[0].train.remote(shard, schedule.steps), timeout=300)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
