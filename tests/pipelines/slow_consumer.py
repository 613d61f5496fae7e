"""Trains as slowly as can be, on a private Ray with a small object store; tells what that held.

After each few batches it waits until nothing more is read: so slow is no machine, and what the
store holds then depends on no machine's speed.

python tests/pipelines/slow_consumer.py FOLDER WINDOW TASKS ROUNDS
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
from pipelines.source import data_config, make_dataset
from pipelines.storage import open_place
from pipelines.stream import batches
from pipelines.windows import CropOptions

STORE = 100 * 2**20
SIDE = 128
BATCH = 64
CPUS = 4
BATCHES = 8
"""Of a round."""
STILL_S = 4
"""Seconds without a change of what is stored, after which nothing more is taken to come."""


class Watch(threading.Thread):
    """Looks at the store ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._state = get_state_from_address(ray.get_runtime_context().gcs_address)
        self._used = self.peak = self.spilled = 0
        self._changed = time.monotonic()

    def run(self) -> None:
        while True:
            self.look()
            time.sleep(0.1)

    def look(self) -> None:
        stats = get_memory_info_reply(self._state).store_stats
        if (stats.object_store_bytes_used, stats.spilled_bytes_total) != (self._used, self.spilled):
            self._changed = time.monotonic()
        self._used = stats.object_store_bytes_used
        self.peak = max(self.peak, self._used)
        self.spilled = stats.spilled_bytes_total

    def wait_until_still(self) -> None:
        self._changed = time.monotonic()
        while time.monotonic() - self._changed < STILL_S:
            time.sleep(0.1)


def main() -> None:
    folder, window, tasks, rounds = sys.argv[1], *map(int, sys.argv[2:])
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
    stop = rounds * BATCHES
    for batch in batches(shard["train"], worker_batch=BATCH, start_step=0, stop_step=stop):
        if batch.step % BATCHES == 0:
            watch.wait_until_still()
    print(json.dumps({"peak": watch.peak, "spilled": watch.spilled, "store": STORE}))


if __name__ == "__main__":
    main()
