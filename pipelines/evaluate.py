"""Evaluate: what a backbone is worth, by the figures its data allow.

With labels: k-NN and a linear probe on frozen features. Without: effective rank of the features.
With a position head: position accuracy under the fixed protocol.
"""

from dataclasses import dataclass, field
from hashlib import blake2b

import torch
from torch import Tensor

from droppos.config import Heads
from droppos.errors import DataError
from droppos.measure.features import Features, extract_features
from droppos.measure.intervals import Proportion
from droppos.measure.knn import knn_accuracy
from droppos.measure.position import (
    PositionMeter,
    PositionReport,
    measure_positions,
    position_predictor,
)
from droppos.measure.probe import linear_probe
from droppos.measure.rank import effective_rank
from pipelines.backbone import open_backbone
from pipelines.holdout import Pictures, load_pictures, protocol
from pipelines.recipe import Measure

KNOWN_SHARE = 0.8
"""Of a labelled data set that comes alone: what k-NN and probe may learn from."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The figures; None where the data or the backbone does not allow one."""

    pictures: int
    knn: Proportion | None
    """Of 20 nearest neighbours."""
    probe: Proportion | None
    """Of a linear classifier on frozen features."""
    position: PositionReport | None
    effective_rank: float
    """Between 1 and the width of the features; higher is richer (RankMe)."""
    width: int
    """Channels of the features."""
    notes: list[str] = field(default_factory=list)
    """What could not be measured, and why."""


def evaluate(
    backbone: str,
    data: str,
    *,
    train: str | None = None,
    measure: Measure,
    limit: int | None = None,
    heads: Heads = Heads(),  # noqa: B008 - frozen
) -> Evaluation:
    """Measure a backbone on a prepared data set.

    Args:
        backbone: What :func:`open_backbone` opens.
        data: Prepared data set to measure on.
        train: Labelled data set for k-NN and probe to learn from; without it four fifths of
            ``data``, chosen by the hash of each picture's key.
        measure: The protocol of position accuracy; so many ``pictures`` are asked.
        limit: Pictures to take of each data set, from all over it; all when not given.
        heads: Attention heads, for weights of another project that don't tell.

    Raises:
        DataError: If backbone or data cannot be read, or their classes differ.
    """
    trained = open_backbone(backbone, heads)
    pictures = load_pictures(data, trained.model.image_size, limit)
    features = extract_features(trained.encoder, pictures.pixels)
    notes: list[str] = []

    position = None
    if trained.droppos is None:
        notes.append("position accuracy: this backbone has no position head")
    else:
        meter = PositionMeter(trained.model.grid, protocol(measure).counts(trained.model.grid))
        predict = position_predictor(trained.droppos)
        # The pictures that a run is measured on while it trains, so the figures are the same.
        held = load_pictures(data, trained.model.image_size, measure.pictures).pixels
        position = measure_positions(predict, held, meter, seed=measure.seed).report()

    knn = probe = None
    if pictures.labels is None:
        notes.append("k-NN and linear probe: the data set has no labels")
    else:
        if train is None:
            known, asked = _part(pictures, features)
        else:
            other = load_pictures(train, trained.model.image_size, limit)
            _require_same_classes(train, other, data, pictures)
            learnt = extract_features(trained.encoder, other.pixels)
            known = _Labelled.of(learnt, other)
            asked = _Labelled.of(features, pictures)
        knn = knn_accuracy(known.features, known.labels, asked.features, asked.labels)
        probe = linear_probe(known.features, known.labels, asked.features, asked.labels).accuracy
    return Evaluation(
        pictures=len(pictures.pixels),
        knn=knn,
        probe=probe,
        position=position,
        effective_rank=effective_rank(features.patch_mean),
        width=features.patch_mean.shape[1],
        notes=notes,
    )


@dataclass(frozen=True, slots=True)
class _Labelled:
    features: Tensor
    labels: Tensor

    @classmethod
    def of(cls, features: Features, pictures: Pictures) -> "_Labelled":
        # The mean of the patches: DropPos trains every token, the class token only as a guide.
        return cls(features.patch_mean, torch.tensor(pictures.labels))

    def where(self, chosen: Tensor) -> "_Labelled":
        return _Labelled(self.features[chosen], self.labels[chosen])


def _part(pictures: Pictures, features: Features) -> tuple[_Labelled, _Labelled]:
    """Split by the hash of each key: the same pictures whatever their number or order."""
    digests = [blake2b(key.encode(), digest_size=4).digest() for key in pictures.keys]
    known = torch.tensor([int.from_bytes(d, "big") / 2**32 < KNOWN_SHARE for d in digests])
    if known.all() or not known.any():
        raise DataError(
            f"{len(known)} pictures are too few to part for k-NN and probe; "
            "give a larger data set, or another one with --train"
        )
    both = _Labelled.of(features, pictures)
    return both.where(known), both.where(~known)


def _require_same_classes(train: str, known: Pictures, data: str, asked: Pictures) -> None:
    if known.classes != asked.classes:
        raise DataError(
            f"{train} has classes {known.classes}, {data} has {asked.classes}; "
            "they must be the same, in the same order, for labels to mean the same"
        )
