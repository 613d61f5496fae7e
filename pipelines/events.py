"""Events: the way from the training workers to the driver, which alone writes the ledger.

A small actor beside the driver holds a bounded queue. A worker's `send` hands over and goes
on: it never waits for the actor, and a lost event is counted, not raised. Events of one
sender arrive in the order they were sent. The other way goes a wish: save, or leave.
"""

import logging
import pickle
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from threading import Lock
from typing import Any, NamedTuple, Self

import ray
from ray.exceptions import GetTimeoutError, PendingCallsLimitExceeded, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Event = Mapping[str, Any]

_PENDING = 1000
"""Calls a sender may have under way before it drops: a driver that hangs must not fill memory."""

_log = logging.getLogger(__name__)


class Wish(NamedTuple):
    """What the driver wants of the workers, beyond going on."""

    saves: int = 0
    """Checkpoints asked for so far, besides those that are due."""
    leave: int = 0
    """Whether to end: 0 not at all, 1 after the next checkpoint that is due, 2 at once, after a
    checkpoint made for it."""


class _Mailbox:
    """Runs in the actor. Events stay pickled here, or it would import torch to hold them."""

    def __init__(self, capacity: int) -> None:
        self.events: deque[bytes] = deque(maxlen=capacity)
        self.overflowed = 0
        self.wished = Wish()

    def put(self, event: bytes) -> None:
        self.overflowed += len(self.events) == self.events.maxlen
        self.events.append(event)

    def drain(self, wished: Wish) -> tuple[list[bytes], int]:
        self.wished = wished
        events, overflowed = list(self.events), self.overflowed
        self.events.clear()
        self.overflowed = 0
        return events, overflowed

    def wish(self) -> Wish:
        return self.wished


class Events:
    """One queue. The driver starts and drains it; a copy in a worker sends."""

    def __init__(self, mailbox: Any, group: int = 0) -> None:
        """Join a queue that runs; `start` makes one.

        Args:
            mailbox: Handle of the actor.
            group: Which group of workers sends, and stands in each event: one of a node that was
                cut off may speak again when the next group runs.
        """
        self._mailbox = mailbox
        self.group = group
        self._under_way: deque[ray.ObjectRef] = deque()
        self._lock = Lock()  # a worker's pulse sends from a thread of its own
        self._lost = 0
        self._asked: Any = None
        """In the driver: a drain whose answer has not come yet."""
        self.wished: Wish = Wish()
        """In the driver: what workers are told from the next `drain` on. In a worker: the newest
        that it was told when it asked."""

    @classmethod
    def start(cls, capacity: int = 100_000) -> Self:
        """Start the actor on this process's node; it ends with this process.

        Args:
            capacity: Events held between two drains; then the oldest make room.
        """
        here = ray.get_runtime_context().get_node_id()
        return cls(
            ray.remote(_Mailbox)
            .options(
                num_cpus=0,
                max_restarts=-1,
                max_pending_calls=_PENDING,
                scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
            )
            .remote(capacity)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Events, (self._mailbox, self.group)

    def send(self, event: Event) -> None:
        """Hand an event over without waiting; what cannot be delivered is counted.

        Args:
            event: Values that pickle; of a device tensor that would cost a synchronisation.
        """
        try:
            call = self._mailbox.put.remote(pickle.dumps({**event, "group": self.group}))
            with self._lock:
                self._under_way.append(call)
        except (PendingCallsLimitExceeded, RayError):
            self._lost += 1
        self._settle(0)

    def flush(self, timeout_s: float) -> None:
        """Wait until all that was sent has arrived, a worker's last act, and tell what has not."""
        self._settle(timeout_s)
        if lost := self._lost + len(self._under_way):
            _log.warning("%d events for the driver were lost: it could not be reached", lost)

    def ask(self, timeout_s: float = 5) -> Wish:
        """Ask what the driver wishes; what it last did, if there is no answer in time."""
        with suppress(RayError):  # training goes on; the driver is asked again
            wished: Any = ray.get(self._mailbox.wish.remote(), timeout=timeout_s)
            self.wished = wished
        return self.wished

    def drain(self, timeout_s: float = 10) -> list[Event]:
        """Take all events that arrived since the last call; none, with a warning, on trouble.

        What comes too late for one call is the next one's, with what has come since: the queue has
        given it away.
        """
        late = self._asked is not None
        if not late:
            self._asked = self._mailbox.drain.remote(self.wished)
        try:
            events, overflowed = ray.get(self._asked, timeout=timeout_s)
        except RayError as error:
            if not isinstance(error, GetTimeoutError):
                self._asked = None
            _log.warning("metrics of the workers cannot be fetched now: %s", error)
            return []
        self._asked = None
        if overflowed:
            _log.warning("%d events of the workers were lost: they came too fast", overflowed)
        found = [pickle.loads(event) for event in events]
        return found + self.drain(timeout_s) if late else found

    def _settle(self, timeout_s: float) -> None:
        """Forget calls that are done, and count those that failed."""
        with self._lock:
            if not self._under_way:
                return
            done, _ = ray.wait(
                list(self._under_way), num_returns=len(self._under_way), timeout=timeout_s
            )
            for ref in done:
                self._under_way.remove(ref)
                try:
                    ray.get(ref)
                except RayActorError:
                    self._lost += 1
