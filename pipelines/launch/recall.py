"""A job whose submission failed or was interrupted: it may have arrived all the same."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from droppos.errors import DropposError
from pipelines.launch import jobs, record
from pipelines.launch.backend import Address, Backend
from pipelines.launch.errors import TakenError
from pipelines.launch.record import Record
from pipelines.launch.terminal import Terminal

ARRIVE_S = 5.0
"""Seconds after which a submission that was interrupted will not arrive any more."""
AGAIN_S = 0.5


@contextmanager
def recalled(
    begun: Record, backend: Backend, address: Address, terminal: Terminal
) -> Iterator[None]:
    """Stop the job if its submission is broken off, or say how it can be stopped."""
    try:
        yield
    except TakenError:
        raise
    except BaseException:
        if backend.mortal and not begun.keep:
            raise  # the machines are ended, and the job with them
        terminal.say(f"looking whether job {begun.job} has arrived all the same")
        try:
            gone = _called_back(begun, address, terminal)
        except (KeyboardInterrupt, DropposError):
            gone = False
        if gone:
            record.note(begun, "up" if backend.mortal else "ended")
        else:
            terminal.say(
                f"job {begun.job} may be running on {backend.where}: `droppos stop {begun.name}` "
                "saves and ends it"
            )
        raise


def _called_back(begun: Record, address: Address, terminal: Terminal) -> bool:
    """Look for the job that was being submitted, and stop it; tell whether nothing of it runs."""
    there = jobs.ready(address, jobs.LOOK_S, terminal.say)
    until = time.monotonic() + ARRIVE_S
    while (job := there.marked(begun.mark)) is None:
        if time.monotonic() > until:
            terminal.say("it has not")
            return True
        time.sleep(AGAIN_S)
    terminal.say(f"job {job.id} has arrived; it is stopped")
    until = time.monotonic() + jobs.LOOK_S
    while there.get(job.id).running:
        if time.monotonic() > until:
            return False
        there.stop(job.id)  # again: one that has not begun yet does not hear it
        time.sleep(AGAIN_S)
    return True
