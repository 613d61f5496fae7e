"""Compare what Ray Data's executor costs with and without rests between its rounds.

    python -m tests.benchmarks.executor [--seconds 15] [--rounds 3]

A consumer takes batches of the stream as a worker does, once with a pause after each, as where
training is slower than reading, and once as fast as they come. Counted are the CPU seconds of the
process in which the executor runs, and the batches that came in that time. Both ways take turns,
so what else the machine does meets them alike. The last line is for scripts: how many times the
CPU time of the executor without rests is that with them, and how many times the batches with
rests are those without, where none may be missed.
"""

import argparse
import gc
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import ray
from rich.console import Console
from rich.table import Table

from pipelines.order import Schedule
from pipelines.prepare import prepare
from pipelines.shards import load_manifest
from pipelines.source import data_config, make_dataset
from pipelines.storage import Place, open_place
from pipelines.stream import batches
from pipelines.windows import CropOptions
from tests.benchmarks.tiles import write_tiles

CROP = CropOptions(size=(64, 64), scale=(0.2, 1.0), flip=True)
PICTURES, BATCH, WINDOW = 1000, 32, 500
PACES = {"slower than reading": 0.25, "as fast as it comes": 0.0}
"""Seconds between batches."""
WARM_UP = 10
"""Batches before anything is counted."""


class Cost(NamedTuple):
    """What a second of the stream took and brought."""

    cores: float
    """CPU seconds of the executor's process."""
    batches: float


def executors() -> set[psutil.Process]:
    """Find the processes that Ray Data's executors run in, of this benchmark."""
    children = psutil.Process().children(recursive=True)
    return {child for child in children if "SplitCoordinator" in " ".join(child.cmdline())}


def feed(data: Place, pause: float, rests: bool, seconds: float) -> Cost:
    """Take batches for a while."""
    schedule = Schedule(
        manifest=load_manifest(data), seed=0, global_batch=BATCH, window=WINDOW, epochs=10_000
    )
    before = executors()
    dataset = make_dataset(schedule, data, CROP, worker_batch=BATCH, decode_tasks=1)
    if not rests:
        dataset.context.custom_execution_callback_classes.clear()
    (shard,) = data_config().configure({"train": dataset}, 1, None, None)
    stream = batches(shard["train"], worker_batch=BATCH, start_step=0, stop_step=schedule.steps)
    for _ in range(WARM_UP):
        next(stream)
    (process,) = executors() - before
    spent, start, count = _cpu_s(process), time.monotonic(), 0
    while (took := time.monotonic() - start) < seconds:
        next(stream)
        count += 1
        time.sleep(pause)
    cost = Cost((_cpu_s(process) - spent) / took, count / took)
    del stream, shard, dataset
    gc.collect()  # what nobody holds any more, Ray ends
    process.wait(60)
    return cost


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict[tuple[str, bool], list[Cost]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiles(folder / "tiles", PICTURES)
        prepare(str(folder / "tiles"), str(folder / "data"), short_side=128, group_rows=50)
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=2**30,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        data = open_place(str(folder / "data"))
        for _ in range(options.rounds):
            for pace, pause in PACES.items():
                for rests in (False, True):
                    cost = feed(data, pause, rests, options.seconds)
                    found.setdefault((pace, rests), []).append(cost)
        ray.shutdown()
    show({case: Cost(*map(statistics.median, zip(*costs, strict=True)))
          for case, costs in found.items()})  # fmt: skip


def show(costs: dict[tuple[str, bool], Cost]) -> None:
    """Print the table, and the line for scripts."""
    table = Table(title="Ray Data's executor", title_justify="left")
    for column in ("training is", "rests", "cores", "batches/s"):
        table.add_column(column, justify="left" if column in ("training is", "rests") else "right")
    for (pace, rests), cost in costs.items():
        table.add_row(pace, "yes" if rests else "no", f"{cost.cores:.2f}", f"{cost.batches:.1f}")
    Console().print(table)
    slow, fast = PACES
    print(
        f"executor slow_cpu_ratio={costs[slow, False].cores / costs[slow, True].cores:.2f} "
        f"slow_batches_ratio={costs[slow, True].batches / costs[slow, False].batches:.2f} "
        f"fast_batches_ratio={costs[fast, True].batches / costs[fast, False].batches:.2f}"
    )


if __name__ == "__main__":
    main()
