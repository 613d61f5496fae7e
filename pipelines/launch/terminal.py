"""How a launch speaks with a person, and hears of signals."""

import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.prompt import Confirm

from droppos.errors import ConfigError
from pipelines.lasting import LastingConsole
from pipelines.launch import check, cost
from pipelines.launch.backend import Say
from pipelines.launch.check import Check
from pipelines.launch.cost import Cost

CLOSING = (signal.SIGTERM, signal.SIGHUP)
"""Signals of a shell or a system that wants its programs to end."""


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


def terminal(console: LastingConsole, *, yes: bool) -> Terminal:
    """Speak through a console.

    Args:
        console: For people; the job's output goes to standard output. Machines are ended after it
            has closed, too.
        yes: Answer every question with yes.
    """

    def say(text: str) -> None:
        console.print(f"[dim]·[/] {escape(text)}", highlight=False, soft_wrap=True)

    def show(text: str) -> None:
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            raise  # who read it has left, so following it may end
        except OSError:
            pass

    def ask(question: str) -> bool:
        if yes:
            return True
        if sys.stdin is None or not sys.stdin.isatty():
            raise ConfigError(f"{question} Nobody can be asked here; say --yes to go on")
        try:
            return Confirm.ask(escape(question), console=console, default=False)
        except EOFError:  # Ctrl-D
            return False

    def tell_checks(checks: list[Check]) -> None:
        console.print(check.table(checks), soft_wrap=False)
        for line in check.ways_out(checks):
            console.print(f"[bold]{escape(line)}[/]", highlight=False, soft_wrap=True)

    def tell_cost(told: Cost) -> None:
        if told.kinds:
            console.print(cost.table(told))
            for line in cost.sources(told):
                say(line)
        say(told.line)

    return Terminal(say, show, ask, tell_checks, tell_cost)


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Take a closed terminal and SIGTERM for Ctrl-C, so that tunnels are ended and records kept.

    Only the first of them: a terminal that closes is told by the system and by its shell, and the
    second must not stop what the first began. A signal that is ignored stays so, as under nohup.
    """

    def interrupt(number: int, frame: object) -> None:
        for each in heard:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    heard = [each for each in CLOSING if signal.getsignal(each) is not signal.SIG_IGN]
    with _handled({each: interrupt for each in heard}):
        yield


@contextmanager
def signals_ignored() -> Iterator[None]:
    """Hear neither a closed terminal nor SIGTERM, nor do programs that are started; only Ctrl-C."""
    with _handled(dict.fromkeys(CLOSING, signal.SIG_IGN)):
        yield


@contextmanager
def _handled(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    before = {each: signal.signal(each, handler) for each, handler in handlers.items()}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
