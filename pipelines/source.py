"""The source of the stream: a data set of Ray's that yields what is left of a run, in order.

Imports no torch: Train's controller makes the data set for each group of workers, and no worker
starts while that imports anything. :mod:`pipelines.stream` is the workers' side.
"""

from dataclasses import dataclass
from functools import partial
from math import gcd, prod

import ray.data
from ray.data import DataContext, Dataset, ExecutionOptions, ExecutionResources
from ray.train import DataConfig

from droppos.errors import TrainingError
from pipelines import checkpoints
from pipelines.order import Schedule
from pipelines.recipe import Recipe
from pipelines.sharing import ReadWindow, Sharing, Stream
from pipelines.storage import Place, open_place
from pipelines.unhurried import rest_between_rounds
from pipelines.windows import CropOptions, Windows, read_window, window_tasks

LARGEST_BLOCK = 256
"""Rows of a block, at most: 39 MB of 224 x 224 pixels. What Ray spends on a block is spread over
so many pictures, and a micro-batch of one block reaches the worker without another copy."""
SMALLEST_BLOCK = 16
"""Below this, what Ray spends on each block would show; a larger block is taken instead."""
SHARED_WINDOWS = 200
"""Windows of an execution, about, where they are shared."""


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
    if sharing is not None:  # one task reads them all, and Ray would repeat the whole of it
        windows_per_execution = min(windows_per_execution, SHARED_WINDOWS)
    span = max(1, windows_per_execution // schedule.windows_per_epoch)
    if sharing is None:
        alone = partial(read, data=data, crop=crop, global_batch=schedule.global_batch, block=block)
        tasks, cpus = partial(window_tasks, alone), None
    else:
        stream = stream_of(schedule, data, crop, worker_batch)
        tasks, cpus = sharing.reader(stream, data, ahead=1 + (decode_tasks or 1)).tasks, 0
    source = Windows(schedule, tasks, start_step=start_step, epochs_per_execution=span)
    dataset = ray.data.read_datasource(
        source, override_num_blocks=1, concurrency=decode_tasks, num_cpus=cpus
    )
    _keep_blocks_whole(dataset.context, block, crop)
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    dataset.context.execution_options = _execution_options()
    rest_between_rounds(dataset.context)
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

    Importing the job, or the workers' side, would cost Train's controller six seconds of CPU.
    """

    recipe: Recipe
    schedule: Schedule
    decode_tasks: int
    sharing: Sharing | None = None
    read: ReadWindow = read_window
    """What reads and decodes a window."""

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
            read=self.read,
        )


def stream_of(schedule: Schedule, data: Place, crop: CropOptions, worker_batch: int) -> Stream:
    """Describe what a trial reads."""
    return Stream(
        manifest=schedule.manifest.digest,
        data=data.uri,
        seed=schedule.seed,
        window=schedule.rows_per_window,
        global_batch=schedule.global_batch,
        block=block_rows(worker_batch, schedule.rows_per_window),
        crop=crop,
    )


def join(sharing: Sharing, recipe: Recipe, schedule: Schedule) -> None:
    """Have other trials wait for one that starts, before its workers do: that takes a while."""
    assert recipe.data.path is not None
    saved = checkpoints.newest(open_place(recipe.home))
    data = open_place(recipe.data.path)
    stream = stream_of(schedule, data, crop_options(recipe), recipe.worker_batch)
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
