"""A console that a job outlives.

Somebody closes the terminal, nobody reads the pipe any more, or the disk under the log is full:
what is said is lost then, and nothing else. By itself rich raises OSError, or leaves the program.
"""

from contextlib import suppress
from typing import IO, Any, cast

from rich.console import Console


class _Lasting:
    """A text stream whose reader may go."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class LastingConsole(Console):
    """Rich's, for what jobs say to people."""

    @property
    def file(self) -> IO[str]:
        """The stream it writes to, which never fails."""
        return cast(IO[str], _Lasting(super().file))

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file
