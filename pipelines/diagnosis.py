"""Diagnosis: what the doctor's readings mean, in words. Pure: numbers in, words out."""

from dataclasses import dataclass

from droppos.draw.ingest import Bar
from pipelines.advice import Advice, advise
from pipelines.bottleneck import Bound, allowed_per_s, bound_of, cores_for, per_core
from pipelines.readings import Readings
from pipelines.words import counted


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
        demand_words=f"{counted(site.gpus, 'GPU')}: {site.demand:,.0f}",
        advice=tuple(advise(readings, bound)),
        notes=tuple(notes(readings)),
    )


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
    tasks = counted(site.decode_cpus, "process", "processes")
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
