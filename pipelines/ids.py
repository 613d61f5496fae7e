"""The ids: which picture was trained on in which step, kept beside the checkpoints on request.

    HOME/ids/steps-00000008-00000016.rank-00001.4f0c2a9e.parquet
        the pictures of rank 1 from step 8 on, up to those that checkpoint 16 is made of; written
        by group 4f0c2a9e (:mod:`pipelines.attempt`) before that checkpoint counts

:mod:`pipelines.beside` has the way they are written.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from droppos.errors import DataError
from pipelines.attempt import Attempt
from pipelines.beside import Beside, StepsFile, steps_files
from pipelines.order import Schedule
from pipelines.storage import Place, explained
from pipelines.stream import Batch

FOLDER = "ids"
SCHEMA = pa.schema([("step", pa.int64()), ("epoch", pa.int32()), ("row", pa.int64())])
"""Steps count from 0: that of the first batch."""


def read_ids(file: StepsFile) -> pa.Table:
    """Read a file of ids whole.

    Raises:
        DataError: If storage refuses, or it is no file of ids.
    """
    with explained(file.place, "read"), file.place.open_input() as source:
        try:
            return pq.read_table(source, schema=SCHEMA)
        except pa.ArrowInvalid as error:
            raise DataError(f"{file.place} is damaged: {error}; was it changed?") from error


def id_files(home: Place) -> list[StepsFile]:
    """List a run's files of ids by step, committed or not."""
    return steps_files(home / FOLDER)


class IdWriter(Beside[tuple[int, np.ndarray]]):
    """Keeps one rank's ids in memory until a checkpoint counts."""

    def __init__(self, attempt: Attempt, schedule: Schedule, rank: int, start_step: int) -> None:
        """Start with nothing.

        Args:
            attempt: The group of workers.
            schedule: The order of the whole run.
            rank: This worker's.
            start_step: First step of the group.
        """
        suffix = f"rank-{rank:05d}.{attempt.group}.parquet"
        super().__init__(attempt.home / FOLDER, suffix, self._table, start_step)
        self._schedule = schedule

    def add(self, group: Sequence[Batch]) -> None:
        """Note the pictures of a step."""
        for batch in group:
            self.note((batch.step, batch.rows.numpy()))

    def _table(self, items: Sequence[tuple[int, np.ndarray]]) -> bytes:
        steps = np.concatenate([np.full(len(rows), step, np.int64) for step, rows in items])
        rows = np.concatenate([rows for _, rows in items])
        epochs = (steps // self._schedule.steps_per_epoch).astype(np.int32)
        sink = pa.BufferOutputStream()
        table = pa.table([steps, epochs, rows], schema=SCHEMA)
        pq.write_table(table, sink, compression="zstd")
        return sink.getvalue().to_pybytes()
