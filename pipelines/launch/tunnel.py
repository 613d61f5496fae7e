"""A way to a port of the cluster through a program that forwards it, and that is kept alive.

The local port stays the same for as long as the tunnel is open. So who follows a job over it only
has to try again: the program is started anew behind the port when it ends.
"""

import logging
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from droppos.errors import DropposError
from pipelines.launch.errors import LaunchError

OPEN_S = 30.0
"""Seconds that a program has to open its port."""
AGAIN_S = 2.0
"""Seconds between its end and its next start."""
END_S = 5.0
LOCAL = "127.0.0.1"

Command = Callable[[int], Sequence[str]]
"""Makes the program's command for a local port. Asked at each start: a head may have moved."""

_log = logging.getLogger(__name__)


@contextmanager
def tunnel(command: Command, log: Path) -> Iterator[str]:
    """Keep a forwarding program running.

    Args:
        command: What to start.
        log: File for what it says.

    Yields:
        http:// URL of the near end.

    Raises:
        LaunchError: If the port does not open; with what the program said.
    """
    port = _free_port()
    ending, opened = threading.Event(), threading.Event()
    failures: list[str] = []
    keeper = threading.Thread(
        target=_keep, args=(command, port, log, ending, opened, failures), daemon=True
    )
    keeper.start()
    try:
        if not opened.wait(OPEN_S) or failures:
            said = failures[0] if failures else f"the port did not open within {OPEN_S:.0f} s"
            raise LaunchError(f"the tunnel to the cluster does not open: {said} (see {log})")
        yield f"http://{LOCAL}:{port}"
    finally:
        ending.set()
        keeper.join(2 * END_S)


def _keep(
    command: Command,
    port: int,
    log: Path,
    ending: threading.Event,
    opened: threading.Event,
    failures: list[str],
) -> None:
    while not ending.is_set():
        try:
            with log.open("ab") as said:
                program = subprocess.Popen(
                    command(port),
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    # Ctrl-C is for who follows; the tunnel is ended when that one has left.
                    start_new_session=True,
                )
        except (OSError, DropposError) as error:  # such as a cloud that cannot be asked just now
            if not opened.is_set():
                failures.append(str(error))
                opened.set()
                return
            _log.warning("the tunnel could not be opened again: %s", error)
            ending.wait(AGAIN_S)
            continue
        try:
            while program.poll() is None and not ending.is_set():
                if not opened.is_set() and _listens(port):
                    opened.set()
                ending.wait(0.1)
            if not opened.is_set() and not ending.is_set():
                failures.append(_last_line(log) or f"the program ended with {program.returncode}")
                opened.set()
                return
        finally:
            _end(program)
        ending.wait(AGAIN_S)


def _end(program: "subprocess.Popen[bytes]") -> None:
    program.terminate()
    try:
        program.wait(END_S)
    except subprocess.TimeoutExpired:
        program.kill()
        program.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection((LOCAL, port), timeout=1):
        return True
    return False


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((LOCAL, 0))
        return found.getsockname()[1]
