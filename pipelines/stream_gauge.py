"""Gauge of the whole stream: how many pictures Ray Data brings to a process that only takes them.

Figures are for the steady state. A task decodes a window at a time, and tasks that started
together end together, so pictures arrive in bursts: a measurement spans whole rounds of windows.
"""

import os
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple, cast

import psutil
import ray
import ray._private.state
from ray._private import internal_api

from pipelines.order import Schedule
from pipelines.readings import Streaming
from pipelines.shards import Manifest
from pipelines.source import data_config, make_dataset
from pipelines.storage import Place
from pipelines.stream import Batch, batches
from pipelines.windows import CropOptions

BATCH = 256
"""Pictures of a batch, at most: one block."""
ROUND_SECONDS = 1.5
"""A window is small enough to be decoded in about this time."""
THREAD_SECONDS = 10.0
"""Ray's thread that fetches batches ends when it has the next one, or so late."""
EPOCHS = 10**6
"""More than anyone waits for."""


class Fit(NamedTuple):
    """A batch and a window that suit a data set, however small."""

    batch: int
    window: int

    @classmethod
    def to(cls, pictures: int, per_core_s: float, largest_window: int) -> "Fit":
        """Choose powers of two, neither above the data set nor above what a round may take."""
        window = _power_of_two(min(pictures, largest_window, ROUND_SECONDS * per_core_s))
        return cls(min(BATCH, window), window)


def _power_of_two(most: float) -> int:
    return 1 << max(0, int(most).bit_length() - 1)


def stream_for(
    data: Place,
    manifest: Manifest,
    crop: CropOptions,
    *,
    decode_cpus: int,
    fit: Fit,
    warm_up: float,
    seconds: float,
) -> Streaming:
    """Run the stream for a while, as training would.

    Args:
        data: Folder of the data set.
        manifest: Its manifest.
        crop: What is cut out of each picture.
        decode_cpus: Decode tasks at once.
        fit: Batch and window.
        warm_up: Seconds that are not counted, at least.
        seconds: Seconds that are, about.

    Raises:
        DataError: If a task could not read its pictures.
    """
    schedule = Schedule(
        manifest=manifest, seed=0, global_batch=fit.batch, window=fit.window, epochs=EPOCHS
    )
    dataset = make_dataset(schedule, data, crop, worker_batch=fit.batch, decode_tasks=decode_cpus)
    (shard,) = data_config().configure({"train": dataset}, 1, None, None)
    stream = batches(shard["train"], worker_batch=fit.batch, start_step=0, stop_step=schedule.steps)
    in_a_round = decode_cpus * schedule.rows_per_window
    with _ended(stream), _store_watched() as store:
        arrivals = (len(batch.images) for batch in stream)
        first, last, longest = _marks(arrivals, in_a_round, warm_up, seconds)
    used, others = None, None
    if first.cpu is not None and last.cpu is not None:
        used = last.cpu.ours - first.cpu.ours
        foreign = last.cpu.machine - first.cpu.machine - used
        others = max(0.0, foreign / (last.time - first.time))
    return Streaming(
        pictures=last.arrived - first.arrived,
        seconds=last.time - first.time,
        cpu_seconds=used,
        longest_wait=longest,
        store_peak=store.peak,
        spilled=store.spilled,
        others=others,
        batch=fit.batch,
        window=schedule.rows_per_window,
    )


@contextmanager
def _ended(stream: Iterator[Batch]) -> Iterator[None]:
    """Leave a stream early: its thread would complain if Ray ended while it fetches."""
    try:
        yield
    finally:
        cast(Generator[Batch], stream).close()
        for thread in threading.enumerate():
            if thread.name == "iter_threaded":
                thread.join(THREAD_SECONDS)


class _Cpu(NamedTuple):
    """CPU seconds so far."""

    ours: float
    machine: float


class _Mark(NamedTuple):
    arrived: int
    time: float
    cpu: _Cpu | None


def _marks(
    arrivals: Iterator[int], in_a_round: int, warm_up: float, seconds: float
) -> tuple[_Mark, _Mark, float]:
    """Take the stream until it was measured; rounds that are very slow are cut short.

    Returns:
        Where the measurement began and ended, and the longest time between two batches.
    """
    arrived, rounds, longest = 0, 0, 0.0
    first: _Mark | None = None
    since = before = perf_counter()
    for pictures in arrivals:
        now = perf_counter()
        arrived += pictures
        longest = max(longest, now - before) if first else 0.0
        before = now
        wanted = seconds if first else warm_up
        whole_round = arrived // in_a_round > rounds
        # Starting the processes is no part of the warm-up: it begins with the first batch.
        if arrived == pictures:
            since = now
        elif now - since >= wanted and (whole_round or now - since >= 2 * wanted):
            mark = _Mark(arrived, now, cpu_seconds())
            if first:
                return first, mark, longest
            first, since = mark, now
        rounds = arrived // in_a_round
    raise AssertionError("the stream has more epochs than fit into a measurement")


def cpu_seconds() -> _Cpu | None:
    """Add up what this process and all below it used, if Ray's processes are among them."""
    top = psutil.Process(os.getpid())
    below = top.children(recursive=True)
    found_ray = False
    ours = 0.0
    for process in [top, *below]:
        try:
            times = process.cpu_times()
            found_ray = found_ray or process.name() == "raylet"
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        ours += times.user + times.system + times.children_user + times.children_system
    return _Cpu(ours, _machine_seconds()) if found_ray else None


def _machine_seconds() -> float:
    """CPU seconds of everything on this machine: all but idle, waiting and stolen time."""
    times = psutil.cpu_times()._asdict()
    return times["user"] + times["system"] + times.get("nice", 0.0)


@dataclass
class _Store:
    """The object store of the whole cluster, watched."""

    peak: float = 0.0
    spilled_before: float = field(default_factory=lambda: store_stats().spilled)
    spilled: float = 0.0

    def look(self) -> None:
        now = store_stats()
        self.peak = max(self.peak, now.used)
        self.spilled = now.spilled - self.spilled_before


@contextmanager
def _store_watched(every: float = 0.5) -> Iterator[_Store]:
    store, over = _Store(), threading.Event()

    def watch() -> None:
        while not over.wait(every):
            store.look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield store
        store.look()
    finally:
        over.set()
        thread.join()


class StoreStats(NamedTuple):
    """Bytes of the object stores of all nodes."""

    used: float
    spilled: float
    """To disk, since the cluster started."""


def store_stats() -> StoreStats:
    """Ask the cluster; Ray has no public way (its own `ray memory` asks here, too)."""
    stats = internal_api.get_memory_info_reply(ray._private.state.state).store_stats
    return StoreStats(stats.object_store_bytes_used, stats.spilled_bytes_total)
