"""A job beside the main thread, and signals as requests: how a driver stays able to listen."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from time import monotonic
from typing import TypeVar

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ONCE_S = 1.0
"""Seconds in which signals are one request: whoever started this process (`timeout`, make, a shell)
may pass on what it was sent as well."""

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


def in_background(job: Callable[[], Result]) -> Future[Result]:
    """Run a job in a thread that ends with this process.

    On the main thread `fit` would take Ctrl-C for itself, and drop the last steps.
    """
    result: Future[Result] = Future()

    def run() -> None:
        try:
            result.set_result(job())
        except BaseException as error:  # handed on to whoever asks for the result
            result.set_exception(error)

    threading.Thread(target=run, name="fit", daemon=True).start()
    return result


@contextmanager
def stop_on_signal(
    stop: Callable[[], None],
    abort: Callable[[], None],
    words: str = "saving a last checkpoint, then ending; once more ends at once, without it",
) -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM and a closed terminal into a request to end well; a second ends at once.

    Only a main thread is sent signals; elsewhere (a Tune trial) nothing changes. Under nohup a
    terminal may close.

    Args:
        stop: Called at the first one.
        abort: Called at each later one.
        words: What is done at the first one, for the log.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked_at = 0.0

    def on_signal(number: int, frame: object) -> None:
        nonlocal asked_at
        if asked_at:
            if monotonic() - asked_at > ONCE_S:
                abort()
            return
        asked_at = monotonic()
        logger.warning("%s: %s", signal.Signals(number).name, words)
        stop()

    nohup = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    before = {
        number: signal.signal(number, on_signal) for number in STOP_SIGNALS if number not in nohup
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
