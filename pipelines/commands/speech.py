"""How commands speak with a person, whatever they do."""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from droppos.errors import ConfigError
from pipelines.lasting import LastingConsole
from pipelines.recipe import Recipe

if TYPE_CHECKING:
    from pipelines.search_outcome import SearchOutcome
    from pipelines.search_screen import SearchScreen

console = LastingConsole(stderr=True)
"""For people; results that a script may want go to standard output."""


def announce() -> None:
    """Say what takes seconds before anything else is seen."""
    say("loading torch and Ray")


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Show what takes seconds while it does: a moving line on a terminal, one line elsewhere."""
    if not console.is_terminal:
        say(what)
        yield
        return
    with console.status(what):
        yield


def say_news(event: Mapping[str, Any]) -> None:
    """Tell what happened to a run, if it is news."""
    from pipelines.news import told

    if (news := told(event)) is not None:
        say(f"    {news}")


def say(text: str) -> None:
    """Say a line about what happens."""
    console.print(f"[dim]·[/] {escape(text)}", highlight=False, soft_wrap=True)


def refuse_late(file: str, command: str) -> None:
    """Refuse a recipe that does not stand first, where it is read."""
    if file:
        raise ConfigError(
            f"the recipe {file!r} must come first, before all flags: droppos {command} {file} ..."
        )


def searching() -> "SearchScreen":
    """Show a search while it goes on."""
    from pipelines.search_screen import SearchScreen

    # Tune tells of each trial that did not complete; the table does, too.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    return SearchScreen(console)


def conclude_search(recipe: Recipe, outcome: "SearchOutcome", line: str = "") -> None:
    """Show what a search gave, and tell the shell."""
    from pipelines.report import show_search

    show_search(console, recipe, outcome)
    if line:
        print(line)
    if not outcome.finished:
        sys.exit(130)
    if outcome.best is None:
        sys.exit(1)
