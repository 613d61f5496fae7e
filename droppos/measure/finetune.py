"""Full fine-tuning: how good a start a backbone is, when all of its weights learn a task.

The recipe is the field's for masked pre-training (BEiT; He et al., "Masked Autoencoders Are
Scalable Vision Learners", CVPR 2022, appendix A), and its parts are timm's: drop path, layer-wise
learning rates, mixup and cutmix, random erasing, soft targets. RandAugment and the random crop are
the data's side: a picture arrives here cropped and augmented, as uint8.

Axes in this file
    B  images of a micro-batch on this rank
    C  classes
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.layers import trunc_normal_  # pyright: ignore[reportPrivateImportUsage]
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from droppos.config import Compute, Model
from droppos.encoder import timm_arguments, timm_classifier
from droppos.errors import DataError, DivergedError, TrainingError
from droppos.measure.finetune_recipe import Finetune
from droppos.model import normalise
from droppos.parallel import gradient_sync, precision, to_device
from droppos.schedule import learning_rate

HEAD_STD = 2e-5
"""Deviation of the head's first weights, as MAE's: all classes begin equally likely."""


def build_classifier(
    encoder: Mapping[str, Tensor], config: Model, classes: int, finetune: Finetune, seed: int = 0
) -> VisionTransformer:
    """Make timm's own classifier with the weights of a pre-trained encoder.

    As MAE does: patch tokens are averaged before the last norm, so that norm is another one
    (``fc_norm``) and starts anew, like the head; the class token stays and goes unread. Positions
    start as the fixed ones they were pre-trained with, and learn like all else.

    Args:
        encoder: State of the encoder (:func:`droppos.encoder.build_encoder`, or an export).
        config: The model it was pre-trained as.
        classes: Outputs of the head.
        finetune: Tells the drop path.
        seed: Of the head's first weights.

    Raises:
        TrainingError: If the weights are not those of the model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm_classifier(config, classes, finetune.drop_path)
        assert isinstance(model.head, nn.Linear)
        trunc_normal_(model.head.weight, std=HEAD_STD)
        nn.init.zeros_(model.head.bias)
    kept = {name: value for name, value in encoder.items() if not name.startswith("norm.")}
    own = {name for name in model.state_dict() if not name.startswith(("fc_norm.", "head."))}
    if kept.keys() != own:
        odd, (name, _) = sorted(kept.keys() ^ own), timm_arguments(config)
        raise TrainingError(
            f"the encoder's weights are not those of {name}: {', '.join(odd[:3])} "
            f"{'is' if len(odd) == 1 else 'are'} in one and not in the other; name the backbone's "
            "own configuration"
        )
    model.load_state_dict(kept, strict=False)
    return model


class Labelled(NamedTuple):
    """Images of one forward pass on one rank, with their classes."""

    images: UInt8[Tensor, "B rows columns 3"]
    labels: Int[Tensor, " B"]
    mirrored: Bool[Tensor, " B"] | None = None
    """Images to mirror, on the device; none when not given."""


@dataclass
class FinetuneState:
    """All that a step reads and changes."""

    finetune: Finetune
    compute: Compute
    seed: int
    rank: int
    steps_per_epoch: int
    device: torch.device
    model: nn.Module
    """The classifier, or DDP around it."""
    optimizer: torch.optim.Optimizer
    mix: Mixup | None
    erase: RandomErasing
    loss: nn.Module
    step: int = 0
    """Optimizer steps done."""

    @classmethod
    def create(
        cls,
        finetune: Finetune,
        model: nn.Module,
        classes: int,
        *,
        compute: Compute,
        steps_per_epoch: int,
        device: torch.device,
        seed: int = 0,
        rank: int = 0,
    ) -> "FinetuneState":
        """Make the optimizer of a classifier that is on the device.

        Args:
            finetune: The recipe.
            model: The classifier, or DDP around it.
            classes: Outputs of its head.
            compute: Tells the precision.
            steps_per_epoch: Optimizer steps of an epoch.
            device: Where the model is.
            seed: Of all that is drawn in a step.
            rank: This process's number; each draws its own.
        """
        inner = _inner(model)
        optim = finetune.optim
        groups = param_groups_layer_decay(
            inner,
            optim.weight_decay,
            no_weight_decay_list=inner.no_weight_decay(),
            layer_decay=finetune.layer_decay,
        )
        smoothing = finetune.label_smoothing
        mix = None
        if finetune.mixes:
            mix = Mixup(
                finetune.mixup, finetune.cutmix, label_smoothing=smoothing, num_classes=classes
            )
        return cls(
            finetune=finetune,
            compute=compute,
            seed=seed,
            rank=rank,
            steps_per_epoch=steps_per_epoch,
            device=device,
            model=model,
            optimizer=torch.optim.AdamW(groups, lr=optim.peak_lr, betas=optim.betas, fused=True),
            mix=mix,
            erase=RandomErasing(finetune.random_erasing, mode="pixel", device=str(device)),
            loss=LabelSmoothingCrossEntropy(smoothing) if mix is None else SoftTargetCrossEntropy(),
        )

    @property
    def epoch(self) -> float:
        """Epochs done, with the fraction of the one under way."""
        return self.step / self.steps_per_epoch


