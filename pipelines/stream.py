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
      smaller than 1.5 times that (`BlockOutputBuffer`); see `_keep_blocks_whole` in source.py.
    - `DataContext._execution_idx` counts the finished executions of a data set.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import cast

import numpy as np
import torch
from jaxtyping import Bool, Int32, Int64, UInt8
from ray.data import (
    DataIterator,
)
from ray.exceptions import RayTaskError
from torch import Tensor

from droppos.errors import TrainingError

Columns = dict[str, np.ndarray]
"""A batch as Ray hands it over."""


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
