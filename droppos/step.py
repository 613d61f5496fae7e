"""One training step: forward, loss, backward, clip, move.

Axes in this file
    B  images of a micro-batch on this rank
    N  cells in the patch grid
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from droppos.config import Compute, Method, Model, Optim
from droppos.loss import Metrics, pretraining_loss
from droppos.masking import Noise, draw, draw_noise
from droppos.model import normalise
from droppos.parallel import build, gradient_sync, precision, resolve_device, to_device
from droppos.schedule import learning_rate, parameter_groups, sigma
from droppos.targets import smoothed_targets


class MicroBatch(NamedTuple):
    """Images of one forward pass on one rank."""

    images: UInt8[Tensor, "B rows columns 3"]
    slots: Int[Tensor, "B"]
    """Place of each image in the global batch: its masks depend on it and on the step alone."""
    mirrored: Bool[Tensor, "B"] | None = None
    """Images to mirror, on the device; none when not given."""


class StepReport(NamedTuple):
    """What a step did. Tensors stay where they were made; nothing here waits for the device."""

    metrics: Metrics
    """Means over this rank's images."""
    grad_norm: Tensor
    """Euclidean norm of the whole gradient before clipping."""
    lr: float
    sigma: float
    """In patches."""
    skipped: Tensor
    """Whether loss or gradient was not finite, on any rank (bool): nothing but the step count
    changed."""


@dataclass
class TrainState:
    """All that a step reads and changes."""

    model_config: Model
    method: Method
    optim: Optim
    compute: Compute
    seed: int
    steps_per_epoch: int
    device: torch.device
    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    """Optimizer steps done."""
    _targets: dict[float, Float[Tensor, "N N"]] = field(default_factory=dict)

    @classmethod
    def create(
        cls,
        model_config: Model,
        method: Method,
        optim: Optim,
        compute: Compute,
        *,
        seed: int,
        steps_per_epoch: int,
    ) -> "TrainState":
        """Make model and optimizer on this process's device, the same on every rank."""
        device = resolve_device(compute)
        model = build(model_config, method, compute, seed, device)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, optim.weight_decay),
            lr=optim.peak_lr,
            betas=optim.betas,
            fused=True,
        )
        return cls(
            model_config=model_config,
            method=method,
            optim=optim,
            compute=compute,
            seed=seed,
            steps_per_epoch=steps_per_epoch,
            device=device,
            model=model,
            optimizer=optimizer,
        )

    @property
    def epoch(self) -> float:
        """Epochs done, with the fraction of the one under way."""
        return self.step / self.steps_per_epoch

    def targets(self, width: float) -> Float[Tensor, "N N"]:
        """Give the target map of a sigma on the device, made once for each value."""
        if width not in self._targets:
            self._targets.clear()  # sigma never comes back, so one map is enough
            # Made where it is read: a copy from pageable memory would wait for the device.
            with self.device:
                self._targets[width] = smoothed_targets(
                    self.model_config.grid, width, self.method.conformance
                )
        return self._targets[width]


def step_noise(state: TrainState) -> Noise:
    """Draw the masks' noise for all images of this step's global batch."""
    digest = blake2b(f"{state.seed}:{state.step}".encode(), digest_size=8).digest()
    generator = torch.Generator(state.device)
    generator.manual_seed(int.from_bytes(digest, "big") >> 1)
    counts = state.method.counts(state.model_config.grid)
    return draw_noise(counts, state.method, generator, state.optim.global_batch)


def train_step(state: TrainState, micro_batches: Sequence[MicroBatch]) -> StepReport:
    """Take one optimizer step on this rank's images of one global batch.

    Accumulated micro-batches give the gradient of the large batch: each counts 1/n. A loss or
    gradient that is not finite changes no weight, moment or step counter of the optimizer, on any
    rank; ``state.step`` advances, for that batch is passed over.
    """
    model, method = state.model, state.method
    lr = learning_rate(state.optim, state.epoch)
    width = sigma(method, state.epoch, state.optim.epochs)
    counts = method.counts(state.model_config.grid)
    noise = step_noise(state)

    parts = []
    for i, batch in enumerate(micro_batches):
        images = _on_device(batch, state.device)
        masks = draw(counts, method, noise.of(to_device(batch.slots, state.device)))
        with gradient_sync(model, last=i == len(micro_batches) - 1):
            with precision(state.compute, state.device, model):
                prediction = model(images, masks, guided=method.guided)
            metrics = pretraining_loss(
                method,
                prediction,
                masks,
                state.targets(width),
                images,
                state.model_config.shape.patch_size,
            )
            # 1/n, or NaN where the loss is not finite: its gradient alone could still be.
            share = (metrics.loss.detach() * 0 + 1) / len(micro_batches)
            (metrics.loss * share).backward()
        parts.append(torch.stack([value.detach() for value in metrics]))

    grad_norm = _clip(model, method, state.optim.clip_norm)
    skipped = ~grad_norm.isfinite()
    _update(state.optimizer, lr, skipped)
    state.step += 1
    return StepReport(Metrics(*torch.stack(parts).mean(dim=0)), grad_norm, lr, width, skipped)


def _update(optimizer: torch.optim.Optimizer, lr: float, skipped: Bool[Tensor, ""]) -> None:
    """Move the weights unless told to skip, which is decided on the device.

    The norm is of the gradient summed over ranks, where one rank's NaN is everyone's, so all
    decide alike with no word between them.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    # Fused AdamW looks at it in its kernel, as it would for torch.amp.GradScaler.
    optimizer.found_inf = skipped.float()  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    optimizer.zero_grad()


def _on_device(batch: MicroBatch, device: torch.device) -> Float[Tensor, "B 3 rows columns"]:
    images = to_device(batch.images, device)
    mirrored = None if batch.mirrored is None else to_device(batch.mirrored, device)
    return normalise(images, mirrored)


def _clip(model: nn.Module, method: Method, limit: float | None) -> Tensor:
    parameters = [p for p in model.parameters() if p.grad is not None]
    bound = float("inf") if limit is None else limit
    if method.conformance == "paper":
        return _whole(clip_grad_norm_(parameters, bound))
    # The reference clips each tensor by itself; the norm of norms is the whole gradient's.
    return torch.stack([_whole(clip_grad_norm_([p], bound)) for p in parameters]).norm()


def _whole(norm: Tensor) -> Tensor:
    """Gather a norm that is sharded over ranks."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
