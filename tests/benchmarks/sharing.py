"""Compare trials that share one stream with trials that read each for itself, and with one alone.

    python -m tests.benchmarks.sharing [--trials 4] [--pictures 2000] [--epochs 2] [--rounds 1]

Trials only read, at once, in threads of one process; nothing is trained, so that nothing else is
measured. The pictures are those of `tests.benchmarks.ingest`, in shards on a real S3 server. GETs
are counted between Ray and that server; CPU seconds of reading and decoding where it is done, in
the processes that do it, over all their threads; wall time is of this machine. The last line is
for scripts: what sharing costs, and what separate streams cost, in units of one trial's.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.data
from ray.data.block import Block
from rich.console import Console
from rich.table import Table

from pipelines.local_s3 import s3_server
from pipelines.order import Schedule, Window
from pipelines.prepare import prepare
from pipelines.shards import load_manifest
from pipelines.sharing import Sharing
from pipelines.source import data_config, make_dataset, stream_of
from pipelines.storage import Place, open_place
from pipelines.stream import batches
from pipelines.windows import CropOptions, read_window
from tests.benchmarks.tiles import write_tiles
from tests.fault_proxy import FaultProxy, fault_proxy

CROP = CropOptions(size=(224, 224), scale=(0.2, 1.0), flip=True)
BATCH, WINDOW = 64, 256
TASKS = 2
"""Windows that are decoded at once for one trial, or for all that share."""


class Cost(NamedTuple):
    """What it took to feed all trials."""

    gets: float
    """GET requests of shards."""
    cpu_s: float
    """CPU seconds of reading and decoding."""
    wall_s: float


class Meter:
    """Runs in an actor; adds up CPU seconds of whoever decodes."""

    def __init__(self) -> None:
        self._spent = 0.0

    def add(self, seconds: float) -> None:
        self._spent += seconds

    def spent(self) -> float:
        return self._spent


def metered(meter: Any, window: Window, start: int, **how: Any) -> Iterator[Block]:
    """Read a window, and tell the meter what that took of this process."""
    spent, blocks = 0.0, read_window(window, start, **how)
    while True:
        before = time.process_time()
        block = next(blocks, None)
        spent += time.process_time() - before
        if block is None:
            break
        yield block
    ray.get(meter.add.remote(spent))


def feed(data: Place, schedule: Schedule, trials: int, shared: bool, proxy: FaultProxy) -> Cost:
    """Have so many trials read a whole run."""
    meter: Any = ray.remote(num_cpus=0)(Meter).remote()
    read = partial(metered, meter)
    sharing = Sharing.start(capacity=4 * TASKS, patience_s=60, read=read) if shared else None
    members = [sharing.of(f"trial {i}") if sharing else None for i in range(trials)]
    for member in members:
        if member is not None:
            member.join(stream_of(schedule, data, CROP, BATCH), 0)
    proxy.clear()
    start = time.perf_counter()

    def run(member: Sharing | None) -> None:
        dataset = make_dataset(
            schedule,
            data,
            CROP,
            worker_batch=BATCH,
            decode_tasks=TASKS,
            sharing=member,
            read=read,
        )
        (shard,) = data_config().configure({"train": dataset}, 1, None, None)
        steps = schedule.steps
        for _ in batches(shard["train"], worker_batch=BATCH, start_step=0, stop_step=steps):
            pass
        if member is not None:
            member.leave()

    with ThreadPoolExecutor(trials) as pool:
        list(pool.map(run, members))
    wall = time.perf_counter() - start
    gets = len(proxy.requests(method="GET", key=".parquet"))
    return Cost(gets, ray.get(meter.spent.remote()), wall)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--photographs", type=Path, help="folder of large JPEGs to cut tiles from")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with s3_server(folder / "s3") as server, fault_proxy(server) as proxy:
            os.environ.update(server.env | {"RAY_USAGE_STATS_ENABLED": "0"})
            server.bucket("benchmark")
            tiles = write_tiles(folder / "tiles", options.pictures, options.photographs)
            prepare(str(folder / "tiles"), "s3://benchmark/data", group_rows=50)
            os.environ.update(proxy.env)
            ray.init(
                address="local",
                num_cpus=TASKS * options.trials,
                object_store_memory=2 * 2**30,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
            )
            data = open_place("s3://benchmark/data")
            schedule = Schedule(
                manifest=load_manifest(data),
                seed=0,
                global_batch=BATCH,
                window=WINDOW,
                epochs=options.epochs,
            )
            ways = {
                "one trial": (1, False),
                "separate streams": (options.trials, False),
                "one stream": (options.trials, True),
            }
            found: dict[str, list[Cost]] = {name: [] for name in ways}
            feed(data, schedule, 1, False, proxy)  # so that no way starts the processes for others
            for _ in range(options.rounds):
                for way, (trials, shared) in ways.items():
                    found[way].append(feed(data, schedule, trials, shared, proxy))
            ray.shutdown()
    del tiles
    costs = {
        way: Cost(*(statistics.median(column) for column in zip(*rounds, strict=True)))
        for way, rounds in found.items()
    }
    show(console, costs, options.trials)


def show(console: Console, costs: dict[str, Cost], trials: int) -> None:
    """Print the table, and the line for scripts."""
    one = costs["one trial"]
    table = Table(title=f"{trials} trials", title_justify="left")
    for column in ("", "GETs", "x one", "decode CPU s", "x one", "wall s"):
        table.add_column(column, justify="right" if column else "left")
    for way, cost in costs.items():
        table.add_row(
            way,
            f"{cost.gets:,.0f}",
            f"{cost.gets / one.gets:.2f}",
            f"{cost.cpu_s:.1f}",
            f"{cost.cpu_s / one.cpu_s:.2f}",
            f"{cost.wall_s:.0f}",
        )
    console.print(table)
    shared, separate = costs["one stream"], costs["separate streams"]
    print(
        f"sharing trials={trials} gets_ratio={shared.gets / one.gets:.2f} "
        f"cpu_ratio={shared.cpu_s / one.cpu_s:.2f} "
        f"separate_gets_ratio={separate.gets / one.gets:.2f} "
        f"separate_cpu_ratio={separate.cpu_s / one.cpu_s:.2f}"
    )


if __name__ == "__main__":
    main()
