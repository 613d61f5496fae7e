"""Advice: what to change about ingest, from the doctor's readings. Pure: numbers in, words out."""

from dataclasses import dataclass
from math import ceil

from pipelines.bottleneck import Bound, cores_for, per_core
from pipelines.memory import AHEAD, SHARE, Footprint
from pipelines.readings import Readings

GBIT = 1e9 / 8
"""Bytes per second of a network of one Gbit/s."""
LARGEST_GROUP = 64e6
"""Bytes of a row group, at most: a decode task holds all of those its window touches."""


@dataclass(frozen=True, slots=True)
class Advice:
    """Something to change."""

    words: str
    """What, why, and what it would bring."""
    command: str | None = None
    """What to type or set for it."""


def advise(readings: Readings, bound: Bound) -> list[Advice]:
    """Say what to change, what is most useful first; nothing where all is well."""
    short = readings.streaming.per_s < readings.site.demand
    found: list[Advice] = []
    if bound == "object store":
        found += _store(readings)
    if bound == "storage" and short:
        found += _storage(readings)
    if short:
        found += _pictures(readings, bound)
        found += _cores(readings, bound)
    return [*found, *_memory(readings)]


def _store(readings: Readings) -> list[Advice]:
    return [
        Advice(
            f"give Ray more memory for its object store, which holds "
            f"{readings.site.store_bytes / 1e6:,.0f} MB: a larger shared-memory file system, and",
            "ray start --object-store-memory BYTES",
        )
    ]


def _storage(readings: Readings) -> list[Advice]:
    contents, together = readings.contents, readings.together
    if together.latency_share > 0.5:
        return [
            Advice(
                f"a row group is {contents.group_bytes / 1e6:.1f} MB, and "
                f"{together.latency_share:.0%} of its time is the wait for its first byte: larger "
                "row groups wait less often",
                f"droppos prepare SOURCE DEST --group-rows {group_rows(readings)}",
            )
        ]
    gbit = readings.site.demand * contents.bytes_per_picture / GBIT
    return [
        Advice(
            f"the GPUs draw {gbit:.1f} Gbit/s from storage: put data and nodes into one region, "
            "and take nodes with that much network, or more nodes"
        )
    ]


def group_rows(readings: Readings) -> int:
    """Rows of a group whose first byte takes a fifth of its time, in hundreds: a model."""
    contents, share = readings.contents, readings.together.latency_share
    times = min(4 * share / max(1 - share, 1e-3), LARGEST_GROUP / contents.group_bytes)
    rows = contents.group_bytes / contents.bytes_per_picture
    return 100 * ceil(max(times, 1.0) * rows / 100)


def _pictures(readings: Readings, bound: Bound) -> list[Advice]:
    decoding, contents = readings.decoding, readings.contents
    found = []
    if decoding.copies_gain >= 1.2 or (bound == "storage" and decoding.copied_bytes <= 0.8):
        found.append(
            Advice(
                f"store smaller copies: {decoding.copies_gain:.1f} times the crops per core, "
                f"{decoding.copied_bytes:.0%} of the bytes (measured on {decoding.copied} of your "
                "pictures; docs/data.md says what it does to crops)",
                f"droppos prepare SOURCE DEST --short-side {decoding.short_side}",
            )
        )
    if bound == "decode" and decoding.scaled_gain >= 1.1:
        found.append(
            Advice(
                f"decode large JPEGs at a fraction of their size: {decoding.scaled_gain:.1f} times "
                "the crops per core, measured on a sample",
                "--data.scaled-decoding True",
            )
        )
    if bound == "decode" and contents.progressive + contents.other >= 0.1:
        found.append(
            Advice(
                f"{contents.progressive:.0%} progressive JPEGs and {contents.other:.0%} pictures "
                "that are no plain upright JPEG take the slow way: store them as baseline JPEGs"
            )
        )
    return found


def _cores(readings: Readings, bound: Bound) -> list[Advice]:
    if bound not in ("decode", "hand-over"):
        return []
    site = readings.site
    cores = cores_for(site.demand, per_core(readings, bound)[0])
    if cores <= site.decode_cpus:
        tasks = ceil(site.decode_cpus * site.demand / readings.streaming.per_s)
        return [
            Advice(
                f"{cores} cores would do if the stream had them to itself; it did not, so end what "
                f"else runs on them, or decode on {tasks} CPUs instead of {site.decode_cpus}",
                f"--data.decode-cpus {tasks}",
            )
        ]
    return [
        Advice(
            f"or decode on more CPUs: {cores} instead of {site.decode_cpus}, say on CPU nodes "
            "beside the GPU nodes",
            f"max_workers of the CPU nodes in cluster.yaml; --data.decode-cpus {cores}",
        )
    ]


def _memory(readings: Readings) -> list[Advice]:
    """Warn of what training may run into, though this measurement has not."""
    site = readings.site
    found = []
    tasks, window = tasks_that_fit(readings, site.window), window_that_fits(readings)
    if tasks < site.decode_cpus:
        found.append(
            Advice(
                f"a run would use {tasks} of {site.decode_cpus} decode CPUs: so many windows of "
                f"{site.window:,} decoded pictures fit into half of the object store's "
                f"{site.store_bytes / 1e6:,.0f} MB; give it more, or shuffle fewer pictures "
                "together",
                f"--data.window {window}" if window < site.window else None,
            )
        )
    encoded = site.decode_cpus * site.window * readings.contents.bytes_per_picture
    if encoded > 0.5 * site.memory_bytes > 0:
        found.append(
            Advice(
                f"{site.decode_cpus} tasks hold a window encoded each, {encoded / 1e9:.1f} GB of "
                f"{site.memory_bytes / 1e9:.1f} GB (a model): a smaller window needs less",
                f"--data.window {max(1, site.window // 4)}",
            )
        )
    return found


def tasks_that_fit(readings: Readings, window: int) -> int:
    """Count the decode tasks that a run starts, of those it has CPUs for: a model.

    A run starts no more than fit into the object stores (:mod:`pipelines.memory`).
    """
    site, batch = readings.site, readings.streaming.batch
    footprint = Footprint(window * site.crop_bytes, AHEAD * site.gpus * batch * site.crop_bytes)
    return footprint.tasks(SHARE * site.store_bytes, site.decode_cpus)


def window_that_fits(readings: Readings) -> int:
    """Choose data.window, or a half or less, whichever lets a run use most decode CPUs."""
    windows = [readings.site.window >> halved for halved in range(5)]
    return max(windows, key=lambda window: (tasks_that_fit(readings, window), window))
