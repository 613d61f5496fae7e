"""The linear probe by stochastic gradient descent."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from droppos.errors import ConfigError, DataError, TrainingError
from droppos.measure import linear
from droppos.measure.linear import LARS, LinearRecipe, sgd_probe
from droppos.measure.probe import linear_probe

QUICK = LinearRecipe(epochs=20, warmup_epochs=2, batch=64)


def clusters(count: int, seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Points around seven corners, far from the origin, in channels of unlike scales."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 7
    corners = torch.randn(7, 12, generator=torch.Generator().manual_seed(99))
    points = corners[labels] + spread * torch.randn(count, 12, generator=random)
    return 30 + points * torch.logspace(-3, 3, 12), labels


@pytest.mark.parametrize("recipe", [QUICK, replace(LARS, epochs=60, batch=64)])
def test_separate_clusters_are_told_apart(recipe: LinearRecipe) -> None:
    report = sgd_probe(*clusters(350, 0, 0.3), *clusters(70, 1, 0.3), recipe)
    assert report.accuracy.value > 0.97
    assert report.top_5.hits >= report.accuracy.hits


def test_noise_scores_chance() -> None:
    random = torch.Generator().manual_seed(0)
    features = torch.randn(1400, 8, generator=random)
    labels = torch.randint(4, (1400,), generator=random)
    report = sgd_probe(features[:400], labels[:400], features[400:], labels[400:], QUICK)
    assert report.accuracy.value == pytest.approx(0.25, abs=0.06)
    assert report.top_5.value == 1  # of four classes


def test_it_finds_about_what_the_exact_probe_finds() -> None:
    train, test = clusters(700, 0), clusters(1400, 1)
    exact = linear_probe(*train, *test).accuracy.value
    assert sgd_probe(*train, *test, QUICK).accuracy.value == pytest.approx(exact, abs=0.03)


def test_same_seed_same_answer_and_another_seed_another_order() -> None:
    train, test = clusters(200, 0), clusters(200, 1)
    first = sgd_probe(*train, *test, QUICK)
    assert first == sgd_probe(*train, *test, QUICK)
    assert first.validation != sgd_probe(*train, *test, QUICK, seed=1).validation


@pytest.mark.parametrize("recipe", [QUICK, replace(LARS, epochs=5, warmup_epochs=1, batch=64)])
def test_a_rate_learns_the_same_beside_others_as_alone(recipe: LinearRecipe) -> None:
    features, labels = clusters(150, 0)
    known = linear._Set(features, labels, *linear._scale(features, torch.device("cpu")))
    together = linear._train(known, torch.arange(150), recipe.rates, 7, recipe, 0)
    for place, rate in enumerate(recipe.rates):
        alone = linear._train(known, torch.arange(150), (rate,), 7, recipe, 0)
        torch.testing.assert_close(together.weights[place], alone.weights[0])
        torch.testing.assert_close(together.bias[place], alone.bias[0])


def test_steps_are_those_of_torchs_sgd() -> None:
    """The written-out gradient and momentum, held against autograd and torch.optim."""
    features, labels = clusters(150, 0)
    recipe = replace(QUICK, rates=(0.1,), epochs=3, warmup_epochs=1, weight_decay=0.01)
    known = linear._Set(features, labels, *linear._scale(features, torch.device("cpu")))
    rows = torch.arange(150)
    own = linear._train(known, rows, (0.1,), 7, recipe, 0)

    first = 0.01 * torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    weights, bias = first.requires_grad_(), torch.zeros(7, requires_grad=True)
    solver = torch.optim.SGD(
        [{"params": [weights], "weight_decay": 0.01}, {"params": [bias]}], lr=1, momentum=0.9
    )
    for epoch, batch in linear._batches(rows, recipe, 0):
        for group in solver.param_groups:
            group["lr"] = 0.1 * 50 / 256 * linear._share_of_peak(recipe, epoch)
        x, truth = known.take(batch)
        solver.zero_grad()
        F.cross_entropy(F.linear(x, weights, bias), truth).backward()
        solver.step()
    torch.testing.assert_close(own.weights[0], weights.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own.bias[0, 0], bias.detach(), rtol=1e-4, atol=1e-5)


def test_an_epoch_sees_every_picture_once_in_batches_of_almost_one_size() -> None:
    recipe = replace(QUICK, epochs=2, warmup_epochs=0, batch=10)
    seen = [batch for _, batch in linear._batches(torch.arange(33), recipe, 0)]
    assert [len(batch) for batch in seen] == [9, 8, 8, 8] * 2
    for epoch in (seen[:4], seen[4:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(33))
    assert not torch.equal(seen[0], seen[4])


def test_scale_and_offset_of_a_channel_mean_nothing_and_a_dead_one_does_no_harm() -> None:
    train, test = clusters(140, 0), clusters(140, 1)

    def changed(features: Tensor, factor: float, dead: float) -> Tensor:
        return torch.cat([features * factor, torch.full((140, 1), dead)], dim=1)

    one, other = (
        sgd_probe(changed(train[0], *how), train[1], changed(test[0], *how), test[1], QUICK)
        for how in ((1, 1), (1024, 5))  # a power of two: no value is rounded otherwise
    )
    assert one == other
    assert one.accuracy.value > 0.7


def test_the_rate_is_chosen_without_a_look_at_the_test_pictures() -> None:
    train, test = clusters(140, 0), clusters(140, 1)
    right = sgd_probe(*train, *test, QUICK)
    wrong = sgd_probe(*train, test[0].flip(0), test[1], QUICK)
    assert (wrong.rate, wrong.validation) == (right.rate, right.validation)
    assert wrong.accuracy != right.accuracy


def test_a_rate_at_the_end_of_the_grid_is_told() -> None:
    train, test = clusters(350, 0), clusters(70, 1)
    low = sgd_probe(*train, *test, replace(QUICK, rates=(1e-7, 1e-6, 0.01)))
    assert low.rate == 0.01 and low.at_edge
    assert not sgd_probe(*train, *test, replace(QUICK, rates=(0.01,))).at_edge


@pytest.mark.parametrize(
    "wrong",
    [
        {"rates": ()},
        {"rates": (0.1, 0.0)},
        {"epochs": 0, "warmup_epochs": 0},
        {"warmup_epochs": 20},
        {"batch": 0},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
    ],
)
def test_a_recipe_that_cannot_be_trained_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        replace(QUICK, **wrong)


def test_features_and_labels_that_cannot_be_learnt_are_refused() -> None:
    features, labels = clusters(70, 0)
    with pytest.raises(DataError, match="needs 2 classes"):
        sgd_probe(features, torch.zeros_like(labels), features, labels, QUICK)
    with pytest.raises(DataError, match="2 of 70 test pictures have no label"):
        missing = torch.where(torch.arange(70) < 2, -1, labels)
        sgd_probe(features, labels, features, missing, QUICK)
    features[3, 4] = torch.nan
    with pytest.raises(TrainingError, match="NaN or infinity"):
        sgd_probe(features, labels, features, labels, QUICK)
