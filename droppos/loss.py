"""Losses: how far the named cells are from the true ones, and the pixels from the hidden ones.

Axes in this file
    B  images on this rank
    N  cells in the patch grid
    V  visible patches of an image; H = N - V hidden ones
    S  visible patches whose position is asked for (scored)
    P  pixels of a patch, times 3
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from droppos.config import Method
from droppos.encoder import exact, take
from droppos.masking import Draw
from droppos.model import Prediction
from droppos.targets import attentive_weights


class Metrics(NamedTuple):
    """What a batch scored. 0-d tensors on the device: whoever reads one waits for it."""

    loss: Tensor
    """What is minimised."""
    position_loss: Tensor
    """Weighted cross-entropy in nats; ln(N) is a uniform guess, the target's entropy is perfect."""
    position_excess: Tensor
    """Nats above the least that any answer could score, for a distribution its entropy: 0 is
    perfect at any sigma, a uniform guess is at ln(N) less that entropy."""
    position_accuracy: Tensor
    """Share of scored patches placed in their very cell. Compare with ``Counts.chance``. Under
    the reference's conformance it is weighted as the loss is."""
    pixel_loss: Tensor
    """Mean squared error per pixel; 1 is a guess of each patch's mean when pixels are normalised.
    """
    carrying: Tensor
    """Scored patches of an image that carry the loss: Kish's effective number, (sum w)^2 / sum w^2
    over the batch, shared among its images. All of them when they weigh the same, 1 when each
    image hangs on a single patch."""
    ignored: Tensor
    """Share of scored patches left out as confident (method.ignore_confident)."""


def pretraining_loss(
    method: Method,
    prediction: Prediction,
    draw: Draw,
    targets: Float[Tensor, "N N"],
    images: Float[Tensor, "B 3 rows columns"],
    patch_size: int,
) -> Metrics:
    """Score a prediction by the method's objective.

    Args:
        method: Objective, weights and conformance.
        prediction: Of the model for this draw.
        draw: The masks.
        targets: Row i is the target of a patch from cell i (:func:`smoothed_targets`).
        images: Normalised images, for the pixel task.
        patch_size: Side of a patch in pixels.
    """
    zero = images.new_zeros((), dtype=torch.float32)
    metrics = Metrics(*[zero] * len(Metrics._fields))
    if prediction.logits is not None:
        metrics = _position_metrics(
            method, prediction.logits, prediction.similarity, draw, targets, metrics
        )
    if prediction.pixels is None:
        return metrics._replace(loss=metrics.position_loss)
    pixel_loss = _pixel_loss(method, prediction.pixels, draw, images, patch_size)
    loss = method.position_weight * metrics.position_loss + pixel_loss
    return metrics._replace(loss=loss, pixel_loss=pixel_loss)


def _position_metrics(
    method: Method,
    logits: Float[Tensor, "B S N"],
    similarity: Float[Tensor, "B V"] | None,
    draw: Draw,
    targets: Float[Tensor, "N N"],
    metrics: Metrics,
) -> Metrics:
    logits, true = exact(logits), draw.asked
    wanted = targets.to(logits.dtype)[true]
    log_probability = logits.log_softmax(dim=-1)
    nats = -(wanted * log_probability).sum(dim=-1)
    hit = logits.argmax(dim=-1) == true

    counted = torch.ones_like(hit)
    if method.ignore_confident:
        counted = ~_confident(log_probability.detach(), true, targets)
    weights = _weights(method, similarity, draw, counted, nats.dtype)
    excess = nats - least_nats(targets.to(logits.dtype))[true]

    # The reference weighs it as its loss.
    share = hit.to(nats.dtype).mean() if method.conformance == "paper" else (hit * weights).sum()
    return metrics._replace(
        position_loss=(weights * nats).sum(),
        position_excess=(weights * excess).sum().detach(),
        position_accuracy=share,
        carrying=_carrying(weights),
        ignored=1 - counted.to(nats.dtype).mean(),
    )


def least_nats(targets: Float[Tensor, "N N"]) -> Float[Tensor, "N"]:
    """Bound the cross-entropy of each row from below: no answer scores less.

    An answer sums to 1. A row that does, as in ``paper``, is best answered by itself, which costs
    its entropy. A row that sums to s, as the reference's do, is best answered by row / s, which
    costs its entropy + s ln s; its entropy alone would make good answers look better than perfect.
    """
    return torch.special.entr(targets).sum(dim=1) - torch.special.entr(targets.sum(dim=1))


def _confident(
    log_probability: Float[Tensor, "B S N"], true: Int[Tensor, "B S"], targets: Float[Tensor, "N N"]
) -> Bool[Tensor, "B S"]:
    """Find patches placed at least as surely as the target, at its peak, asks for."""
    of_true = log_probability.gather(2, true[..., None]).squeeze(2)
    return of_true.exp() >= targets.diagonal().to(of_true.dtype)[true]


def _weights(
    method: Method,
    similarity: Float[Tensor, "B V"] | None,
    draw: Draw,
    counted: Bool[Tensor, "B S"],
    dtype: torch.dtype,
) -> Float[Tensor, "B S"]:
    """Share a total of 1 among the counted patches of the batch, 0 elsewhere.

    Paper: each image has 1/B (an image with nothing left to score gives its share up, so the
    loss falls towards 0 and is never NaN). Reference: weights are shared among all visible
    patches of an image first, so that images count unequally.
    """
    visible = draw.visible
    alike = torch.zeros_like(visible, dtype=dtype) if similarity is None else similarity.to(dtype)
    if method.conformance == "paper":
        of_scored = alike.gather(1, draw.scored)
        return attentive_weights(of_scored, counted, method.tau) / len(visible)
    everything = torch.ones_like(visible, dtype=torch.bool)
    weights = attentive_weights(alike, everything, method.tau).gather(1, draw.scored) * counted
    return weights / weights.sum().clamp(min=torch.finfo(dtype).tiny)


def _carrying(weights: Float[Tensor, "B S"]) -> Tensor:
    """Count the patches of an image that carry the loss; 0 where nothing is weighed."""
    smallest = torch.finfo(weights.dtype).tiny
    return weights.sum() ** 2 / (weights**2).sum().clamp(min=smallest) / len(weights)


def _pixel_loss(
    method: Method,
    pixels: Float[Tensor, "B H P"],
    draw: Draw,
    images: Float[Tensor, "B 3 rows columns"],
    patch_size: int,
) -> Tensor:
    wanted = take(patchify(images, patch_size), draw.hidden)
    if method.normalise_pixels:
        mean = wanted.mean(dim=-1, keepdim=True)
        wanted = (wanted - mean) / (wanted.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    return F.mse_loss(exact(pixels), wanted)


def patchify(images: Float[Tensor, "B 3 rows columns"], patch_size: int) -> Float[Tensor, "B N P"]:
    """Cut images into patches, cells row by row, pixels row by row with channels last."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.view(batch, channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)
