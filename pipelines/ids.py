"""The ids: which picture was trained on in which step, kept beside the checkpoints on request.

    HOME/ids/steps-00000008-00000016.rank-00001.4f0c2a9e.parquet
        the pictures of rank 1 from step 8 on, up to those that checkpoint 16 is made of; written
        by group 4f0c2a9e (:mod:`pipelines.attempt`) before that checkpoint counts

So storage describes exactly the steps that are committed, and perhaps one tail that a killed
group wrote for a checkpoint it did not finish. The next group deletes that tail before it starts,
whatever its own number of workers.
"""

import logging
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from droppos.errors import DataError
from pipelines.attempt import Attempt
from pipelines.order import Schedule
from pipelines.storage import Place, explained
from pipelines.stream import Batch

FOLDER = "ids"
SCHEMA = pa.schema([("step", pa.int64()), ("epoch", pa.int32()), ("row", pa.int64())])
"""Steps count from 0: that of the first batch."""
_log = logging.getLogger(__name__)
_NAME = re.compile(r"steps-(\d+)-(\d+)\.rank-(\d+)\.(\w+)\.parquet")


class IdFile(NamedTuple):
    """One file of ids."""

    place: Place
    first: int
    """First step in it."""
    end: int
    """Step after the last in it; the checkpoint that commits it."""

    def read(self) -> pa.Table:
        """Read it whole.

        Raises:
            DataError: If storage refuses, or it is no file of ids.
        """
        with explained(self.place, "read"), self.place.open_input() as source:
            try:
                return pq.read_table(source, schema=SCHEMA)
            except pa.ArrowInvalid as error:
                raise DataError(f"{self.place} is damaged: {error}; was it changed?") from error


def id_files(home: Place) -> list[IdFile]:
    """List a run's files of ids by step, committed or not."""
    folder = home / FOLDER
    found = []
    for name in folder.children():
        if match := _NAME.fullmatch(name):
            found.append(IdFile(folder / name, int(match[1]), int(match[2])))
    return sorted(found, key=lambda file: (file.first, file.place.name))


def forget_after(home: Place, step: int) -> None:
    """Delete what no checkpoint up to this step has committed; one rank calls this."""
    for file in id_files(home):
        if file.end > step:
            file.place.delete()


class IdWriter:
    """Keeps one rank's ids in memory until a checkpoint counts.

    The training thread adds and cuts; the one that writes the checkpoint writes what was cut. What
    is cut stays here until it is known to count: a checkpoint that storage did not take leaves its
    ids to the next.
    """

    def __init__(self, attempt: Attempt, schedule: Schedule, rank: int, start_step: int) -> None:
        """Start with nothing.

        Args:
            attempt: The group of workers.
            schedule: The order of the whole run.
            rank: This worker's.
            start_step: First step of the group.
        """
        self._attempt = attempt
        self._schedule = schedule
        self._rank = rank
        self._first = start_step
        self._steps: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []
        self._cut: tuple[int, int, Place] | None = None
        self._stale: list[Place] = []
        """Files that may have been written for checkpoints that do not count."""

    def add(self, group: Sequence[Batch]) -> None:
        """Note the pictures of a step."""
        for batch in group:
            self._rows.append(batch.rows.numpy())
            self._steps.append(np.full(len(batch.rows), batch.step, np.int64))

    def cut(self, end: int) -> Callable[[], None]:
        """Take all noted pictures for the checkpoint of this step.

        Returns:
            What writes them, for another thread; nothing when there are none. It raises DataError
            if storage refuses.
        """
        if not self._rows:
            return lambda: None
        name = f"steps-{self._first:08d}-{end:08d}.rank-{self._rank:05d}.{self._attempt.group}"
        place = self._attempt.home / FOLDER / f"{name}.parquet"
        self._cut = (len(self._rows), end, place)
        steps, rows = np.concatenate(self._steps), np.concatenate(self._rows)
        stale, self._stale = self._stale, []

        def write() -> None:
            for file in stale:  # the same pictures are in this one
                file.delete()
            epochs = (steps // self._schedule.steps_per_epoch).astype(np.int32)
            sink = pa.BufferOutputStream()
            table = pa.table([steps, epochs, rows], schema=SCHEMA)
            pq.write_table(table, sink, compression="zstd")
            place.write_bytes(sink.getvalue())

        return write

    def committed(self) -> None:
        """Forget what was cut last: its checkpoint counts."""
        if self._cut is not None:
            batches, self._first, _ = self._cut
            del self._steps[:batches], self._rows[:batches]
            self._cut = None

    def put_off(self) -> None:
        """Leave what was cut last to the next checkpoint: storage did not take this one.

        What was perhaps written goes when that is: storage may still be away, and nobody waits.
        """
        if self._cut is not None:
            self._stale.append(self._cut[2])
            self._cut = None

    def withdraw(self) -> None:
        """Delete what was cut last and perhaps written: the run is another's now, or ends."""
        if self._cut is None:
            return
        place, self._cut = self._cut[2], None
        try:
            place.delete()
        except DataError as error:
            _log.warning("ids of a checkpoint that does not count stay: %s", error)
