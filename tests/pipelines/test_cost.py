from collections.abc import Iterator

import pytest

from pipelines.cost import HOURS, PRICE, Cost


def clock(*seconds: float) -> Iterator[float]:
    yield from seconds


def test_workers_cost_from_their_start_and_over_restarts() -> None:
    times = clock(100, 100 + 3600, 100 + 3 * 3600, 100 + 4 * 3600)
    cost = Cost(2.0, 0.5, lambda: next(times))
    cost.hold(8)
    assert cost.metrics() == {HOURS: pytest.approx(10), PRICE: pytest.approx(5)}
    cost.hold(4)  # the eight until now
    assert cost.metrics()[HOURS] == pytest.approx(10 + 16 + 4)


def test_time_before_the_first_worker_costs_nothing() -> None:
    times = clock(1e6, 1e6)
    cost = Cost(0.0, None, lambda: next(times))
    cost.hold(8)
    assert cost.metrics() == {HOURS: 0}


def test_nothing_is_told_if_the_hours_before_are_not_known() -> None:
    cost = Cost(None, 1.0)
    cost.hold(8)
    assert cost.metrics() == {}
