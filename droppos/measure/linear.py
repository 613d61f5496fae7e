"""Linear probe by stochastic gradient descent: for features of a million pictures.

:mod:`droppos.measure.probe` fits the same classifier to convergence, in float64, over all pictures
in each of its hundreds of passes: exact, and the one to take while that fits into memory and
patience. This one goes as the field does (MoCo, MAE, DINOv2): momentum or LARS, a cosine, and a
grid of learning rates, because the best rate differs from backbone to backbone. The classifiers of
all rates see the same batches, so they are one tensor and one matrix product.

Axes in this file
    T  training pictures, Q test pictures, B of them in a batch
    D  channels of a feature
    C  classes
    G  learning rates tried at once
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, cos, inf, pi
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from droppos.config import require
from droppos.errors import DataError, TrainingError
from droppos.measure.intervals import Proportion
from droppos.measure.knn import check_labels

TRUST = 1e-3
"""LARS' coefficient: a step's length over that of the weights, at learning rate 1."""
FIRST_STD = 0.01
"""Deviation of the first weights, as MAE's; not 0, for LARS' steps are as long as the weights."""
VALIDATION_SHARE = 0.1
"""Part of the training pictures on which the rate is chosen."""
STATISTICS_ROWS = 2**16
"""Features that are summed in float64 at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearRecipe:
    """How the classifiers are trained."""

    optimizer: Literal["sgd", "lars"] = "sgd"
    """sgd: with momentum. lars: each step as long as a share of the weights (You et al., 2017), for
    batches of many thousands."""
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """Peak learning rates for 256 pictures a step; the peak used is rate / 256 times the
    pictures that a step has in the mean."""
    epochs: int = 90
    """Passes over the training pictures; MAE's probe takes 90."""
    warmup_epochs: float = 10.0
    """Epochs of linear warm-up from 0; a cosine to 0 follows."""
    batch: int = 1024
    """Most pictures of a step; an epoch is dealt evenly to as few steps as that takes."""
    momentum: float = 0.9
    """Share of the last update that is kept."""
    weight_decay: float = 0.0
    """L2 penalty on the weights, not on the bias; the field takes none."""

    def __post_init__(self) -> None:
        require(
            len(self.rates) > 0 and all(0 < rate < inf for rate in self.rates),
            "rates",
            self.rates,
            "one or more, each above 0",
            "a grid a factor of three apart is usual",
        )
        require(self.epochs > 0, "epochs", self.epochs, "positive", "MAE's probe takes 90")
        require(
            0 <= self.warmup_epochs < self.epochs,
            "warmup_epochs",
            self.warmup_epochs,
            f"from 0 to less than the epochs ({self.epochs})",
            "a ninth is usual",
        )
        require(self.batch > 0, "batch", self.batch, "positive", "1024")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)", "0.9 is usual")
        require(0 <= self.weight_decay < inf, "weight_decay", self.weight_decay, "0 or more", "0")


LARS = LinearRecipe(optimizer="lars", rates=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), batch=16384)
"""MAE's probe (He et al., 2022, appendix A: rate 0.1 for 256 pictures, batch 16384), on a grid."""


@dataclass(frozen=True, slots=True)
class LinearReport:
    """What the probe found."""

    accuracy: Proportion
    """Test pictures classified right."""
    top_5: Proportion
    """Test pictures whose class is among the five likeliest; all of them below six classes."""
    rate: float
    """The learning rate chosen, for 256 pictures a step."""
    validation: dict[float, Proportion]
    """Each rate's accuracy on the part of the training pictures set aside to choose it."""

    @property
    def at_edge(self) -> bool:
        """Whether the rate is the grid's first or last, so that a better one may lie outside."""
        return len(self.validation) > 1 and self.rate in (
            min(self.validation),
            max(self.validation),
        )


