"""The stream of training batches: manifest, seed and step, through Ray Data, to tensors.

A task of Ray reads one window of the order (:mod:`pipelines.order`), decodes and crops its
pictures in the same process, and yields blocks of equal size. Ray hands the blocks out in order,
round robin: block i goes to worker i mod n. A worker's micro-batch is a whole number of blocks
and a global batch a whole number of micro-batches per worker, so whatever n is, the blocks of
global batch k are spread over all workers' k-th step, and nowhere else.

What travels is uint8. A crop depends on (seed, epoch, picture), not on the process that makes it.

What this stands on in Ray 2.60 (tests/pipelines/test_stream.py would notice a change):
    - `ExecutionOptions.preserve_order`: tasks finish in any order, blocks leave in order. It also
      makes the splitter ignore locality and give each block to the worker with the fewest rows.
    - Blocks are neither merged nor split while one is larger than target_max_block_size and
      smaller than 1.5 times that (`BlockOutputBuffer`); see `_keep_blocks_whole`.
    - `DataContext._execution_idx` counts the finished executions of a data set.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import gcd, prod
from time import perf_counter
from typing import cast

import numpy as np
import ray.data
import torch
from jaxtyping import Bool, Int32, Int64, UInt8
from ray.data import (
    DataContext,
    DataIterator,
    Dataset,
    ExecutionOptions,
    ExecutionResources,
)
from ray.exceptions import RayTaskError
from ray.train import DataConfig
from torch import Tensor

from droppos.errors import TrainingError
from pipelines import checkpoints
from pipelines.order import Schedule
from pipelines.recipe import Recipe
from pipelines.sharing import ReadWindow, SharedWindows, Sharing, stream_of
from pipelines.storage import Place, open_place
from pipelines.windows import CropOptions, Windows, read_window

Columns = dict[str, np.ndarray]
"""A batch as Ray hands it over."""

LARGEST_BLOCK = 256
"""Rows of a block, at most: 39 MB of 224 x 224 pixels. What Ray spends on a block is spread over
so many pictures, and a micro-batch of one block reaches the worker without another copy."""
SMALLEST_BLOCK = 16
"""Below this, what Ray spends on each block would show; a larger block is taken instead."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of one worker, in CPU memory; its pixels are not to be written to."""

    step: int
    """Optimizer step it is for; `accumulate` batches in a row have the same."""
    images: UInt8[Tensor, "B H W 3"]
    """Pixels; their normalisation is the device's."""
    mirrored: Bool[Tensor, "B"]
    """Which of them are to be mirrored, on the device."""
    rows: Int64[Tensor, "B"]
    """Global numbers of the pictures."""
    slots: Int32[Tensor, "B"]
    """Places in the global batch, 0 to global_batch - 1: masks are drawn by them, so that they
    do not depend on the number of workers."""
    problems: dict[int, str]
    """By row, why a picture could not be had; another of its window stands in for it."""
    waited: float
    """Seconds this worker waited for it."""


def block_rows(worker_batch: int, window: int) -> int:
    """Choose the rows of a block: what divides micro-batch and window, of moderate size.

    128 in windows of 1024 gives 128, 1000 in windows of 2000 gives 125; 127, a prime, gives 127.
    """
    common = gcd(worker_batch, window)
    divisors = [rows for rows in range(1, common + 1) if common % rows == 0]
    largest = max(rows for rows in divisors if rows <= LARGEST_BLOCK)
    if largest >= min(SMALLEST_BLOCK, common):
        return largest
    return min(rows for rows in divisors if rows > LARGEST_BLOCK)


