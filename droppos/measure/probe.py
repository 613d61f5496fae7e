"""Linear probe: how well a linear classifier does on frozen features.

Fitted to convergence in float64, so there is no learning rate to get wrong: the probe for all that
fits into memory. :mod:`droppos.measure.linear` is for a million pictures.

Axes in this file
    T  training pictures, Q test pictures
    D  channels of a feature
    C  classes
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from droppos.errors import DataError
from droppos.measure.intervals import Proportion
from droppos.measure.knn import check_labels

L2_GRID = (1.0, 0.1, 1e-2, 1e-3, 1e-4)
"""Penalties tried, strongest first, so that each fit starts from the one before."""
VALIDATION_SHARE = 0.2
"""Part of the training pictures on which the penalty is chosen."""


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What a linear probe found."""

    accuracy: Proportion
    """Test pictures classified right."""
    top_5: Proportion
    """Test pictures whose class is among the five likeliest; all of them below six classes."""
    l2: float
    """The penalty chosen."""
    validation: dict[float, Proportion]
    """Each penalty's accuracy on the part of the training pictures set aside to choose it."""


def linear_probe(
    train: Float[Tensor, "T D"],
    train_labels: Int[Tensor, " T"],
    test: Float[Tensor, "Q D"],
    test_labels: Int[Tensor, " Q"],
    *,
    seed: int = 0,
) -> ProbeReport:
    """Fit a linear classifier on frozen features and score it on the test pictures.

    Multinomial logistic regression on standardised features, fitted to convergence by
    L-BFGS. The penalty is chosen on a part of the training pictures, then all of them are
    fitted: no test picture has a say. Same features and seed, same answer.

    Args:
        train: Features to fit.
        train_labels: Their classes, from 0.
        test: Features to classify.
        test_labels: Their true classes, from 0.
        seed: Chooses the validation part.

    Raises:
        DataError: If labels are missing, or there are fewer than two classes or five pictures.
    """
    check_labels("training", train, train_labels)
    check_labels("test", test, test_labels)
    classes = int(train_labels.max()) + 1
    if classes < 2 or len(train) < 5:
        raise DataError(
            f"a linear probe needs 2 classes and 5 training pictures, got {classes} and "
            f"{len(train)}; measure position accuracy or effective rank instead"
        )
    mean, spread = train.double().mean(0), train.double().std(0)
    # A channel that never changes carries nothing; dividing by its 0 would make it NaN.
    scale = torch.where(spread > 0, 1 / spread, 0.0)
    train, test = (train - mean) * scale, (test - mean) * scale
    train_labels, test_labels = train_labels.long(), test_labels.long()

    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    order = order.to(train.device)
    aside, rest = order.tensor_split([int(len(train) * VALIDATION_SHARE)])
    weights = train.new_zeros(classes, train.shape[1] + 1)
    validation: dict[float, Proportion] = {}
    for l2 in L2_GRID:
        weights = _fit(train[rest], train_labels[rest], l2, weights)
        validation[l2] = _score(train[aside], train_labels[aside], weights)
    best = max(L2_GRID, key=lambda l2: validation[l2].hits)
    weights = _fit(train, train_labels, best, torch.zeros_like(weights))
    accuracy, top_5 = (_score(test, test_labels, weights, top) for top in (1, min(5, classes)))
    return ProbeReport(accuracy, top_5, best, validation)


def _logits(x: Float[Tensor, "B D"], weights: Float[Tensor, "C D+1"]) -> Float[Tensor, "B C"]:
    return F.linear(x, weights[:, :-1], weights[:, -1])


def _fit(
    x: Float[Tensor, "T D"], labels: Int[Tensor, " T"], l2: float, start: Float[Tensor, "C D+1"]
) -> Float[Tensor, "C D+1"]:
    """Minimise mean cross-entropy + l2 / 2 |W|²; the bias (last column) is free."""
    weights = start.clone().requires_grad_()
    solver = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        with torch.enable_grad():
            penalty = weights[:, :-1].square().sum() * l2 / 2
            value = F.cross_entropy(_logits(x, weights), labels) + penalty
            value.backward()
        return value

    solver.step(loss)  # pyright: ignore[reportArgumentType]  # torch types the closure as float
    return weights.detach()


def _score(
    x: Float[Tensor, "B D"],
    labels: Int[Tensor, " B"],
    weights: Float[Tensor, "C D+1"],
    top: int = 1,
) -> Proportion:
    likeliest = _logits(x, weights).topk(top, dim=1).indices == labels[:, None]
    return Proportion(int(likeliest.any(1).sum()), len(labels))
