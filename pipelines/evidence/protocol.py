"""How every arm is measured, and a digest of what decides each figure. Imports no torch."""

import json
from dataclasses import asdict, replace
from hashlib import sha256
from typing import Any

from droppos.config import Optim
from droppos.measure.finetune_recipe import Finetune
from pipelines.evidence.arms import BY_NAME, Arm
from pipelines.evidence.recipes import changed, load_recipe
from pipelines.recipe import Recipe

VERSION = 2
"""To be raised when code changes what a figure is. 1 trained on pictures that lay by class."""

FINETUNE = Finetune(
    optim=Optim(
        epochs=1,
        global_batch=64,
        warmup_epochs=0,
        weight_decay=0.05,
        betas=(0.9, 0.999),
        clip_norm=1.0,
    ),
    layer_decay=1.0,
    drop_path=0.0,
    mixup=0.0,
    cutmix=0.0,
    label_smoothing=0.1,
    random_erasing=0.0,
    augment="",
    crop_scale=(0.4, 1.0),
)
"""Fine-tuning, and supervised training, but for the rate: the same for all, and mild, for a few
epochs. No layer learns more slowly than another, which would hold back whoever starts from
scratch."""
PEAK, SCRATCH_PEAK = 1e-3, 5e-4
"""Peak learning rates, after pre-training and from scratch: the best of three on training pictures
(docs/evidence/rates.csv), the first in the mean over arms."""
TENTH_EPOCHS = 10
"""Passes over a tenth of the pictures, with labels."""
ALL_EPOCHS = 1
"""Passes over all pictures, with labels."""
LOCATED = 500
"""Pictures whose patches the location probe learns from, and as many others that it is asked of."""


def finetuning(arm: Arm) -> Finetune:
    """Tell how an arm is fine-tuned; what starts from scratch has the peak rate best for that."""
    return at_peak(SCRATCH_PEAK if arm.kind in {"untrained", "supervised"} else PEAK)


def at_peak(rate: float) -> Finetune:
    """Give the fine-tuning a peak learning rate, at its own batch."""
    optim = replace(FINETUNE.optim, lr_per_256=rate * 256 / FINETUNE.optim.global_batch)
    return replace(FINETUNE, optim=optim)


def digest(arm: str, figure: str) -> str:
    """Hash what decides a figure of an arm: rows of another digest are not compared with these.

    What one figure is taken by is in no other's digest, so that to change it costs that one alone.

    Args:
        arm: Its name.
        figure: Its name, or "weights" for what decides the pre-trained weights.
    """
    about, recipe = BY_NAME[arm], changed(load_recipe(), BY_NAME[arm])
    told: list[Any] = [training(recipe)]
    if figure == "location":
        told.append(LOCATED)
    if figure == "position":
        told.append(measuring(recipe))
    if figure == "tenth":
        told.append([asdict(finetuning(about)), TENTH_EPOCHS])
    elif figure == "all" or about.kind == "supervised":
        told.append([asdict(finetuning(about)), ALL_EPOCHS])
    return digest_of(*told)


def training(recipe: Recipe) -> list[Any]:
    """List what decides a training; who trains it, where, and what it logs does not."""
    data = recipe.data
    sections = (recipe.model, recipe.method, recipe.optim)
    compute = [recipe.compute.precision, recipe.compute.guide_precision]
    read = [data.crop_scale, data.flip, data.scaled_decoding, data.window]
    return [*(asdict(section) for section in sections), *compute, *read]


def measuring(recipe: Recipe) -> list[Any]:
    """List what decides a measurement on held-out pictures."""
    own = recipe.measure
    return [own.mask_ratio, own.position_mask_ratio, own.pictures, own.seed]


def digest_of(*told: Any) -> str:
    """Hash what decides figures, and the code's version."""
    return sha256(json.dumps([VERSION, *told], sort_keys=True).encode()).hexdigest()[:8]