def make_dataset(
    schedule: Schedule,
    data: Place,
    crop: CropOptions,
    *,
    worker_batch: int,
    start_step: int = 0,
    decode_tasks: int | None = None,
    sharing: Sharing | None = None,
    read: ReadWindow = read_window,
    windows_per_execution: int = 2000,
) -> Dataset:
    """Make the data set of all that is left of a run, for TorchTrainer.

    Nothing is read yet. Each iteration covers the next few whole epochs (:func:`batches` asks
    for as many as it needs); only the first one starts inside an epoch.

    Args:
        schedule: The order of the whole run.
        data: Folder of the prepared data set.
        crop: What is cut out of each picture.
        worker_batch: Pictures of a micro-batch on one worker.
        start_step: First optimizer step that is still to be done.
        decode_tasks: Windows that are read and decoded at once, each by one task on one CPU; as
            many as there are free CPUs when not given. While the first is under way, what is
            done of the others waits in the object store (:mod:`pipelines.memory`).
        sharing: Have windows decoded together with other trials that read the same; the tasks
            that ask for them take no CPU then.
        read: What reads and decodes a window; another than usual may count what it costs.
        windows_per_execution: A new execution drains the pipeline first, so small data sets do
            several epochs in one: as many whole epochs as have about so many windows.

    Raises:
        TrainingError: If start_step is not a step of the run.
    """
    if not 0 <= start_step <= schedule.steps:
        raise TrainingError(
            f"cannot start at step {start_step}: the run has {schedule.steps} steps "
            f"({schedule.epochs} epochs of {schedule.steps_per_epoch}); "
            "resume with the recipe the checkpoint was made with"
        )
    block = block_rows(worker_batch, schedule.rows_per_window)
    span = max(1, windows_per_execution // schedule.windows_per_epoch)
    where = {"start_step": start_step, "epochs_per_execution": span}
    if sharing is None:
        alone = partial(read, data=data, crop=crop, global_batch=schedule.global_batch, block=block)
        source, cpus = Windows(schedule, alone, **where), None
    else:
        stream = stream_of(schedule, data, crop, block)
        reader = sharing.reader(stream, data, ahead=1 + (decode_tasks or 1))
        source, cpus = SharedWindows(schedule, reader, **where), 0
    dataset = ray.data.read_datasource(
        source, override_num_blocks=1, concurrency=decode_tasks, num_cpus=cpus
    )
    _keep_blocks_whole(dataset.context, block, crop)
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    dataset.context.execution_options = _execution_options()
    return dataset


def crop_options(recipe: Recipe) -> CropOptions:
    """Take what a recipe says of crops."""
    data = recipe.data
    return CropOptions(
        size=recipe.model.image_size,
        scale=data.crop_scale,
        flip=data.flip,
        scaled_decoding=data.scaled_decoding,
    )


@dataclass(frozen=True, slots=True)
class Remaining:
    """Makes the stream of what is left of a run; Ray Train calls it for each group of workers.

    It stands here and not beside the job: Train's controller unpickles it before any worker can
    start, and importing the job would cost it timm and torchvision, six seconds of CPU.
    """

    recipe: Recipe
    schedule: Schedule
    decode_tasks: int
    sharing: Sharing | None = None

    def __call__(self) -> ray.data.Dataset:
        """Start where the newest checkpoint stands, as the workers do."""
        recipe = self.recipe
        saved = checkpoints.newest(open_place(recipe.home))
        assert recipe.data.path is not None
        return make_dataset(
            self.schedule,
            open_place(recipe.data.path),
            crop_options(recipe),
            worker_batch=recipe.worker_batch,
            start_step=saved.step if saved else 0,
            decode_tasks=self.decode_tasks,
            sharing=self.sharing,
        )


def join(sharing: Sharing, recipe: Recipe, schedule: Schedule) -> None:
    """Have other trials wait for one that starts, before its workers do: that takes a while."""
    assert recipe.data.path is not None
    saved = checkpoints.newest(open_place(recipe.home))
    data = open_place(recipe.data.path)
    block = block_rows(recipe.worker_batch, schedule.rows_per_window)
    stream = stream_of(schedule, data, crop_options(recipe), block)
    sharing.join(stream, (saved.step if saved else 0) * schedule.global_batch)


def data_config(buffer_mb: float | None = None) -> DataConfig:
    """Tell Ray Train to hand the blocks out in order, wherever they are.

    Args:
        buffer_mb: MB in the object stores above which tasks pause; by default half of these.
    """
    options = _execution_options()
    if buffer_mb is not None:
        limits = ExecutionResources.for_limits(object_store_memory=int(buffer_mb * 1e6))
        options.resource_limits = limits
    return DataConfig(execution_options=options, enable_shard_locality=False)


def batches(
    shard: DataIterator,
    *,
    worker_batch: int,
    start_step: int,
    stop_step: int,
    accumulate: int = 1,
) -> Iterator[Batch]:
    """Iterate over one worker's micro-batches, from start_step to before stop_step.

    All workers must take equally many: a new execution starts when all of them ask for it.

    Args:
        shard: This worker's part of :func:`make_dataset`.
        worker_batch: Pictures of a micro-batch, as given there.
        start_step: First step, as given there.
        stop_step: Step after the last.
        accumulate: Micro-batches of a step on each worker.

    Raises:
        TrainingError: If pictures are not of the step they should be, or end too early.
        DataError: If a task could not read its pictures.
    """
    pieces = _endless(shard, worker_batch)
    for step in range(start_step, stop_step):
        for _ in range(accumulate):
            start = perf_counter()
            columns = next(pieces, None)
            waited = perf_counter() - start
            columns = _checked(columns, step, worker_batch)
            yield Batch(
                step=step,
                images=_shared(columns["image"]),
                mirrored=_own(columns["mirrored"]),
                rows=_own(columns["row"]),
                slots=_own(columns["slot"]),
                problems=_problems(columns),
                waited=waited,
            )


def _endless(shard: DataIterator, worker_batch: int) -> Iterator[Columns]:
    """Chain the executions of a data set, until one has nothing left."""
    some = True
    while some:
        some = False
        try:
            for piece in shard.iter_batches(
                batch_size=worker_batch, batch_format="numpy", prefetch_batches=2
            ):
                some = True
                yield cast(Columns, piece)
        except RayTaskError as error:
            raise _root_cause(error) from error


def _root_cause(error: BaseException) -> BaseException:
    """Unwrap what a task raised: Ray's text of it is the traceback of every process it crossed."""
    while isinstance(error, RayTaskError) and error.cause is not None:
        error = error.cause
    return error


def _checked(columns: Columns | None, step: int, worker_batch: int) -> Columns:
    if columns is None:
        raise TrainingError(
            f"the stream ended before step {step}; its schedule has fewer epochs than the loop "
            "that reads it: make both from the same recipe"
        )
    steps = columns["step"]
    if len(steps) != worker_batch or (steps != step).any():
        raise TrainingError(
            f"the stream is out of step: expected {worker_batch} pictures of step {step}, got "
            f"{len(steps)} of steps {steps.min()} to {steps.max()}; all workers must take equally "
            "many batches, and start where the data set does"
        )
    return columns


def _problems(columns: Columns) -> dict[int, str]:
    problems = columns["problem"]
    return {int(columns["row"][i]): str(problems[i]) for i in np.flatnonzero(problems != "")}


def _execution_options() -> ExecutionOptions:
    return ExecutionOptions(preserve_order=True)


def _keep_blocks_whole(context: DataContext, block: int, crop: CropOptions) -> None:
    """Have Ray pass on each block as the task yielded it.

    Its output buffer holds blocks back until they exceed the target size together, and cuts
    them where they reach 1.5 times that. In between (here 1.1 times, so that the texts of many
    pictures that cannot be had find room) a block passes untouched.
    """
    beside_pixels = 40
    """Bytes of the other columns and of the tensor's offsets, about."""
    context.target_max_block_size = int(block * (3 * prod(crop.size) + beside_pixels) / 1.1)


def _shared(array: np.ndarray) -> Tensor:
    """Wrap pixels without a copy: while the tensor lives, its block stays in Ray's store.

    The store's memory is read-only, which torch can't express. Nobody writes to a batch: the
    first thing that is done with it is to make floats of it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array)


def _own(array: np.ndarray) -> Tensor:
    """Copy what may outlive its batch."""
    return torch.from_numpy(np.array(array))
