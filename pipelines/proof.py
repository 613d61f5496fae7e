"""What each worker keeps so that exactness can be shown, and not only be claimed.

Its group trains on the pictures that the schedule names, each once (:mod:`pipelines.tally`), and
nobody else writes the run meanwhile (:mod:`pipelines.attempt`). Beside each checkpoint storage says
what was measured on the way to it (:mod:`pipelines.history`), and on request which pictures were
trained on (:mod:`pipelines.ids`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from pipelines import checkpoints, history, ids
from pipelines.attempt import Attempt
from pipelines.beside import Beside, forget_after
from pipelines.events import Events
from pipelines.history import HistoryWriter
from pipelines.ids import IdWriter
from pipelines.order import Schedule
from pipelines.stream import Batch
from pipelines.tally import Tally


@dataclass(frozen=True, slots=True)
class Proof:
    """One worker's part of it."""

    attempt: Attempt
    tally: Tally
    history: HistoryWriter | None
    """Rank 0 has it."""
    ids: IdWriter | None
    """None where run.record_ids is off."""

    @classmethod
    def begin(
        cls,
        attempt: Attempt,
        schedule: Schedule,
        step: int,
        begun: int,
        device: torch.device,
        *,
        record_ids: bool = False,
    ) -> "Proof":
        """Start to count where a checkpoint stands, and drop what lies beyond it; all ranks call.

        Args:
            attempt: This group, which has taken the run over.
            schedule: The order of the whole run.
            step: Where the group starts.
            begun: Pictures of the begun epoch that groups before it trained on.
            device: Where the process group adds up.
            record_ids: Keep which picture was trained on in which step.
        """
        rank = dist.get_rank()
        if rank == 0:
            # The others need not wait here: before anybody writes, all settle their counts.
            for folder in (ids.FOLDER, history.FOLDER):
                forget_after(attempt.home / folder, step)
        return cls(
            attempt,
            Tally(schedule, step, begun, device),
            HistoryWriter(attempt.home, attempt.group, step) if rank == 0 else None,
            IdWriter(attempt, schedule, rank, step) if record_ids else None,
        )

    @property
    def _beside(self) -> list[Beside[Any]]:
        return [writer for writer in (self.history, self.ids) if writer is not None]

    def count(self, group: Sequence[Batch]) -> None:
        """Take note of a step's pictures before they are trained on; every rank calls this.

        Raises:
            TrainingError: If they are not those of the schedule.
        """
        self.tally.count(group)
        if self.ids is not None:
            self.ids.add(group)

    def tell(self, events: Events, step: int, values: Mapping[str, float]) -> None:
        """Tell the driver what was measured at a step, and keep it; rank 0 calls this."""
        assert self.history is not None
        row = self.history.add(step, values)
        events.send({"kind": "metrics", "step": step, "time_ms": row.time_ms, "values": row.values})

    def settle(self, step: int) -> tuple[int, Callable[[], None]]:
        """Settle all counts for the checkpoint of a step; every rank calls this before it is made.

        Returns:
            Pictures of the begun epoch that were trained on, for the checkpoint's cursor; and what
            writes the files beside the checkpoint, to be called while it is written.

        Raises:
            TrainingError: If they are not those of the schedule.
        """
        pictures = self.tally.settle()
        writes = [writer.cut(step) for writer in self._beside]

        def write() -> None:
            for each in writes:
                each()

        return pictures, write

    def committed(self) -> None:
        """Learn that the checkpoint that was last settled for counts."""
        for writer in self._beside:
            writer.committed()

    def put_off(self) -> None:
        """Learn that storage did not take it, and the next one is to make up for it."""
        for writer in self._beside:
            writer.put_off()

    def withdraw(self) -> None:
        """Learn that it never will count."""
        for writer in self._beside:
            writer.withdraw()


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
