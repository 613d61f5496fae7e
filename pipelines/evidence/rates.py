"""What fine-tuning's peak rate was chosen by: training pictures outside the labelled tenth.

    python -m pipelines.evidence.rates FOLDER CSV RATE,RATE ARM/BUDGET/SEED...

Each start is fine-tuned on the tenth at each rate as the study does it, and asked of 3,000 of the
other 45,000 training pictures, so that no test picture has a say. Rows are added to the CSV
(docs/evidence/rates.csv). The cells' checkpoints must be in FOLDER, where `droppos evidence` keeps
them.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pipelines.backbone import from_checkpoint
from pipelines.checkpoints import newest
from pipelines.evidence.arms import Name
from pipelines.evidence.budget import lasting
from pipelines.evidence.cell import untrained
from pipelines.evidence.cifar import Cifar, cifar
from pipelines.evidence.here import finetune_here
from pipelines.evidence.protocol import FINETUNE, TENTH_EPOCHS
from pipelines.evidence.recipes import load_recipe
from pipelines.evidence.tables import read_table, write_table
from pipelines.holdout import load_pictures
from pipelines.storage import open_place

EVERY = 15
"""One in so many of the pictures outside the tenth is asked."""


@dataclass(frozen=True, slots=True, order=True)
class Rated:
    """What one rate gave one start."""

    start: str
    """ARM/BUDGET/SEED of what was fine-tuned."""
    rate: float
    """Peak learning rate, at the study's batch."""
    accuracy: float
    low: float
    """95 % interval over the pictures asked."""
    high: float
    epochs: int
    seconds: float


def rated(name: Name, rate: float, folder: Path, data: Cifar) -> Rated:
    """Fine-tune a start on the tenth at one peak rate."""
    recipe = load_recipe()
    optim = FINETUNE.optim
    own = replace(optim, lr_per_256=rate * 256 / optim.global_batch)
    start = perf_counter()
    done = finetune_here(
        _start(name, folder),
        recipe.model,
        data.tenth,
        _others(data, recipe.model.image_size),
        lasting(replace(FINETUNE, optim=own), TENTH_EPOCHS),
        seed=name.seed,
        device=torch.device("cpu"),
    )
    low, high = done.accuracy.interval
    seconds = perf_counter() - start
    return Rated(str(name), rate, done.accuracy.value, low, high, TENTH_EPOCHS, seconds)


def _start(name: Name, folder: Path) -> VisionTransformer:
    if name.about.kind == "untrained":
        return untrained(load_recipe(), name.seed)
    saved = newest(open_place(str(folder / "cells" / name.folder / "run")))
    assert saved is not None, f"{name} has no checkpoint in {folder}"
    return from_checkpoint(saved).whole.encoder.eval()


def _others(data: Cifar, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Load training pictures outside the tenth, and their classes."""
    found, known = load_pictures(data.train, size), set(load_pictures(data.tenth, size).keys)
    assert found.labels is not None
    rows = [row for row, key in enumerate(found.keys) if key not in known][::EVERY]
    return found.pixels[rows], torch.tensor(found.labels)[rows]


def main() -> None:
    """Try each rate on each start, and keep what came of it at once."""
    torch.set_num_threads(1)
    folder, out, rates, *names = sys.argv[1:]
    data = cifar(Path(folder) / "cifar")
    for rate in rates.split(","):
        for name in names:
            row = rated(Name.parse(name), float(rate), Path(folder), data)
            print(f"{row.start} at {row.rate:g}: {row.accuracy:.4f}", flush=True)
            known = read_table(Path(out), Rated, "is no table of rates")
            write_table(Path(out), Rated, [*known, row])


if __name__ == "__main__":
    main()
