"""Statistics over a search's finished trials: what matters, what ranks alike, what is chance."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import numpy as np

from pipelines.space import Dimension, Point, Space, Value

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

FEWEST_TRUSTED = 10
"""Finished trials below which an importance is not to be trusted."""
FEWEST_RANKED = 3
"""Trials from which on a rank correlation is told; two always agree or disagree fully."""


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


def repeat_deviation(points: Sequence[Point], values: Sequence[float]) -> float | None:
    """Pool the standard deviation over trials whose settings are equal but for the seed."""
    groups: dict[tuple[tuple[str, Value], ...], list[float]] = {}
    for point, value in zip(points, values, strict=True):
        groups.setdefault(without_seed(point), []).append(value)
    repeated = [group for group in groups.values() if len(group) > 1]
    if not repeated:
        return None
    squares = sum(float(np.var(group) * len(group)) for group in repeated)
    return float(np.sqrt(squares / sum(len(group) - 1 for group in repeated)))


def without_seed(point: Point) -> tuple[tuple[str, Value], ...]:
    """List a trial's settings, but not what only chance goes by."""
    return tuple(sorted((name, value) for name, value in point.items() if name != "run.seed"))
