"""Who reads beside whom: streams that are at the same place have each window decoded once.

A pack is those who read the same order at about the same place. A window that one of them asks
for is decoded for all, and held until all have taken it. Who is ahead waits once as much is held
as there is room for; who is behind never waits: what it needs is held, or is decoded for it. So
nobody waits for somebody who waits for it, and one who stops asking is left behind after a while.

Pure bookkeeping, in the actor of :mod:`pipelines.sharing`: it knows neither Ray nor pictures.

Numbers in this file
    turn   number of a picture in the order of the whole run
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from time import monotonic
from typing import Generic, TypeVar

Content = TypeVar("Content")

LEAST = 2
"""Windows that a pack may hold however many packs there are."""
REMEMBERED = 1000
"""Windows that a member is known to have taken, the last ones; more than it asks for at once."""


class Wait(Enum):
    """The answer to one who is too far ahead."""

    WAIT = "ask again"


@dataclass
class Held(Generic[Content]):
    """A window that is decoded, or is being decoded."""

    content: Content
    end: int
    """Turn after its last."""
    missing: set[str]
    """Members that have not taken it."""


@dataclass
class Pack(Generic[Content]):
    """Members who read the same order at about the same place."""

    stream: Hashable
    low: int
    """Turns before this one are no longer held."""
    members: dict[str, int] = field(default_factory=dict)
    """From which turn on each of them reads."""
    held: dict[int, Held[Content]] = field(default_factory=dict)
    """By first turn."""

    @property
    def high(self) -> int:
        """Turn after the last that is held."""
        return max((held.end for held in self.held.values()), default=self.low)

    def holds(self, stream: Hashable, turn: int) -> bool:
        """Tell whether it has all from a turn on, or comes to it next."""
        return self.stream == stream and self.low <= turn <= self.high

    def drop(self, member: str) -> None:
        """Wait no longer for a member."""
        self.members.pop(member, None)
        for held in self.held.values():
            held.missing.discard(member)

    def make_room(self, most: int) -> bool:
        """Let go of windows that all have taken, oldest first; tell whether one more has room."""
        for first in sorted(self.held):
            if len(self.held) < most or self.held[first].missing:
                break
            self.low = max(self.low, self.held.pop(first).end)
        return len(self.held) < most


class Packs(Generic[Content]):
    """All packs of a search."""

    def __init__(
        self, capacity: int, patience_s: float, now: Callable[[], float] = monotonic
    ) -> None:
        """Begin without members.

        Args:
            capacity: Windows that all packs together may hold, about.
            patience_s: Seconds without a request after which a pack no longer waits for a member.
            now: A clock, in seconds.
        """
        self._capacity = capacity
        self._patience_s = patience_s
        self._now = now
        self._packs: list[Pack[Content]] = []
        self._asked: dict[str, float] = {}
        self._has: dict[str, set[int]] = {}
        self.decoded = 0
        """Windows that were decoded."""
        self.taken = 0
        """Windows that members took."""

    def join(self, member: str, stream: Hashable, turn: int) -> None:
        """Count on a member that will ask from a turn on, so that others do not run away from it.

        Args:
            member: Its name.
            stream: What it reads; only equal streams share.
            turn: First turn it needs.
        """
        self.leave(member)
        self._asked[member] = self._now()
        self._enter(self._near(stream, turn), member, turn)

    @property
    def known(self) -> set[str]:
        """Members that have joined or asked, and not left."""
        return set(self._asked)

    def leave(self, member: str) -> None:
        """Count on a member no longer."""
        self._asked.pop(member, None)
        self._has.pop(member, None)
        self._leave_pack(member)

    def want(
        self,
        member: str,
        stream: Hashable,
        first: int,
        end: int,
        decode: Callable[[], Content],
    ) -> Content | Wait:
        """Give a member a window, decoded for it or before, or tell it to ask again.

        Args:
            member: Who asks.
            stream: What it reads.
            first: First turn of the window.
            end: Turn after its last.
            decode: Starts decoding it.
        """
        self._asked[member] = self._now()
        has = self._has.setdefault(member, set())
        pack = self._pack_of(member, stream, first, end)
        if first not in pack.held:
            if first >= pack.high and not self._has_room(pack):
                return Wait.WAIT
            self.decoded += 1
            missing = {other for other in pack.members if self._needs(pack, other, first, end)}
            pack.held[first] = Held(decode(), end, missing)
        held = pack.held[first]
        held.missing.discard(member)
        has.add(first)
        if len(has) > 2 * REMEMBERED:
            self._has[member] = set(sorted(has)[-REMEMBERED:])
        self.taken += 1
        return held.content

    def forget(self, stream: Hashable, first: int) -> None:
        """Forget a window that could not be decoded: who asks for it again has it tried again."""
        for pack in self._packs:
            if pack.stream == stream:
                pack.held.pop(first, None)

    def _has_room(self, pack: Pack[Content]) -> bool:
        most = max(LEAST, self._capacity // len(self._packs))
        if pack.make_room(most):
            return True
        for member in list(pack.members):
            waited_for = any(member in held.missing for held in pack.held.values())
            if waited_for and self._now() - self._asked[member] > self._patience_s:
                pack.drop(member)
        return pack.make_room(most)

    def _needs(self, pack: Pack[Content], member: str, first: int, end: int) -> bool:
        """Tell whether a member will ask for a window: it may have it, from another pack say.

        One that goes back to a checkpoint asks for some again; they are not kept for it.
        """
        return end > pack.members[member] and first not in self._has.get(member, ())

    def _pack_of(self, member: str, stream: Hashable, first: int, end: int) -> Pack[Content]:
        mine = next((pack for pack in self._packs if member in pack.members), None)
        # It asks for several windows at once, and one may overtake another, so any is in reach
        # that comes after what was let go of.
        if mine is not None and mine.stream == stream and mine.low < end:
            return mine
        self._leave_pack(member)
        return self._enter(self._near(stream, first), member, first)

    def _near(self, stream: Hashable, turn: int) -> Pack[Content]:
        """Find the pack that reads at a turn, or begin one."""
        for pack in self._packs:
            if pack.holds(stream, turn):
                return pack
        self._packs.append(Pack(stream, turn))
        return self._packs[-1]

    def _enter(self, pack: Pack[Content], member: str, turn: int) -> Pack[Content]:
        pack.members[member] = turn
        for first, held in pack.held.items():
            if self._needs(pack, member, first, held.end):
                held.missing.add(member)
        return pack

    def _leave_pack(self, member: str) -> None:
        for pack in self._packs:
            pack.drop(member)
        self._packs = [pack for pack in self._packs if pack.members]

    def __iter__(self) -> Iterator[Pack[Content]]:
        return iter(self._packs)
