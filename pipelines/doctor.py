"""Doctor: what bounds ingest, of a data set on a cluster, measured in about a minute.

First one process reads and decodes alone, then as many as decode at once read, then the stream
runs end to end. What the numbers mean is the business of :mod:`pipelines.diagnosis`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite, prod
from pathlib import Path
from statistics import fmean
from typing import Any

import ray

from droppos.draw.ingest import draw_ingest
from droppos.errors import ConfigError, DataError
from pipelines.cluster import join_standing, result_of, standing_address, start_private
from pipelines.diagnosis import Diagnosis, bars, diagnose
from pipelines.gauges import look_and_decode, read_and_crop
from pipelines.memory import AHEAD, Footprint
from pipelines.readings import Cropping, Reading, Readings, Site
from pipelines.recipe import Data
from pipelines.shards import Manifest, load_manifest
from pipelines.storage import Place, open_reachable
from pipelines.stream_gauge import BATCH, Fit, cpu_seconds, stream_for
from pipelines.windows import CropOptions

SECONDS = 60.0
"""How long it all may take, about."""
SHORTEST = 5.0
"""Below this many seconds, nothing would be in its steady state."""
ALONE, TOGETHER, WARM_UP, STREAM = 0.12, 0.12, 0.08, 0.25
"""Shares of that time; the rest is Ray's start and what begins with each part."""
GPU_IMAGES_PER_S = 1500.0
"""What one GPU may ask for, by assumption: ViT-B/16 with attentive weights costs 61.1 GFLOP a
picture, so this is 92 TFLOP/s, 30 % of an A100's peak in bfloat16."""
PICTURE = Path("droppos-runs/doctor.png")


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured, what it means, and a picture of it."""

    readings: Readings
    diagnosis: Diagnosis
    picture: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked; see :func:`doctor`."""

    gpus: int | None = None
    gpu_images_per_s: float = GPU_IMAGES_PER_S
    decode_cpus: int | None = None
    image_size: tuple[int, int] = (224, 224)
    seconds: float = SECONDS

    def __post_init__(self) -> None:
        _require(self.gpus is None or self.gpus > 0, "--gpus", self.gpus, "positive")
        speed = self.gpu_images_per_s
        _require(speed > 0 and isfinite(speed), "--gpu-images-per-s", speed, "positive")
        cpus = self.decode_cpus
        _require(cpus is None or cpus > 0, "--decode-cpus", cpus, "positive")
        _require(min(self.image_size) > 0, "--image-size", self.image_size, "positive")
        enough = self.seconds >= SHORTEST and isfinite(self.seconds)
        _require(enough, "--seconds", self.seconds, f"at least {SHORTEST:.0f}")


