"""What fine-tuning's peak rate was chosen by: training pictures outside the labelled tenth.

    python -m pipelines.evidence.rates FOLDER CSV RATE,RATE ARM/BUDGET/SEED...

Each start is fine-tuned on the tenth at each rate as the study does it, and asked of 3,000 of the
other 45,000 training pictures, so that no test picture has a say. Rows go into the CSV
(docs/evidence/rates.csv). The cells' checkpoints must be in FOLDER, where `droppos evidence` keeps
them.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from jaxtyping import Int64, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from droppos.errors import DataError
from droppos.parallel import resolve_device
from pipelines.backbone import from_checkpoint
from pipelines.checkpoints import newest
from pipelines.evidence.arms import Name
from pipelines.evidence.budget import lasting
from pipelines.evidence.cell import run_name, untrained
from pipelines.evidence.cifar import Cifar, cifar
from pipelines.evidence.here import finetune_here
from pipelines.evidence.protocol import TENTH_EPOCHS, at_peak
from pipelines.evidence.recipes import load_recipe
from pipelines.evidence.tables import read_table, write_table
from pipelines.holdout import load_pictures
from pipelines.storage import open_place

EVERY = 15
"""One in so many of the pictures outside the tenth is asked."""

Asked = tuple[UInt8[Tensor, "P 32 32 3"], Int64[Tensor, " P"]]
"""Pictures, with their classes."""


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


def rated(name: Name, rate: float, folder: Path, tenth: str, asked: Asked) -> Rated:
    """Fine-tune a start on the tenth at one peak rate.

    Raises:
        DataError: If there is no checkpoint of it.
    """
    recipe = load_recipe()
    start = perf_counter()
    done = finetune_here(
        starting(name, folder),
        recipe.model,
        tenth,
        asked,
        lasting(at_peak(rate), TENTH_EPOCHS),
        seed=name.seed,
        device=resolve_device(recipe.compute),
    )
    low, high = done.accuracy.interval
    seconds = perf_counter() - start
    return Rated(str(name), rate, done.accuracy.value, low, high, TENTH_EPOCHS, seconds)


def starting(name: Name, folder: Path) -> VisionTransformer:
    """Load what a cell's fine-tuning starts from.

    Raises:
        DataError: If there is no checkpoint of it.
    """
    if name.about.kind == "untrained":
        return untrained(load_recipe(), name.seed)
    home = folder / "cells" / name.folder / run_name(name.arm)
    saved = newest(open_place(str(home)))
    if saved is None:
        raise DataError(
            f"{home} has no checkpoint; `droppos evidence --only {name} --folder {folder}` makes it"
        )
    return from_checkpoint(saved).whole.encoder.eval()


def others(data: Cifar, size: tuple[int, int]) -> Asked:
    """Load training pictures outside the tenth, by what they show: there they have other names."""
    found = load_pictures(data.train, size)
    known = {picture.numpy().tobytes() for picture in load_pictures(data.tenth, size).pixels}
    assert found.labels is not None
    rows = [
        row for row, picture in enumerate(found.pixels) if picture.numpy().tobytes() not in known
    ][::EVERY]
    return found.pixels[rows], torch.tensor(found.labels)[rows]


def main() -> None:
    """Try each rate on each start, and keep what came of it at once."""
    torch.set_num_threads(1)
    folder, out, rates, *names = sys.argv[1:]
    data = cifar(Path(folder) / "cifar")
    asked = others(data, load_recipe().model.image_size)
    for rate in map(float, rates.split(",")):
        for name in map(Name.parse, names):
            row = rated(name, rate, Path(folder), data.tenth, asked)
            print(f"{row.start} at {row.rate:g}: {row.accuracy:.4f}", flush=True)
            known = read_table(Path(out), Rated, "is no table of rates")
            rows = {(each.start, each.rate): each for each in [*known, row]}
            write_table(Path(out), Rated, rows.values())


if __name__ == "__main__":
    main()
