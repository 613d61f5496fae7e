"""Trains slower than it reads, on a private Ray with a small object store; tells what that held.

python tests/pipelines/slow_consumer.py FOLDER WINDOW TASKS BATCHES
"""

import json
import logging
import sys
import threading
import time

import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from pipelines.order import Schedule
from pipelines.shards import load_manifest
from pipelines.storage import open_place
from pipelines.stream import batches, data_config, make_dataset
from pipelines.windows import CropOptions

STORE = 100 * 2**20
SIDE = 128
BATCH = 64
CPUS = 4


class Watch(threading.Thread):
    """Looks at the store ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._state = get_state_from_address(ray.get_runtime_context().gcs_address)
        self.peak = self.spilled = 0

    def run(self) -> None:
        while True:
            self.look()
            time.sleep(0.1)

    def look(self) -> None:
        stats = get_memory_info_reply(self._state).store_stats
        self.peak = max(self.peak, stats.object_store_bytes_used)
        self.spilled = stats.spilled_bytes_total


def main() -> None:
    folder, window, tasks, count = sys.argv[1], *map(int, sys.argv[2:])
    ray.init(
        address="local",
        num_cpus=CPUS,
        object_store_memory=STORE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    watch = Watch()
    data = open_place(folder)
    schedule = Schedule(
        manifest=load_manifest(data), seed=0, global_batch=BATCH, window=window, epochs=1000
    )
    dataset = make_dataset(
        schedule,
        data,
        CropOptions((SIDE, SIDE), (0.2, 1.0), flip=True),
        worker_batch=BATCH,
        decode_tasks=tasks,
    )
    (shard,) = data_config().configure({"train": dataset}, 1, None, None)
    watch.start()
    for _ in batches(shard["train"], worker_batch=BATCH, start_step=0, stop_step=count):
        time.sleep(0.1)
    watch.look()
    print(json.dumps({"peak": watch.peak, "spilled": watch.spilled, "store": STORE}))


if __name__ == "__main__":
    main()
