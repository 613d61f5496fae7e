"""Position accuracy under one fixed protocol, so that runs can be compared.

Training accuracy depends on the ratios a run trains with; this measure does not: the same
pictures, the same masks, the same ratios, no smoothing and no weights, for every run.

Axes in this file
    P  pictures, B of them in a batch
    N  cells in the patch grid (rows * columns)
    S  visible patches of a picture whose position is asked for (scored)
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from droppos.config import Counts, Grid
from droppos.errors import ConfigError, DataError, TrainingError
from droppos.masking import Draw, draw_patches
from droppos.measure.intervals import Proportion, design_effect
from droppos.model import DropPos, normalise

Predict = Callable[[UInt8[Tensor, "B rows columns 3"], Draw], Float[Tensor, "B S N"]]
"""Position logits of each scored patch, in the draw's order, on the device of the draw."""


def protocol_draw(
    counts: Counts, pictures: range, seed: int, device: torch.device | str = "cpu"
) -> Draw:
    """Draw the masks of some pictures; picture i has the same ones in any batch.

    Args:
        counts: Patches of a picture by part.
        pictures: Numbers of the pictures in the measured set.
        seed: Seed of the masks.
        device: Where they are wanted; they are the same on all.

    Returns:
        The draw with wrong positions: a model that was trained with them needs them, others
        ignore them.
    """
    noise = torch.empty(len(pictures), 2 * counts.cells + counts.visible, dtype=torch.float64)
    for row, picture in zip(noise, pictures, strict=True):
        # SeedSequence spreads neighbouring (seed, picture) pairs over all generators.
        state = np.random.SeedSequence((seed, picture)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0] >> 1))
        torch.rand(row.shape, generator=generator, out=row)
    patches, positions, wrong = noise.to(device).split(
        [counts.cells, counts.visible, counts.cells], dim=1
    )
    draw = draw_patches(counts, patches, positions)
    return draw._replace(wrong=wrong.argsort(dim=1).gather(1, draw.visible))


@dataclass(frozen=True, slots=True)
class PositionReport:
    """How well dropped positions were found."""

    accuracy: Proportion
    """Scored patches put into exactly their cell; its interval allows for patches of one
    picture being easy or hard together."""
    near: Proportion
    """Scored patches put into their cell or one that touches it, corners included."""
    beside: Proportion | None
    """Wrong answers that fall on a cell which touches the true one; None if none is wrong."""
    cross_entropy: float
    """Nats per scored patch, unsmoothed and unweighted; ln N is a uniform guess."""
    chance: float
    """Accuracy of the best guess that looks at no picture: any cell not already taken."""
    offsets: Int[np.ndarray, "down right"]
    """Scored patches by (predicted - true) row and column; the centre is right."""
    wrong: Int[np.ndarray, "rows columns"]
    """Wrong answers by true cell."""

    @property
    def beside_chance(self) -> float | None:
        """Share of ``beside`` if each wrong answer were any other cell, looking at nothing.

        Exact for these wrong answers: a corner has 3 neighbours, an edge 5, the inside 8. Leaving
        out cells that are taken would change nothing, as they are taken at random.
        """
        wrong = int(self.wrong.sum())
        if not wrong:
            return None
        expected = (self.wrong * neighbours(Grid(*self.wrong.shape))).sum()
        return float(expected / wrong / (self.wrong.size - 1))

    @property
    def skill(self) -> float:
        """Accuracy corrected for chance: 0 looks at no picture, 1 is always right."""
        return self.accuracy.skill(self.chance)

    def metrics(self) -> dict[str, float]:
        """Name the figures for a ledger."""
        figures = {
            **self.accuracy.metrics("position/accuracy"),
            **self.near.metrics("position/accuracy_within_one_cell"),
            "position/skill": self.skill,
            "position/cross_entropy_nats": self.cross_entropy,
            "position/chance": self.chance,
        }
        if self.beside is not None and self.beside_chance is not None:
            figures["position/wrong_beside"] = self.beside.value
            figures["position/wrong_beside_chance"] = self.beside_chance
        return figures


def neighbours(grid: Grid) -> Int[np.ndarray, "rows columns"]:
    """Count the cells that touch each cell, corners included."""
    down, across = (
        1 + (np.arange(length) > 0) + (np.arange(length) < length - 1) for length in grid
    )
    return np.outer(down, across) - 1