def finetune_step(state: FinetuneState, micro_batches: Sequence[Labelled]) -> Float[Tensor, ""]:
    """Take one optimizer step on this rank's images of one global batch.

    All that is drawn depends on seed, step and rank alone, so a run that resumes draws the same.

    Returns:
        The mean loss over this rank's images, left where it was made.
    """
    rate = learning_rate(state.finetune.optim, state.epoch)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    state.model.train()
    state.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=state.device)
    with _drawing(state):
        for number, batch in enumerate(micro_batches):
            images, targets = _prepared(state, batch)
            with gradient_sync(state.model, number == len(micro_batches) - 1):
                with precision(state.compute, state.device, state.model):
                    logits = state.model(images)
                loss = state.loss(logits.float(), targets) / len(micro_batches)
                loss.backward()
            total += loss.detach()
    if state.finetune.optim.clip_norm is not None:
        clip_grad_norm_(state.model.parameters(), state.finetune.optim.clip_norm)
    state.optimizer.step()
    state.step += 1
    return total


def _prepared(state: FinetuneState, batch: Labelled) -> tuple[Tensor, Tensor]:
    """Normalise, erase, then mix, in timm's order."""
    mirrored = None if batch.mirrored is None else to_device(batch.mirrored, state.device)
    images = normalise(to_device(batch.images, state.device), mirrored)
    images, labels = state.erase(images), to_device(batch.labels, state.device)
    if state.mix is None:
        return images, labels
    if len(images) % 2:
        raise DataError(
            f"mixup and cutmix blend images in pairs, got a micro-batch of {len(images)}; choose "
            "an even one by optim.global_batch, optim.accumulate and the workers"
        )
    return state.mix(images, labels)


@contextmanager
def _drawing(state: FinetuneState) -> Iterator[None]:
    """Seed the three generators that timm's parts draw from, and put them back after.

    Mixup draws from numpy's, random erasing from Python's and torch's, drop path from torch's.
    """
    text = f"{state.seed}/{state.step}/{state.rank}".encode()
    seed = int.from_bytes(blake2b(text, digest_size=8).digest(), "big")
    before = random.getstate(), np.random.get_state()
    devices = [state.device] if state.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def _inner(model: nn.Module) -> VisionTransformer:
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    assert isinstance(inner, VisionTransformer)
    return inner


@torch.no_grad()
def count_right(
    state: FinetuneState,
    images: UInt8[Tensor, "B rows columns 3"],
    labels: Int[Tensor, " B"],
) -> Int[Tensor, "2"]:
    """Classify images as they are.

    Returns:
        How many have the likeliest class right, and how many have it among the five likeliest, on
        the device.

    Raises:
        DivergedError: If a logit is not finite.
    """
    model = _inner(state.model)  # not through DDP: ranks need not have equally many batches
    training = model.training
    model.eval()
    try:
        with precision(state.compute, state.device, model):
            logits = model(normalise(images.to(state.device))).float()
    finally:
        model.train(training)
    if not logits.isfinite().all():  # or the first class would be the likeliest of all
        raise DivergedError(
            f"the classifier of step {state.step} gives logits that are not finite: it diverged; "
            "fine-tune again with a lower optim.lr_per_256, or with optim.clip_norm"
        )
    likeliest = logits.topk(min(5, logits.shape[1])).indices == labels.to(state.device)[:, None]
    return torch.stack([likeliest[:, 0].sum(), likeliest.any(1).sum()])
