"""Evaluate: what a backbone is worth, by the figures its data allow.

With labels: k-NN and a linear probe on frozen features. Without: effective rank of the features.
With a position head: position accuracy under the fixed protocol.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from droppos.config import Compute, Heads
from droppos.errors import ConfigError, DataError
from droppos.measure.intervals import Proportion
from droppos.measure.knn import knn_accuracy
from droppos.measure.linear import LARS, LinearRecipe, sgd_probe
from droppos.measure.position import PositionReport
from droppos.measure.probe import linear_probe
from droppos.measure.rank import effective_rank
from pipelines.backbone import Backbone, open_backbone
from pipelines.extraction import Extracted, extract
from pipelines.facts import classes_apart
from pipelines.holdout import Holdout, in_known_share, load_pictures
from pipelines.recipe import MeasureProtocol, Tracking
from pipelines.scores import track_figures
from pipelines.spread import Spread
from pipelines.storage import open_place

EXACT_VALUES = 2**27
"""Largest number of features and logits for which the exact probe is taken: 1 GiB each of float64,
several times over while it solves."""

PROBED = 5
"""Fewest pictures that a linear probe learns from."""

Solver = Literal["auto", "lbfgs", "sgd", "lars"]


@dataclass(frozen=True, slots=True)
class Probe:
    """What a linear probe found."""

    accuracy: Proportion
    top_5: Proportion | None
    """The class is among the five likeliest; None where there are not more than five."""
    solver: str
    """How it was fitted, with what was chosen: `lbfgs, l2 0.01`."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The figures; None where the data or the backbone does not allow one."""

    backbone: str
    """Place of the export or checkpoint that was measured."""
    data: str
    """The data set it was measured on."""
    train: str | None
    """The data set that k-NN and probe learnt from; None if that was a part of ``data``."""
    pictures: int
    protocol: str
    """How positions were asked for."""
    blocks: int
    """Last blocks of the encoder whose features were taken, side by side."""
    known: int
    """Pictures that k-NN and probe learnt from."""
    knn: Proportion | None
    """Of 20 nearest neighbours."""
    probe: Probe | None
    """Of a linear classifier on frozen features."""
    position: PositionReport | None
    effective_rank: float
    """Between 1 and the width of the features; higher is richer (RankMe)."""
    width: int
    """Channels of the features."""
    notes: list[str] = field(default_factory=list)
    """What could not be measured, or should be known of what was, and why."""

    def metrics(self) -> dict[str, float]:
        """Name the figures for a ledger, each accuracy with its 95 % interval."""
        figures = {} if self.position is None else self.position.metrics()
        if self.knn is not None:
            figures |= self.knn.metrics("features/knn_accuracy")
        if self.probe is not None:
            figures |= self.probe.accuracy.metrics("features/probe_accuracy")
            if self.probe.top_5 is not None:
                figures |= self.probe.top_5.metrics("features/probe_top_5_accuracy")
        return figures | {"features/effective_rank": self.effective_rank}


