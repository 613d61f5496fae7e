"""The bottleneck: which part of ingest holds the stream up, and what a core is worth. Pure.

A decode task reads its window, then decodes it, so reading and decoding take turns: with S
pictures/s from storage alone and D by decoding alone, the stream can bring 1 / (1/S + 1/D).
Where it brings much less though CPUs were idle, what lies between the tasks and the trainer is to
blame: the object store if it was full, else the hand-over, which is Ray's scheduling and copying.
"""

from math import ceil
from typing import Literal

from pipelines.memory import SHARE
from pipelines.readings import Readings

Bound = Literal["storage", "decode", "object store", "hand-over"]

HEAD_ROOM = 1.2
"""Cores are asked for a fifth above the bare need: nodes differ, and some pictures are larger."""
FAR_BELOW = 0.6
"""A stream below this share of what its stages allow is held up by something else. Not higher:
a busy machine, or cores that share their caches, cost a quarter."""
BUSY = 0.85
"""Of the CPUs a stream may use, what it uses when only they hold it up."""
FULL = 0.8
"""Of what the stream may use of the object stores, what it uses when they hold it up."""


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
        full = streaming.store_peak >= FULL * SHARE * site.store_bytes
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
