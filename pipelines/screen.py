"""What a person sees of a run: one live line on a terminal, plain lines elsewhere."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import monotonic
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from droppos.measure.intervals import read_metric
from pipelines.news import told
from pipelines.recipe import Recipe
from pipelines.words import counted

PLAIN_EVERY_S = 10
"""Seconds between two lines where there is no terminal, in a job's log say."""


class Screen:
    """Follows a run's events: step, images/s, loss, position accuracy against chance, time left."""

    def __init__(self, recipe: Recipe, console: Console) -> None:
        self._recipe = recipe
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._steps = 0
        self._step = 0
        self._said = 0.0
        self._values: dict[str, float] = {}
        self._skipped: set[int] = set()
        self._activity = "starting workers"
        self._pace = TimeLeft()

    def __enter__(self) -> Self:
        """Begin the live line."""
        if self._console.is_terminal:
            self._live.start()
            self._show()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the last line standing."""
        if self._console.is_terminal:
            self._live.stop()

    def event(self, event: Mapping[str, Any]) -> None:
        """Take one event of the run."""
        match event["kind"]:
            case "plan":
                self._step, self._steps = event["step"], event["steps"]
            case "started":
                if not self._console.is_terminal and event["rank"] == 0:
                    who = counted(event["workers"], "worker begins", "workers begin")
                    self.say(f"{who} at step {event['step']:,}")
                self._step = event["step"]
                self._activity = "waiting for the first pictures"
                self._pace = TimeLeft()
            case "metrics":
                self._values |= event["values"]
                if "train/loss" in event["values"]:
                    self._step = event["step"]
                    self._activity = ""
                    self._pace.reached(self._step)
            case "skipped":
                self._skipped |= event["problems"].keys()
            case "group":
                self._activity = f"starting {counted(event['workers'], 'worker')}"
                if not self._console.is_terminal:
                    self.say(self._activity)
            case "checkpoint":
                if not self._console.is_terminal:
                    self.say(f"checkpoint at step {event['step']}: {event['saved'].uri}")
            case _ if (said := told(event)) is not None:
                self.say(said)
        self._show()

    def _show(self) -> None:
        if self._console.is_terminal:
            self._live.update(Text(self.line(), no_wrap=True, overflow="ellipsis"), refresh=True)
        elif not self._activity and monotonic() - self._said > PLAIN_EVERY_S:
            self._said = monotonic()
            self._console.print(self.line(), highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Write a line that stays, above the live one."""
        self._console.print(f"[dim]·[/] {escape(text)}", highlight=False, soft_wrap=True)

    def line(self) -> str:
        """Tell where the run is, in one line."""
        parts = [f"step {self._step:,}/{self._steps:,}"]
        if self._activity:
            return " · ".join([*parts, self._activity])
        if (left := self._pace.left(self._steps)) is not None:
            parts.append(f"{clock(left)} left")  # early: a narrow terminal cuts the end off
        values = self._values
        parts.append(f"{values.get('data/images_per_s', 0):,.0f} images/s")
        parts.append(f"loss {values['train/loss']:.3f}")
        if "train/position_accuracy" in values:
            accuracy = values["train/position_accuracy"]
            parts.append(f"right {accuracy:.1%} (chance {self._recipe.counts.chance:.1%})")
        if (accuracy := read_metric(values, "holdout/position/accuracy")) is not None:
            parts.append(f"held out {accuracy}")
        if "data/wait_fraction" in values:
            parts.append(f"waiting for data {values['data/wait_fraction']:.0%}")
        if self._skipped:
            parts.append(f"{len(self._skipped):,} pictures skipped")
        return " · ".join(parts)


class TimeLeft:
    """Estimates the time left from the steps seen since the workers started."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None

    def reached(self, step: int) -> None:
        """Note that a step is done now."""
        self._last = (step, monotonic())
        self._first = self._first or self._last

    def left(self, steps: int) -> float | None:
        """Give the seconds left, or None while there is nothing to go by."""
        if self._first is None or self._last is None or self._first == self._last:
            return None
        done, seconds = self._last[0] - self._first[0], self._last[1] - self._first[1]
        return (steps - self._last[0]) * seconds / done


@contextmanager
def progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar for a job that counts.

    Yields:
        To be called with (done, total).
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def clock(seconds: float) -> str:
    """Write a duration as a person says it: 45 s, 3 min 20 s, 5 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