class PositionMeter:
    """Sums over scored patches that can be added up over batches and over ranks.

    All-reduce (sum) each tensor of ``state`` in place before ``report``. Nothing here waits
    for the device until then.
    """

    def __init__(self, grid: Grid, counts: Counts, device: torch.device | str = "cpu") -> None:
        """Start from nothing.

        Raises:
            ConfigError: If no position is asked for.
        """
        if counts.scored < 1:
            raise ConfigError(
                f"measure.position_mask_ratio drops the position of none of the {counts.visible} "
                "visible patches, so there is nothing to measure; raise it"
            )
        self.grid, self.counts = grid, counts
        shape = (2 * grid.rows - 1, 2 * grid.columns - 1)
        self.offsets = torch.zeros(shape, dtype=torch.int64, device=device)
        self.wrong = torch.zeros(grid.cells, dtype=torch.int64, device=device)
        self.products = torch.zeros(2, 2, dtype=torch.int64, device=device)
        """Sum over pictures of the products of (right, near) patches, for the spread between
        pictures: each figure has its own."""
        self.nats = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def state(self) -> list[Tensor]:
        """The tensors to add up over ranks."""
        return [self.offsets, self.wrong, self.products, self.nats]

    def update(self, logits: Float[Tensor, "B S N"], draw: Draw) -> None:
        """Count a batch."""
        true = draw.asked
        predicted = logits.argmax(dim=-1)
        rows, columns = self.grid
        down = predicted // columns - true // columns + rows - 1
        right = predicted % columns - true % columns + columns - 1
        flat = (down * (2 * columns - 1) + right).flatten()
        # Not bincount, which reads its input's largest on the host first.
        self.offsets.view(-1).index_add_(0, flat, torch.ones_like(flat))
        hit = predicted == true
        self.wrong.index_add_(0, true.flatten(), (~hit).flatten().to(self.wrong.dtype))
        # The centre of the offsets is (rows - 1, columns - 1).
        near = ((down - rows + 1).abs() <= 1) & ((right - columns + 1).abs() <= 1)
        counts = torch.stack([hit.sum(dim=1), near.sum(dim=1)], dim=1)
        # By broadcasting: CUDA has no matmul of integers.
        self.products += (counts[:, :, None] * counts[:, None]).sum(dim=0)
        self.nats += F.cross_entropy(
            logits.flatten(0, 1).float(), true.flatten(), reduction="sum"
        ).double()

    def report(self) -> PositionReport:
        """Read the sums.

        Raises:
            DataError: If no picture was counted.
            TrainingError: If a logit was not finite.
        """
        offsets = self.offsets.cpu().numpy()
        row, column = self.grid.rows - 1, self.grid.columns - 1
        total, hits = int(offsets.sum()), int(offsets[row, column])
        near = int(offsets[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2].sum())
        if total == 0:
            raise DataError("no position was scored; was anything measured?")
        accuracy, nearby, beside = self._proportions(hits, near, total)
        nats = self.nats.item() / total
        if not np.isfinite(nats):
            raise TrainingError(
                f"cross-entropy of positions is {nats} over {total} patches; the model diverged: "
                "go back to an earlier checkpoint and lower optim.lr_per_256"
            )
        wrong = self.wrong.view(*self.grid).cpu().numpy()
        return PositionReport(accuracy, nearby, beside, nats, self.counts.chance, offsets, wrong)

    def _proportions(
        self, hits: int, near: int, total: int
    ) -> tuple[Proportion, Proportion, Proportion | None]:
        """Count the right, the near, and of the wrong those beside, each with its own interval."""
        (right_right, right_near), (_, near_near) = self.products.tolist()
        scored = self.counts.scored
        pictures = total // scored

        def effect(squares: float, found: int, of: int) -> float:
            """Compare the spread between pictures with that of as many independent patches."""
            measured = 1.0
            if pictures > 1 and found not in (0, of):
                independent = of * (found / of) * (1 - found / of)
                measured = squares * pictures / (pictures - 1) / independent
            return design_effect(measured, pictures, scored)

        right_spread = right_right - hits**2 / pictures
        near_spread = near_near - near**2 / pictures
        accuracy = Proportion(hits, total, effect(right_spread, hits, total))
        nearby = Proportion(near, total, effect(near_spread, near, total))
        wrong, beside = total - hits, near - hits
        if not wrong:
            return accuracy, nearby, None
        # A ratio of two sums over pictures: its spread is that of (beside - share * wrong), whose
        # sum is 0, with beside = near - right and wrong = scored - right.
        share = beside / wrong
        rest = 1 - share
        squares = near_near - 2 * rest * right_near + rest**2 * right_right
        constant = share * scored
        squares += constant * (pictures * constant - 2 * near + 2 * rest * hits)
        return accuracy, nearby, Proportion(beside, wrong, effect(squares, beside, wrong))


def position_predictor(model: DropPos) -> Predict:
    """Ask a model, on its device, for position logits; it must be in eval mode.

    Raises:
        ConfigError: If the model has no position head.
    """
    if not model.method.predicts_positions:
        raise ConfigError(
            f"method.objective {model.method.objective} trains no position head, so has no "
            "position accuracy; measure k-NN, probe or effective rank instead"
        )

    def predict(pictures: UInt8[Tensor, "B rows columns 3"], draw: Draw) -> Tensor:
        device = next(model.parameters()).device
        logits = model(normalise(pictures.to(device)), draw.to(device)).logits
        assert logits is not None
        return logits

    return predict


@torch.no_grad()
def measure_positions(
    predict: Predict,
    pictures: UInt8[Tensor, "P rows columns 3"],
    meter: PositionMeter,
    *,
    seed: int,
    batch: int = 64,
    first: int = 0,
) -> PositionMeter:
    """Ask for the positions of every picture and count the answers.

    Args:
        predict: What answers: see `position_predictor`.
        pictures: Pictures of the grid's size, on any device.
        meter: Where answers are counted; its counts are the ratios that are asked.
        seed: Seed of the masks.
        batch: Pictures at a time; changes nothing but memory and time.
        first: Number of the first picture in the measured set, where this rank has a part of
            it. With a sharded model all ranks must have equally many batches: its forward
            pass is collective, so an odd one out would wait for ever.

    Returns:
        The meter, for ``measure_positions(...).report()``.
    """
    for start in range(0, len(pictures), batch):
        part = pictures[start : start + batch]
        numbers = range(first + start, first + start + len(part))
        draw = protocol_draw(meter.counts, numbers, seed, meter.offsets.device)
        meter.update(predict(part, draw), draw)
    return meter
