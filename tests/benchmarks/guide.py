"""Compare the cheaper guides with the published one: what they cost, and whether they agree.

    python -m tests.benchmarks.guide [--quick] [--steps 600] [--rounds 3]

Cost: operations of a ViT-B/16's step at the published ratios by formula, and its time, steps of
all guides in turn. Agreement: a small model is trained on the demo's photographs with the published
guide; on held-out photographs, each picture's weights by another guide are ranked beside the exact
ones (Spearman, mean over pictures, over visible patches), with the same weights and masks.
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor

from droppos.config import Compute, Method, Model, Optim
from droppos.flops import guide_flops, step_flops
from droppos.masking import draw, draw_noise
from droppos.measure.position import PositionMeter, measure_positions, position_predictor
from droppos.model import DropPos, normalise
from droppos.parallel import unwrap
from droppos.step import MicroBatch, TrainState, train_step
from pipelines.demo_pictures import write_demo_pictures
from tests.benchmarks.step import TINY, Setting, create, pictures, timed

SMALL = Model(
    size="tiny",
    image_size=(64, 64),
    patch_size=8,
    width=96,
    depth=8,
    heads=4,
    decoder_width=64,
    decoder_depth=1,
    decoder_heads=4,
)
METHOD = Method(mask_ratio=0.5, sigma=2, sigma_decay="step")
BATCH, HELD_OUT = 32, 192


class Variant(NamedTuple):
    """A guide, and the share of the encoder's blocks that it passes."""

    guide: str
    share: float = 1

    def of(self, method: Method, model: Model) -> Method:
        depth = None if self.share == 1 else max(1, round(self.share * model.shape.depth))
        return replace(method, guide=self.guide, guide_depth=depth)  # pyright: ignore[reportArgumentType]


EXACT = Variant("picture")
VARIANTS = (
    EXACT,
    Variant("picture", 0.75),
    Variant("picture", 0.5),
    Variant("picture", 0.25),
    Variant("half"),
    Variant("visible"),
    Variant("student"),
)


def load(folder: Path, limit: int | None = None) -> Tensor:
    """Read tiles of all photographs as (tiles, rows, columns, 3), in turn where not all."""
    files = sorted(folder.glob("*/*.jpg"), key=lambda file: (file.name, file.parent.name))
    return torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files[:limit]]))


def trained(tiles: Tensor, steps: int) -> DropPos:
    """Train with the published guide."""
    state = TrainState.create(
        SMALL,
        METHOD,
        Optim(epochs=10, warmup_epochs=1, global_batch=BATCH, lr_per_256=1.6e-2),
        Compute(strategy="single", precision="float32", device="cpu"),
        seed=0,
        steps_per_epoch=max(1, steps // 10),
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(tiles), (BATCH,), generator=generator)
        train_step(state, [MicroBatch(tiles[chosen], torch.arange(BATCH))])
    return unwrap(state.model).eval()


@torch.no_grad()
def agreement(model: DropPos, tiles: Tensor) -> dict[Variant, float]:
    """Rank each picture's weights by every guide beside the exact ones; 1 is the same order."""
    counts = METHOD.counts(model.grid)
    masks = draw(
        counts, METHOD, draw_noise(counts, METHOD, torch.Generator().manual_seed(1), len(tiles))
    )
    found = {}
    for variant in VARIANTS:
        model.method = variant.of(METHOD, SMALL)
        found[variant] = model(normalise(tiles), masks, guided=True).similarity.numpy()
    exact = found[EXACT]
    return {
        variant: statistics.fmean(
            float(spearmanr(ours, theirs).statistic)
            for ours, theirs in zip(values, exact, strict=True)
        )
        for variant, values in found.items()
    }


def skill(model: DropPos, tiles: Tensor) -> float:
    """Measure held-out positions, so that one sees whether there is anything to agree on."""
    meter = PositionMeter(model.grid, METHOD.counts(model.grid))
    return measure_positions(position_predictor(model), tiles, meter, seed=0).report().skill


def step_seconds(model: Model, batch: int, rounds: int) -> dict[Variant, list[float]]:
    """Time a step with each guide, all in turn in each round."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = Setting("", model, True, batch)
    state, images = create(setting, device), pictures(setting)
    seconds: dict[Variant, list[float]] = {variant: [] for variant in VARIANTS}
    for i in range(rounds + 1):
        for variant in VARIANTS:
            state.method = unwrap(state.model).method = variant.of(setting.method, model)
            took = timed(device, lambda: train_step(state, [images]))
            if i > 0:  # the first round warms up
                seconds[variant].append(took)
    return seconds


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny: test the benchmark")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    model = TINY if options.quick else Model()
    seconds = step_seconds(model, batch=4, rounds=options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        demo = write_demo_pictures(Path(folder))
        student = trained(load(demo.train), options.steps)
        held_out = load(demo.holdout, 8 if options.quick else HELD_OUT)
    ability, ranks = skill(student, held_out), agreement(student, held_out)

    table = Table("guide", "blocks", "guide GFLOP", "step GFLOP", "s/step", "vs exact", "Spearman")
    for variant in VARIANTS:
        method = variant.of(Method(), model)
        rounds = zip(seconds[EXACT], seconds[variant], strict=True)
        table.add_row(
            variant.guide,
            f"{variant.share:g}",
            f"{guide_flops(model, method) / 1e9:.1f}",
            f"{step_flops(model, method) / 1e9:.1f}",
            f"{statistics.median(seconds[variant]):.3g}",
            f"{statistics.median(ours / exact for exact, ours in rounds):.2f}",
            f"{ranks[variant]:.2f}",
        )
    Console(width=100).print(table)
    print(f"guide steps={options.steps} held_out={len(held_out)} skill={ability:.3f}")


if __name__ == "__main__":
    main()
