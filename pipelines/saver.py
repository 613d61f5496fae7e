"""Checkpoints in the background: a step waits for the copy to host memory, and for nothing else.

One checkpoint is under way at a time. All ranks learn of its end at the same step: what failed in
it is raised on all of them, or on none.
"""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from droppos.errors import StorageError
from pipelines import stored_state
from pipelines.agreement import host_group
from pipelines.checkpoints import Retention, Saved
from pipelines.storage import Place

_log = logging.getLogger(__name__)

FAILURES = 2
"""Checkpoints in a row that storage may not take before the run ends: training on would only
make more to lose."""

SLOWEST_S = 6 * 3600.0
"""Seconds that ranks wait for each other's parts: who has died is known at once, who hangs by his
pulse (:mod:`pipelines.group`), and storage may just be slow."""


class Done(NamedTuple):
    """How the checkpoint that was under way ended."""

    saved: Saved | None
    """None: storage did not take it, and the run goes on without."""
    seconds: float
    """From the first copy to the last file."""
    error: str = ""


class Saver:
    """Writes a run's checkpoints; every rank has one, and they make the same calls in order."""

    def __init__(
        self,
        home: Place,
        retention: Retention,
        device: torch.device,
        *,
        may_write: Callable[[], None],
        moved: Callable[[], None] = lambda: None,
        timeout_s: float = SLOWEST_S,
    ) -> None:
        """Open a process group of its own, for the ranks to talk in the background.

        Args:
            home: Folder of the run.
            retention: Which older checkpoints stay.
            device: Where the state is.
            may_write: See :func:`stored_state.save`.
            moved: Likewise.
            timeout_s: Seconds that ranks wait for each other's parts.
        """
        self._home = home
        self._retention = retention
        self._may_write = may_write
        self._moved = moved
        self._group = host_group(timeout_s)
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=device.type == "cuda",
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=device.type == "cuda",
            )
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[tuple[Saved, float]] | None = None
        self.step = 0
        """Step of the checkpoint under way, or of the last one."""
        self._began = 0.0
        self._failures = 0

    @property
    def ended(self) -> int:
        """Step of the checkpoint under way if this rank's part of it has ended, well or not.

        0 if not: the ranks may `finish` without waiting once all of them say the same step.
        """
        return self.step if self._under_way is not None and self._under_way.done() else 0

    def begin(
        self,
        step: int,
        state: dict[str, Any],
        facts: Mapping[str, Any],
        beside: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy the state to host memory and write it in the background; none may be under way.

        Args:
            step: Optimizer steps taken.
            state: As :func:`stored_state.save` takes it.
            facts: As it takes them.
            beside: Called on each rank in the background while it writes its part; what it raises
                makes the checkpoint fail.
        """
        assert self._under_way is None
        self._began = perf_counter()
        staged = self._stager.stage(state)
        assert isinstance(staged, dict)
        self.step = step

        def write() -> tuple[Saved, float]:
            saved = stored_state.save(
                self._home,
                step,
                staged,
                facts,
                self._retention,
                may_write=self._may_write,
                beside=beside,
                moved=self._moved,
                group=self._group,
            )
            return saved, perf_counter()

        self._under_way = self._thread.submit(write)

    def finish(self, last: bool = False) -> Done | None:
        """Wait for the checkpoint under way; None if there is none.

        Args:
            last: No later one will make up for it, so that it may not fail even once.

        Raises:
            DropposError: On all ranks, what any of them met, but for storage that could not be
                reached once: that is told in what is returned.
        """
        if self._under_way is None:
            return None
        under_way, self._under_way = self._under_way, None
        try:
            saved, ended = under_way.result()
        except StorageError as error:
            self._failures += 1
            if last or self._failures >= FAILURES:
                raise
            _log.warning("the run goes on without this checkpoint: %s", error)
            return Done(None, perf_counter() - self._began, str(error))
        self._failures = 0
        return Done(saved, ended - self._began)

    def close(self) -> None:
        """Let go of host memory; what is under way must be finished, or is given up."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._stager.close()
