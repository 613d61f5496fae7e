"""One stream for many trials: a window that several want is read and decoded once.

Each trial has its own stream (:mod:`pipelines.stream`), its own order and its own place in it, so
all that holds of a run holds of a trial. Only the reading of a window is handed to an actor, which
has a task decode it and gives the same blocks to every trial that asks. Trials at the same place
wait for each other within a few windows (:mod:`pipelines.packs`); one elsewhere reads for itself.

Imports no torch, for it is unpickled where data is read (:mod:`pipelines.windows`).
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self
from uuid import uuid4

import ray
from ray.data.block import Block
from ray.data.datasource import ReadTask
from ray.exceptions import RayError, RayTaskError

from pipelines.order import Window
from pipelines.packs import Packs, Wait
from pipelines.storage import Place
from pipelines.windows import CropOptions, Piece, read_task, read_window

ASK_AGAIN_S = 0.05
"""Seconds between two looks whether there is room."""

ReadWindow = Callable[..., Iterator[Block]]
"""As `pipelines.windows.read_window`."""

_log = logging.getLogger(__name__)


class Stream(NamedTuple):
    """What makes two streams the same: equal ones give equal blocks at equal turns."""

    manifest: str
    """Digest of the data set."""
    data: str
    """Its place."""
    seed: int
    window: int
    """Rows of a window."""
    global_batch: int
    block: int
    """Rows of a block."""
    crop: CropOptions


class Shared(NamedTuple):
    """How much was shared so far."""

    decoded: int
    """Windows that were read and decoded."""
    taken: int
    """Windows that trials took: so many would have been decoded without sharing."""


class _Pool:
    """Runs in the actor. Its methods are coroutines, so one who waits holds nobody up."""

    def __init__(self, capacity: int, patience_s: float, read: ReadWindow) -> None:
        self._packs: Packs[list[ray.ObjectRef]] = Packs(capacity, patience_s)
        self._read = read
        self._gone: set[str] = set()

    async def join(self, member: str, stream: Stream, turn: int) -> None:
        self._packs.join(member, stream, turn)

    async def leave(self, trial: str, member: str) -> None:
        """Let one member go, or all that a trial has had."""
        members = (
            {member} if member else {m for m in self._packs.known if m.startswith(f"{trial}#")}
        )
        self._gone |= members
        for each in members:
            self._packs.leave(each)

    async def take(self, member: str, stream: Stream, window: Window, data: Place) -> Any:
        first, end = window.first, window.first + window.size

        def decode() -> list[ray.ObjectRef]:
            return _decoded(self._read, stream, window, data)

        # The references come back at once: whoever asked waits for the pictures, not this actor.
        # One who has died, or left, still has calls here, which must not hold the others up.
        while member not in self._gone:
            found = self._packs.want(member, stream, first, end, decode)
            if found is not Wait.WAIT:
                return found
            await asyncio.sleep(ASK_AGAIN_S)
        return []

    async def forget(self, stream: Stream, first: int) -> None:
        self._packs.forget(stream, first)

    async def shared(self) -> Shared:
        return Shared(self._packs.decoded, self._packs.taken)


def _decoded(read: ReadWindow, stream: Stream, window: Window, data: Place) -> list[ray.ObjectRef]:
    """Have a window decoded, by a task whose blocks the calling actor owns.

    A node that is lost takes blocks with it; Ray makes them anew, since their owner is here.
    """
    count = window.size // stream.block
    task = ray.remote(num_cpus=1, num_returns=count, scheduling_strategy="SPREAD")(_decode)
    blocks: Any = task.remote(read, stream, window, data)
    return [blocks] if count == 1 else blocks


def _decode(read: ReadWindow, stream: Stream, window: Window, data: Place) -> Any:
    blocks = read(
        window,
        0,
        data=data,
        crop=stream.crop,
        global_batch=stream.global_batch,
        block=stream.block,
    )
    return next(blocks) if window.size == stream.block else blocks


@dataclass(frozen=True, slots=True)
class SharedReader:
    """Reads the windows of one trial's stream from what is decoded for all."""

    pool: Any
    """Handle of the actor."""
    member: str
    stream: Stream
    data: Place
    ahead: int
    """Windows that are asked for before the first of them is needed."""

    def tasks(self, pieces: Sequence[Piece]) -> list[ReadTask]:
        """Make one task of all windows of an execution.

        It needs no CPU, for others decode. Ray would start a process for each window, since it
        keeps no more of them than there are CPUs, and that costs more than the window.
        """
        return [read_task(partial(self, pieces), pieces)] if pieces else []

    def __call__(self, pieces: Sequence[Piece]) -> Iterator[Block]:
        """Yield the blocks of windows, each from a turn on, as `read_window` does.

        Raises:
            DataError: As `read_window` raises it.
            StorageError: Likewise.
        """
        asked: deque[ray.ObjectRef] = deque()
        left = iter(pieces)
        for window, start in pieces:
            while len(asked) < self.ahead and (piece := next(left, None)) is not None:
                asked.append(self.pool.take.remote(self.member, self.stream, piece[0], self.data))
            yield from self._blocks(asked.popleft(), window, start)

    def _blocks(self, asked: ray.ObjectRef, window: Window, start: int) -> Iterator[Block]:
        done = start // self.stream.block
        try:
            refs: Any = ray.get(asked)
            for ref in refs[done:]:
                block = ray.get(ref)
                yield block
                done += 1
        except RayTaskError as error:
            self.pool.forget.remote(self.stream, window.first)
            raise error.cause or error from error
        except RayError as error:
            # A process or a node is gone, and the blocks with it. Nobody else is given them, and
            # this trial makes its own.
            _log.warning("a shared window is lost, so this trial decodes it: %s", error)
            self.pool.forget.remote(self.stream, window.first)
            for ref in _decoded(read_window, self.stream, window, self.data)[done:]:
                yield ray.get(ref)


@dataclass(frozen=True, slots=True)
class Sharing:
    """A trial's membership; of another process, too, for it pickles."""

    pool: Any
    """Handle of the actor."""
    trial: str = ""
    """Name of the trial."""
    member: str = ""
    """Name of this process's membership: one that was killed does not come back under it."""

    @classmethod
    def start(cls, capacity: int, patience_s: float, read: ReadWindow = read_window) -> Self:
        """Start the actor; it ends with this process.

        Args:
            capacity: Decoded windows that it may hold, about.
            patience_s: Seconds without a request after which nobody waits for a trial any more.
            read: What reads and decodes a window; another than usual may count what it costs.
        """
        actor = ray.remote(_Pool).options(
            num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=1000
        )
        return cls(actor.remote(capacity, patience_s, read))

    def of(self, trial: str) -> "Sharing":
        """Be a new membership of a trial."""
        return Sharing(self.pool, trial, f"{trial}#{uuid4().hex[:8]}")

    def dismiss(self, trial: str) -> None:
        """Have nobody wait for any process that a trial has had."""
        self.pool.leave.remote(trial, "")

    def join(self, stream: Stream, turn: int) -> None:
        """Have others wait for this trial, which will read from a turn on."""
        ray.get(self.pool.join.remote(self.member, stream, turn))

    def leave(self) -> None:
        """Have nobody wait for this trial any more."""
        self.pool.leave.remote(self.trial, self.member)

    def reader(self, stream: Stream, data: Place, ahead: int) -> SharedReader:
        """Make what reads this trial's windows, so many of them asked for ahead."""
        return SharedReader(self.pool, self.member, stream, data, ahead)

    @property
    def shared(self) -> Shared:
        """How much was shared so far."""
        found: Any = ray.get(self.pool.shared.remote())
        return Shared(*found)
