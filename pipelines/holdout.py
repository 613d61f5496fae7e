"""Pictures kept out of training, and the fixed protocol asked of them.

Axes in this file
    P  held-out pictures, of which a rank has its share
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import UInt8
from torch import Tensor, nn

from droppos.config import Grid, Method
from droppos.errors import DataError
from droppos.measure.position import PositionMeter, PositionReport, measure_positions
from droppos.model import normalise
from droppos.pictures import center_crop
from pipelines.recipe import Measure, Recipe
from pipelines.shards import Manifest, Picture, load_manifest, read_row_group
from pipelines.storage import Place, open_place

BATCH = 32
"""Pictures of a forward pass: the model's own batch may be too large beside its gradients."""


GROUP_SHARE = 32
"""Pictures taken of a row group, about, where not all are wanted."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """Decoded pictures in memory, few enough to measure on."""

    pixels: UInt8[Tensor, "P rows columns 3"]
    keys: list[str]
    labels: list[int] | None
    """Class of each picture, where the data set has classes."""
    classes: tuple[str, ...] | None


def load_pictures(uri: str, size: tuple[int, int], limit: int | None = None) -> Pictures:
    """Decode the centres of pictures of a prepared data set.

    Args:
        uri: The data set.
        size: Height and width of the result, in pixels.
        limit: Pictures to take, from row groups all over the data set; all when not given.

    Raises:
        DataError: If there are none, or one that was good when prepared is no longer.
    """
    place = open_place(uri)
    manifest = load_manifest(place)
    rows = list(_some(place, manifest, limit or manifest.rows))
    if not rows:
        raise DataError(f"{uri} holds no picture; prepare a folder that has some")
    pixels = np.stack([center_crop(row.image, size) for row in rows])
    labels = [row.label for row in rows if row.label is not None]
    return Pictures(
        torch.from_numpy(pixels),
        [row.key for row in rows],
        labels if manifest.classes and len(labels) == len(rows) else None,
        manifest.classes,
    )


def _some(place: Place, manifest: Manifest, limit: int) -> Iterator[Picture]:
    """Read evenly spaced pictures of evenly spaced row groups.

    A few dozen of each group it touches: taking one of every group would read the whole data set.
    """
    limit = min(limit, manifest.rows)
    wanted = ceil(limit / GROUP_SHARE)
    chosen = [manifest.groups[i] for i in spread(len(manifest.groups), wanted)]
    while sum(group.rows for group in chosen) < limit:  # short groups: take more of them
        wanted *= 2
        chosen = [manifest.groups[i] for i in spread(len(manifest.groups), wanted)]
    rows = spread(sum(group.rows for group in chosen), limit)
    start = 0
    for group in chosen:
        own = [row - start for row in rows if start <= row < start + group.rows]
        if own:
            table = read_row_group(place, manifest.shards[group.shard], group.group).take(own)
            yield from (Picture(**row) for row in table.to_pylist())
        start += group.rows


def spread(total: int, wanted: int) -> list[int]:
    """Choose evenly spaced indices of a sequence; all of it when that is asked."""
    wanted = min(wanted, total)
    return [i * total // wanted for i in range(wanted)]


def protocol(measure: Measure) -> Method:
    """Make the method that draws the protocol's masks."""
    return Method(mask_ratio=measure.mask_ratio, position_mask_ratio=measure.position_mask_ratio)


class Holdout:
    """This rank's share of the held-out pictures."""

    def __init__(self, measure: Measure, pictures: Pictures, device: torch.device) -> None:
        self._measure = measure
        self._pictures = pictures.pixels
        self._device = device

    @classmethod
    def open(cls, recipe: Recipe, device: torch.device) -> "Holdout | None":
        """Read the recipe's held-out pictures; None if it names none or there is no head."""
        if recipe.data.holdout is None or not recipe.method.predicts_positions:
            return None
        limit = recipe.measure.pictures
        pictures = load_pictures(recipe.data.holdout, recipe.model.image_size, limit)
        return cls(recipe.measure, pictures, device)

    def measure(self, model: nn.Module, grid: Grid) -> PositionReport:
        """Ask for positions under the protocol; collective, and equal on all ranks."""
        counts = protocol(self._measure).counts(grid)
        meter = PositionMeter(grid, counts, self._device)
        idle = PositionMeter(grid, counts, self._device)
        model.eval()

        def predict(pictures: Tensor, draw: object) -> Tensor:
            return model(normalise(pictures.to(self._device)), draw).logits

        share, first = _share(len(self._pictures))
        own = self._pictures[first : first + share]
        rounds = -(-_share(len(self._pictures), rank=0)[0] // BATCH)
        for i in range(rounds):
            part = own[i * BATCH : (i + 1) * BATCH]
            # A sharded forward pass is collective: a rank that has run out goes through it with
            # a picture that is not counted, or the others would wait for ever.
            target, part = (meter, part) if len(part) else (idle, self._pictures[:1])
            measure_positions(
                predict, part, target, seed=self._measure.seed, first=first + i * BATCH
            )
        model.train()
        for total in meter.state:
            dist.all_reduce(total)
        return meter.report()


def _share(total: int, rank: int | None = None) -> tuple[int, int]:
    """Count a rank's pictures, and find its first."""
    rank, world = dist.get_rank() if rank is None else rank, dist.get_world_size()
    most = -(-total // world)
    first = min(rank * most, total)
    return min(most, total - first), first
