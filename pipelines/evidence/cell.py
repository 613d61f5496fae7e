"""One cell of the comparison: an arm with a seed is trained, then every figure of it is taken.

A process of its own, of one thread, and on a GPU if there is one. It can be killed at any moment
and started again: training goes on from its checkpoint, a figure that is known is not taken again.

    python -m pipelines.evidence.cell ARM/BUDGET/SEED FOLDER DATA_JSON
"""

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from jaxtyping import Int64, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from droppos.config import Compute
from droppos.flops import step_flops
from droppos.measure.features import extract_features
from droppos.measure.finetune_recipe import Finetune
from droppos.measure.intervals import Proportion
from droppos.measure.knn import knn_accuracy
from droppos.measure.location import location_probe, pixel_location_probe
from droppos.measure.probe import linear_probe
from droppos.measure.rank import effective_rank
from droppos.model import DropPos
from droppos.parallel import resolve_device
from pipelines.backbone import from_checkpoint
from pipelines.evidence.arms import Name
from pipelines.evidence.budget import (
    TRAIN,
    at_budget,
    lasting,
    supervised_at_budget,
    supervised_flops,
)
from pipelines.evidence.cifar import CLASSES, Cifar
from pipelines.evidence.cifar import TENTH as TENTH_OF_A_CLASS
from pipelines.evidence.here import Classifier, finetune_here, pretrain_here
from pipelines.evidence.protocol import ALL_EPOCHS, LOCATED, TENTH_EPOCHS, digest, finetuning
from pipelines.evidence.recipes import load_recipe
from pipelines.evidence.results import Row, known_rows
from pipelines.evidence.tables import replace_file
from pipelines.holdout import Holdout, load_pictures
from pipelines.recipe import Recipe

_PARENT = os.getppid()


