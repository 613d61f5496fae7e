"""Runs on the terminal: a list, one, or several side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.report import Row, print_table
from pipelines.screen import clock

if TYPE_CHECKING:
    from pipelines.runs import Comparison, RunFacts
    from pipelines.sync import Synced

SHOWN = {
    "holdout/position/skill": "position skill",
    "holdout/features/knn_skill": "k-NN skill",
    "data/images_per_s": "images/s",
    "cost/worker_hours": "worker hours",
}
"""Metrics of the list, and their headings."""


def show_runs(console: Console, runs: list[RunFacts]) -> None:
    """List runs, the newest first."""
    table = _table("Runs")
    table.add_column("run", overflow="fold")
    for heading in ("status", "started"):
        table.add_column(heading, no_wrap=True)
    for heading in ("start to end", "step", *SHOWN.values()):
        table.add_column(heading, justify="right")
    for run in runs:
        values = [_number(run.metrics.get(name)) for name in SHOWN]
        began = f"{run.started:%y-%m-%d %H:%M}"
        step = f"{run.step:,}" if run.step >= 0 else "-"
        table.add_row(escape(run.name), run.status, began, clock(run.seconds), step, *values)
    console.print(table, highlight=False)
    console.print("[dim]started: UTC. RUNNING may be killed: `droppos sync` finds out[/]")


def show_run(console: Console, run: RunFacts, next_command: str) -> None:
    """Tell all of one run: what it was told, what came of it, and how to go on."""
    rows: list[Row] = [
        ("status", f"{run.status}, step {run.step:,}"),
        ("started", f"{run.started:%Y-%m-%d %H:%M} UTC, to its end {clock(run.seconds)}"),
        ("id", run.run_id),
    ]
    wanted = ("hardware.workers", "mlflow.source.git.commit", "code.changed_files", "command")
    rows += [(name, run.tags[name]) for name in wanted if name in run.tags]
    print_table(console, f"Run {run.name}", rows)
    print_table(console, "Fields that are not at their defaults", sorted(run.changed.items()))
    metrics = [(name, _number(value)) for name, value in sorted(run.metrics.items())]
    print_table(console, "Last values", metrics)
    for name, tag in (("folder", "droppos.home"), ("checkpoint", "droppos.checkpoint.uri")):
        if place := run.tags.get(tag):
            console.print(f"[dim]{name}:[/] {escape(place)}", highlight=False, soft_wrap=True)
    if run.status != "FINISHED" and run.home:
        console.print(f"[dim]next:[/] {escape(next_command)}", highlight=False, soft_wrap=True)


def show_comparison(console: Console, comparison: Comparison) -> None:
    """Put runs side by side: fields that differ, and last values."""
    names = [run.name for run in comparison.runs]
    for title, rows in (
        ("Fields that differ", comparison.fields),
        (
            "Last values",
            {name: [_number(v) for v in values] for name, values in comparison.metrics.items()},
        ),
    ):
        table = _table(title)
        for heading in ("", *names):
            table.add_column(escape(heading), overflow="fold")
        for name, values in rows.items():
            table.add_row(escape(name), *(escape(value) for value in values))
        console.print(table, highlight=False)


def show_synced(console: Console, synced: list[Synced]) -> None:
    """Tell what became of each journal."""
    if not synced:
        console.print("nothing waits for MLflow here")
        return
    table = _table("Entries that waited for MLflow")
    table.add_column("run", overflow="fold")
    for heading in ("sent", "refused", "overtaken", "left"):
        table.add_column(heading, justify="right")
    table.add_column("from", overflow="fold")
    for one in synced:
        name = escape(one.run_name or one.run_id)
        if one.living:
            table.add_row(name, "", "", "", "", f"{escape(one.source)}: a process writes it now")
            continue
        counts = [f"{n:,}" for n in (one.sent, one.refused, one.overtaken, one.left)]
        table.add_row(name, *counts, escape(one.source))
    console.print(table, highlight=False)
    if any(one.overtaken for one in synced):
        console.print("[dim]overtaken: a later process goes over the same steps[/]")
    for one in synced:
        if one.error:
            console.print(f"{escape(one.run_name or one.run_id)}: {escape(one.error)}", style="red")
    if any(one.left and not one.error for one in synced):
        console.print("MLflow does not answer; the same command sends what is left", style="red")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
