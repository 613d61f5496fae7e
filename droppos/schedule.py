"""Schedules: learning rate and sigma over time, and which parameters decay."""

from collections.abc import Iterable
from math import cos, pi
from typing import Any

from torch import nn

from droppos.config import Method, Optim


def learning_rate(optim: Optim, epoch: float) -> float:
    """Give the learning rate at a fractional epoch: linear warm-up from 0, then half a cosine."""
    if epoch < optim.warmup_epochs:
        return optim.peak_lr * epoch / optim.warmup_epochs
    if optim.epochs == optim.warmup_epochs:
        return optim.peak_lr
    done = (epoch - optim.warmup_epochs) / (optim.epochs - optim.warmup_epochs)
    return optim.min_lr + (optim.peak_lr - optim.min_lr) * 0.5 * (1 + cos(pi * done))


def sigma(method: Method, epoch: float, epochs: int) -> float:
    """Give sigma, in patches, at a fractional epoch of a run of so many epochs."""
    if method.sigma_decay == "constant":
        return method.sigma
    if method.sigma_decay == "step":
        return method.sigma * (1 - epoch / epochs)
    last = epochs - 1 if method.sigma_decay == "epoch_to_zero" else epochs
    return method.sigma * (1 - int(epoch) / last) if last else 0.0


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Part the trained parameters by whether they decay: 1-D ones and biases do not.

    Class, mask and dropped-position tokens have three axes, so they do.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def group(parameters: Iterable[nn.Parameter], decay: float) -> dict[str, Any]:
        return {"params": list(parameters), "weight_decay": decay}

    return [
        group((p for _, p in trained if p.ndim > 1), weight_decay),
        group((p for _, p in trained if p.ndim <= 1), 0.0),
    ]