def doctor(
    data: str,
    question: Question,
    *,
    picture: Path = PICTURE,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Measure a prepared data set on the cluster named by RAY_ADDRESS, or on this machine.

    Args:
        data: Prepared data set; path or s3:// URI.
        question: For which GPUs, and how long to measure.
        picture: PNG to write.
        say: Is told what is being measured.

    Raises:
        DataError: If the data set or its storage can't be read.
        ConfigError: If the cluster can't be reached, or has fewer CPUs than asked for.
    """
    place = open_reachable(data)
    manifest = load_manifest(place)
    if not manifest.rows:
        raise DataError(f"{place} has no pictures; prepare it again from a source that has some")
    say("starting Ray")
    with _cluster(question):
        readings = _measure(place, manifest, question, say)
    diagnosis = diagnose(readings)
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_ingest(bars(readings), readings.site.demand, diagnosis.demand_words, picture)
    return Report(readings, diagnosis, picture)


def _measure(
    place: Place,
    manifest: Manifest,
    question: Question,
    say: Callable[[str], None],
) -> Readings:
    site = _site(place, question)
    crop = CropOptions(question.image_size, Data().crop_scale, Data().flip)
    seconds = question.seconds
    data, shards = ray.put(place), ray.put(manifest)

    say("reading and decoding, one process")
    contents, alone, decoding = result_of(
        _task(look_and_decode).remote(data, shards, crop, ALONE * seconds)
    )
    say(f"reading and decoding, {site.decode_cpus} processes")
    together, cropping = _together(data, shards, crop, site.decode_cpus, TOGETHER * seconds)
    say("streaming, end to end")
    fit = Fit.to(manifest.rows, decoding.per_core_s, site.window)
    streaming = stream_for(
        place,
        manifest,
        crop,
        decode_cpus=site.decode_cpus,
        fit=fit,
        warm_up=WARM_UP * seconds,
        seconds=STREAM * seconds,
    )
    return Readings(
        site=site,
        contents=contents,
        alone=alone,
        together=together,
        decoding=decoding,
        cropping=cropping,
        streaming=streaming,
    )


def _together(
    data: Any, shards: Any, crop: CropOptions, processes: int, seconds: float
) -> tuple[Reading, Cropping]:
    """Have every decode task's process read at once, then decode at once, and add it up."""
    work = _task(read_and_crop)
    # Processes start one after another: a first short round waits until all are there.
    for duration in (0.0, seconds):
        found: list[tuple[Reading, Cropping]] = result_of(
            [work.remote(data, shards, crop, duration, seed) for seed in range(processes)]
        )
    readings, croppings = [reading for reading, _ in found], [cropping for _, cropping in found]
    reading = replace(
        readings[0],
        bytes=sum(each.bytes for each in readings),
        pictures=sum(each.pictures for each in readings),
        cpu_seconds=sum(each.cpu_seconds for each in readings),
        seconds=fmean(each.seconds for each in readings),
        group_seconds=fmean(each.group_seconds for each in readings),
        latency_seconds=fmean(each.latency_seconds for each in readings),
    )
    crops = sum(each.crops for each in croppings)
    return reading, Cropping(crops=crops, seconds=fmean(each.seconds for each in croppings))


def _task(work: Callable[..., Any]) -> Any:
    """Make a task of one CPU, on whichever node, that fails at once instead of trying again."""
    return ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")(work)


@contextmanager
def _cluster(question: Question) -> Iterator[None]:
    """Join the cluster that stands, or start a private one as a run would; leave it after."""
    if ray.is_initialized():
        yield
        return
    if standing_address():
        join_standing()
    else:
        _start_private(question)
    try:
        yield
    finally:
        ray.shutdown()


def _start_private(question: Question) -> None:
    """Start one with an object store such as a run would have."""
    cpus = question.decode_cpus or os.cpu_count() or 1
    crop = 3 * prod(question.image_size)
    start_private(cpus, Footprint(Data().window * crop, AHEAD * BATCH * crop).total(cpus))


def _site(place: Place, question: Question) -> Site:
    """See what the cluster has, and which of its CPUs a run would leave for decoding."""
    has = ray.cluster_resources()
    cpus, gpus = int(has.get("CPU", 0)), int(has.get("GPU", 0))
    # A training worker takes a CPU beside its GPU; where there is no GPU, nobody trains.
    decode_cpus = question.decode_cpus or max(1, cpus - gpus)
    if decode_cpus > cpus:
        raise ConfigError(
            f"--decode-cpus {decode_cpus} is more than the {cpus} CPUs that the cluster has; "
            f"lower it, or add {decode_cpus - cpus} CPUs"
        )
    nodes = sum(node["Alive"] for node in ray.nodes())
    return Site(
        nodes=nodes,
        cores=os.cpu_count() if nodes == 1 and cpu_seconds() is not None else None,
        decode_cpus=decode_cpus,
        store_bytes=has.get("object_store_memory", 0.0),
        memory_bytes=has.get("memory", 0.0),
        local_data=not place.is_s3,
        gpus=question.gpus or gpus or 1,
        gpu_images_per_s=question.gpu_images_per_s,
        image_size=question.image_size,
        window=Data().window,
    )


def _require(holds: bool, flag: str, value: object, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{flag} must be {rule}, got {value}")
