"""Packs: whoever reads, in whatever order and at whatever pace, nobody waits for ever."""

from dataclasses import dataclass, field
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from pipelines.packs import Packs, Wait

SIZE = 10
"""Turns of a window."""
PATIENCE_S = 60.0


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Bench:
    """Packs, and what they had decoded."""

    capacity: int = 4
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.packs: Packs[str] = Packs(self.capacity, PATIENCE_S, self.clock)

    def take(self, member: str, window: int, stream: str = "s") -> bool:
        """Ask for a window; tell whether it was given."""
        first = window * SIZE
        found = self.packs.want(member, stream, first, first + SIZE, lambda: f"{stream}{first}")
        assert found in (f"{stream}{first}", Wait.WAIT)
        return found is not Wait.WAIT


def test_those_who_read_side_by_side_have_each_window_decoded_once() -> None:
    bench = Bench()
    for member in "abc":
        bench.packs.join(member, "s", 0)
    for window in range(20):
        for member in "abc":
            assert bench.take(member, window)
    assert (bench.packs.decoded, bench.packs.taken) == (20, 60)


def test_who_is_ahead_waits_for_who_is_behind() -> None:
    bench = Bench(capacity=4)
    bench.packs.join("fast", "s", 0)
    bench.packs.join("slow", "s", 0)
    assert all(bench.take("fast", window) for window in range(4))
    assert not bench.take("fast", 4)
    assert bench.take("slow", 0)
    assert bench.take("fast", 4)
    assert not bench.take("fast", 5)


def test_one_who_stops_asking_or_leaves_is_left_behind() -> None:
    for leaves in (False, True):
        bench = Bench(capacity=4)
        bench.packs.join("fast", "s", 0)
        bench.packs.join("gone", "s", 0)
        assert all(bench.take("fast", window) for window in range(4))
        assert not bench.take("fast", 4)
        if leaves:
            bench.packs.leave("gone")
        else:
            bench.clock.now += PATIENCE_S + 1
        assert all(bench.take("fast", window) for window in range(4, 9))
        # It comes back, and reads alone from where it was.
        assert all(bench.take("gone", window) for window in range(9))


def test_one_who_left_is_forgotten() -> None:
    bench = Bench()
    bench.packs.join("a", "s", 0)
    assert bench.take("b", 0)
    assert bench.packs.known == {"a", "b"}
    bench.packs.leave("b")
    assert bench.packs.known == {"a"}


def test_one_who_comes_late_shares_what_is_still_held() -> None:
    bench = Bench(capacity=8)
    assert all(bench.take("first", window) for window in range(3))
    bench.packs.join("second", "s", 0)
    assert all(bench.take("second", window) for window in range(3))
    assert bench.packs.decoded == 3


def test_those_at_another_place_do_not_hold_the_pack_up() -> None:
    bench = Bench(capacity=4)
    bench.packs.join("old", "s", 500)
    assert all(bench.take("old", window) for window in range(50, 60))
    for member in ("new", "newer"):
        bench.packs.join(member, "s", 0)
    for window in range(10):
        assert bench.take("old", 60 + window)
        assert bench.take("new", window)
        assert bench.take("newer", window)
    assert bench.packs.decoded == 30
    assert len(list(bench.packs)) == 2


def test_other_streams_share_nothing() -> None:
    bench = Bench()
    assert bench.take("a", 0, "one")
    assert bench.take("b", 0, "two")
    assert bench.packs.decoded == 2


def test_a_window_that_was_forgotten_is_decoded_again() -> None:
    bench = Bench()
    assert bench.take("a", 0)
    bench.packs.forget("s", 0)
    assert bench.take("a", 0)
    assert bench.packs.decoded == 2


@given(
    seed=st.integers(0, 2**32),
    members=st.integers(1, 5),
    capacity=st.integers(1, 12),
    ahead=st.integers(1, 4),
)
def test_nobody_waits_for_one_who_waits(seed: int, members: int, capacity: int, ahead: int) -> None:
    """Each member asks for several windows at once, out of order; some go back as after a crash.

    The clock stands still: patience helps nobody.
    """
    random = Random(seed)
    bench = Bench(capacity)
    last = 40
    begin = {f"m{i}": random.randrange(30) for i in range(members)}
    for member, start in begin.items():
        bench.packs.join(member, "s", start * SIZE + 3)
    got: dict[str, set[int]] = {member: set() for member in begin}
    crashes = random.randrange(4)
    while unfinished := [m for m in begin if len(got[m]) < last - begin[m]]:
        moved = False
        for member in random.sample(unfinished, len(unfinished)):
            left = [w for w in range(begin[member], last) if w not in got[member]][:ahead]
            for window in random.sample(left, len(left)):
                if bench.take(member, window):
                    got[member].add(window)
                    moved = True
        for member in set(begin) - set(unfinished):
            bench.packs.leave(member)
        assert moved, "all wait for each other"
        if crashes and random.random() < 0.5:
            crashes -= 1
            member = random.choice(unfinished)
            back = random.randrange(begin[member], last)
            got[member] = {w for w in got[member] if w < back}
