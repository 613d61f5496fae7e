"""What all workers of a run agree on after each step, without waiting for each other or a device.

A wish may reach one worker only: the driver speaks to rank 0, a signal to whoever it was sent to.
All must act on it at the same step, or those that go on would wait for those that left. So each
step's wishes travel, largest first, in a small reduction between the hosts' processors while the
next step is under way, and everybody hears the same after that: one step later.
"""

from datetime import timedelta

import torch
import torch.distributed as dist


class Agreement:
    """One worker's part; every rank of the default process group makes one."""

    def __init__(self, wishes: int, timeout_s: float) -> None:
        """Open a group of its own: the step's device, and its order of calls, stay out of it.

        Args:
            wishes: Numbers in a wish.
            timeout_s: Seconds after which a rank that does not answer is an error.
        """
        self._group = host_group(timeout_s)
        self._round = torch.zeros(wishes, dtype=torch.int64)
        self._under_way: dist.Work | None = None

    def settle(self, *wishes: int) -> list[int]:
        """Say what this rank wishes, and hear the largest of what any said a step ago.

        Every rank calls this after every step.
        """
        heard = self.close()
        self._round = torch.tensor(wishes, dtype=torch.int64)
        self._under_way = dist.all_reduce(
            self._round, op=dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return heard

    def close(self) -> list[int]:
        """Hear the last round; every rank calls this when it leaves the loop."""
        if self._under_way is not None:
            self._under_way.wait()
            self._under_way = None
        return self._round.tolist()


def host_group(timeout_s: float) -> dist.ProcessGroup:
    """Make a group of all ranks that talk between host memories, beside the devices' own group.

    Every rank of the default process group calls this.

    Args:
        timeout_s: Seconds after which a rank that does not answer is an error.
    """
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup)  # every rank is a member
    return group