def evaluate(
    backbone: str,
    data: str,
    *,
    train: str | None = None,
    measure: MeasureProtocol,
    blocks: int = 1,
    limit: int | None = None,
    probe: Solver = "auto",
    spread: Spread = Spread(),  # noqa: B008 - frozen
    heads: Heads = Heads(),  # noqa: B008 - frozen
) -> Evaluation:
    """Measure a backbone on a prepared data set.

    Args:
        backbone: What :func:`open_backbone` opens.
        data: Prepared data set to measure on.
        train: Labelled data set for k-NN and probe to learn from; without it four fifths of
            ``data``, chosen by the hash of each picture's key.
        measure: The protocol of position accuracy; so many ``pictures`` are asked.
        blocks: Last blocks of the encoder whose features k-NN, probe and rank have, side by side.
        limit: Pictures to take of each data set, from all over it; all when not given.
        probe: How the linear probe is fitted: lbfgs exactly, sgd or lars as the field does on a
            million pictures; auto takes the exact one where it fits into memory.
        spread: Who takes the features, and where they are kept.
        heads: Attention heads, for weights of another project that don't tell.

    Raises:
        ConfigError: If workers have no room, no picture is to be taken, or the encoder has not so
            many blocks.
        DataError: If backbone or data cannot be read, or their classes differ.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--pictures must be 1 or more, got {limit}; leave it out to take all")
    trained = open_backbone(backbone, heads)
    if not 1 <= blocks <= trained.model.shape.depth:
        raise ConfigError(
            f"--blocks must be from 1 to the {trained.model.shape.depth} that {backbone} has, got "
            f"{blocks}"
        )
    size = trained.model.image_size
    asked = extract(trained.encoder, data, size, blocks=blocks, limit=limit, spread=spread)
    notes: list[str] = []
    here = device(spread)
    position = _positions(trained, data, measure, here)
    if position is None:
        notes.append("position accuracy: this backbone has no position head")

    knn = found = None
    learnt_from = 0
    if asked.labels is None:
        notes.append("k-NN and linear probe: the data set has no labels")
    else:
        _note_unlabelled(data, asked, notes)
        if train is None:
            known, asked_labelled = _part(asked)
        else:
            learnt = extract(
                trained.encoder, train, size, blocks=blocks, limit=limit, spread=spread
            )
            _require_same_classes(train, learnt, data, asked)
            _note_unlabelled(train, learnt, notes)
            known, asked_labelled = _Labelled.of(learnt), _Labelled.of(asked)
        if (reason := _why_not(known, asked_labelled)) is not None:
            notes.append(f"k-NN and linear probe: {reason}")
        else:
            pair = known.on(here), asked_labelled.on(here)
            learnt_from = len(known.labels)
            knn = knn_accuracy(pair[0].features, pair[0].labels, pair[1].features, pair[1].labels)
            if len(known.labels) >= PROBED:
                found = _probe(*pair, probe, notes)
            else:
                notes.append(
                    f"linear probe: {len(known.labels)} labelled pictures to learn from are too "
                    f"few, it takes {PROBED}; give a larger data set"
                )
    return Evaluation(
        backbone=trained.uri,
        data=open_place(data).uri,
        train=None if train is None else open_place(train).uri,
        pictures=len(asked.keys),
        protocol=(
            f"{measure.mask_ratio:.0%} of patches hidden, the position of "
            f"{measure.position_mask_ratio:.0%} of the others dropped"
        ),
        blocks=blocks,
        known=learnt_from,
        knn=knn,
        probe=found,
        position=position,
        effective_rank=effective_rank(asked.features),
        width=asked.features.shape[1],
        notes=notes,
    )


def track(evaluation: Evaluation, tracking: Tracking) -> str:
    """Write an evaluation to MLflow; return the run's identifier (:mod:`pipelines.scores`).

    Raises:
        ConfigError: If MLflow cannot be reached.
    """
    facts = {  # none is written, too: an earlier evaluation's tag would stand
        "pictures": str(evaluation.pictures),
        "train": evaluation.train or "none",
        "blocks": str(evaluation.blocks),
        "probe": "none" if evaluation.probe is None else evaluation.probe.solver,
    }
    return track_figures(
        evaluation.metrics(),
        backbone=evaluation.backbone,
        data=evaluation.data,
        facts=facts,
        tracking=tracking,
    )


def device(spread: Spread) -> torch.device:
    """Choose where this process measures: a driver need not have the GPU that its workers have."""
    if spread.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")


def _positions(
    trained: Backbone, data: str, measure: MeasureProtocol, device: torch.device
) -> PositionReport | None:
    """Ask for positions just as a run does while it trains: of the same pictures."""
    if trained.droppos is None:
        return None
    pictures = load_pictures(data, trained.model.image_size, measure.pictures)
    exactly = Compute(strategy="single", precision="float32")
    holdout = Holdout(measure, exactly, pictures, device)
    try:
        return holdout.positions(trained.droppos.to(device))
    finally:
        trained.droppos.cpu()


@dataclass(frozen=True, slots=True)
class _Labelled:
    features: Tensor
    labels: Tensor

    @classmethod
    def of(cls, extracted: Extracted, chosen: Tensor | None = None) -> "_Labelled":
        """Take the chosen ones of those pictures that have a label."""
        assert extracted.labels is not None
        there = extracted.labels >= 0
        taken = there if chosen is None else there & chosen
        return cls(extracted.features[taken], extracted.labels[taken])

    def on(self, device: torch.device) -> "_Labelled":
        return _Labelled(self.features.to(device), self.labels.to(device))


def _probe(known: _Labelled, asked: _Labelled, solver: Solver, notes: list[str]) -> Probe:
    """Fit a linear classifier by the solver that was asked for."""
    classes = int(known.labels.max()) + 1
    if solver == "auto":
        values = len(known.features) * (known.features.shape[1] + classes)
        solver = "lbfgs" if values <= EXACT_VALUES else "sgd"
    four = known.features, known.labels, asked.features, asked.labels
    if solver == "lbfgs":
        exact = linear_probe(*four)
        top_5 = exact.top_5 if classes > 5 else None
        return Probe(exact.accuracy, top_5, f"lbfgs, l2 {exact.l2:g}")
    found = sgd_probe(
        *four, LARS if solver == "lars" else LinearRecipe(), device=asked.features.device
    )
    if found.at_edge:
        notes.append(
            f"linear probe: rate {found.rate:g} is at the end of {solver}'s grid, a better one may "
            "lie outside"
        )
    top_5 = found.top_5 if classes > 5 else None
    return Probe(found.accuracy, top_5, f"{solver}, rate {found.rate:g}")


def _part(pictures: Extracted) -> tuple[_Labelled, _Labelled]:
    """Part a data set that comes alone."""
    known = in_known_share(pictures.keys)
    return _Labelled.of(pictures, known), _Labelled.of(pictures, ~known)


def _note_unlabelled(uri: str, pictures: Extracted, notes: list[str]) -> None:
    assert pictures.labels is not None
    if missing := int((pictures.labels < 0).sum()):
        notes.append(
            f"k-NN and linear probe: {missing} of {len(pictures.labels)} pictures of {uri} have no "
            "label, and are left out"
        )


def _why_not(known: _Labelled, asked: _Labelled) -> str | None:
    """Tell why nothing can be learnt or asked, where that is so; other figures can be had."""
    told = f"{len(known.labels)} labelled pictures to learn from and {len(asked.labels)} to ask"
    if len(known.labels) == 0 or len(asked.labels) == 0:
        return f"{told} are too few; give a larger data set, or another one with --train"
    if len(known.labels.unique()) < 2:
        return f"{told}, but those to learn from are all of one class; give some of two or more"
    return None


def _require_same_classes(train: str, known: Extracted, data: str, asked: Extracted) -> None:
    if known.classes != asked.classes:
        ours, theirs = classes_apart(known.classes, asked.classes)
        raise DataError(
            f"classes of {train}: {ours}; of {data}: {theirs}; they must be the same, in the same "
            "order, or labels mean something else: prepare both from folders with the same "
            "sub-folders"
        )
    if known.labels is None:
        raise DataError(
            f"no picture of {train} has a label, so nothing can be learnt from it; prepare it "
            "from a folder with a sub-folder per class"
        )
