"""Pictures kept out of training, and what is asked of them: during a run, and of a checkpoint.

Axes in this file
    P  held-out pictures, B of them in a batch
    D  channels of a token
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from math import ceil
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from droppos.config import Compute
from droppos.errors import DataError
from droppos.measure.features import patch_mean
from droppos.measure.knn import can_leave_one_out, knn_leave_one_out
from droppos.measure.position import PositionMeter, PositionReport, measure_positions
from droppos.measure.probe import linear_probe
from droppos.measure.rank import effective_rank
from droppos.model import normalise
from droppos.parallel import precision, unwrap
from droppos.pictures import center_crop
from pipelines.backbone import from_checkpoint
from pipelines.checkpoints import Saved
from pipelines.recipe import MeasureProtocol, Recipe
from pipelines.shards import Group, Manifest, Picture, load_manifest, read_row_group
from pipelines.storage import Place, open_place

KNOWN_SHARE = 0.8
"""Of labelled pictures that come alone: what a classifier may learn from."""

BATCH = 32
"""Pictures of a forward pass: the model's own batch may be too large beside its gradients. The same
pictures go together whatever the number of ranks, so that it changes no figure."""

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


class Chosen(NamedTuple):
    """Some rows of a row group."""

    group: Group
    rows: tuple[int, ...]
    """Their indices in the group."""


def load_pictures(
    uri: str, size: tuple[int, int], limit: int | None = None, *, ratio: float = 224 / 256
) -> Pictures:
    """Decode the centres of pictures of a prepared data set.

    Args:
        uri: The data set.
        size: Height and width of the result, in pixels.
        limit: Pictures to take, from row groups all over the data set; all when not given.
        ratio: Side of what is cut out over that of the largest crop that fits.

    Raises:
        DataError: If there are none, or one that was good when prepared is no longer.
    """
    place = open_place(uri)
    manifest = load_manifest(place)
    chosen = choose(manifest, limit)
    if not chosen:
        raise DataError(f"{uri} holds no picture; prepare a folder that has some")
    rows = [row for part in chosen for row in read_chosen(place, manifest, part)]
    pixels = np.stack([center_crop(row.image, size, ratio=ratio) for row in rows])
    labels = [row.label for row in rows if row.label is not None]
    return Pictures(
        torch.from_numpy(pixels),
        [row.key for row in rows],
        labels if manifest.classes and len(labels) == len(rows) else None,
        manifest.classes,
    )


def choose(manifest: Manifest, limit: int | None = None) -> list[Chosen]:
    """Choose evenly spaced pictures of evenly spaced row groups; all when there is no limit.

    A few dozen of each group it touches: taking one of every group would read the whole data set.
    """
    limit = manifest.rows if limit is None else min(limit, manifest.rows)
    wanted = ceil(limit / GROUP_SHARE)
    groups = [manifest.groups[i] for i in spread(len(manifest.groups), wanted)]
    while sum(group.rows for group in groups) < limit:  # short groups: take more of them
        wanted *= 2
        groups = [manifest.groups[i] for i in spread(len(manifest.groups), wanted)]
    rows = spread(sum(group.rows for group in groups), limit)
    chosen, start = [], 0
    for group in groups:
        first, last = bisect_left(rows, start), bisect_left(rows, start + group.rows)
        if first < last:
            chosen.append(Chosen(group, tuple(row - start for row in rows[first:last])))
        start += group.rows
    return chosen


def read_chosen(place: Place, manifest: Manifest, chosen: Chosen) -> list[Picture]:
    """Read the pictures, still encoded."""
    group, rows = chosen
    table = read_row_group(place, manifest.shards[group.shard], group.group).take(list(rows))
    return [Picture(**row) for row in table.to_pylist()]


def spread(total: int, wanted: int) -> list[int]:
    """Choose evenly spaced indices of a sequence; all of it when that is asked."""
    wanted = min(wanted, total)
    return [i * total // wanted for i in range(wanted)]


def in_known_share(keys: list[str]) -> Bool[Tensor, "P"]:
    """Part pictures by the hash of each key: the same ones whatever their number or order."""
    digests = [blake2b(key.encode(), digest_size=4).digest() for key in keys]
    return torch.tensor([int.from_bytes(d, "big") / 2**32 < KNOWN_SHARE for d in digests])


class Holdout:
    """Held-out pictures and what is asked of them; the same in a run and of its checkpoint."""

    def __init__(
        self, measure: MeasureProtocol, compute: Compute, pictures: Pictures, device: torch.device
    ) -> None:
        self._measure, self._compute, self._device = measure, compute, device
        self._pictures = pictures.pixels
        labels = None if pictures.labels is None else torch.tensor(pictures.labels)
        self._labels = labels if labels is not None and can_leave_one_out(labels) else None
        self._known = in_known_share(pictures.keys)

    @classmethod
    def open(cls, recipe: Recipe, device: torch.device) -> "Holdout | None":
        """Read the recipe's held-out pictures; None if it names none."""
        if recipe.data.holdout is None:
            return None
        limit = recipe.measure.pictures
        pictures = load_pictures(recipe.data.holdout, recipe.model.image_size, limit)
        return cls(recipe.measure, recipe.compute, pictures, device)

    def measure(self, model: nn.Module, *, probe: bool = False) -> dict[str, float]:
        """Measure a model in the precision it trains in; with ranks collective, equal on all.

        Args:
            model: A DropPos, however it is spread, on the device.
            probe: Also fit a linear probe: seconds, which nobody should wait for.

        Returns:
            By name, all that begin with ``holdout/``: position figures if it has a position head,
            effective rank, and those of k-NN and probe if the pictures have labels that allow it.

        Raises:
            TrainingError: If the model diverged.
        """
        training = model.training
        model.eval()
        try:
            positions = self.positions(model)
            figures = {} if positions is None else positions.metrics()
            # Outside of autocast, which would round similarities.
            features = self._features(model).cpu()
            figures |= self._feature_figures(features)
            if probe:
                figures |= self._probe_figures(features)
        finally:
            model.train(training)
        # Every rank has summed up the same, but perhaps on another processor: one rank's word goes.
        values = torch.tensor(list(figures.values()), dtype=torch.float64, device=self._device)
        if _world() > 1:
            dist.broadcast(values, src=0)
        return dict(zip([f"holdout/{name}" for name in figures], values.tolist(), strict=True))

    def positions(self, model: nn.Module) -> PositionReport | None:
        """Ask a model in eval mode for positions under the protocol; None without a position head.

        Args:
            model: As of `measure`.
        """
        whole = unwrap(model)
        if not whole.method.predicts_positions:
            return None
        counts = self._measure.counts(whole.grid)
        meter = PositionMeter(whole.grid, counts, self._device)
        idle = PositionMeter(whole.grid, counts, self._device)

        def predict(pictures: Tensor, draw: object) -> Tensor:
            with precision(self._compute, self._device, model):
                return model(normalise(pictures.to(self._device)), draw).logits

        for first, part, counted in self._own_batches():
            target = meter if counted else idle
            measure_positions(predict, part, target, seed=self._measure.seed, first=first)
        if _world() > 1:
            for total in meter.state:
                dist.all_reduce(total)
        return meter.report()

    def _feature_figures(self, features: Float[Tensor, "P D"]) -> dict[str, float]:
        """Judge features of whole pictures."""
        figures = {"features/effective_rank": effective_rank(features)}
        if self._labels is not None:
            figures |= knn_leave_one_out(features, self._labels).metrics()
        return figures

    def _probe_figures(self, features: Float[Tensor, "P D"]) -> dict[str, float]:
        """Have four fifths of the pictures classify the others; nothing where those are too few."""
        known, labels = self._known, self._labels
        if labels is None or known.sum() < 5 or known.all() or len(labels[known].unique()) < 2:
            return {}
        learnt, asked = (features[known], labels[known]), (features[~known], labels[~known])
        return linear_probe(*learnt, *asked).accuracy.metrics("features/probe_accuracy")

    @torch.no_grad()
    def _features(self, model: nn.Module) -> Float[Tensor, "P D"]:
        """Run the whole pictures through the encoder, and gather all ranks' features."""
        whole = unwrap(model)
        parts = []
        for _, part, _ in self._own_batches():
            with precision(self._compute, self._device, model):
                tokens = whole.encode_whole(normalise(part.to(self._device)))
            parts.append(F.pad(patch_mean(tokens), (0, 0, 0, BATCH - len(part))))
        own = torch.stack(parts)
        dealt = [own]
        if _world() > 1:
            dealt = [torch.empty_like(own) for _ in range(_world())]
            dist.all_gather(dealt, own)
        # By turn, rank and place: that is the pictures' order, and padding comes after the last.
        return torch.stack(dealt, dim=1).flatten(0, 2)[: len(self._pictures)]

    def _own_batches(self) -> Iterator[tuple[int, UInt8[Tensor, "B rows columns 3"], bool]]:
        """Deal the batches out to the ranks in turn, equally many to each.

        A sharded forward pass is collective: a rank that has run out goes through it with a picture
        that is not counted, or the others would wait for ever.

        Yields:
            Number of the first picture, the pictures, and whether they count.
        """
        rank = dist.get_rank() if _world() > 1 else 0
        for turn in range(0, len(self._pictures), BATCH * _world()):
            first = turn + rank * BATCH
            part = self._pictures[first : first + BATCH]
            yield (first, part, True) if len(part) else (0, self._pictures[:1], False)


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def measure_checkpoint(
    recipe: Recipe, saved: Saved, *, device: str = "cpu", probe: bool = False
) -> dict[str, float]:
    """Measure a checkpoint, in this process, as its run measures itself.

    Args:
        recipe: Of the run.
        saved: The checkpoint.
        device: Where it is measured.
        probe: See `Holdout.measure`.

    Returns:
        As of `Holdout.measure`; nothing if the recipe names no held-out pictures.
    """
    holdout = Holdout.open(recipe, torch.device(device))
    if holdout is None:
        return {}
    return holdout.measure(from_checkpoint(saved).whole.to(device), probe=probe)
