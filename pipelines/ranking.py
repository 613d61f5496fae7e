"""Statistics over a search's finished trials: what matters, what ranks alike, what is chance."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, cast

import numpy as np

from pipelines.space import Dimension, Point, Space, Value

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

FEWEST_TRUSTED = 10
"""Finished trials below which an importance is not to be trusted."""
FEWEST_RANKED = 3
"""Trials from which on a rank correlation is told; two always agree or disagree fully."""
DRAWN = 5000
"""Searches over equally good settings that a lead is held against."""


def importances(
    space: Space, points: Sequence[Point], values: Sequence[float]
) -> dict[str, float] | str:
    """Find how much of the objective's variation each field explains (functional ANOVA).

    Args:
        space: What was searched.
        points: Settings of finished trials.
        values: Objective of each.

    Returns:
        Shares that sum to 1, by the field's dotted name; or why there are none.
    """
    varied = [dimension for dimension in space if len(set(_column(dimension, points))) > 1]
    if len(space) < 2:
        return "Only one field was searched, so there is nothing to weigh it against."
    if len(points) < FEWEST_RANKED:
        return f"It takes {FEWEST_RANKED} finished trials, and there {_are(len(points))}."
    if np.ptp(values) < 1e-12:
        return "All finished trials have the same objective, so no field explains a difference."
    if len(varied) < 2:
        return "Fewer than two fields differ among the finished trials."
    return _anova(varied, points, values)


def _are(number: int) -> str:
    return f"is {number}" if number == 1 else f"are {number or 'none'}"


def _column(dimension: Dimension, points: Sequence[Point]) -> list[Value]:
    return [point[dimension.field] for point in points]


def _anova(
    space: Sequence[Dimension], points: Sequence[Point], values: Sequence[float]
) -> dict[str, float] | str:
    with _quiet():
        import optuna
        from optuna.importance import FanovaImportanceEvaluator, get_param_importances

        ways = {dimension.field: _distribution(dimension, points) for dimension in space}
        study = optuna.create_study(direction="maximize")
        for point, value in zip(points, values, strict=True):
            params = {name: point[name] for name in ways}
            study.add_trial(
                optuna.trial.create_trial(params=params, distributions=ways, value=value)
            )
        # Not PED-ANOVA: its best tenth of few trials is one trial.
        try:
            shares = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
        except RuntimeError:  # no tree of the forest found anything to split on
            return "The finished trials do not differ enough for any field to explain it."
    return {name: float(share) for name, share in shares.items()}


def _distribution(dimension: Dimension, points: Sequence[Point]) -> "BaseDistribution":
    """Write a field as Optuna's: numbers have an order, even where they are listed."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    seen = _column(dimension, points)
    every = [*dimension.values, *(value for value in seen if value not in dimension.values)]
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in every):
        return CategoricalDistribution(list(dict.fromkeys(every)))
    numbers = cast(list[float], every)
    log = dimension.kind == "loguniform"
    if all(isinstance(number, int) for number in numbers):
        return IntDistribution(int(min(numbers)), int(max(numbers)), log=log)
    return FloatDistribution(min(numbers), max(numbers), log=log)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna from telling of a study that nobody asked for."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Find whether two figures order trials alike (Spearman).

    Returns:
        From -1, the opposite order, to 1, the same; None where either is constant.
    """
    ranks = np.stack([_ranks(first), _ranks(second)])
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    lengths = np.sqrt((centred**2).sum(axis=1))
    if not lengths.all():
        return None
    return float(np.clip(centred[0] @ centred[1] / lengths.prod(), -1, 1))


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Number values from the smallest; equal ones share the mean of their numbers."""
    _, inverse, counts = np.unique(
        np.asarray(values, float), return_inverse=True, return_counts=True
    )
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def smaller_is_better(figure: str) -> bool:
    """Tell whether a figure is a loss, by its name."""
    return any(word in figure.lower() for word in ("nats", "loss"))


def correlations(
    figures: Sequence[Mapping[str, float]],
) -> dict[tuple[str, str], tuple[float | None, int]]:
    """Correlate ranks of each pair of figures; a loss is taken negative, so all grow if better.

    Args:
        figures: Of each trial, those that were measured.

    Returns:
        Correlation and number of trials, for each pair that enough trials have.
    """
    names = list(dict.fromkeys(name for row in figures for name in row))
    pairs = {}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            both = [row for row in figures if first in row and second in row]
            if len(both) >= FEWEST_RANKED:
                columns = (
                    [-row[name] if smaller_is_better(name) else row[name] for row in both]
                    for name in (first, second)
                )
                pairs[first, second] = rank_correlation(*columns), len(both)
    return pairs


def could_be_chance(correlation: float, trials: int) -> bool:
    """Tell whether figures that have nothing to do with each other agree so well in 5 of 100."""
    return abs(correlation) < 1.96 / np.sqrt(trials - 1)


@dataclass(frozen=True, slots=True)
class Setting:
    """Trials whose values are equal but for the seed, by which only chance goes."""

    trials: tuple[int, ...]
    """Where they stand among all trials, the best first."""
    values: tuple[float, ...]
    """Objective of each."""

    @property
    def mean(self) -> float:
        """What it is ranked by: the best of more seeds would be the luckier one."""
        return float(np.mean(self.values))


def settings_of(points: Sequence[Point], values: Sequence[float]) -> list[Setting]:
    """Group trials by their setting, the best on average first.

    Args:
        points: Of finished trials.
        values: Objective of each, larger is better.
    """
    groups: dict[tuple[tuple[str, Value], ...], list[int]] = {}
    for number, point in enumerate(points):
        groups.setdefault(_without_seed(point), []).append(number)
    ordered = [sorted(group, key=lambda number: -values[number]) for group in groups.values()]
    settings = [Setting(tuple(one), tuple(values[number] for number in one)) for one in ordered]
    return sorted(settings, key=lambda setting: -setting.mean)


@dataclass(frozen=True, slots=True)
class Repeats:
    """What chance alone changes, from settings that were run with several seeds."""

    deviation: float
    """Standard deviation, pooled over those settings."""
    freedom: int
    """Its degrees of freedom: trials less settings."""


def repeats_of(settings: Sequence[Setting]) -> Repeats | None:
    """Pool the standard deviation within settings; None where none was run twice."""
    freedom = sum(len(setting.values) - 1 for setting in settings)
    if not freedom:
        return None
    squares = sum(float(np.var(setting.values)) * len(setting.values) for setting in settings)
    return Repeats(float(np.sqrt(squares / freedom)), freedom)


def chance_of_lead(ratio: float, settings: int) -> float:
    """Tell how often the best of so many equally good settings leads by so much or more.

    Args:
        ratio: Lead of the best over the second, in standard deviations over all settings.
        settings: How many, 2 or more. Of two the lead is 1.41 deviations, whatever it is.
    """
    leads = _leads_of_chance(settings)
    return 1 - float(np.searchsorted(leads, ratio * (1 - 1e-9))) / len(leads)


@cache
def _leads_of_chance(settings: int) -> np.ndarray:
    drawn = np.sort(np.random.default_rng(0).standard_normal((DRAWN, settings)), axis=1)
    return np.sort((drawn[:, -1] - drawn[:, -2]) / drawn.std(axis=1, ddof=1))


def _without_seed(point: Point) -> tuple[tuple[str, Value], ...]:
    return tuple(sorted((name, value) for name, value in point.items() if name != "run.seed"))
