"""A plan on the terminal: what it compares, the cheapest in detail, and larger sizes."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.plan import figures
from pipelines.plan.bill import Bill
from pipelines.plan.figures import Figure
from pipelines.plan.job import Plan
from pipelines.plan.option import Option
from pipelines.plan.scaling import Scale

HOW = "how it is known"
"""Heading of the column that tells models from measurements."""


def show_plan(console: Console, plan: Plan) -> None:
    """Show all of it."""
    best = plan.best
    name = best.fleet.machine.name
    _figures(console, f"Run {plan.recipe.run.name}", figures.run_figures(plan))
    _options(console, plan)
    _figures(console, f"Memory of a worker on {name}", figures.memory_figures(best))
    pace = figures.pace_figures(best, plan.question, plan.work.decode_source)
    _figures(console, f"Pace on {fleet_words(best)}", pace)
    _figures(console, "Checkpoints", figures.saving_figures(best))
    _figures(console, "Money", figures.money_figures(best, plan.question))
    if plan.scaling:
        _scaling(console, plan)
    for note in notes(plan):
        console.print(f"[dim]note:[/] {escape(note)}", highlight=False)


def fleet_words(option: Option, between: str = " + ") -> str:
    """Name the machines of an option: those of the workers, then those that only decode."""
    place = option.fleet
    words = f"{place.machines} x {place.machine.name}"
    return words + (f"{between}{place.decoders} x {place.decoder.name}" if place.decoders else "")


def notes(plan: Plan) -> list[str]:
    """Say what to know of the figures, and what would help."""
    best = plan.best
    found = [
        "formulas and simulations are models: no GPU has been measured yet; --mfu, "
        "--images-per-worker-s and --decode-per-core put measured figures in their place",
        "spot prices move by the hour; the simulated cost has them fixed",
    ]
    if plan.recipe.run.min_workers is not None:
        found.append(
            "run.min_workers lets a run go on with fewer workers while a machine is replaced; the "
            "plan counts that time as lost, so it is less in truth"
        )
    if plan.recipe.compute.compile:
        found.append("compute.compile is not modelled: memory and time are those without")
    machine = best.fleet.machine
    if machine.efa_gbit and not plan.question.efa:
        found.append(
            f"{machine.name} could send {machine.efa_gbit:,.0f} Gbit/s by EFA, which neither "
            f"cluster.yaml nor the image sets up: its one network card is counted, "
            f"{machine.network_gbit:,.0f}; --efa if yours do"
        )
    if best.bound == "communication":
        found.append(
            "gradients and weights take longer to send than to compute: take machines with a "
            "faster network or more GPUs each, compute.shard_ranks (the GPUs of a machine), or "
            "compute.reshard_after_forward False where memory allows"
        )
    bill = figures.cheaper(best)
    if isfinite(bill.best_steps) and bill.expected_factor > 1.01 * bill.best_factor:
        found.append(
            f"set run.checkpoint_every to {bill.best_steps:,.0f}: it saves "
            f"{1 - bill.best_factor / bill.expected_factor:.0%} of the time"
        )
    return found


def _figures(console: Console, title: str, found: Sequence[Figure]) -> None:
    table = _table(title, "", "value", "", HOW)
    for figure in found:
        table.add_row(figure.name, number(figure.value), figure.unit, f"[dim]{figure.how}[/]")
    console.print(table, highlight=False)


def _options(console: Console, plan: Plan) -> None:
    table = Table(
        title=f"Machines ({plan.machines_source}), the cheapest first; USD of the whole run",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("machines", no_wrap=True)
    for column in ("GB each", "images/s"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("bound by")
    for column in ("hours", "on demand", "on spot"):
        table.add_column(column, justify="right", no_wrap=True)
    for each in plan.options:
        memory = f"{each.memory.peak / 1e9:,.1f}/{each.memory_bytes / 1e9:,.0f}"
        row = [fleet_words(each, "\n+ "), memory]
        if each.fits:
            row += [number(each.flow.images_per_s), each.bound, number(each.on_demand.hours)]
            row += [money(each.on_demand), money(each.spot)]
        else:
            row += ["", "[red]memory: does not fit[/]"]
        table.add_row(*row)
    console.print(table, highlight=False)


def _scaling(console: Console, plan: Plan) -> None:
    """Show the sizes side by side."""
    name = plan.best.fleet.machine.name
    sizes = [f"{each.gpus:,} GPUs" for each in plan.scaling]
    table = _table(f"The same steps on more of {name}, simulated", "", *sizes)
    columns = [_scale_column(each) for each in plan.scaling]
    for label in max(columns, key=len):
        table.add_row(label, *(column.get(label, "") for column in columns))
    console.print(table, highlight=False)


def _scale_column(each: Scale) -> dict[str, str]:
    """Tell of one size, by the rows' labels; of one that cannot be, what is in its way."""
    planned = each.option
    if planned is None:
        return {"bound by": each.bound}
    bill, paid = planned.spot or planned.on_demand, "on spot" if planned.spot else "on demand"
    after, could = planned.bounds[1]
    return {
        "images a GPU, of a step": number(each.images_per_gpu),
        "images/s": number(planned.flow.images_per_s),
        "bound by": each.bound,
        "next to bound": after,
        "  at images/s": number(could),
        "CPUs that decode": number(planned.decode_cpus_needed),
        "GB/s from storage": number(planned.storage_bytes_s / 1e9),
        "requests a second": number(planned.requests_s),
        "% lost to failures": number(100 * each.lost),
        f"hours {paid}": number(bill.hours),
        f"USD {paid}": money(bill),
    }


def money(bill: Bill | None) -> str:
    """Write what it costs."""
    if bill is None:
        return "not offered"
    return number(bill.usd) if isfinite(bill.usd) else "never ends"


def number(value: float) -> str:
    """Write a number with three digits that count, and all of a large one."""
    if not isfinite(value):
        return "never"
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in {"", HOW} else "right")
    return table
