"""The tally: every worker holds what the stream delivers against the schedule, all the time.

Ray moves the pictures, and `ray.data.read_parquet` of 2.60 has been seen to lose some without a
word. The order is a pure function, so no worker has to believe what it is given: each picture is
compared with the one planned for its step and slot before it is trained on, and at each
checkpoint and each end of an epoch all ranks together count that every slot of every step was
there once. Rows and slots are in CPU memory: an ordinary step waits for no device.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int64

from droppos.errors import TrainingError
from pipelines.order import Schedule, Window
from pipelines.stream import Batch


class Plan:
    """The rows of one step after another; holds the windows that the next step is in."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._epoch = -1
        self._windows: Iterator[Window] = iter(())
        self._first = 0
        self._rows: np.ndarray = np.empty(0, np.int64)

    def rows(self, step: int) -> Int64[np.ndarray, "B"]:
        """Return the row planned for each slot of a step; steps must not go backwards."""
        size = self._schedule.global_batch
        epoch = self._schedule.position(step).epoch
        if epoch != self._epoch:
            self._epoch, self._windows = epoch, self._schedule.windows(epoch)
            self._rows = self._rows[:0]
        start = step * size
        self._rows = self._rows[start - self._first :] if len(self._rows) else self._rows
        self._first = start
        while len(self._rows) < size:
            window = next(self._windows)
            if window.first + window.size > start:
                ahead = window.rows()[max(0, start - window.first) :]
                self._rows = np.concatenate([self._rows, ahead])
        return self._rows[:size]


class Tally:
    """What the ranks were given, and what they should have been."""

    def __init__(
        self, schedule: Schedule, start_step: int, pictures: int, device: torch.device
    ) -> None:
        """Start to count.

        Args:
            schedule: The order of the whole run.
            start_step: First step of this group of workers.
            pictures: Pictures of the begun epoch that groups before this one trained on.
            device: Where the process group adds up.
        """
        self._schedule = schedule
        self._plan = Plan(schedule)
        self._device = device
        self._step = start_step
        self._expected = schedule.position(start_step).batch * schedule.global_batch
        """Pictures of the epoch that the schedule has planned so far."""
        self._settled = pictures
        """Pictures of the epoch that all ranks trained on, when they last settled."""
        self._forget()

    def count(self, group: Sequence[Batch]) -> None:
        """Compare the micro-batches of a step with the schedule; settle at the end of an epoch.

        Every rank calls this before each step.

        Raises:
            TrainingError: If a picture is not the one planned, or the epoch's sum is wrong.
        """
        size = self._schedule.global_batch
        planned = self._plan.rows(self._step)
        first = self._step * size
        for batch in group:
            rows, slots = batch.rows.numpy(), batch.slots.numpy().astype(np.int64)
            self._compare(batch.step, rows, slots, planned)
            self._found += len(rows)
            self._found_mark += _mark(first + slots)
        self._planned_mark += _mark(np.arange(first, first + size))
        self._expected += size
        self._step += 1
        if self._schedule.position(self._step).batch == 0:
            self.settle()
            self._expected = self._settled = 0

    def settle(self) -> int:
        """Add up over all ranks, and hold the sum against the schedule; every rank calls this.

        Returns:
            Pictures of the begun epoch that were trained on: all planned so far, each once.

        Raises:
            TrainingError: If it is another number, or a slot came twice and another never.
        """
        # The marks are modulo 2**64. Their halves travel, whose sums over ranks fit an int64.
        high, low = divmod(self._found_mark % 2**64, 2**32)
        sums = torch.tensor([self._found, high, low], dtype=torch.int64, device=self._device)
        dist.all_reduce(sums)
        found, high, low = sums.tolist()
        self._settled += found
        marks_differ = (high * 2**32 + low - self._planned_mark) % 2**64
        if self._settled != self._expected or marks_differ:
            epoch = self._schedule.position(self._step - 1).epoch
            twice = "; some came twice, and others never" if marks_differ else ""
            raise TrainingError(
                f"after step {self._step} of the run, all workers together have trained on "
                f"{self._settled} pictures of epoch {epoch}, expected {self._expected}, each once"
                f"{twice}; the stream lost or repeated pictures: --resume from the newest "
                "checkpoint, which was counted, and report this"
            )
        self._forget()
        return self._settled

    def _forget(self) -> None:
        self._found = 0
        self._found_mark = 0
        self._planned_mark = 0

    def _compare(
        self,
        step: int,
        rows: Int64[np.ndarray, "b"],
        slots: Int64[np.ndarray, "b"],
        planned: Int64[np.ndarray, "B"],
    ) -> None:
        if step != self._step:
            raise TrainingError(
                f"a batch of step {step} came where step {self._step} is due; all workers must "
                "take equally many batches"
            )
        if slots.min() < 0 or slots.max() >= len(planned):
            raise TrainingError(
                f"a picture of step {step} has slot {slots.max()}, expected 0 to {len(planned) - 1}"
            )
        wrong = np.flatnonzero(planned[slots] != rows)
        if len(wrong):
            one = wrong[0]
            raise TrainingError(
                f"step {step} was given {len(wrong)} wrong pictures of {len(rows)}: in slot "
                f"{slots[one]}, expected row {planned[slots[one]]}, found row {rows[one]}; the "
                "stream does not follow its schedule: report this"
            )


def _mark(turns: Int64[np.ndarray, "n"]) -> int:
    """Sum a 64-bit hash of each turn, so that equal sums mean the same turns, each as often.

    A plain sum would not notice slots 1 and 3 in place of 2 and 2.
    """
    mixed = turns.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return int((mixed ^ (mixed >> np.uint64(32))).sum())