class Value(NamedTuple):
    """A figure with its 95 % interval over the test pictures, or itself in place of one."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, found: Proportion | float) -> "Value":
        """Take what a measurement gave."""
        if isinstance(found, Proportion):
            return cls(found.value, *found.interval)
        return cls(found, found, found)


class Cell:
    """The work of one cell."""

    def __init__(self, name: Name, folder: Path, data: Cifar) -> None:
        """Look at what is known.

        Args:
            name: Which.
            folder: Where its checkpoints and figures are kept.
            data: Prepared data sets.
        """
        self.name, self._data, self._folder = name, data, folder
        self._known = folder / "figures.json"
        self.rows = known_rows(folder)
        self._recipe = load_recipe()
        self._device = resolve_device(self._recipe.compute)
        self.epochs, self.gflops = 0, 0.0

    def take(self, figures: list[str]) -> None:
        """Train, then take the figures that are not known."""
        takers: dict[str, Callable[[], Proportion | Value | float]] = {
            "knn": self._knn,
            "knn_1_l2": self._nearest_by_distance,
            "linear": lambda: self._probed(*self._features),
            "blocks": lambda: self._probed(*self._blocks),
            "rank": lambda: effective_rank(self._features[1]),
            "location": self._location,
            "position": self._position,
            "tenth": self._tenth,
            "all": lambda: self._finetuned(self._data.train, ALL_EPOCHS),
        }
        missing = [figure for figure in figures if figure not in self.rows]
        if not missing:
            return
        if self.name.about.kind != "pixels":
            _ = self.encoder  # so that no figure's time holds the training's
        for figure in missing:
            if figure in self.rows:  # supervised training tells what it came to when it ends
                continue
            start = perf_counter()
            self._keep(figure, takers[figure](), perf_counter() - start)

    def _keep(self, figure: str, found: "Proportion | Value | float", seconds: float) -> None:
        value = found if isinstance(found, Value) else Value.of(found)
        name = self.name
        row = Row(
            arm=name.arm,
            budget=name.budget,
            seed=name.seed,
            figure=figure,
            value=value.value,
            low=value.low,
            high=value.high,
            epochs=self.epochs,
            gflops=self.gflops,
            seconds=seconds,
            protocol=digest(name.arm, figure),
        )
        self.rows[figure] = row
        rows = {figure: asdict(row) for figure, row in self.rows.items()}
        replace_file(self._known, json.dumps(rows, indent=1) + "\n")
        say(f"{figure} {value.value:.4g}")

    @cached_property
    def _pictures(
        self,
    ) -> tuple[tuple[Tensor, Tensor], tuple[UInt8[Tensor, "Q 32 32 3"], Int64[Tensor, " Q"]]]:
        """Whole pictures to learn from and to be asked, with their classes."""

        def load(uri: str) -> tuple[Tensor, Tensor]:
            found = load_pictures(uri, self._recipe.model.image_size)
            assert found.labels is not None
            return found.pixels, torch.tensor(found.labels)

        return load(self._data.train), load(self._data.test)

    @cached_property
    def _trained(self) -> tuple[VisionTransformer, DropPos | None]:
        """Encoder to measure, and the pre-training's whole model where it is one."""
        name, recipe = self.name, self._recipe
        kind = name.about.kind
        if kind == "untrained":
            return self._scratch(), None
        if kind == "supervised":
            return self._supervised(), None
        own = at_budget(recipe, name.about, name.budget)
        run = replace(own.run, name=run_name(name.arm), storage=str(self._folder), seed=name.seed)
        own = replace(own, run=run, data=replace(own.data, path=self._data.train))
        flops = step_flops(own.model, own.method)
        self.epochs, self.gflops = own.optim.epochs, own.optim.epochs * TRAIN * flops / 1e9
        saved = pretrain_here(own, lambda step, loss: self._loss(own, step, loss))
        task = from_checkpoint(saved).whole.to(self._device)
        return task.encoder.eval(), task

    def _loss(self, recipe: Recipe, step: int, loss: float) -> None:
        epoch = step / (TRAIN // recipe.optim.global_batch)
        say(f"epoch {epoch:.2f} of {recipe.optim.epochs}: loss {loss:.4f}")

    def _scratch(self) -> VisionTransformer:
        return untrained(self._recipe, self.name.seed).to(self._device)

    def _supervised(self) -> VisionTransformer:
        """Train from scratch; what came of it is kept, for it has no checkpoint on the way.

        It computes what another arm's pre-training and its fine-tuning do together.
        """
        recipe = self._recipe
        own = finetuning(self.name.about)
        finetune = supervised_at_budget(recipe, own, self.name.budget, ALL_EPOCHS)
        self._took(finetune, TRAIN)
        start = perf_counter()
        done = self._classifier(self._scratch(), self._data.train, finetune)
        self._keep("all", done.accuracy, perf_counter() - start)
        # Its head reads means that are normed after; other arms' tokens are normed before.
        done.model.norm = done.model.fc_norm
        return done.model

    def _tenth(self) -> Proportion:
        """Learn from a tenth of the labels.

        Supervised training takes as many passes more as another arm's pre-training computes.
        """
        if self.name.about.kind != "supervised":
            return self._finetuned(self._data.tenth, TENTH_EPOCHS)
        budget, rows = self.name.budget, len(CLASSES) * TENTH_OF_A_CLASS
        own = finetuning(self.name.about)
        longer = supervised_at_budget(self._recipe, own, budget, TENTH_EPOCHS, rows=rows)
        self._took(longer, rows)
        return self._classifier(self._scratch(), self._data.tenth, longer).accuracy

    def _took(self, finetune: Finetune, rows: int) -> None:
        """Note what a supervised training of so many pictures computes."""
        self.epochs = finetune.optim.epochs
        self.gflops = self.epochs * rows * supervised_flops(self._recipe.model) / 1e9

    @property
    def encoder(self) -> VisionTransformer:
        """What is measured, in eval mode."""
        return self._trained[0]

    @cached_property
    def _features(self) -> tuple[Tensor, Tensor]:
        """Of all pictures to learn from, and to be asked."""
        (known, _), (asked, _) = self._pictures
        if self.name.about.kind == "pixels":
            return known.flatten(1).float() / 255, asked.flatten(1).float() / 255
        width = self.encoder.num_features
        return self._blocks[0][:, -width:], self._blocks[1][:, -width:]

    @cached_property
    def _blocks(self) -> tuple[Tensor, Tensor]:
        """The same of all blocks side by side, the last one last."""
        (known, _), (asked, _) = self._pictures
        blocks = len(self.encoder.blocks)
        return (
            extract_features(self.encoder, known, blocks=blocks, batch=250),
            extract_features(self.encoder, asked, blocks=blocks, batch=250),
        )

    def _labels(self) -> tuple[Tensor, Tensor]:
        (_, known), (_, asked) = self._pictures
        return known, asked

    def _knn(self) -> Proportion:
        (known, asked), (labels, truth) = self._features, self._labels()
        return knn_accuracy(known, labels, asked, truth)

    def _nearest_by_distance(self) -> Proportion:
        (known, asked), (labels, truth) = self._features, self._labels()
        nearest = torch.cat([torch.cdist(part, known).argmin(1) for part in asked.split(200)])
        return Proportion(int((labels[nearest] == truth).sum()), len(truth))

    def _probed(self, known: Tensor, asked: Tensor) -> Proportion:
        labels, truth = self._labels()
        return linear_probe(known, labels, asked, truth).accuracy

    def _location(self) -> float:
        """Read positions; without an interval, for patches of a picture are no own observations."""
        (known, _), (asked, _) = self._pictures
        known = known[:: max(1, len(known) // LOCATED)][:LOCATED]
        asked = asked[:: max(1, len(asked) // LOCATED)][:LOCATED]
        if self.name.about.kind == "pixels":
            patch = self._recipe.model.shape.patch_size
            return pixel_location_probe(known, asked, patch).accuracy.value
        encoder, task = self._trained
        stand_in = None if task is None else task.dropped_token.detach()
        return location_probe(encoder, known, asked, stand_in=stand_in).accuracy.value

    def _position(self) -> Value:
        task = self._trained[1]
        assert task is not None
        measure, compute = self._recipe.measure, Compute(strategy="single", precision="float32")
        limit = measure.pictures
        pictures = load_pictures(self._data.test, self._recipe.model.image_size, limit)
        report = Holdout(measure, compute, pictures, self._device).positions(task)
        assert report is not None
        skills = (
            (share - report.chance) / (1 - report.chance) for share in report.accuracy.interval
        )
        return Value(report.skill, *skills)

    def _finetuned(self, data: str, epochs: int) -> Proportion:
        finetune = lasting(finetuning(self.name.about), epochs)
        return self._classifier(self.encoder, data, finetune).accuracy

    def _classifier(self, encoder: VisionTransformer, data: str, finetune: Finetune) -> Classifier:
        return finetune_here(
            encoder,
            self._recipe.model,
            data,
            self._pictures[1],
            finetune,
            seed=self.name.seed,
            device=self._device,
            on_loss=lambda step, loss: say(f"fine-tuning, step {step}: loss {loss:.4f}"),
        )


def run_name(arm: str) -> str:
    """Name the pre-training of an arm: one of another recipe is another run, with other weights."""
    return f"run-{digest(arm, 'weights')}"


def untrained(recipe: Recipe, seed: int) -> VisionTransformer:
    """Make the encoder that a pre-training of this seed starts from, on the CPU, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DropPos(recipe.model, recipe.method).encoder.eval()


def say(text: str) -> None:
    """Tell the log of the cell, which the study keeps beside its figures.

    Raises:
        SystemExit: If the study is gone: another may be about to work on this cell.
    """
    print(text, flush=True)
    if os.getppid() != _PARENT:
        sys.exit("the study that began this cell is gone")


def main() -> None:
    """Take the figures that are asked for."""
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    name, folder, data, *figures = sys.argv[1:]
    Cell(Name.parse(name), Path(folder), Cifar(**json.loads(data))).take(figures)


if __name__ == "__main__":
    main()
