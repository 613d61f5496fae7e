"""Receipts on the terminal: what one tells, and what became of verifying it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.report import Row, print_table

if TYPE_CHECKING:
    from pipelines.check import Check
    from pipelines.receipt import Receipt

STYLES = {"ok": "green", "differs": "bold red", "not reachable": "yellow", "note": "dim"}


def show_receipt(console: Console, receipt: Receipt, notes: Sequence[str], out: str) -> None:
    """Tell what a receipt holds, and what it cannot."""
    links, data = receipt["chain"], receipt["data"]
    shards = f"shards: {len(data['shards']):,}" if "shards" in data else "shards not listed"
    none = "none: --backbone names an export"
    export = f"{len(receipt['backbone']['files'])} files" if "backbone" in receipt else none
    rows: list[Row] = [
        ("run", receipt["run"]["home"]),
        ("checkpoint", f"step {links[-1]['step']:,}, {links[-1]['sha256'][:12]}"),
        ("chain", f"{len(links):,} checkpoints from step {links[0]['step']:,} on"),
        ("data", f"{data['manifest'][:12]}, {shards}"),
        ("backbone", export),
        ("receipt", receipt["sha256"]),
    ]
    print_table(console, "Receipt", rows)
    for note in notes:
        console.print(f"[dim]note:[/] {escape(note)}", highlight=False, soft_wrap=True)
    console.print(
        f"[dim]next:[/] droppos receipt --verify {escape(out)}", highlight=False, soft_wrap=True
    )


def show_checks(console: Console, checks: Sequence[Check]) -> None:
    """Tell what was compared, and what came of it."""
    table = Table(
        title="Receipt, verified", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("what", overflow="fold")
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for check in checks:
        state = f"[{STYLES[check.state]}]{check.state}[/]"
        table.add_row(escape(check.what), state, escape(check.told))
    console.print(table, highlight=False)
    counts = Counter(check.state for check in checks)
    said = ", ".join(f"{counts[state]} {state}" for state in STYLES if counts[state])
    console.print(said, style="red" if counts["differs"] else "green", highlight=False)
