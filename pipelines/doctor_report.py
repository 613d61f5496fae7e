"""The doctor's report on the terminal, in plain words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from pipelines.report import Row, print_table
from pipelines.words import counted

if TYPE_CHECKING:
    from pipelines.diagnosis import Diagnosis
    from pipelines.doctor import Report
    from pipelines.readings import Contents, Readings


def show_doctor(console: Console, report: Report) -> None:
    """Tell what was measured, then what bounds ingest and what to change."""
    readings, diagnosis = report.readings, report.diagnosis
    print_table(console, "Data set", contents_rows(readings.contents))
    print_table(console, "Measured", measured_rows(readings))
    print_table(console, "Diagnosis", [*needs_rows(diagnosis), ("picture", report.picture)])
    for note in diagnosis.notes:
        console.print(f"[dim]note:[/] {escape(note)}", highlight=False)
    for advice in diagnosis.advice:
        command = f": [bold]{escape(advice.command)}[/]" if advice.command else ""
        console.print(f"[dim]change:[/] {escape(advice.words)}{command}", highlight=False)


def contents_rows(contents: Contents) -> list[Row]:
    """Write what is in the data set."""
    kinds = {
        "quick JPEGs": contents.quick,
        "progressive": contents.progressive,
        "others": contents.other,
    }
    shares = ", ".join(f"{share:.0%} {kind}" for kind, share in kinds.items() if share)
    return [
        ("pictures", f"{contents.pictures:,} of {contents.bytes_per_picture / 1e3:,.0f} kB"),
        ("median size", f"{contents.width:,.0f} x {contents.height:,.0f} pixels"),
        ("formats", f"{shares} (of {contents.sampled:,} looked at)"),
        ("crops to be enlarged", f"{contents.enlarged:.0%}"),
        ("row group", f"{contents.group_bytes / 1e6:,.1f} MB"),
    ]


def measured_rows(readings: Readings) -> list[Row]:
    """Write the figures of each stage."""
    site, alone, decoding = readings.site, readings.alone, readings.decoding
    streaming = readings.streaming
    where = "this machine" if site.cores else counted(site.nodes, "node")
    gpus = counted(site.gpus, "GPU")
    tasks = counted(site.decode_cpus, "process", "processes")
    per_core = f", {streaming.per_core_s:,.0f} per core" if streaming.per_core_s else ""
    return [
        ("cluster", f"{where}, {site.decode_cpus} CPUs to decode, {gpus} to feed"),
        ("storage, one process", f"{alone.bytes_per_s / 1e6:,.0f} MB/s"),
        ("  CPU time", f"{alone.cpu_ms_per_mb:.2f} ms a MB"),
        ("  smallest request", _latency(alone.latency_seconds)),
        (f"storage, {tasks}", _megabytes_and_pictures(readings)),
        ("decode and crop, one core", f"{decoding.per_core_s:,.0f} pictures/s"),
        ("  of it decoding", f"{decoding.decode_share:.0%}, the rest is resizing"),
        (f"decode and crop, {tasks}", f"{readings.decode_per_s:,.0f} pictures/s"),
        ("the stream, end to end", f"{streaming.per_s:,.0f} pictures/s{per_core}"),
        ("  longest wait for a batch", f"{streaming.longest_wait:.2f} s of {streaming.batch}"),
        ("  object store, at most", _store(readings)),
    ]


def needs_rows(diagnosis: Diagnosis) -> list[Row]:
    """Write the verdict, and what the GPUs need."""
    kind = "measured end to end" if diagnosis.per_core_is_measured else "of decoding alone"
    gbit = 8 * diagnosis.network_bytes_per_s / 1e9
    return [
        ("verdict", diagnosis.verdict),
        ("ingest is bound by", diagnosis.bound_words),
        (
            "CPU cores for each GPU",
            f"{diagnosis.cores_per_gpu} ({diagnosis.per_core_s:,.0f} pictures/s a core {kind}, a "
            "fifth to spare)",
        ),
        ("  for all GPUs", f"{diagnosis.cores}"),
        (
            "network for all GPUs",
            f"{diagnosis.network_bytes_per_s / 1e6:,.0f} MB/s ({gbit:.1f} Gbit/s)",
        ),
    ]


def _megabytes_and_pictures(readings: Readings) -> str:
    rate = readings.together.bytes_per_s / 1e6
    return f"{rate:,.0f} MB/s, {readings.storage_per_s:,.0f} pictures/s"


def _latency(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds >= 1e-4 else "less than 0.1 ms"


def _store(readings: Readings) -> str:
    streaming = readings.streaming
    spilled = f"{streaming.spilled / 1e6:,.0f} MB" if streaming.spilled else "nothing"
    capacity = readings.site.store_bytes / 1e6
    return f"{streaming.store_peak / 1e6:,.0f} of {capacity:,.0f} MB, {spilled} spilled"
