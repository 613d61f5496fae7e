"""A run's checkpoints as its loop sees them: begun, finished, and told of."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from droppos.errors import DropposError
from pipelines import chain
from pipelines.checkpoints import COMPLETE, Retention, Saved
from pipelines.job import Job
from pipelines.proof import Proof
from pipelines.saver import Done, Saver


class Keeper:
    """Makes a run's checkpoints, and tells the driver of each when it counts."""

    def __init__(
        self,
        job: Job,
        device: torch.device,
        proof: Proof,
        start: Saved | None,
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        """Open what writes them; every rank calls this.

        Args:
            job: The run.
            device: Where its state is.
            proof: What is written beside.
            start: The checkpoint this group starts from.
            moved: Called whenever writing one gets on.
        """
        self._newest = start
        if start is not None and dist.get_rank() == 0:
            chain.keep_start(job.home, start.step, start.sha256, start.place / COMPLETE)
        self._job = job
        self._proof = proof
        self._blocked = 0.0
        run = job.recipe.run
        smallest = run.keep_best_is == "smallest"
        retention = Retention(run.keep_checkpoints, run.keep_every, run.keep_best, smallest)
        self._saver = Saver(job.home, retention, device, may_write=proof.attempt.check, moved=moved)

    @property
    def ended(self) -> int:
        """See :attr:`Saver.ended`."""
        return self._saver.ended

    def begin(
        self, step: int, state: Callable[[], dict[str, Any]], facts: Mapping[str, Any]
    ) -> None:
        """Copy the state; every rank calls this. Waits for the checkpoint before it, if need be.

        Args:
            step: Optimizer steps taken.
            state: Gives what is kept, as :func:`pipelines.stored_state.save` takes it.
            facts: What the checkpoint tells besides where in the schedule, and of what run, it is.
        """
        started = perf_counter()
        self.finish()
        position = asdict(self._job.schedule.position(step))
        pictures, write_beside = self._proof.settle(step)
        newest = self._newest
        previous = newest and {"step": newest.step, "sha256": newest.sha256}
        self._saver.begin(
            step,
            state(),
            {
                "cursor": {**position, "step": step, "pictures": pictures},
                "origin": dict(self._job.origin),
                "previous": previous,
                **facts,
            },
            beside=write_beside,
        )
        self._blocked = perf_counter() - started

    def finish_if(self, ended: int) -> None:
        """Finish the checkpoint under way if all ranks' parts of it have ended.

        Args:
            ended: The least of what the ranks said a step ago; 0 unless all of theirs have.
        """
        if ended == self._saver.step:  # or it is one that was finished meanwhile
            self.finish()

    def finish(self, last: bool = False) -> None:
        """Wait for the checkpoint under way, if there is one; every rank calls this.

        Args:
            last: No later one will make up for it.

        Raises:
            DropposError: On all ranks, if it failed for good.
        """
        try:
            done = self._saver.finish(last)
        except DropposError:
            self._proof.withdraw()
            raise
        if done is None:
            return
        if done.saved is None:
            self._proof.put_off()
        else:
            self._newest = done.saved
            self._proof.committed()
        if dist.get_rank() == 0:
            self._tell(done)

    def _tell(self, done: Done) -> None:
        send = self._job.events.send
        if done.saved is None:
            send({"kind": "not_saved", "error": done.error})
            return
        step = done.saved.step
        send({"kind": "checkpoint", "step": step, "saved": done.saved})
        values = {
            "checkpoint/blocked_s": self._blocked,
            "checkpoint/write_s": done.seconds,
            "checkpoint/size_mb": done.saved.size / 1e6,
        }
        self._proof.tell(self._job.events, step, values)

    def close(self) -> None:
        """Let go of host memory."""
        self._saver.close()
