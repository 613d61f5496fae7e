"""The order in which pictures are seen: a pure function of manifest, seed and epoch.

No worker count, block size, clock or earlier interruption enters. An epoch is made so:

1. permute all row groups of the data set; their rows, one after another, are its sequence;
2. keep whole global batches, drop the remainder: other rows each epoch, the same on every rank;
3. cut the sequence into windows, and permute the rows inside each window.

Global batch k is rows [k * B, (k + 1) * B) of the result. Windows are counted in rows and not
in groups, so only a window's first and last group are also read by a neighbour; each is a whole
number of global batches or a whole fraction of one, so the steps of an epoch tile its windows.

Numbers in this file
    row   number of a picture in the data set as stored
    turn  number of a picture in an order: of a window, or of the whole run where it says so
    B     global batch: pictures of one optimizer step, over all workers
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil, log
from typing import Self

import numpy as np
from jaxtyping import Int64

from droppos.errors import ConfigError
from pipelines.recipe import Recipe
from pipelines.shards import Group, Manifest, Shard

VERSION = 2
"""Goes up when the same manifest, seed and settings give another order or other crops. 1 rounded
windows below a global batch up to it, and resized with Pillow."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands: the batch that comes next, readable in a checkpoint."""

    epoch: int
    batch: int
    """Global batches of this epoch already taken."""


@dataclass(frozen=True, slots=True)
class Window:
    """Rows that are shuffled together: all that one task needs to know to read them.

    Small on purpose (a few row groups and numbers): one travels with every task.
    """

    seed: int
    epoch: int
    index: int
    """Number of the window in its epoch."""
    first: int
    """Turn of its first picture in the whole run."""
    size: int
    """Rows of the window."""
    skip: int
    """Rows at the start of the first group that belong to the window before."""
    groups: tuple[Group, ...]
    """Row groups that hold the rows, in the epoch's order."""
    shards: tuple[Shard, ...]
    """The file of each group."""

    def order(self) -> tuple[Int64[np.ndarray, "size"], Int64[np.ndarray, "size"]]:
        """Shuffle the window.

        Returns:
            For each turn, the index of its group in ``groups`` and its offset in that group.
        """
        sizes = np.array([group.rows for group in self.groups])
        members = np.repeat(np.arange(len(sizes)), sizes)
        offsets = np.arange(len(members)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        order = self.skip + _generator(self.seed, self.epoch, 1 + self.index).permutation(self.size)
        return members[order], offsets[order]

    def rows(self) -> Int64[np.ndarray, "size"]:
        """Return the rows in the order in which they are seen."""
        members, offsets = self.order()
        return np.array([group.start for group in self.groups])[members] + offsets


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The order of all pictures of a run.

    Raises:
        ConfigError: If a number is not positive, or one global batch needs more pictures than
            there are.
    """

    manifest: Manifest
    seed: int
    global_batch: int
    """Pictures of one optimizer step, over all workers."""
    window: int
    """Pictures to shuffle together, about: see :func:`window_rows`."""
    epochs: int

    def __post_init__(self) -> None:
        if min(self.global_batch, self.window, self.epochs) < 1:
            raise ConfigError(
                f"optim.global_batch ({self.global_batch}), data.window ({self.window}) and "
                f"optim.epochs ({self.epochs}) must be positive; 1024, 4096 and 800 are usual"
            )
        if self.global_batch > self.manifest.rows:
            raise ConfigError(
                f"optim.global_batch {self.global_batch} is larger than the data set, which has "
                f"{self.manifest.rows} pictures, so an epoch has no step; take at most "
                f"{self.manifest.rows}, or prepare more pictures"
            )

    @classmethod
    def of(cls, recipe: Recipe, manifest: Manifest) -> Self:
        """Lay out a recipe's run on a data set.

        Raises:
            ConfigError: If a batch is larger than the data set.
        """
        return cls(
            manifest=manifest,
            seed=recipe.run.seed,
            global_batch=recipe.optim.global_batch,
            window=recipe.data.window,
            epochs=recipe.optim.epochs,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches of an epoch."""
        return self.manifest.rows // self.global_batch

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    @property
    def rows_per_epoch(self) -> int:
        """Pictures seen in an epoch: all but the remainder of a global batch."""
        return self.steps_per_epoch * self.global_batch

    @cached_property
    def rows_per_window(self) -> int:
        """Pictures shuffled together; the last window of an epoch may have fewer."""
        return min(window_rows(self.window, self.global_batch), self.rows_per_epoch)

    @property
    def windows_per_epoch(self) -> int:
        """Windows, so tasks, of an epoch."""
        return ceil(self.rows_per_epoch / self.rows_per_window)

    def position(self, step: int) -> Position:
        """Return the epoch of a step and its place in that epoch."""
        return Position(*divmod(step, self.steps_per_epoch))

    def windows(self, epoch: int) -> Iterator[Window]:
        """Cut an epoch into its windows, in order."""
        groups = self.manifest.groups
        shuffled = _generator(self.seed, epoch, 0).permutation(len(groups))
        sizes = np.array([group.rows for group in groups])[shuffled]
        ends = np.cumsum(sizes)
        for index in range(self.windows_per_epoch):
            start = index * self.rows_per_window
            stop = min(start + self.rows_per_window, self.rows_per_epoch)
            low = int(np.searchsorted(ends, start, side="right"))
            high = int(np.searchsorted(ends, stop, side="left")) + 1
            members = [groups[member] for member in shuffled[low:high]]
            yield Window(
                seed=self.seed,
                epoch=epoch,
                index=index,
                first=epoch * self.rows_per_epoch + start,
                size=stop - start,
                skip=start - int(ends[low] - sizes[low]),
                groups=tuple(members),
                shards=tuple(self.manifest.shards[group.shard] for group in members),
            )

    def rows(self, epoch: int) -> Int64[np.ndarray, "rows"]:
        """Return a whole epoch's rows in order; reshaped to (-1, B), row k is global batch k."""
        return np.concatenate([window.rows() for window in self.windows(epoch)])


def window_rows(window: int, global_batch: int) -> int:
    """Fit a window to the global batch: whole batches, or a whole fraction of one.

    It is rounded up to batches; below one it becomes the divisor that comes nearest, by ratio:
    1024 of 4096 stays, of 5000 it becomes 1000, of 5003, a prime, all.
    """
    if window >= global_batch:
        return ceil(window / global_batch) * global_batch
    # A divisor far below what was asked, 1 of a prime say, would be no window at all.
    least = ceil(window / 4)
    divisors = (rows for rows in range(least, global_batch + 1) if global_batch % rows == 0)
    return min(divisors, key=lambda rows: (abs(log(rows / window)), -rows))


def _generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    """Make the generator of one permutation: stream 0 of the groups, 1 + w of window w.

    Trap: numpy pads seeds with zeros, so default_rng([s, e]) and default_rng([s, e, 0]) are
    the same generator. All seeds here have three numbers.
    """
    return np.random.default_rng([seed, epoch, stream])
