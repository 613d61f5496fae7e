"""How a launch speaks with a person, and hears of signals."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.prompt import Confirm

from droppos.errors import ConfigError
from pipelines.launch import check, cost
from pipelines.launch.backend import Say
from pipelines.launch.check import Check
from pipelines.launch.cost import Cost


@dataclass(frozen=True, slots=True)
class Terminal:
    """Where a launch says and asks."""

    say: Say
    """A line about what happens."""
    show: Callable[[str], None]
    """The job's output, as it is."""
    ask: Callable[[str], bool]
    """A question of yes or no; raises ConfigError where nobody could answer."""
    checks: Callable[[list[Check]], None]
    cost: Callable[[Cost], None]


def terminal(console: Console, *, yes: bool) -> Terminal:
    """Speak through a console.

    Args:
        console: For people; the job's output goes to standard output.
        yes: Answer every question with yes.
    """

    def say(text: str) -> None:
        console.print(f"[dim]·[/] {escape(text)}", highlight=False, soft_wrap=True)

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def ask(question: str) -> bool:
        if yes:
            return True
        if sys.stdin is None or not sys.stdin.isatty():
            raise ConfigError(f"{question} Nobody can be asked here; say --yes to go on")
        return Confirm.ask(escape(question), console=console, default=False)

    def tell_cost(told: Cost) -> None:
        if told.kinds:
            console.print(cost.table(told))
        say(told.line)

    return Terminal(
        say,
        show,
        ask,
        lambda checks: console.print(check.table(checks), soft_wrap=False),
        tell_cost,
    )


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Take a closed terminal and SIGTERM for Ctrl-C, so that tunnels are ended and records kept."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {each: signal.signal(each, interrupt) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
