from dataclasses import replace
from math import log
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from droppos.config import Conformance, Grid, Method
from droppos.loss import Metrics, least_nats, patchify, pretraining_loss
from droppos.masking import Draw, draw, draw_noise
from droppos.model import Prediction
from droppos.schedule import sigma as sigma_at
from droppos.targets import smoothed_targets

GRID = Grid(4, 6)


def drawn(method: Method, images: int = 4, seed: int = 0) -> Draw:
    counts = method.counts(GRID)
    return draw(
        counts, method, draw_noise(counts, method, torch.Generator().manual_seed(seed), images)
    )


def score(method: Method, logits: torch.Tensor, masks: Draw, similarity=None) -> Metrics:
    targets = smoothed_targets(GRID, method.sigma, method.conformance)
    images = torch.zeros(len(logits), 3, 32, 48)
    return pretraining_loss(method, Prediction(logits, None, similarity), masks, targets, images, 8)


def perfect(masks: Draw, targets: torch.Tensor) -> torch.Tensor:
    return targets[masks.asked].clamp(min=1e-30).log()


@given(
    sigma=st.floats(0, 5),
    mask=st.sampled_from([0.0, 0.25, 0.9, 0.95]),
    positions=st.sampled_from([0.05, 0.5, 0.75, 1.0]),
    attentive=st.booleans(),
    confident=st.booleans(),
    conformance=st.sampled_from(["paper", "reference"]),
    scale=st.sampled_from([0.0, 1.0, 1e4]),
)
@settings(max_examples=80, deadline=None)
def test_never_nan(sigma, mask, positions, attentive, confident, conformance, scale) -> None:
    method = Method(
        sigma=sigma,
        mask_ratio=mask,
        position_mask_ratio=positions,
        attentive=attentive,
        ignore_confident=confident,
        conformance=conformance,
    )
    masks = drawn(method)
    logits = (torch.randn(*masks.scored.shape, GRID.cells) * scale).requires_grad_()
    similarity = torch.rand(masks.visible.shape) * 2 - 1 if attentive else None
    metrics = score(method, logits, masks, similarity)
    assert torch.stack(list(metrics)).isfinite().all()
    metrics.loss.backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("sigma", [0.0, 1.0, 3.0])
def test_a_uniform_guess_scores_ln_n_at_any_sigma(sigma: float) -> None:
    method = Method(sigma=sigma, attentive=False)
    masks = drawn(method)
    metrics = score(method, torch.zeros(*masks.scored.shape, 24), masks)
    assert metrics.loss.item() == pytest.approx(log(24), rel=1e-5)


@pytest.mark.parametrize("decay", ["constant", "epoch", "step", "epoch_to_zero"])
@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("attentive", [False, True])
@pytest.mark.parametrize("conformance", ["paper", "reference"])
def test_the_excess_of_a_perfect_answer_is_0_at_any_sigma(
    sigma: float, attentive: bool, decay: Any, conformance: Conformance
) -> None:
    method = Method(
        sigma=sigma, sigma_decay=decay, attentive=attentive, mask_ratio=0, conformance=conformance
    )
    masks = drawn(method)
    likeness = torch.rand(masks.visible.shape)
    for epoch in (0, 3.5, 9.9):
        now = replace(method, sigma=sigma_at(method, epoch, 10))
        logits = perfect(masks, smoothed_targets(GRID, now.sigma, conformance))
        metrics = score(now, logits, masks, likeness)
        # All that is left is float32's rounding of terms of up to 3 nats.
        assert metrics.position_excess.item() == pytest.approx(0, abs=3e-6)
        if conformance == "paper":
            assert metrics.position_accuracy.item() == 1


@pytest.mark.parametrize("conformance", ["paper", "reference"])
def test_patches_that_carry_the_loss_are_counted(conformance: Conformance) -> None:
    """All when each weighs the same, one of each image when one is far likelier than the rest."""
    method = Method(mask_ratio=0, conformance=conformance)
    masks = drawn(method)
    scored = masks.scored.shape[1]
    logits = torch.zeros(*masks.scored.shape, GRID.cells)
    alike = torch.ones(masks.visible.shape)
    assert score(method, logits, masks, alike).carrying.item() == pytest.approx(scored)
    one = alike.neg().scatter(1, masks.scored[:, :1], 1.0)
    assert score(method, logits, masks, one).carrying.item() == pytest.approx(1, abs=1e-3)
    two = one.scatter(1, masks.scored[:, 1:2], 1.0)
    assert score(method, logits, masks, two).carrying.item() == pytest.approx(2, abs=1e-3)


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0, 2.0])
def test_the_excess_of_a_uniform_guess_is_ln_n_less_the_entropy_of_the_target(sigma: float) -> None:
    method = Method(sigma=sigma, mask_ratio=0, attentive=False)
    masks = drawn(method)
    metrics = score(method, torch.zeros(*masks.scored.shape, 24), masks)
    entropy = torch.special.entr(smoothed_targets(GRID, sigma)).sum(1)[masks.asked].mean().item()
    assert metrics.position_excess.item() == pytest.approx(log(24) - entropy, abs=1e-5)


