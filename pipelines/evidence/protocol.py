"""How every arm is measured, and a digest of all that decides a figure. Imports no torch."""

import json
from dataclasses import asdict
from hashlib import sha256
from typing import Any

from droppos.config import Optim
from droppos.measure.finetune_recipe import Finetune
from pipelines.evidence.recipes import load_recipe

VERSION = 2
"""To be raised when code changes what a figure is. 1 trained on pictures that lay by class."""

FINETUNE = Finetune(
    optim=Optim(
        epochs=1,
        global_batch=64,
        lr_per_256=1e-3,
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
"""Fine-tuning, and supervised training: the same for all, and mild, for a few epochs. No layer
learns more slowly than another, which would hold back whoever starts from scratch. A peak four
times as high spoils what was learnt before, and helps nobody (docs/evidence.md)."""
TENTH_EPOCHS = 10
"""Passes over a tenth of the pictures, with labels."""
ALL_EPOCHS = 1
"""Passes over all pictures, with labels."""
LOCATED = 500
"""Pictures whose patches the location probe learns from, and as many others that it is asked of."""


def digest() -> str:
    """Hash what decides all figures: those of another digest are not compared with these."""
    return digest_of(asdict(load_recipe()), asdict(FINETUNE), [TENTH_EPOCHS, ALL_EPOCHS, LOCATED])


def digest_of(*told: Any) -> str:
    """Hash what decides figures, and the code's version."""
    return sha256(json.dumps([VERSION, *told], sort_keys=True).encode()).hexdigest()[:8]
