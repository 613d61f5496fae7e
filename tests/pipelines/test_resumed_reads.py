"""What a resumed stream reads of storage: which bytes, and of which row groups they are.

A filesystem that notes every read stands between the tasks and the shards.
"""

from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from PIL import Image
from pyarrow import fs as pafs

from pipelines.order import Schedule
from pipelines.shards import Manifest, Picture, ShardWriter
from pipelines.storage import Place, open_place
from pipelines.windows import CropOptions, Windows, read_window, window_tasks

B = 8
ROWS, GROUP = 200, 10
CROP = CropOptions(size=(8, 8), scale=(0.5, 1.0), flip=False)

pytestmark = [
    # Ray's own: it sets a setting it calls deprecated whenever it makes a DataContext.
    pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning:ray.data.context"),
]


class NotingFileSystem(LocalFileSystem):
    """Notes which bytes of which file are read."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[str, int, int]] = []

    def _open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> Any:
        return NotingFile(path, self.reads)


class NotingFile:
    """A file opened to read, as pyarrow uses one."""

    mode = "rb"

    def __init__(self, path: str, reads: list[tuple[str, int, int]]) -> None:
        self._file = Path(path).open("rb")  # noqa: SIM115 - pyarrow closes it
        self._name = Path(path).name
        self._reads = reads

    def read(self, size: int = -1) -> bytes:
        start = self._file.tell()
        data = self._file.read(size)
        self._reads.append((self._name, start, start + len(data)))
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Noted:
    """A data set whose reads are noted, and the row groups of its bytes."""

    def __init__(self, folder: Path) -> None:
        self.fs = NotingFileSystem()
        noting = pafs.PyFileSystem(pafs.FSSpecHandler(self.fs))
        self.place = Place(str(folder), str(folder), noting, noting)
        writer = ShardWriter(open_place(str(folder)), group_rows=10)
        shards = []
        for row in range(ROWS):
            writer.add(Picture(png(row), f"{row}.png", None, 8, 8))
            if (row + 1) % (5 * GROUP) == 0:
                shards.append(writer.close_shard())
        self.schedule = Schedule(
            manifest=Manifest(shards=tuple(shards)), seed=2, global_batch=B, window=5 * B, epochs=2
        )
        self._sizes = {shard.name: shard.bytes for shard in shards}
        self._groups: dict[tuple[str, int], range] = {}
        for shard in shards:
            metadata = pq.read_metadata(folder / shard.name)
            for group in range(metadata.num_row_groups):
                columns = [metadata.row_group(group).column(i) for i in range(5)]
                first = min(column.data_page_offset for column in columns)
                size = sum(column.total_compressed_size for column in columns)
                self._groups[shard.name, group] = range(first, first + size)

    def stream(self, start_step: int, tasks: int | None = None) -> list[int]:
        """Run the tasks of one execution in this process; the rows they yield, in order."""
        read = partial(read_window, data=self.place, crop=CROP, global_batch=B, block=B)
        source = Windows(
            self.schedule,
            partial(window_tasks, read),
            start_step=start_step,
            epochs_per_execution=2,
        )
        rows: list[int] = []
        for task in source.get_read_tasks(1)[:tasks]:
            for block in task():
                rows += block["row"].to_pylist()
        return rows

    def groups_read(self) -> set[tuple[str, int]]:
        """The row groups of which any byte was read.

        But for footers: of those, read once in a process, pyarrow asks with the file's last 64 kB.
        """
        return {
            group
            for name, start, stop in self.fs.reads
            for group, extent in self._groups.items()
            if group[0] == name and start < extent.stop and stop > extent.start
            if stop < self._sizes[name]
        }

    def groups_of(self, rows: np.ndarray) -> set[tuple[str, int]]:
        """The row groups that hold these rows."""
        return {(f"shard-{row // 50:05d}.parquet", row % 50 // GROUP) for row in rows.tolist()}


def png(row: int) -> bytes:
    """Noise of 12 kB, so that what pyarrow reads beside what it was asked for stays in a group."""
    noise = np.random.default_rng(row).integers(0, 256, (64, 64, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(noise).save(file, "PNG", compress_level=0)
    return file.getvalue()


@pytest.fixture
def noted(tmp_path: Path) -> Noted:
    return Noted(tmp_path)


@pytest.mark.parametrize("step", [0, 1, 4, 5, 13, 24, 25, 38, 49])
def test_a_resumed_stream_reads_no_row_group_of_what_is_done_but_its_windows(
    noted: Noted, step: int
) -> None:
    schedule = noted.schedule
    whole = np.concatenate([schedule.rows(0), schedule.rows(1)])
    epoch, batch = divmod(step, schedule.steps_per_epoch)
    window = batch * B // schedule.rows_per_window  # the one that holds the next batch
    begun = (epoch * schedule.rows_per_epoch) + window * schedule.rows_per_window
    end = min(begun + schedule.rows_per_window, (epoch + 1) * schedule.rows_per_epoch)

    rows = noted.stream(step, tasks=1)
    np.testing.assert_array_equal(rows, whole[step * B : end])
    # Of the window that was interrupted, only the groups that hold what is left of it.
    assert noted.groups_read() == noted.groups_of(whole[step * B : end])

    noted.fs.reads.clear()
    rows = noted.stream(step)
    np.testing.assert_array_equal(rows, whole[step * B :])
    assert noted.groups_read() == noted.groups_of(whole[step * B :])


def test_the_window_bounds_what_is_read_again(noted: Noted) -> None:
    schedule = noted.schedule
    for step in range(schedule.steps_per_epoch):
        noted.fs.reads.clear()
        noted.stream(step, tasks=1)
        done = noted.groups_of(schedule.rows(0)[: step * B])
        again = noted.groups_read() & done
        # 40 rows lie in at most 5 groups of 10, and a part of one more at each end.
        assert len(noted.groups_read()) > 0
        assert len(again) <= schedule.rows_per_window // GROUP + 1