@given(st.floats(0, 3), st.integers(0, 999), st.floats(0, 5))
@settings(max_examples=50, deadline=None)
def test_no_answer_is_better_than_perfect_even_to_rows_that_are_no_distributions(
    sigma: float, seed: int, noise: float
) -> None:
    method = Method(sigma=sigma, mask_ratio=0, attentive=False, conformance="reference")
    masks = drawn(method)
    logits = perfect(masks, smoothed_targets(GRID, sigma, "reference"))
    random = torch.Generator().manual_seed(seed)
    logits = logits + noise * torch.randn(logits.shape, generator=random)
    assert score(method, logits, masks).position_excess.item() >= -3e-6


def test_a_row_that_sums_to_2_is_best_answered_by_its_half() -> None:
    least = least_nats(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
    torch.testing.assert_close(least, torch.tensor([0.0, 2 * log(2)]))


def test_the_papers_images_count_equally_and_the_references_do_not() -> None:
    # Alike to different degrees on purpose: with likenesses drawn alike for all images, chance
    # (and what tests before it drew) decides whether the reference's shares differ visibly.
    generator = torch.Generator().manual_seed(0)
    similarity = torch.rand(4, 12, generator=generator) * torch.linspace(0.1, 1, 4)[:, None]
    shares = {}
    for conformance in ("paper", "reference"):
        method = Method(mask_ratio=0.5, sigma=0, conformance=conformance)  # pyright: ignore[reportArgumentType]
        logits = torch.zeros(4, 9, 24, requires_grad=True)
        score(method, logits, drawn(method), similarity).loss.backward()
        assert logits.grad is not None
        # At uniform logits the true cell's gradient is the patch's weight times -(1 - 1/24).
        shares[conformance] = -logits.grad.clamp(max=0).sum(dim=(1, 2)) / (1 - 1 / 24)
    torch.testing.assert_close(shares["paper"], torch.full((4,), 0.25))
    assert shares["reference"].sum().item() == pytest.approx(1, rel=1e-5)
    assert shares["reference"].max() - shares["reference"].min() > 0.01


def test_accuracy_is_the_share_of_scored_patches_in_their_cell() -> None:
    method = Method(mask_ratio=0, attentive=False)
    masks = drawn(method)
    logits = F.one_hot(masks.asked, 24).float()
    logits[:, :6] = logits[:, :6].roll(1, dims=-1)
    assert score(method, logits, masks).position_accuracy.item() == pytest.approx(12 / 18)


def test_all_confident_is_a_zero_loss_and_counted() -> None:
    method = Method(mask_ratio=0, ignore_confident=True, sigma=1)
    masks = drawn(method)
    sure = F.one_hot(masks.asked, 24).float() * 100
    metrics = score(method, sure.requires_grad_(), masks, torch.rand(masks.visible.shape))
    assert metrics.loss.item() == 0
    assert metrics.ignored.item() == 1


def test_a_picture_with_nothing_left_to_score_gives_its_share_up() -> None:
    method = Method(mask_ratio=0, ignore_confident=True, sigma=1, attentive=False)
    masks = drawn(method, images=2)
    logits = torch.zeros(2, 18, 24)
    logits[0] = F.one_hot(masks.asked[0], 24).float() * 100
    metrics = score(method, logits, masks)
    assert metrics.ignored.item() == pytest.approx(0.5)
    assert metrics.loss.item() == pytest.approx(log(24) / 2, rel=1e-5)


def test_patches_are_cells_row_by_row_with_channels_last() -> None:
    images = torch.arange(2 * 3 * 32 * 48, dtype=torch.float32).view(2, 3, 32, 48)
    patches = patchify(images, 8).view(2, 4, 6, 8, 8, 3)
    assert (patches[1, 2, 5, 3, 7] == images[1, :, 2 * 8 + 3, 5 * 8 + 7]).all()


def test_pixel_loss_of_a_mean_guess_is_about_1() -> None:
    method = Method(objective="pixels")
    masks = drawn(method)
    images = torch.rand(4, 3, 32, 48)
    zeros = Prediction(None, torch.zeros(4, 18, 192), None)
    metrics = pretraining_loss(method, zeros, masks, torch.eye(24), images, 8)
    assert metrics.loss.item() == pytest.approx(191 / 192, rel=1e-3)  # unbiased variance
    assert metrics.position_loss.item() == 0


def test_both_tasks_add_up_by_their_weight() -> None:
    method = Method(objective="position_pixels", position_weight=0.3, attentive=False)
    masks = drawn(method)
    prediction = Prediction(torch.randn(4, 5, 24), torch.randn(4, 18, 192), None)
    images = torch.rand(4, 3, 32, 48)
    metrics = pretraining_loss(method, prediction, masks, smoothed_targets(GRID, 1), images, 8)
    expected = 0.3 * metrics.position_loss + metrics.pixel_loss
    torch.testing.assert_close(metrics.loss, expected)
