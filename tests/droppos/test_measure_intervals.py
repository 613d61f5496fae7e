from math import isclose

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppos.errors import DataError
from droppos.measure.intervals import (
    Z_95,
    Proportion,
    design_effect,
    read_metric,
    student_95,
    wilson,
)


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [  # Newcombe (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_values(hits: int, total: int, low: float, high: float) -> None:
    assert wilson(hits, total) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_value_and_stays_a_share(counts: tuple[int, int]) -> None:
    proportion = Proportion(*counts)
    low, high = proportion.interval
    assert 0 <= low <= proportion.value <= high <= 1


def test_alike_observations_widen_the_interval_as_fewer_independent_ones_would() -> None:
    widened = Proportion(300, 1000, design_effect=10).interval
    assert all(map(isclose, widened, Proportion(30, 100).interval))


@pytest.mark.parametrize(
    ("freedom", "published"), [(1, 12.706), (4, 2.776), (9, 2.262), (10, 2.228), (30, 2.042)]
)
def test_student_has_the_published_quantiles(freedom: int, published: float) -> None:
    assert student_95(freedom) == pytest.approx(published, abs=0.003)
    assert student_95(freedom) > student_95(freedom + 1) > Z_95


@pytest.mark.parametrize("pictures", [1, 4, 16])
def test_few_pictures_are_not_sold_for_many_patches(pictures: int) -> None:
    """Pictures are easy or hard as a whole, one half in the mean: the interval is to hold it."""
    random, each, held = np.random.default_rng(0), 36, 0
    for _ in range(1000):
        hits = random.binomial(each, random.beta(1.5, 1.5, pictures))
        found, total = int(hits.sum()), each * pictures
        share = found / total
        spread = hits.var(ddof=1) if pictures > 1 else 0.0
        effect = design_effect(spread / (each * max(share * (1 - share), 1e-9)), pictures, each)
        low, high = Proportion(found, total, effect).interval
        held += low <= 0.5 <= high
    assert held / 1000 > 0.92


def test_a_proportion_prints_with_its_interval() -> None:
    assert str(Proportion(612, 1000)) == "61.2 % (58.1 to 64.2)"


def test_a_ledgers_numbers_read_as_the_proportion_did() -> None:
    found = Proportion(612, 1000)
    assert read_metric(found.metrics("a/accuracy"), "a/accuracy") == str(found)
    assert read_metric({"a/accuracy": 0.6}, "a/accuracy") is None  # of an older run
    assert read_metric({}, "a/accuracy") is None


@pytest.mark.parametrize("counts", [(0, 0), (2, 1), (-1, 1)])
def test_impossible_counts_are_refused(counts: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="0 <= hits <= total"):
        Proportion(*counts)


@given(st.integers(0, 20), st.integers(0, 19))
def test_skill_is_0_at_chance_1_for_all_hits_and_negative_below(hits: int, chance: int) -> None:
    skill = Proportion(hits, 20).skill(chance / 20)
    assert Proportion(chance, 20).skill(chance / 20) == 0
    assert Proportion(20, 20).skill(chance / 20) == 1
    assert (skill > 0, skill < 0) == (hits > chance, hits < chance)


def test_there_is_no_skill_in_what_cannot_be_missed() -> None:
    assert Proportion(5, 5).skill(1.0) == 0
