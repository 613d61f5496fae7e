"""The ids: which picture was trained on in which step, kept beside the checkpoints on request.

    HOME/ids/steps-00000008-00000016.rank-00001.4f0c2a9e.parquet
        the pictures of rank 1 from step 8 on, up to those that checkpoint 16 is made of; written
        by group 4f0c2a9e (:mod:`pipelines.attempt`) before that checkpoint counts

So storage describes exactly the steps that are committed, and perhaps one tail that a killed
group wrote for a checkpoint it did not finish. The next group deletes that tail before it starts,
whatever its own number of workers.
"""

import re
from collections.abc import Sequence
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
    """Keeps one rank's ids in memory until a checkpoint is about to count."""

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
        self._written: Place | None = None

    def add(self, group: Sequence[Batch]) -> None:
        """Note the pictures of a step."""
        for batch in group:
            self._rows.append(batch.rows.numpy())
            self._steps.append(np.full(len(batch.rows), batch.step, np.int64))

    def write(self, end: int) -> None:
        """Write all noted pictures, for the checkpoint of this step; nothing when there are none.

        Raises:
            DataError: If storage refuses.
        """
        self._written = None
        if not self._rows:
            return
        steps = np.concatenate(self._steps)
        epochs = (steps // self._schedule.steps_per_epoch).astype(np.int32)
        table = pa.table([steps, epochs, np.concatenate(self._rows)], schema=SCHEMA)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        name = f"steps-{self._first:08d}-{end:08d}.rank-{self._rank:05d}.{self._attempt.group}"
        self._written = self._attempt.home / FOLDER / f"{name}.parquet"
        self._written.write_bytes(sink.getvalue())
        self._first, self._steps, self._rows = end, [], []

    def withdraw(self) -> None:
        """Delete what was written last: the run is another's now, and this never counted."""
        if self._written is not None:
            self._written.delete()
