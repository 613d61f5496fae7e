"""What the workers are asked besides going on, heard by all of them at the same step.

The driver asks (a notice of a node, Ctrl-C, room for more workers), and so does whoever sends a
worker SIGTERM. Every loop that a supervisor runs listens here.
"""

from typing import NamedTuple

import torch.distributed as dist

from pipelines.agreement import Agreement
from pipelines.events import Events
from pipelines.terminate import asked_to_terminate


class Asked(NamedTuple):
    """Of all workers."""

    save: bool
    """Make a checkpoint now, whether or not one is due."""
    leave: bool
    """Leave now, after a checkpoint made for it."""
    leave_after_next: bool
    """Leave after the next checkpoint, whatever it is made for."""
    ended: int
    """The least of what all of them gave `hear`."""


class Ear:
    """One worker's; every rank of the default process group makes one."""

    def __init__(self, events: Events, timeout_s: float) -> None:
        """Begin to listen.

        Args:
            events: Bring what the driver wishes; its first worker's pulse asks for it.
            timeout_s: Seconds after which a rank that does not answer is an error.
        """
        self._events = events
        self._agreement = Agreement(3, timeout_s)
        self._saves = 0
        self._told_to_go = False

    def hear(self, ended: int = 0) -> Asked:
        """Hear what any worker was asked a step ago; every rank calls this after every step.

        Args:
            ended: A step that this rank is done with, to be compared with the others'.
        """
        if asked_to_terminate() and not self._told_to_go:
            self._told_to_go = True
            why = f"worker {dist.get_rank()} was sent SIGTERM"
            self._events.send({"kind": "leave", "why": why})
        wish = self._events.wished  # of rank 0's pulse; the other ranks wish for nothing
        leave = max(wish.leave, 2 * asked_to_terminate())
        # The largest of what is negative is the least.
        saves, leave, ended = self._agreement.settle(wish.saves, leave, -ended)
        save = saves > self._saves
        self._saves = max(self._saves, saves)
        return Asked(save, leave > 1, leave > 0, -ended)

    def close(self) -> None:
        """Hear the last round out; every rank calls this when it leaves the loop."""
        self._agreement.close()