def sgd_probe(
    train: Float[Tensor, "T D"],
    train_labels: Int[Tensor, " T"],
    test: Float[Tensor, "Q D"],
    test_labels: Int[Tensor, " Q"],
    recipe: LinearRecipe = LinearRecipe(),
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> LinearReport:
    """Train a linear classifier on frozen features and score it on the test pictures.

    Features are standardised by mean and deviation of the training pictures: MAE's batch norm
    without scale and shift, without the noise of a batch's statistics. The rate is chosen on a part
    of the training pictures, then one classifier is trained on all of them: no test picture has a
    say. Same features, seed and device, same answer.

    Args:
        train: Features to fit, on any device; batches are brought to ``device``.
        train_labels: Their classes, from 0, on the same device.
        test: Features to classify.
        test_labels: Their true classes, from 0.
        recipe: How it is trained.
        device: Where it is trained.
        seed: Decides first weights, order and validation part.

    Raises:
        DataError: If labels are missing, or there are fewer than two classes or five pictures.
        TrainingError: If a feature is not finite.
    """
    check_labels("training", train, train_labels)
    check_labels("test", test, test_labels)
    classes = int(train_labels.max()) + 1
    if classes < 2 or len(train) < 5:
        raise DataError(
            f"a linear probe needs 2 classes and 5 training pictures, got {classes} and "
            f"{len(train)}; measure position accuracy or effective rank instead"
        )
    known = _Set(train, train_labels.long(), *_scale(train, torch.device(device)))
    asked = _Set(test, test_labels.long(), known.mean, known.scale)

    order = _permutation(len(train), seed, -1)
    aside, rest = order.tensor_split([max(1, int(len(train) * VALIDATION_SHARE))])
    tried = _train(known, rest, recipe.rates, classes, recipe, seed)
    scores = [hits for hits, _ in _score(known, aside, tried)]
    validation = dict(zip(recipe.rates, scores, strict=True))
    best = max(recipe.rates, key=lambda rate: validation[rate].hits)  # of equals the first
    chosen = _train(known, order, (best,), classes, recipe, seed)
    ((accuracy, top_5),) = _score(asked, torch.arange(len(test)), chosen)
    return LinearReport(accuracy, top_5, best, validation)


@dataclass(frozen=True, slots=True)
class _Set:
    """Pictures, standardised batch by batch: a copy of all of them may not fit."""

    features: Tensor
    labels: Tensor
    mean: Float[Tensor, " D"]
    scale: Float[Tensor, " D"]

    def take(self, rows: Int[Tensor, " B"]) -> tuple[Float[Tensor, "B D"], Int[Tensor, " B"]]:
        """Bring some pictures to the device of the statistics."""
        rows = rows.to(self.features.device)
        device = self.mean.device
        chosen = self.features[rows].to(device, torch.float32)
        return (chosen - self.mean) * self.scale, self.labels[rows].to(device)


@dataclass(frozen=True, slots=True)
class _Classifiers:
    """One linear classifier for each learning rate."""

    weights: Float[Tensor, "G C D"]
    bias: Float[Tensor, "G 1 C"]

    def logits(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "G B C"]:
        return torch.baddbmm(self.bias, x.expand(len(self.weights), -1, -1), self.weights.mT)


def _scale(
    features: Float[Tensor, "T D"], device: torch.device
) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
    """Find mean and 1 / deviation of each channel, in float64, a part at a time.

    A channel that never changes carries nothing, and gets 0: dividing by its deviation would make
    it NaN.
    """
    parts = features.split(STATISTICS_ROWS)
    mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / len(features)
    squares = torch.stack([(part.double() - mean).square().sum(0) for part in parts]).sum(0)
    if not squares.isfinite().all():
        raise TrainingError(
            f"features of {len(features)} pictures hold NaN or infinity, so nothing can be learnt "
            "on them; the model diverged: measure an earlier checkpoint"
        )
    scale = torch.where(squares > 0, (squares / len(features)).rsqrt(), 0.0)
    return mean.float().to(device), scale.float().to(device)


def _permutation(count: int, seed: int, epoch: int) -> Int[Tensor, " T"]:
    """Draw on the CPU, so that every device sees the pictures in one order."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator)


def _batches(
    rows: Int[Tensor, " T"], recipe: LinearRecipe, seed: int
) -> Iterator[tuple[float, Int[Tensor, " B"]]]:
    """Deal out all pictures in every epoch, in batches that differ by one picture at most.

    Yields:
        Epochs done, with the fraction of the one under way, and the pictures of a step.
    """
    steps = ceil(len(rows) / recipe.batch)
    for epoch in range(recipe.epochs):
        order = rows[_permutation(len(rows), seed, epoch)]
        for step, batch in enumerate(order.tensor_split(steps)):
            yield epoch + step / steps, batch


def _share_of_peak(recipe: LinearRecipe, epoch: float) -> float:
    if epoch < recipe.warmup_epochs:
        return epoch / recipe.warmup_epochs
    done = (epoch - recipe.warmup_epochs) / (recipe.epochs - recipe.warmup_epochs)
    return 0.5 * (1 + cos(pi * done))


@torch.no_grad()
def _train(
    known: _Set,
    rows: Int[Tensor, " T"],
    rates: tuple[float, ...],
    classes: int,
    recipe: LinearRecipe,
    seed: int,
) -> _Classifiers:
    """Train one classifier for each rate, all from the same first weights, on the same batches."""
    device = known.mean.device
    width = known.features.shape[1]
    first = torch.randn(classes, width, generator=torch.Generator().manual_seed(seed))
    weights = (FIRST_STD * first.to(device)).repeat(len(rates), 1, 1)
    found = _Classifiers(weights, torch.zeros(len(rates), 1, classes, device=device))
    moved = _Classifiers(torch.zeros_like(found.weights), torch.zeros_like(found.bias))
    per_step = len(rows) / ceil(len(rows) / recipe.batch) / 256  # of the batches there are
    peaks = torch.tensor(rates, device=device)[:, None, None] * per_step
    for epoch, batch in _batches(rows, recipe, seed):
        x, labels = known.take(batch)
        # Cross-entropy's gradient by its logits, written out: no graph of G x B x C is kept.
        slope = found.logits(x).softmax(-1)
        slope -= F.one_hot(labels, classes)
        slope /= len(x)
        decay = recipe.weight_decay * found.weights
        by_weights = torch.bmm(slope.mT, x.expand(len(rates), -1, -1)) + decay
        if recipe.optimizer == "lars":
            by_weights *= _trust(found.weights, by_weights)
        rate = peaks * _share_of_peak(recipe, epoch)
        moved.weights.mul_(recipe.momentum).add_(by_weights)
        moved.bias.mul_(recipe.momentum).add_(slope.sum(1, keepdim=True))
        found.weights.sub_(rate * moved.weights)
        found.bias.sub_(rate * moved.bias)
    return found


def _trust(weights: Float[Tensor, "G C D"], update: Float[Tensor, "G C D"]) -> Tensor:
    """Scale each classifier's update to a share of its weights' length; 1 where either is 0."""
    length = torch.linalg.vector_norm(weights, dim=(1, 2), keepdim=True)
    step = torch.linalg.vector_norm(update, dim=(1, 2), keepdim=True)
    return torch.where((length > 0) & (step > 0), TRUST * length / step, 1.0)


@torch.no_grad()
def _score(
    asked: _Set, rows: Int[Tensor, " Q"], classifiers: _Classifiers
) -> list[tuple[Proportion, Proportion]]:
    """Give top-1 and top-5 of each classifier."""
    count = min(5, classifiers.weights.shape[1])
    hits = torch.zeros(len(classifiers.weights), 2, dtype=torch.int64)
    for batch in rows.split(1024):
        x, labels = asked.take(batch)
        likeliest = classifiers.logits(x).topk(count, dim=-1).indices == labels[:, None]
        found = torch.stack([likeliest[..., 0].sum(1), likeliest.any(-1).sum(1)], dim=1)
        hits += found.cpu()
    total = len(rows)
    return [(Proportion(int(one), total), Proportion(int(five), total)) for one, five in hits]
