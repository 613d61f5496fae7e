"""What each worker keeps so that exactness can be shown, and not only be claimed.

Its group trains on the pictures that the schedule names, each once (:mod:`pipelines.tally`), and
nobody else writes the run meanwhile (:mod:`pipelines.attempt`); on request storage says which
pictures those were (:mod:`pipelines.ids`).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from pipelines import checkpoints
from pipelines.attempt import Attempt
from pipelines.ids import IdWriter, forget_after
from pipelines.order import Schedule
from pipelines.stream import Batch
from pipelines.tally import Tally


@dataclass(frozen=True, slots=True)
class Proof:
    """One worker's part of it."""

    attempt: Attempt
    tally: Tally
    ids: IdWriter | None
    """None where run.record_ids is off."""

    @classmethod
    def begin(
        cls,
        attempt: Attempt,
        schedule: Schedule,
        saved: checkpoints.Saved | None,
        record_ids: bool,
        device: torch.device,
    ) -> "Proof":
        """Start to count where a checkpoint stands, and drop ids beyond it; every rank calls this.

        Args:
            attempt: This group, which has taken the run over.
            schedule: The order of the whole run.
            saved: Where the group starts; None at the beginning.
            record_ids: Keep which picture was trained on in which step.
            device: Where the process group adds up.
        """
        step = saved.step if saved else 0
        if dist.get_rank() == 0:
            # The others need not wait here: before anybody writes ids, all settle their counts.
            forget_after(attempt.home, step)
        tally = Tally(schedule, step, pictures_begun(saved, schedule), device)
        ids = IdWriter(attempt, schedule, dist.get_rank(), step) if record_ids else None
        return cls(attempt, tally, ids)

    def count(self, group: Sequence[Batch]) -> None:
        """Take note of a step's pictures before they are trained on; every rank calls this.

        Raises:
            TrainingError: If they are not those of the schedule.
        """
        self.tally.count(group)
        if self.ids is not None:
            self.ids.add(group)

    def settle(self, step: int) -> tuple[int, Callable[[], None]]:
        """Settle all counts for the checkpoint of a step; every rank calls this before it is made.

        Returns:
            Pictures of the begun epoch that were trained on, for the checkpoint's cursor; and what
            writes the ids, to be called while it is written.

        Raises:
            TrainingError: If they are not those of the schedule.
        """
        pictures = self.tally.settle()
        return pictures, self.ids.cut(step) if self.ids is not None else lambda: None

    def committed(self) -> None:
        """Learn that the checkpoint that was last settled for counts."""
        if self.ids is not None:
            self.ids.committed()

    def put_off(self) -> None:
        """Learn that storage did not take it, and the next one is to make up for it."""
        if self.ids is not None:
            self.ids.put_off()

    def withdraw(self) -> None:
        """Learn that it never will count."""
        if self.ids is not None:
            self.ids.withdraw()


def pictures_begun(saved: checkpoints.Saved | None, schedule: Schedule) -> int:
    """Tell how many pictures of the begun epoch the groups before trained on.

    The checkpoint says so. Older ones did not yet, and one that was made with another batch or
    other data (--allow-changes) speaks of another epoch: these are believed to be exact.
    """
    if saved is None:
        return 0
    position = schedule.position(saved.step)
    planned = position.batch * schedule.global_batch
    now = {**asdict(position), "batch size": schedule.global_batch}
    then = {**saved.cursor, "batch size": saved.record["recipe"]["optim"]["global_batch"]}
    return then.get("pictures", planned) if then.items() >= now.items() else planned
