"""What of the stream lies in memory at once, and how many windows may so be decoded together.

Blocks leave in the order of the run, whoever is ready first; so while the first of several
windows is being decoded, all that is done of the others waits in Ray's object store: in the
worst case a whole window of pixels for each task. Ray spills to disk what does not fit. Here no
more tasks are started than fit, so nothing is spilt, however slow training is.
"""

import logging
from dataclasses import dataclass
from math import prod

from pipelines.order import window_rows
from pipelines.recipe import Recipe

AHEAD = 4
"""Micro-batches of each worker beyond the decode tasks: two fetched ahead, one being trained on,
one on its way."""
SHARE = 0.5
"""Part of the object stores that the stream may use; Ray Data allows itself no more either."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of decoded pictures."""

    window: int
    """Of one window, so of one decode task."""
    ahead: int
    """On the way to the workers and there, over the whole cluster."""

    @classmethod
    def of(cls, recipe: Recipe) -> "Footprint":
        """Compute it from a recipe: a formula, pixels alone."""
        picture = 3 * prod(recipe.model.image_size)
        rows = window_rows(recipe.data.window, recipe.optim.global_batch)
        micro_batches = recipe.run.workers * recipe.worker_batch
        return cls(rows * picture, AHEAD * micro_batches * picture)

    def total(self, tasks: int) -> int:
        """Bytes with so many decode tasks at once."""
        return tasks * self.window + self.ahead

    def tasks(self, budget: float, most: int) -> int:
        """Count the decode tasks that fit, from 1 to ``most``.

        One always runs: alone it waits for training by itself, and needs no room for a window.
        """
        return max(1, min(most, int((budget - self.ahead) // self.window)))


def decode_tasks(recipe: Recipe, decode_cpus: int, buffer_mb: float | None) -> int:
    """Choose how many windows are decoded at once.

    Args:
        recipe: The run.
        decode_cpus: CPUs it has for decoding, those of nodes that an autoscaler may add included.
        buffer_mb: MB it may hold decoded; None while nobody knows, since no node that decodes is
            there yet. Ray's own limit still holds then.
    """
    if buffer_mb is None:
        return decode_cpus
    footprint = Footprint.of(recipe)
    tasks = footprint.tasks(buffer_mb * 1e6, decode_cpus)
    if tasks < decode_cpus:
        _log.warning(
            "only %d of %d decode CPUs are used: each needs room for a window of %.0f MB decoded, "
            "and the stream may hold %.0f MB; lower data.window (%d), raise data.buffer_mb, or "
            "give Ray's object store more memory",
            tasks,
            decode_cpus,
            footprint.window / 1e6,
            buffer_mb,
            recipe.data.window,
        )
    return tasks
