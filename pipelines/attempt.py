"""Attempts: one group of workers writes a run at a time, and the newest one is in the right.

Two groups that write one run would mix their checkpoints. Ray ends the workers of a driver that
was killed within a second, but not those of a node that it cannot reach any more, nor does it
know that somebody has typed the same command in a second terminal. So the run's folder says who
is in the right, and a group that is no longer named there gives up before its checkpoint counts.

    HOME/attempt.json    driver and group, each a random number; who, where and since when

A driver writes its name when it starts to train, its groups add theirs. Who comes later simply
overwrites the file: the newest has been started by somebody who wanted it.
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import uuid4

import torch
import torch.distributed as dist

from droppos.errors import DropposError, TrainingError
from pipelines.storage import Place

FILE = "attempt.json"


class SupersededError(TrainingError):
    """Another attempt has taken the run over; starting this one again would be a fight."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A driver, or one of its groups of workers, that writes a run."""

    home: Place
    """Folder of the run."""
    driver: str
    group: str = ""
    """Empty until the driver's first group has started."""

    def claim(self) -> None:
        """Be the one in the right from now on."""
        record = {
            "driver": self.driver,
            "group": self.group,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        (self.home / FILE).write_bytes(json.dumps(record, indent=1).encode() + b"\n")

    def check(self, *, group_too: bool = True) -> None:
        """Look whether this attempt is still in the right.

        Args:
            group_too: Ask for this very group, not only for its driver.

        Raises:
            SupersededError: Naming who has taken over.
            DataError: If storage cannot be read.
        """
        record = json.loads((self.home / FILE).read_bytes())
        if record["driver"] == self.driver and (not group_too or record["group"] == self.group):
            return
        raise SupersededError(
            f"run {self.home} was taken over by process {record['pid']} on {record['host']} at "
            f"{record['since']}, so this one ends and keeps what it has saved; if that was not "
            "meant, end the other one and --resume this"
        )


def claim_for_driver(home: Place) -> str:
    """Take a run over for a driver.

    Returns:
        The driver's name, for its groups.
    """
    attempt = Attempt(home, uuid4().hex[:8])
    attempt.claim()
    return attempt.driver


@dataclass(slots=True)
class Taken:
    """A run that a driver has taken over, and may give back."""

    driver: str
    """The driver's name, for its groups."""
    begun: bool = False
    """Whether its ledger is open: then it is the one in the right, whatever becomes of it."""


@contextmanager
def taken_over(home: Place) -> Iterator[Taken]:
    """Take a run over for a driver that still has to find out whether it can train.

    One that ends before it has begun gives the run back: else whoever trains now would end at the
    next checkpoint, and nobody would train.
    """
    file = home / FILE
    before = file.read_bytes() if file.exists() else None
    taken = Taken(claim_for_driver(home))
    try:
        yield taken
    except BaseException:
        if before is not None and not taken.begun:
            with suppress(DropposError):  # why it ends is the news
                Attempt(home, taken.driver).check()
                file.write_bytes(before)
        raise


def claim_for_group(home: Place, driver: str, device: torch.device) -> Attempt:
    """Take a run over for a group of workers; every rank of the process group calls this.

    Raises:
        SupersededError: On all ranks, if another driver has taken over.
    """
    said: list[str | None] = [None, None]
    if dist.get_rank() == 0:
        try:
            Attempt(home, driver).check(group_too=False)
            attempt = Attempt(home, driver, uuid4().hex[:8])
            attempt.claim()
            said = [attempt.group, None]
        except SupersededError as error:
            said = [None, str(error)]  # the others wait for an answer, whatever it is
    dist.broadcast_object_list(said, src=0, device=device)
    group, error = said
    if group is None:
        raise SupersededError(error)
    return Attempt(home, driver, group)
