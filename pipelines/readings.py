"""What `droppos doctor` reads off a data set and a cluster: numbers only, with their units.

:mod:`pipelines.gauges` and :mod:`pipelines.stream_gauge` measure them, :mod:`pipelines.diagnosis`
judges them. "Pictures" are encoded ones until they are decoded and crops of the model's size after.
"""

from dataclasses import dataclass
from math import prod

SMALL_FLOAT = 1e-9
"""Stands in for a time too short for the clock, so that a rate stays a number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What is in the data set; shares are of a sample."""

    pictures: int
    """Rows of the manifest."""
    bytes: int
    """Of all shards."""
    group_bytes: float
    """Encoded bytes of a row group, on average: what one request to storage brings."""
    sampled: int
    """Pictures whose bytes were looked at."""
    width: float
    """Median, in pixels."""
    height: float
    """Median, in pixels."""
    quick: float
    """Share that are JPEGs read from the top no further than the crop reaches."""
    progressive: float
    """Share that are JPEGs in several scans, so that all of each has to be decoded."""
    other: float
    """Share of everything else: other formats, CMYK, turned by EXIF."""
    enlarged: float
    """Share of random crops whose box is narrower or lower than the model's input."""
    copies: bool
    """Whether `droppos prepare --short-side` has made pictures smaller already."""

    @property
    def bytes_per_picture(self) -> float:
        """Bytes that storage must send for a picture."""
        return self.bytes / self.pictures


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Row groups read from storage for a while, with nothing else done."""

    bytes: float
    """Encoded bytes that arrived."""
    pictures: int
    seconds: float
    """Of the clock."""
    cpu_seconds: float
    """Of the process that read."""
    group_seconds: float
    """Mean time until a row group is there, while several are asked for at once."""
    latency_seconds: float
    """Median time of the smallest request there is: asking for the manifest's size."""

    @property
    def bytes_per_s(self) -> float:
        """Bytes per second of the clock."""
        return self.bytes / max(self.seconds, SMALL_FLOAT)

    @property
    def cpu_ms_per_mb(self) -> float:
        """Milliseconds of CPU time for a million bytes."""
        return 1e3 * self.cpu_seconds / max(self.bytes / 1e6, SMALL_FLOAT)

    @property
    def latency_share(self) -> float:
        """How much of a row group's time is the wait for its first byte, at most 1."""
        return min(1.0, self.latency_seconds / max(self.group_seconds, SMALL_FLOAT))


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """Pictures decoded and cropped in a loop on one core; times are CPU seconds."""

    crops: int
    failed: int
    """Pictures that could not be decoded."""
    seconds: float
    """Of all crops, whole: headers, decoding, resizing."""
    decode_seconds: float
    """Of headers and decoding alone, measured apart from the same pictures."""
    scaled_seconds: float
    """Of all crops with data.scaled_decoding."""
    copied: int
    """Crops that were also cut from bounded copies, of the short side ``short_side``."""
    copied_before_seconds: float
    """Of those crops, from the pictures as they are."""
    copied_seconds: float
    """Of those crops, from their copies."""
    copied_bytes: float
    """Bytes of the copies over those of the originals; 1 when none is smaller."""
    short_side: int
    """Pixels."""

    @property
    def per_core_s(self) -> float:
        """Pictures per second of CPU time."""
        return self.crops / max(self.seconds, SMALL_FLOAT)

    @property
    def decode_share(self) -> float:
        """Share of the time that decoding takes, at most 1; the rest is mostly resizing."""
        return min(1.0, self.decode_seconds / max(self.seconds, SMALL_FLOAT))

    @property
    def scaled_gain(self) -> float:
        """How many times as fast data.scaled_decoding is."""
        return self.seconds / max(self.scaled_seconds, SMALL_FLOAT)

    @property
    def copies_gain(self) -> float:
        """How many times as fast bounded copies are; 1 when none was made."""
        if not self.copied:
            return 1.0
        return self.copied_before_seconds / max(self.copied_seconds, SMALL_FLOAT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cropping:
    """Pictures decoded and cropped by every decode task's process at once."""

    crops: int
    """Of all of them."""
    seconds: float
    """Of the clock, their mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Streaming:
    """The stream end to end, into one process that does nothing with its batches."""

    pictures: int
    seconds: float
    """Of the clock, between two batches in the steady state."""
    cpu_seconds: float | None
    """Of all Ray's processes and this one; unknown on a cluster that was not started here."""
    longest_wait: float
    """Seconds that passed between one batch and the next, at most."""
    store_peak: float
    """Most bytes in the object store, over all nodes."""
    spilled: float
    """Bytes that the object store wrote to disk meanwhile."""
    others: float | None
    """Cores of this machine that other programs used meanwhile; unknown like cpu_seconds."""
    batch: int
    """Pictures of a batch."""
    window: int
    """Pictures that one task reads, decodes and hands on."""

    @property
    def per_s(self) -> float:
        """Pictures per second of the clock."""
        return self.pictures / max(self.seconds, SMALL_FLOAT)

    @property
    def per_core_s(self) -> float | None:
        """Pictures per CPU second of all processes."""
        if self.cpu_seconds is None:
            return None
        return self.pictures / max(self.cpu_seconds, SMALL_FLOAT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """The cluster and what is asked of it."""

    nodes: int
    cores: int | None
    """Cores of the machine, when all of the cluster is on this one; else unknown."""
    decode_cpus: int
    """Decode tasks at once."""
    store_bytes: float
    """Capacity of the object store, over all nodes."""
    memory_bytes: float
    """Memory that Ray may give to tasks, over all nodes."""
    local_data: bool
    """Whether the data are a folder, whose reads the page cache may have answered."""
    gpus: int
    gpu_images_per_s: float
    """Pictures that one GPU trains on in a second when it never waits."""
    image_size: tuple[int, int]
    """Height and width of the model's input, in pixels."""
    window: int
    """data.window of the run to come."""

    @property
    def demand(self) -> float:
        """Pictures per second that all GPUs take."""
        return self.gpus * self.gpu_images_per_s

    @property
    def crop_bytes(self) -> int:
        """Bytes of a decoded crop."""
        return 3 * prod(self.image_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Readings:
    """All that was measured, by part."""

    site: Site
    contents: Contents
    alone: Reading
    """One process that reads."""
    together: Reading
    """Every decode task's process reading at once; times are means, bytes and pictures sums."""
    decoding: Decoding
    """One process that decodes."""
    cropping: Cropping
    streaming: Streaming

    @property
    def storage_per_s(self) -> float:
        """Pictures per second that storage sends when nothing is done with them."""
        return self.together.bytes_per_s / self.contents.bytes_per_picture

    @property
    def decode_per_s(self) -> float:
        """Pictures per second that the decode CPUs decode and crop when nothing is read."""
        return self.cropping.crops / max(self.cropping.seconds, SMALL_FLOAT)
