"""Consoles whose reader goes: the job goes on."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest
from rich.live import Live
from rich.text import Text

from pipelines.lasting import LastingConsole


@pytest.fixture(params=["full disk", "closed pipe"])
def gone(request: pytest.FixtureRequest) -> Iterator[IO[str]]:
    if request.param == "full disk":
        file = Path("/dev/full").open("w")  # noqa: SIM115
    else:
        end, ours = os.pipe()
        os.close(end)
        file = os.fdopen(ours, "w")
    yield file
    with suppress(OSError):
        file.close()


@pytest.mark.parametrize("terminal", [True, False])
def test_what_nobody_hears_is_lost_and_nothing_else(gone: IO[str], terminal: bool) -> None:
    console = LastingConsole(file=gone, force_terminal=terminal)
    for _ in range(3):
        console.print("a line")
    with Live(console=console, auto_refresh=False) as live:
        live.update(Text("step 1"), refresh=True)
        for _ in range(100):  # more than a buffer holds
            console.print("x" * 500, soft_wrap=True)


def test_it_says_what_any_console_says(capsys: pytest.CaptureFixture[str]) -> None:
    console = LastingConsole(stderr=True)
    console.print("[bold]saved[/]")
    assert capsys.readouterr().err == "saved\n"
    assert not console.is_terminal
