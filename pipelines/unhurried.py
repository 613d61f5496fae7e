"""Keep Ray Data's executor from spinning while the workers have all that they can hold.

Its loop waits for tasks, for up to 0.1 s at a time. But a task whose next block is there, and has
no room further on, ends that wait at once: so wherever training is slower than reading, which is
what one builds a cluster for, the loop goes round without end, on a core of a machine that has
other things to do (Ray 2.60; `make bench-executor` measures it).
"""

import time
from typing import Any

from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback

ROUND_S = 0.1
"""Longest rest between two rounds of the loop, as long as its own wait for tasks."""
GLANCE_S = 0.005
"""How often it looks whether there is anything to do."""


class Unhurried(ExecutionCallback):
    """What Ray Data calls after each round of the loop."""

    def __init__(self) -> None:
        self._stock = 0

    def on_execution_step(self, executor: Any) -> None:
        """Wait, if there were blocks to be fetched and the last round brought and lost none.

        Not after each round that leaves some: a stream bound by reading would lose a tenth.
        """
        blocks = executor._output_node[1].output_queue
        before, self._stock = self._stock, len(blocks)
        until = time.monotonic() + ROUND_S
        while 0 < before == self._stock == len(blocks) and time.monotonic() < until:
            time.sleep(GLANCE_S)


def rest_between_rounds(context: DataContext) -> None:
    """Have executions of a data set of this context do so."""
    context.custom_execution_callback_classes.append(Unhurried)
