"""The pulse: what a worker is doing, told to the driver from a thread of its own.

A collective that waits for a rank that will never come returns to nobody, so the worker that hangs
cannot say so. Its pulse goes on, or stops if the whole process is stopped; the driver sees that no
worker gets on (:mod:`pipelines.supervisor`), and which ones said nothing at all.
"""

import os
import threading
from types import TracebackType
from typing import Self

import ray
import ray.train

from pipelines.events import Events
from pipelines.machine import SAMPLE_S, Machine

EVERY_S = 0.5
"""Seconds between two beats; only changes, and one beat in twenty, are sent."""
SAMPLES = round(SAMPLE_S / EVERY_S)
"""Beats between two looks at the node."""


class Pulse:
    """Sends what this worker does whenever that has changed, and a sign of life in between.

    Rank 0's also asks what the driver wishes, so that no step has to; the first one's of each node
    looks how busy the node is.
    """

    def __init__(self, events: Events, rank: int) -> None:
        self._events = events
        self._rank = rank
        self._node = ray.get_runtime_context().get_node_id()
        self._first_of_node = ray.train.get_context().get_local_rank() == 0
        self._doing = "starting"
        self._step = 0
        self._moves = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def __enter__(self) -> Self:
        """Begin to beat."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Beat no more."""
        self._ended.set()
        self._thread.join()

    def now(self, doing: str, step: int) -> None:
        """Note what this worker begins to do, at which step."""
        self._doing, self._step = doing, step

    def moved(self) -> None:
        """Note that something gets on that takes long and is no step; from any one thread."""
        self._moves += 1

    def _run(self) -> None:
        # psutil counts a CPU's time from the last look of the same thread.
        machine = Machine() if self._first_of_node else None
        beats = 0
        told = None
        while not self._ended.wait(EVERY_S if told else 0):
            beats += 1
            now = (self._doing, self._step, self._moves)
            if now != told or beats % 20 == 0:
                told = now
                self._events.send(
                    {
                        "kind": "beat",
                        "rank": self._rank,
                        "node": self._node,
                        "pid": os.getpid(),
                        "doing": now[0],
                        "step": now[1],
                        "moves": now[2],
                    }
                )
            # The first time with the second beat: a share of a CPU's time needs some time to be of.
            if machine is not None and beats % SAMPLES == 2:
                values = machine.sample()
                self._events.send({"kind": "machine", "node": self._node, "values": values})
            if self._rank == 0:
                self._events.ask()
