"""Diagnosis: what the doctor's readings mean, in words. Pure: numbers in, words out.

A decode task reads its window, then decodes it, so reading and decoding take turns: with S
pictures/s from storage alone and D by decoding alone, the stream can bring 1 / (1/S + 1/D).
Where it brings much less, what lies between the tasks and the trainer is to blame: the object
store if it was full, else the hand-over, which is Ray's scheduling and copying.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal

from droppos.draw.ingest import Bar
from pipelines.readings import Readings

Bound = Literal["storage", "decode", "object store", "hand-over"]

HEAD_ROOM = 1.2
"""Cores are asked for a fifth above the bare need: nodes differ, and some pictures are larger."""
FAR_BELOW = 0.6
"""A stream below this share of what its stages allow is held up by something else. Not higher:
a busy machine, or cores that share their caches, cost a quarter."""
BUSY = 0.85
"""Of the CPUs a stream may use, what it uses when only they hold it up."""
LARGEST_GROUP = 64e6
"""Bytes of a row group, at most: a decode task holds all of those its window touches."""
STORE_SHARE = 0.5
"""Of the object store, what Ray Data lets its tasks fill before it holds them back."""
GBIT = 1e9 / 8
"""Bytes per second of a network of one Gbit/s."""


@dataclass(frozen=True, slots=True)
class Advice:
    """Something to change."""

    words: str
    """What, why, and what it would bring."""
    command: str | None = None
    """What to type or set for it."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What bounds ingest, what the GPUs need, and what to change."""

    bound: Bound
    bound_words: str
    """Why, in a sentence."""
    enough: bool
    """Whether the stream as measured keeps up with the GPUs."""
    verdict: str
    """Supply against demand, in a sentence."""
    per_core_s: float
    """Pictures per core and second that cores are counted by."""
    per_core_is_measured: bool
    """Whether that is of the stream end to end; else it is of decoding alone, so an upper bound."""
    cores_per_gpu: int
    """CPU cores that keep one GPU fed, with head-room."""
    cores: int
    """The same for all GPUs."""
    network_bytes_per_s: float
    """What all GPUs together draw from storage."""
    demand_words: str
    """The demand, for a label."""
    advice: tuple[Advice, ...]
    """Most useful first."""
    notes: tuple[str, ...]
    """What to know of the figures themselves."""


def diagnose(readings: Readings) -> Diagnosis:
    """Judge what was measured."""
    site, contents = readings.site, readings.contents
    bound = bound_of(readings)
    per_core_s, measured = per_core(readings, bound)
    supply = readings.streaming.per_s
    return Diagnosis(
        bound=bound,
        bound_words=_bound_words(readings, bound),
        enough=supply >= site.demand,
        verdict=_verdict(supply, site.demand),
        per_core_s=per_core_s,
        per_core_is_measured=measured,
        cores_per_gpu=cores_for(site.gpu_images_per_s, per_core_s),
        cores=cores_for(site.demand, per_core_s),
        network_bytes_per_s=site.demand * contents.bytes_per_picture,
        demand_words=f"{site.gpus} {_plural(site.gpus, 'GPU')}: {site.demand:,.0f}",
        advice=tuple(advise(readings, bound)),
        notes=tuple(notes(readings)),
    )


def allowed_per_s(readings: Readings) -> float:
    """Pictures per second that storage and decoding, taking turns, allow: a model."""
    return 1 / (1 / readings.storage_per_s + 1 / readings.decode_per_s)


def bound_of(readings: Readings) -> Bound:
    """Name what the stream is held up by."""
    streaming, site = readings.streaming, readings.site
    if streaming.spilled > 0:
        return "object store"
    far_below = streaming.per_s < FAR_BELOW * allowed_per_s(readings)
    if far_below and not cpus_are_busy(readings):
        # Of a store that is small beside one window of each task, half is all Ray would use.
        full = streaming.store_peak >= 0.8 * STORE_SHARE * site.store_bytes
        return "object store" if full else "hand-over"
    if far_below:
        return "decode"
    return "storage" if readings.storage_per_s < readings.decode_per_s else "decode"


def cpus_are_busy(readings: Readings) -> bool:
    """Tell whether the stream had all of the CPU there was; unknown counts as not.

    On a machine that others use too, or whose cores are two threads of one, a stream brings less
    than decoding alone did a minute earlier, with nothing to blame between its stages.
    """
    streaming, site = readings.streaming, readings.site
    if streaming.cpu_seconds is None or site.cores is None:
        return False
    had = min(site.decode_cpus, site.cores - (streaming.others or 0.0))
    return streaming.cpu_seconds / streaming.seconds >= BUSY * had


def per_core(readings: Readings, bound: Bound) -> tuple[float, bool]:
    """Pictures per core and second to count cores by.

    Returns:
        The figure, and whether it is measured end to end.
    """
    streaming = readings.streaming
    if streaming.per_core_s is not None:
        return streaming.per_core_s, True
    if bound == "decode":  # its cores were busy, so the clock's time is theirs
        return streaming.per_s / readings.site.decode_cpus, True
    return readings.decoding.per_core_s, False


