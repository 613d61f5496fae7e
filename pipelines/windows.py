"""The windows of an order as a source of Ray Data: one task each, which yields decoded blocks.

Imports neither torch nor Ray Train: the process that hands out tasks and every one that decodes
would pay four CPU-seconds for it.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8
from ray.data import DataContext, Datasource
from ray.data.block import Block, BlockAccessor, BlockMetadata
from ray.data.datasource import ReadTask

from droppos.errors import DataError
from droppos.pictures import crop_seed, random_crop
from pipelines.order import Schedule, Window
from pipelines.shards import read_row_group
from pipelines.storage import Place

logger = logging.getLogger(__name__)

READERS = 8
"""Row groups that one task asks storage for at once, since object storage is slow to begin."""


@dataclass(frozen=True, slots=True)
class Crop:
    """What is cut out of a picture, see :func:`droppos.pictures.random_crop`."""

    size: tuple[int, int]
    """Height and width of the result, in pixels."""
    scale: tuple[float, float]
    """Smallest and largest area, as a fraction of the picture's."""
    flip: bool
    """Mirror half of the crops."""


class Windows(Datasource):
    """One read task per window; execution i covers the i-th run of whole epochs.

    Args:
        schedule: The order of the whole run.
        read: Yields the blocks of a window from a turn on.
        start_step: First optimizer step that is still to be done.
        epochs_per_execution: Length of such a run of epochs.
    """

    def __init__(
        self,
        schedule: Schedule,
        read: Callable[[Window, int], Iterable[Block]],
        *,
        start_step: int,
        epochs_per_execution: int,
    ) -> None:
        super().__init__()
        self._schedule = schedule
        self._read = read
        self._start_step = start_step
        self._epochs_per_execution = epochs_per_execution

    def estimate_inmemory_data_size(self) -> int | None:
        """Return nothing: Ray would cut blocks by an estimate."""
        return None

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """Make the tasks of one execution, in the order of the run.

        Ray also calls this while planning, without a context, only to count the tasks.
        """
        execution = data_context._execution_idx if data_context else 0
        schedule = self._schedule
        seen = self._start_step * schedule.global_batch
        first = (
            self._start_step // schedule.steps_per_epoch + execution * self._epochs_per_execution
        )
        last = min(first + self._epochs_per_execution, schedule.epochs)
        return [
            _read_task(self._read, window, max(0, seen - window.first))
            for epoch in range(first, last)
            for window in schedule.windows(epoch)
            if window.first + window.size > seen
        ]


def _read_task(
    read: Callable[[Window, int], Iterable[Block]], window: Window, start: int
) -> ReadTask:
    # Not a method: a closure over the data source would put the whole manifest into every task.
    metadata = BlockMetadata(
        num_rows=window.size - start, size_bytes=None, input_files=None, exec_stats=None
    )
    return ReadTask(lambda: read(window, start), metadata)


def read_window(
    window: Window, start: int, *, data: Place, crop: Crop, global_batch: int, block: int
) -> Iterator[Block]:
    """Read, decode and crop one window, all or the rest of it.

    Args:
        window: The window.
        start: First turn to read; those before were seen before the run was interrupted.
        data: Folder of the prepared data set.
        crop: What is cut out of each picture.
        global_batch: Pictures of an optimizer step.
        block: Rows of a block; divides what is left of the window.

    Yields:
        Blocks with columns `image` (H, W, 3) uint8, `row` and `step` int64, `slot` (place in the
        global batch) and `epoch` int32, `ok` bool.

    Raises:
        DataError: If a row group cannot be read, or no picture of the window can be decoded.
    """
    reader = _WindowReader(window, data, crop)
    reader.load(start)
    for low in range(start, window.size, block):
        turns = np.arange(low, low + block)
        pictures = [reader.crop_or_stand_in(turn) for turn in turns.tolist()]
        yield BlockAccessor.batch_to_arrow_block(
            {
                "image": np.stack([image for image, _ in pictures]),
                "row": reader.rows[turns],
                "step": (window.first + turns) // global_batch,
                "slot": ((window.first + turns) % global_batch).astype(np.int32),
                "epoch": np.full(block, window.epoch, np.int32),
                "ok": np.array([ok for _, ok in pictures]),
            }
        )


class _WindowReader:
    """The pictures of one window, by turn."""

    def __init__(self, window: Window, data: Place, crop: Crop) -> None:
        self._window = window
        self._data = data
        self._crop = crop
        self._members, self._offsets = window.order()
        self._tables: dict[int, pa.Table] = {}
        self.rows = window.rows()

    def load(self, start: int) -> None:
        """Read the row groups of all turns from start on, several at once."""
        wanted = np.unique(self._members[start:]).tolist()
        with ThreadPoolExecutor(READERS) as pool:
            self._tables = dict(zip(wanted, pool.map(self._read, wanted), strict=True))

    def crop_or_stand_in(self, turn: int) -> tuple[UInt8[np.ndarray, "H W 3"], bool]:
        """Crop the picture of a turn, or the nearest good one before it (else after it).

        The stand-in depends on the window only, not on blocks or on where the task started, so
        a resumed run sees the same one; for that, pictures seen before are read again if need be.

        Returns:
            The crop, and whether it is of the picture itself.
        """
        try:
            return self._cropped(turn), True
        except DataError as error:
            logger.warning("picture %s is replaced by another: %s", self._key(turn), error)
        for other in chain(range(turn - 1, -1, -1), range(turn + 1, self._window.size)):
            try:
                return self._cropped(other), False
            except DataError:
                continue
        some = ", ".join(self._key(each) for each in range(min(5, self._window.size)))
        raise DataError(
            f"none of the {self._window.size} pictures of a window of {self._data} can be decoded "
            f"({some}, ...); prepare the data set again"
        )

    def _cropped(self, turn: int) -> UInt8[np.ndarray, "H W 3"]:
        return random_crop(
            self._cell("image", turn),
            size=self._crop.size,
            scale=self._crop.scale,
            flip=self._crop.flip,
            seed=crop_seed(self._window.seed, self._window.epoch, self._key(turn)),
        )

    def _key(self, turn: int) -> str:
        return self._cell("key", turn)

    def _cell(self, column: str, turn: int) -> Any:
        member = int(self._members[turn])
        if member not in self._tables:
            self._tables[member] = self._read(member)
        return self._tables[member][column][int(self._offsets[turn])].as_py()

    def _read(self, member: int) -> pa.Table:
        shard, group = self._window.shards[member], self._window.groups[member]
        return read_row_group(self._data, shard, group.group, ["image", "key"])
