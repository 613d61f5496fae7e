"""How every arm is measured, and a digest of all that decides a figure. Imports no torch."""

import json
from dataclasses import asdict
from hashlib import sha256

from droppos.config import Optim
from droppos.measure.finetune_recipe import Finetune
from pipelines.evidence.recipes import load_recipe

VERSION = 1
"""To be raised when code changes what a figure is."""

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
TENTH_EPOCHS = 15
"""Passes over a tenth of the pictures, with labels."""
ALL_EPOCHS = 2
"""Passes over all pictures, with labels."""
LOCATED = 500
"""Pictures whose patches the location probe learns from, and as many others that it is asked of."""


def digest() -> str:
    """Hash what decides all figures: those of another digest are not compared with these."""
    told = [
        VERSION,
        asdict(load_recipe()),
        asdict(FINETUNE),
        [TENTH_EPOCHS, ALL_EPOCHS, LOCATED],
    ]
    return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
