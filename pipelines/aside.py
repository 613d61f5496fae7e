"""Measuring aside: a checkpoint is measured in a process of its own while training goes on.

The driver starts it when a checkpoint that is due has been written, and looks now and then whether
it has ended. One is under way at a time, and at most one waits: where measuring is slower than
training, checkpoints are passed over, not heaped up. So figures arrive in the order of their steps.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError

from droppos.errors import DataError, DropposError
from pipelines import history
from pipelines.checkpoints import Saved
from pipelines.cluster import result_of
from pipelines.order import Schedule
from pipelines.recipe import Recipe

RETRIES = 1
"""Times a measurement is started again whose process or node was lost."""

TELL_S = 60.0
"""Seconds of waiting at the end of a run after which it is told what is waited for."""

Event = Mapping[str, Any]

_log = logging.getLogger(__name__)


class _UnderWay(NamedTuple):
    saved: Saved
    figures: Any
    """Reference to what it will find."""


class Aside:
    """Has a run's checkpoints measured, one after another."""

    def __init__(self, recipe: Recipe, schedule: Schedule) -> None:
        self._recipe = recipe
        self._every = recipe.measure.every_epochs * schedule.steps_per_epoch
        self._steps = schedule.steps
        self._waiting: Saved | None = None
        self._under_way: _UnderWay | None = None

    def offer(self, saved: Saved) -> None:
        """Have a checkpoint measured, if it is one that is due, before any that waits."""
        if saved.step % self._every == 0 or saved.step == self._steps:
            self._waiting = saved

    def look(self) -> Iterator[Event]:
        """Take what was found, and begin with what waits; waits for nothing itself.

        Yields:
            What a run is told: `measuring` where one begins, `metrics` or `not_measured` where it
            ends.
        """
        if self._under_way is not None:
            done, _ = ray.wait([self._under_way.figures], timeout=0)
            if not done:
                return
            yield self._told(*self._under_way)
            self._under_way = None
        if self._waiting is not None:
            saved, self._waiting = self._waiting, None
            self._under_way = _UnderWay(saved, self._begin(saved))
            yield {"kind": "measuring", "step": saved.step}

    def finish(self) -> Iterator[Event]:
        """Wait for what is under way, and for what waits.

        Yields:
            As `look`.
        """
        while self._under_way is not None or self._waiting is not None:
            if self._under_way is not None:
                done, _ = ray.wait([self._under_way.figures], timeout=TELL_S)
                if not done:  # slow, or waiting for a node that may never come again
                    _log.warning(
                        "the run has taken its last step and waits for the figures of step %d; "
                        "they need %d CPUs of the cluster; Ctrl-C ends it without them",
                        *(self._under_way.saved.step, self._recipe.measure.aside_cpus),
                    )
            yield from self.look()

    def cancel(self) -> Iterator[Event]:
        """End what is under way, unless it has just ended; a run that goes on begins it anew.

        Yields:
            As `look`.
        """
        self._waiting = None
        if not ray.is_initialized():  # the driver has left the cluster, and its tasks end with it
            return
        yield from self.look()
        if self._under_way is not None:
            ray.cancel(self._under_way.figures, force=True)
            self._under_way = None

    def _begin(self, saved: Saved) -> Any:
        """Start a process; on a GPU if there is one that training will never want."""
        spare = ray.cluster_resources().get("GPU", 0) - self._recipe.run.workers
        gpu = spare >= 1 and ray.available_resources().get("GPU", 0) >= 1
        return (
            ray.remote(_measure)
            .options(
                num_cpus=self._recipe.measure.aside_cpus, num_gpus=int(gpu), max_retries=RETRIES
            )
            .remote(self._recipe, saved, "cuda" if gpu else "cpu")
        )

    def _told(self, saved: Saved, figures: Any) -> Event:
        try:
            return {"kind": "metrics", "step": saved.step, "values": result_of(figures)}
        except (DropposError, RayError) as error:
            cause = error.cause if isinstance(error, RayTaskError) and error.cause else error
            reason = (str(cause).strip().splitlines() or [repr(cause)])[-1]
            with suppress(DataError):  # storage may be why it failed
                if not saved.place.exists():
                    reason = (
                        "it was deleted before it could be read; raise run.keep_checkpoints "
                        f"({self._recipe.run.keep_checkpoints}) or measure.every_epochs"
                    )
            return {"kind": "not_measured", "step": saved.step, "error": reason}


def _measure(recipe: Recipe, saved: Saved, device: str) -> dict[str, float]:
    """Measure a checkpoint; runs in a process of Ray's."""
    import torch  # the process that starts this, and Train's controller, need none

    from pipelines.holdout import measure_checkpoint

    torch.set_num_threads(recipe.measure.aside_cpus)
    figures = measure_checkpoint(recipe, saved, device=device, probe=True)
    history.keep_late(saved.home, saved.step, figures)
    return figures
