"""What is looked at before any money is spent: all of it, reported together.

A look is one question. Its work returns what was found, or raises `Wrong`; one that depends on
another is left out when that one failed, for its answer would only repeat it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from droppos.errors import DropposError

State = Literal["ok", "note", "wrong", "left out"]
_COLOURS = {"ok": "green", "note": "yellow", "wrong": "bold red", "left out": "dim"}


class Wrong(DropposError):  # noqa: N818 - an answer, not a failure of the program
    """What was found will not do."""

    def __init__(self, found: str, expected: str, way_out: str) -> None:
        super().__init__(f"found {found}; expected {expected}; {way_out}")
        self.found, self.expected, self.way_out = found, expected, way_out


class Note(DropposError):  # noqa: N818
    """What was found will do, but a person should know of it."""

    def __init__(self, found: str, advice: str) -> None:
        super().__init__(f"{found}; {advice}")
        self.found, self.advice = found, advice


@dataclass(frozen=True, slots=True)
class Look:
    """One question."""

    what: str
    work: Callable[[], str]
    """Returns what was found; raises Wrong, Note, or another DropposError."""
    after: tuple[str, ...] = ()
    """Looks that must have gone well for this one to make sense."""


@dataclass(frozen=True, slots=True)
class Check:
    """Its answer."""

    what: str
    state: State
    found: str
    expected: str = ""
    way_out: str = ""


def look(looks: Sequence[Look]) -> list[Check]:
    """Ask all questions, in order."""
    checks: dict[str, Check] = {}
    for each in looks:
        failed = [name for name in each.after if checks[name].state in ("wrong", "left out")]
        checks[each.what] = (
            Check(each.what, "left out", f"not looked at, for {failed[0]} failed")
            if failed
            else _answer(each)
        )
    return list(checks.values())


def _answer(each: Look) -> Check:
    try:
        return Check(each.what, "ok", each.work())
    except Wrong as wrong:
        return Check(each.what, "wrong", wrong.found, wrong.expected, wrong.way_out)
    except Note as note:
        return Check(each.what, "note", note.found, way_out=note.advice)
    except DropposError as error:
        return Check(each.what, "wrong", str(error))
    except Exception as error:  # of a bug, or a file that is odd: the other looks still tell
        return Check(
            each.what,
            "wrong",
            f"{type(error).__name__}: {error}",
            "an answer",
            "this look has failed itself: see whether its file or setting is as documented",
        )


def passed(checks: Sequence[Check]) -> bool:
    """Tell whether nothing is wrong; what was left out depends on something that is."""
    return all(check.state in ("ok", "note") for check in checks)


def ways_out(checks: Sequence[Check]) -> list[str]:
    """Say what to do; beside the table, whose cells are folded, so that commands can be copied."""
    return [f"{check.what}: {check.way_out}" for check in checks if check.way_out]


def table(checks: Sequence[Check]) -> Table:
    """Show the answers."""
    shown = Table(
        box=SIMPLE_HEAD, show_header=False, title="before it starts", title_justify="left"
    )
    shown.add_column(no_wrap=True)
    shown.add_column(no_wrap=True)
    shown.add_column(overflow="fold")
    for check in checks:
        said = escape(check.found)
        if check.expected:
            said += f"\nexpected: {escape(check.expected)}"
        shown.add_row(f"[{_COLOURS[check.state]}]{check.state}[/]", escape(check.what), said)
    return shown
