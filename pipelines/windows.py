"""The windows of an order as a source of Ray Data: one task each, which yields decoded blocks.

Imports neither torch nor Ray Train: the process that hands out tasks and every one that decodes
would pay four CPU-seconds for it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from ray.data import DataContext, Datasource
from ray.data.block import Block, BlockAccessor, BlockMetadata
from ray.data.datasource import ReadTask

from droppos.errors import DataError, StorageError
from droppos.pictures import Crop, crop_seed, random_crop
from pipelines.order import Schedule, Window
from pipelines.shards import read_row_group
from pipelines.storage import Place

Piece = tuple[Window, int]
"""A window, and its first turn that is wanted."""

READERS = 8
"""Row groups that one task asks storage for at once, since object storage is slow to begin."""


@dataclass(frozen=True, slots=True)
class CropOptions:
    """What is cut out of a picture, see :func:`droppos.pictures.random_crop`."""

    size: tuple[int, int]
    """Height and width of the result, in pixels."""
    scale: tuple[float, float]
    """Smallest and largest area, as a fraction of the picture's."""
    flip: bool
    """Mirror half of the crops."""
    scaled_decoding: bool = False
    """Decode large JPEGs at a fraction of their size."""


class Windows(Datasource):
    """The windows of a run; execution i covers the i-th run of whole epochs.

    Args:
        schedule: The order of the whole run.
        tasks: Makes the tasks that read the windows of an execution, in order.
        start_step: First optimizer step that is still to be done.
        epochs_per_execution: Length of such a run of epochs.
    """

    def __init__(
        self,
        schedule: Schedule,
        tasks: Callable[[Sequence[Piece]], list[ReadTask]],
        *,
        start_step: int,
        epochs_per_execution: int,
    ) -> None:
        super().__init__()
        self._schedule = schedule
        self._tasks = tasks
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
        first = (
            self._start_step // schedule.steps_per_epoch + execution * self._epochs_per_execution
        )
        last = min(first + self._epochs_per_execution, schedule.epochs)
        return self._tasks(list(pieces_left(schedule, self._start_step, range(first, last))))


def pieces_left(schedule: Schedule, start_step: int, epochs: Iterable[int]) -> Iterator[Piece]:
    """Give the windows of some epochs that are not wholly seen before a step, in order."""
    seen = start_step * schedule.global_batch
    for epoch in epochs:
        for window in schedule.windows(epoch):
            if window.first + window.size > seen:
                yield window, max(0, seen - window.first)


def window_tasks(
    read: Callable[[Window, int], Iterable[Block]], pieces: Sequence[Piece]
) -> list[ReadTask]:
    """Make a task of each window.

    Args:
        read: Yields the blocks of a window from a turn on.
        pieces: The windows of an execution.
    """
    return [read_task(partial(read, *piece), [piece]) for piece in pieces]


def read_task(read: Callable[[], Iterable[Block]], pieces: Sequence[Piece]) -> ReadTask:
    """Make a task that reads some windows; it must not know the data source, with its manifest."""
    rows = sum(window.size - start for window, start in pieces)
    metadata = BlockMetadata(num_rows=rows, size_bytes=None, input_files=None, exec_stats=None)
    return ReadTask(read, metadata)


def read_window(
    window: Window, start: int, *, data: Place, crop: CropOptions, global_batch: int, block: int
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
        Blocks with columns `image` (H, W, 3) uint8, `mirrored` bool, `row` and `step` int64,
        `slot` (place in the global batch) int32, and `problem`: why the picture could not be had
        and another stands in for it, empty where it could.

    Raises:
        DataError: If no picture of the window can be had.
        StorageError: If storage can't be reached.
    """
    reader = _WindowReader(window, data, crop)
    reader.load(start)
    for low in range(start, window.size, block):
        turns = np.arange(low, low + block)
        pixels = np.empty((block, *crop.size, 3), np.uint8)
        mirrored = np.empty(block, bool)
        problems = np.empty(block, object)
        for i, turn in enumerate(turns.tolist()):
            (pixels[i], mirrored[i]), problems[i] = reader.crop_or_stand_in(turn)
        yield BlockAccessor.batch_to_arrow_block(
            {
                "image": pixels,
                "mirrored": mirrored,
                "row": reader.rows[turns],
                "step": (window.first + turns) // global_batch,
                "slot": ((window.first + turns) % global_batch).astype(np.int32),
                "problem": problems,
            }
        )


class _Group(NamedTuple):
    """A row group in memory."""

    keys: list[str]
    images: pa.BinaryArray

    def image(self, offset: int) -> bytes:
        """Copy a picture's bytes out."""
        return self.images[offset].as_py()


class _WindowReader:
    """The pictures of one window, by turn."""

    def __init__(self, window: Window, data: Place, crop: CropOptions) -> None:
        self._window = window
        self._data = data
        self._crop = crop
        self._members, self._offsets = window.order()
        self._groups: dict[int, _Group | DataError] = {}
        self.rows = window.rows()

    def load(self, start: int) -> None:
        """Read the row groups of all turns from start on, several at once."""
        wanted = np.unique(self._members[start:]).tolist()
        with ThreadPoolExecutor(READERS) as pool:
            self._groups = dict(zip(wanted, pool.map(self._read, wanted), strict=True))

    def crop_or_stand_in(self, turn: int) -> tuple[Crop, str]:
        """Crop the picture of a turn, or the nearest good one before it (else after it).

        The stand-in depends on the window only, not on blocks or on where the task started, so
        a resumed run sees the same one; for that, pictures seen before are read again if need be.

        Returns:
            The crop, and what is wrong with the picture itself; empty if it is its own.
        """
        problem = ""
        for other in chain(range(turn, -1, -1), range(turn + 1, self._window.size)):
            try:
                return self._cropped(other), problem
            except StorageError:
                raise  # no picture is bad because storage is away
            except DataError as error:
                problem = problem or str(error)
        raise DataError(
            f"none of the {self._window.size} pictures of a window of {self._data} can be had; "
            f"the first of them: {problem}; restore the shards, or prepare the data set again"
        )

    def _cropped(self, turn: int) -> Crop:
        group, offset = self._group(turn), int(self._offsets[turn])
        key = group.keys[offset]
        try:
            return random_crop(
                group.image(offset),
                size=self._crop.size,
                scale=self._crop.scale,
                flip=self._crop.flip,
                scaled_decoding=self._crop.scaled_decoding,
                seed=crop_seed(self._window.seed, self._window.epoch, key),
            )
        except DataError as error:
            raise DataError(f"{key}: {error}") from error

    def _group(self, turn: int) -> _Group:
        member = int(self._members[turn])
        if member not in self._groups:
            self._groups[member] = self._read(member)
        found = self._groups[member]
        if isinstance(found, DataError):
            raise DataError(str(found))  # anew: a traceback would grow, and keep the window
        return found

    def _read(self, member: int) -> _Group | DataError:
        """Read a row group; one that is gone or damaged is an answer, not yet an error."""
        shard, group = self._window.shards[member], self._window.groups[member]
        try:
            table = read_row_group(self._data, shard, group.group, ["image", "key"])
        except StorageError:
            raise
        except DataError as error:
            return error
        return _Group(table["key"].to_pylist(), table["image"].combine_chunks())
