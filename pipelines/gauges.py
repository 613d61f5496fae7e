"""Gauges of one process: how fast a data set is read, what it holds, how fast it is decoded.

They run as tasks of Ray, where decoding will run too, and import no torch.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from math import ceil
from random import Random
from statistics import fmean, median
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from droppos.bounded import SMALLEST, Bound, bounded_copy
from droppos.errors import DataError
from droppos.jpeg import decode_rows, read_frame
from droppos.pictures import MAX_PIXELS, crop_seed, random_box, random_crop, upright_rgb
from pipelines.readings import Contents, Cropping, Decoding, Reading
from pipelines.shards import MANIFEST, Manifest, read_row_group
from pipelines.storage import Place
from pipelines.windows import READERS, CropOptions

SAMPLE = 512
"""Pictures that are looked at and decoded, at most."""
SAMPLE_BYTES = 64e6
"""Encoded bytes of those, about, at most."""
COPIES = 48
"""Pictures of which bounded copies are made, to see what those would bring."""
REQUESTS = 7
"""Small requests whose median is the latency."""
BOXES = 4
"""Crops drawn of each sampled picture, to see how many must be enlarged."""


class Sample(NamedTuple):
    """Pictures from all over a data set, in random order."""

    images: list[bytes]
    sizes: list[tuple[int, int]]
    """Width and height of each, in pixels."""


def read_for(
    data: Place, manifest: Manifest, seconds: float, seed: int = 0
) -> tuple[Reading, list[pa.Table]]:
    """Read row groups at random for a while, as many at once as a decode task does.

    Args:
        data: Folder of the data set.
        manifest: Its manifest.
        seconds: After so long no more are asked for; each reader reads at least one.
        seed: Which row groups, so that processes read different ones.

    Returns:
        The figures, and the first tables that arrived, for a sample.

    Raises:
        DataError: If a shard or storage fails.
    """
    groups = list(manifest.groups)
    Random(seed).shuffle(groups)
    latency = median(_seconds((data / MANIFEST).size) for _ in range(REQUESTS))
    kept: list[pa.Table] = []
    read: list[tuple[float, int, int]] = []
    turns = count()
    start, cpu = time.perf_counter(), time.process_time()

    def reader(_: int) -> None:
        while True:
            turn = next(turns)
            group = groups[turn % len(groups)]
            began = time.perf_counter()
            shard = manifest.shards[group.shard]
            table = read_row_group(data, shard, group.group, ["image", "width", "height"])
            now = time.perf_counter()
            read.append((now - began, table.nbytes, table.num_rows))
            if turn < len(groups) and turn * group.rows < SAMPLE:
                kept.append(table)
            if now - start >= seconds:
                return

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(reader, range(READERS)))
    reading = Reading(
        bytes=sum(size for _, size, _ in read),
        pictures=sum(rows for _, _, rows in read),
        seconds=time.perf_counter() - start,
        cpu_seconds=time.process_time() - cpu,
        group_seconds=fmean(took for took, _, _ in read),
        latency_seconds=latency,
    )
    return reading, kept


def look_and_decode(
    data: Place, manifest: Manifest, crop: CropOptions, seconds: float
) -> tuple[Contents, Reading, Decoding]:
    """Take all readings of one process, half of the time reading and half decoding.

    Raises:
        DataError: If a shard or storage fails, or no picture of the sample can be decoded.
    """
    reading, tables = read_for(data, manifest, seconds / 2)
    sample = sample_of(tables)
    return (
        contents_of(manifest, sample, crop),
        reading,
        decode_for(sample, crop, seconds / 2),
    )


def read_and_crop(
    data: Place, manifest: Manifest, crop: CropOptions, seconds: float, seed: int
) -> tuple[Reading, Cropping]:
    """Take the readings of one of many processes: first all read, then all decode.

    Raises:
        DataError: If a shard or storage fails, or no picture of the sample can be decoded.
    """
    reading, tables = read_for(data, manifest, seconds / 2, seed)
    sample = sample_of(tables)
    crops, failed, start = 0, 0, time.perf_counter()
    while True:
        image = sample.images[(crops + failed) % len(sample.images)]
        try:
            _crop(image, crop, crop_seed(seed, crops, "doctor"))
            crops += 1
        except DataError:
            failed += 1
            if failed >= len(sample.images) and not crops:
                raise
        took = time.perf_counter() - start
        if crops and took >= seconds / 2:
            return reading, Cropping(crops=crops, seconds=took)


def sample_of(tables: list[pa.Table]) -> Sample:
    """Draw pictures from tables, none twice."""
    rows = [(table, i) for table in tables for i in range(table.num_rows)]
    Random(0).shuffle(rows)
    images: list[bytes] = []
    sizes: list[tuple[int, int]] = []
    taken = 0
    for table, i in rows[:SAMPLE]:
        image = table["image"][i].as_py()
        images.append(image)
        sizes.append((table["width"][i].as_py(), table["height"][i].as_py()))
        taken += len(image)
        if taken >= SAMPLE_BYTES:
            break
    return Sample(images, sizes)


def contents_of(manifest: Manifest, sample: Sample, crop: CropOptions) -> Contents:
    """Count what the pictures of a sample are."""
    kinds = [_kind(image) for image in sample.images]
    height, width = crop.size
    small = []
    for number, size in enumerate(sample.sizes):
        random = Random(number)
        boxes = [random_box(*size, crop.scale, random) for _ in range(BOXES)]
        small += [b.right - b.left < width or b.bottom - b.top < height for b in boxes]
    return Contents(
        pictures=manifest.rows,
        bytes=manifest.size,
        group_bytes=manifest.size / len(manifest.groups),
        sampled=len(kinds),
        width=float(np.median([w for w, _ in sample.sizes])),
        height=float(np.median([h for _, h in sample.sizes])),
        quick=kinds.count("quick") / len(kinds),
        progressive=kinds.count("progressive") / len(kinds),
        other=kinds.count("other") / len(kinds),
        enlarged=fmean(small),
        copies=manifest.bounded is not None,
    )


def _kind(image: bytes) -> str:
    frame = read_frame(image)
    if frame is None or frame.width * frame.height > MAX_PIXELS:
        return "other"
    return "quick" if frame.one_scan else "progressive"


def decode_for(sample: Sample, crop: CropOptions, seconds: float) -> Decoding:
    """Cut crops in a loop for a while, each picture in several ways right after each other.

    So whatever disturbs the machine meanwhile disturbs all ways alike.

    Raises:
        DataError: If no picture of the sample can be decoded.
    """
    bound = Bound(short_side=max(SMALLEST, round(max(crop.size) * 320 / 224)))
    times: list[_Times] = []
    copies: list[_Copied] = []
    failed = 0
    end = time.perf_counter() + seconds
    for turn in count():
        image = sample.images[turn % len(sample.images)]
        try:
            times.append(_crop_times(image, crop, turn))
            if turn < min(COPIES, len(sample.images)):
                copies.append(_copied(image, crop, turn, bound))
        except DataError as error:
            failed += 1
            if failed == len(sample.images) and not times:
                raise DataError(
                    f"none of {failed} pictures can be decoded, the last one because: {error}; "
                    "prepare the data set again"
                ) from error
        if times and time.perf_counter() >= end:
            break
    return Decoding(
        crops=len(times),
        failed=failed,
        seconds=sum(each.whole for each in times),
        decode_seconds=sum(each.decode for each in times),
        scaled_seconds=sum(each.scaled for each in times),
        copied=len(copies),
        copied_before_seconds=sum(each.before for each in copies),
        copied_seconds=sum(each.after for each in copies),
        copied_bytes=fmean(each.bytes_ratio for each in copies) if copies else 1.0,
        short_side=bound.short_side,
    )


class _Times(NamedTuple):
    """CPU seconds of one crop."""

    whole: float
    scaled: float
    decode: float


class _Copied(NamedTuple):
    """CPU seconds of one crop, from a picture and from its bounded copy."""

    before: float
    after: float
    bytes_ratio: float


def _crop_times(image: bytes, crop: CropOptions, turn: int) -> _Times:
    seed = crop_seed(0, turn, "doctor")
    return _Times(
        _cpu(lambda: _crop(image, crop, seed)),
        _cpu(lambda: _crop(image, crop, seed, scaled=True)),
        _cpu(lambda: _decode(image, crop, seed)),
    )


def _copied(image: bytes, crop: CropOptions, turn: int, bound: Bound) -> _Copied:
    seed = crop_seed(0, turn, "doctor")
    copy = bounded_copy(image, bound).image
    return _Copied(
        _cpu(lambda: _crop(image, crop, seed)),
        _cpu(lambda: _crop(copy, crop, seed)),
        len(copy) / len(image),
    )


def _crop(image: bytes, crop: CropOptions, seed: int, scaled: bool = False) -> None:
    random_crop(
        image, crop.size, scale=crop.scale, flip=crop.flip, scaled_decoding=scaled, seed=seed
    )


def _decode(image: bytes, crop: CropOptions, seed: int) -> None:
    """Do what :func:`random_crop` does before it resizes."""
    frame = read_frame(image)
    if frame is None or frame.width * frame.height > MAX_PIXELS:
        upright_rgb(image)
        return
    box = random_box(frame.width, frame.height, crop.scale, Random(seed))
    decode_rows(image, frame, ceil(box.bottom))


def _cpu(work: Callable[[], object]) -> float:
    """CPU seconds of this process for a piece of work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def _seconds(work: Callable[[], object]) -> float:
    """Seconds of the clock for a piece of work."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
