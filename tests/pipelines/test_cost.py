from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines import heard as module
from pipelines.cost import HOURS, PRICE, Cost
from pipelines.heard import Heard


def clock(*seconds: float) -> Iterator[float]:
    yield from seconds


def test_workers_cost_from_their_start_and_over_restarts() -> None:
    times = clock(100, 100 + 3600, 100 + 3 * 3600, 100 + 4 * 3600)
    cost = Cost(2.0, 0.5, lambda: next(times))
    cost.hold(8)
    assert cost.metrics() == {HOURS: pytest.approx(10), PRICE: pytest.approx(5)}
    cost.hold(4)  # the eight until now
    assert cost.metrics()[HOURS] == pytest.approx(10 + 16 + 4)


@pytest.mark.parametrize(("gone", "hours"), [("lost", 2 * 10), ("waiting", 2 + 2)])
def test_only_while_machines_are_waited_for_nothing_is_held(
    gone: str, hours: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "workers_hardware", lambda _: {})
    ledger: Any = SimpleNamespace(reached=False, tag=lambda _: None)
    skipped: Any = []
    told: list[Any] = []
    heard = Heard(ledger, skipped, None, told.append)
    at = [0.0, 9.0, 10.0] if gone == "lost" else [0.0, 1.0, 9.0, 10.0]
    times = clock(*(3600 * hour for hour in at))
    heard._cost = Cost(0.0, None, lambda: next(times))

    def start() -> None:
        for rank in (0, 1):
            heard.event({"kind": "started", "rank": rank, "workers": 2})

    start()
    heard.event({"kind": gone})
    start()
    assert heard._cost.metrics() == {HOURS: pytest.approx(hours)}


def test_time_before_the_first_worker_costs_nothing() -> None:
    times = clock(1e6, 1e6)
    cost = Cost(0.0, None, lambda: next(times))
    cost.hold(8)
    assert cost.metrics() == {HOURS: 0}


def test_nothing_is_told_if_the_hours_before_are_not_known() -> None:
    cost = Cost(None, 1.0)
    cost.hold(8)
    assert cost.metrics() == {}
