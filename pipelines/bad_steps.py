"""Steps that changed nothing, for their loss or gradient was not finite: counted, to a limit."""

from collections.abc import Sequence

import torch
from torch import Tensor

from droppos.errors import TrainingError


class TooManyBadSteps(TrainingError):  # noqa: N818
    """All ranks skipped too many steps since the last checkpoint."""

    def __init__(self, steps: Sequence[int], limit: int) -> None:
        self.steps = list(steps)
        """Steps, counted from 0, whose batch made the gradient NaN or infinite."""
        super().__init__(
            f"the gradient was NaN or infinite in {len(steps)} steps since the last checkpoint "
            f"({', '.join(map(str, self.steps[:5]))}{', ...' * (len(steps) > 5)}), run.bad_steps "
            f"allows {limit}"
        )


class BadSteps:
    """Steps since the last checkpoint that changed nothing, for their gradient was not finite.

    Whether a step was skipped stays on the device until a step is logged.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._unread: list[tuple[int, Tensor]] = []
        self._noted = 0
        self.steps: list[int] = []

    def note(self, step: int, skipped: Tensor) -> None:
        """Take note of a step; waits for no device."""
        self._noted += 1
        self._unread.append((step, skipped))

    def read(self) -> list[int]:
        """Wait for the device, and return which steps were skipped since the last call."""
        if not self._unread:
            return []
        flags = torch.stack([skipped for _, skipped in self._unread]).tolist()
        found = [step for (step, _), flag in zip(self._unread, flags, strict=True) if flag]
        self._unread.clear()
        self.steps += found
        return found

    @property
    def too_many(self) -> bool:
        """Whether more were read of than the limit allows; all ranks say the same."""
        return len(self.steps) > self._limit

    def forgive(self) -> None:
        """Begin anew, all steps being read: a checkpoint is made, and it is good.

        Not if no step since the last one was: with checkpoints more often than the limit, a run
        whose every gradient is NaN would be forgiven to its end.
        """
        if len(self.steps) < self._noted:
            self.steps.clear()
            self._noted = 0

    def refuse(self) -> None:
        """Raise what the driver is to know, if there are too many.

        Raises:
            TooManyBadSteps: On all ranks.
        """
        if self.too_many:
            raise TooManyBadSteps(self.steps, self._limit)