def cores_for(demand: float, per_core_s: float) -> int:
    """Count the cores for so many pictures per second, with head-room."""
    return max(1, ceil(HEAD_ROOM * demand / per_core_s))


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
    if bound != "object store":
        found += _memory(readings)
    return found


def notes(readings: Readings) -> list[str]:
    """Say how far the figures can be trusted."""
    site, streaming = readings.site, readings.streaming
    found = []
    if site.local_data:
        found.append(
            "the data are a folder: what storage brought may come from this machine's memory (the "
            "page cache), not from its disk or network"
        )
    if streaming.others and streaming.others > 0.2 * (site.cores or 1):
        found.append(
            f"other programs used {streaming.others:.1f} of this machine's {site.cores} cores: "
            "pictures/s are too low by about as much, pictures per core are not"
        )
    if site.cores is not None and site.decode_cpus > site.cores:
        found.append(
            f"{site.decode_cpus} decode tasks share {site.cores} cores: more tasks than cores "
            "bring nothing"
        )
    if readings.decoding.failed:
        found.append(f"{readings.decoding.failed} sampled pictures could not be decoded")
    return found


def bars(readings: Readings) -> list[Bar]:
    """Say what each stage could do, for a picture."""
    site = readings.site
    where = "from a folder, perhaps its cache" if site.local_data else "from S3"
    tasks = f"{site.decode_cpus} {_plural(site.decode_cpus, 'process', 'processes')}"
    return [
        Bar("storage alone", readings.storage_per_s, f"{tasks}, {where}"),
        Bar("decode and crop alone", readings.decode_per_s, f"{tasks}, nothing read"),
        Bar("the stream, end to end", readings.streaming.per_s, f"{tasks}, into one trainer"),
    ]


def _verdict(supply: float, demand: float) -> str:
    facts = f"the stream brings {supply:,.0f} pictures/s, the GPUs take {demand:,.0f}"
    if supply >= demand:
        return f"fast enough: {facts}"
    return f"too slow: {facts}, so they would wait {1 - supply / demand:.0%} of the time"


def _bound_words(readings: Readings, bound: Bound) -> str:
    streaming, site = readings.streaming, readings.site
    decoding = f"{readings.decode_per_s:,.0f} pictures/s"
    storage = f"{readings.storage_per_s:,.0f} pictures/s"
    match bound:
        case "storage":
            slow = readings.together.latency_share > 0.5
            kind = "its answers are slow to begin" if slow else "its bandwidth"
            return f"storage ({kind}): it brings {storage} alone, decoding could do {decoding}"
        case "decode":
            what = "decoding" if readings.decoding.decode_share >= 0.5 else "resizing"
            return (
                f"the CPU, mostly by {what}: decode and crop do {decoding} alone, storage "
                f"brings {storage}"
            )
        case "object store":
            spilled = (
                f", and spilled {streaming.spilled / 1e6:,.0f} MB" if streaming.spilled else ""
            )
            return (
                f"the object store: {streaming.store_peak / 1e6:,.0f} of "
                f"{site.store_bytes / 1e6:,.0f} MB were in use{spilled}"
            )
        case "hand-over":
            return (
                f"the hand-over from tasks to trainer: its stages allow "
                f"{allowed_per_s(readings):,.0f} pictures/s, {streaming.per_s:,.0f} arrive"
            )


def _store(readings: Readings) -> list[Advice]:
    site = readings.site
    window = window_that_fits(readings)
    found = [
        Advice(
            f"the object store holds {site.store_bytes / 1e6:,.0f} MB; {site.decode_cpus} tasks of "
            f"{site.window:,} pictures may want {store_need(readings) / 1e6:,.0f} MB at once: give "
            "Ray more memory for it",
            "ray start --object-store-memory BYTES (a shared-memory file system of that size)",
        )
    ]
    if window < site.window:
        found.append(
            Advice(
                "or shuffle fewer pictures together, which needs less", f"--data.window {window}"
            )
        )
    return found


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
    if store_need(readings) > site.store_bytes > 0:
        found.append(
            Advice(
                f"when training is slower than the stream, {site.decode_cpus} windows of "
                f"{site.window:,} decoded pictures want {store_need(readings) / 1e6:,.0f} MB of "
                f"the object store's {site.store_bytes / 1e6:,.0f} (a model): Ray then holds tasks "
                "back; a smaller window avoids it",
                f"--data.window {window_that_fits(readings)}",
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


def store_need(readings: Readings) -> float:
    """Bytes of the object store if every decode task's window waits decoded: a model."""
    site = readings.site
    return site.decode_cpus * site.window * site.crop_bytes


def window_that_fits(readings: Readings) -> int:
    """Largest power of two of pictures whose windows fit what Ray lets tasks fill."""
    site = readings.site
    most = int(STORE_SHARE * site.store_bytes / (site.decode_cpus * site.crop_bytes))
    return min(site.window, 1 << max(0, most.bit_length() - 1))


def _plural(number: int, one: str, more: str | None = None) -> str:
    return one if number == 1 else more or f"{one}s"
