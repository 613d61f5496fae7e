"""A run's checkpoints as its loop sees them: begun, finished, and told of."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from time import perf_counter

import torch.distributed as dist

from droppos.errors import DropposError
from droppos.step import TrainState
from pipelines import chain
from pipelines.checkpoints import COMPLETE, Retention, Saved
from pipelines.facts import facts
from pipelines.job import Job
from pipelines.kept_state import kept_state
from pipelines.proof import Proof
from pipelines.saver import Done, Saver


class Keeper:
    """Makes a run's checkpoints, and tells the driver of each when it counts."""

    def __init__(
        self,
        job: Job,
        state: TrainState,
        proof: Proof,
        start: Saved | None,
        init_from: Mapping[str, str] | None = None,
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        """Open what writes them; every rank calls this.

        Args:
            job: The run.
            state: What is kept.
            proof: What is written beside.
            start: The checkpoint this group starts from.
            init_from: `uri` and `sha256` of the weights the run began with, if it did.
            moved: Called whenever writing one gets on.
        """
        run = job.recipe.run
        self._newest = start
        if start is not None and dist.get_rank() == 0:
            chain.keep_start(job.home, start.step, start.sha256, start.place / COMPLETE)
        self._job = job
        self._state = state
        self._proof = proof
        self._init_from = init_from
        self._blocked = 0.0
        self._saver = Saver(
            job.home,
            Retention(
                run.keep_checkpoints, run.keep_every, run.keep_best, run.keep_best_is == "smallest"
            ),
            state.device,
            may_write=proof.attempt.check,
            moved=moved,
        )

    @property
    def ended(self) -> int:
        """See :attr:`Saver.ended`."""
        return self._saver.ended

    def begin(self, metrics: dict[str, float]) -> None:
        """Copy the state; every rank calls this. Waits for the checkpoint before it, if need be.

        Args:
            metrics: Of the held-out pictures at this step, if they were measured.
        """
        started = perf_counter()
        self.finish()
        job, state = self._job, self._state
        cursor = {**asdict(job.schedule.position(state.step)), "step": state.step}
        pictures, write_ids = self._proof.settle(state.step)
        newest = self._newest
        previous = newest and {"step": newest.step, "sha256": newest.sha256}
        self._saver.begin(
            state.step,
            kept_state(state),
            {
                "cursor": {**cursor, "pictures": pictures},
                **facts(job.recipe, job.schedule.manifest, self._init_from),
                "origin": dict(job.origin),
                "previous": previous,
                "metrics": metrics,
                "random_states": dist.get_world_size(),
                "random_devices": sorted({"cpu", state.device.type}),
            },
            beside=write_ids,
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
