"""What a person sees of a search: a live table of its trials, or a line for each that ends."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from pipelines.resources import table


class SearchScreen:
    """Follows a search's events: which trials run, how far they are, how good they were."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._trials: dict[str, dict[str, Any]] = {}
        self._total = 0
        self._objective = ""

    def __enter__(self) -> Self:
        """Begin the live table."""
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Make room for the final table."""
        if self._console.is_terminal:
            self._live.stop()

    def event(self, event: Mapping[str, Any]) -> None:
        """Take one event of the search."""
        if event["kind"] == "search":
            self._total, self._objective = event["trials"], event["objective"]
        elif event["kind"] == "fit":
            self._console.print(table(event["fit"]))
        else:
            trial = self._trials.setdefault(event["trial"], {"state": ""})
            changed = trial["state"] != event["state"]
            trial.pop("error", None)
            trial.update(event)
            if changed and not self._console.is_terminal:
                self._console.print(self._line(trial), highlight=False, soft_wrap=True)
        if self._console.is_terminal:
            self._live.update(self._table(), refresh=True)

    def _line(self, trial: Mapping[str, Any]) -> str:
        parts = [trial["trial"], trial["state"], _score(trial), trial.get("error", "")]
        return " · ".join(escape(part) for part in parts if part)

    def _table(self) -> Table:
        ended = {"finished", "early", "failed"}
        done = sum(trial["state"] in ended for trial in self._trials.values())
        table = Table(
            title=f"{done} of {self._total} trials done",
            title_justify="left",
            box=None,
            padding=(0, 2),
        )
        for column in ("trial", "state", "step", self._objective):
            table.add_column(column, header_style="dim")
        for name, trial in self._trials.items():
            step = f"{trial['step']:,}/{trial['steps']:,}" if trial.get("steps") else ""
            table.add_row(escape(name), trial["state"], step, _score(trial))
        return table


def _score(trial: Mapping[str, Any]) -> str:
    objective = trial.get("objective")
    return "" if objective is None else f"{objective:.4f}"
