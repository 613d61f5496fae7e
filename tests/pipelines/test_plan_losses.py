"""What losses cost, and how often to save: the optimum, its approximations, and simulated lives."""

from math import exp, inf, isinf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.plan.life import live
from pipelines.plan.losses import Losses, best, daly, young

rates = st.floats(1e-8, 1e-3)
savings = st.floats(0.01, 600)


def losses(
    hard: float = 0, noticed: float = 0, blocked: float = 0, write: float = 0, restart: float = 0
) -> Losses:
    return Losses(
        hard_per_s=hard,
        noticed_per_s=noticed,
        blocked_s=blocked,
        write_s=write,
        restart_s=restart,
    )


@given(rate=rates, saving=savings, restart=st.floats(0, 600), off=st.floats(1.05, 3))
def test_the_best_interval_beats_its_neighbours(
    rate: float, saving: float, restart: float, off: float
) -> None:
    strikes = losses(rate, blocked=saving, restart=restart)
    interval = strikes.best_interval_s
    assert strikes.factor(interval) < strikes.factor(interval * off)
    assert strikes.factor(interval) < strikes.factor(interval / off)


@given(rate=rates, saving=savings)
def test_the_best_interval_solves_its_equation(rate: float, saving: float) -> None:
    x = rate * best(rate, saving)
    assert (1 - x) * exp(x) == pytest.approx(exp(-rate * saving), abs=1e-9)


@given(rate=st.floats(1e-7, 1e-5), saving=st.floats(0.1, 30))
def test_youngs_and_dalys_intervals_are_near_it_where_losses_are_rare(
    rate: float, saving: float
) -> None:
    exact = best(rate, saving)
    assert young(rate, saving) == pytest.approx(exact, rel=0.02)
    assert daly(rate, saving) == pytest.approx(exact, rel=0.001)
    assert abs(daly(rate, saving) - exact) <= abs(young(rate, saving) - exact)


def test_the_best_interval_of_next_to_no_losses_is_not_lost_in_rounding() -> None:
    for rate in (1e-9, 1e-12, 1e-15, 1e-18):
        assert best(rate, 0.01) == pytest.approx(young(rate, 0.01), rel=1e-4)


def test_where_losses_are_as_often_as_checkpoints_take_daly_gives_their_mean_time() -> None:
    assert daly(1e-2, 300) == 100


def test_without_losses_checkpoints_are_all_that_costs() -> None:
    none = losses(blocked=5)
    assert none.factor(100) == pytest.approx(1.05)
    assert isinf(none.best_interval_s)


def test_an_interval_is_no_shorter_than_a_checkpoint_takes() -> None:
    assert losses(1e-3, blocked=0.01, write=40).best_interval_s == 40


def test_a_notice_costs_no_step_so_it_moves_no_interval() -> None:
    with_notice = losses(1e-5, noticed=1e-3, blocked=3, restart=60)
    assert with_notice.best_interval_s == losses(1e-5, blocked=3, restart=60).best_interval_s
    assert with_notice.factor(1000) > losses(1e-5, blocked=3, restart=60).factor(1000)


@given(rate=rates, more=st.floats(1, 10), interval=st.floats(10, 1000))
def test_more_losses_never_cost_less(rate: float, more: float, interval: float) -> None:
    few, many = losses(rate, blocked=1, restart=60), losses(rate * more, blocked=1, restart=60)
    assert few.factor(interval) <= many.factor(interval)


def test_what_is_lost_before_each_checkpoint_never_ends() -> None:
    assert losses(1, blocked=1).factor(1000) == inf
    assert live(1e6, 1000, losses(1, blocked=1), 0).seconds == inf


@pytest.mark.parametrize(
    "strikes",
    [
        losses(blocked=2),
        losses(1 / 3600, blocked=2, restart=120),
        losses(1 / 3600, blocked=10, write=60, restart=300),
        losses(noticed=1 / 1800, blocked=2, write=10, restart=120),
        losses(1 / 7200, 1 / 3600, blocked=5, write=20, restart=240),
    ],
)
def test_simulated_lives_take_as_long_as_the_formula_says(strikes: Losses) -> None:
    work, interval, lives = 2e5, 900, 200
    found = live(work, interval, strikes, seed=0, lives=lives)
    error = 4 * found.spread_s / lives**0.5
    assert found.seconds == pytest.approx(work * strikes.factor(interval), abs=error, rel=0.01)


def test_a_life_counts_what_struck_it() -> None:
    strikes = losses(1 / 3600, 1 / 1800, blocked=1, restart=60)
    found = live(1e6, 900, strikes, seed=0, lives=50)
    assert found.noticed / found.hard == pytest.approx(2, rel=0.1)
    assert found.hard == pytest.approx((found.seconds) / 3600, rel=0.1)
    # A little less than half an interval: early losses in one are likelier than late ones.
    rate = strikes.hard_per_s + strikes.noticed_per_s
    each = 1 / rate - 900 / (exp(rate * 900) - 1)
    assert found.again_s / found.hard == pytest.approx(each, rel=0.1)


def test_the_same_seed_gives_the_same_life() -> None:
    strikes = losses(1e-4, 1e-4, 2, 10, 60)
    assert live(1e5, 500, strikes, 3) == live(1e5, 500, strikes, 3)
    assert live(1e5, 500, strikes, 3) != live(1e5, 500, strikes, 4)
