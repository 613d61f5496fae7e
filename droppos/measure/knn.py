"""Nearest neighbours: what features are worth before anything is trained on them.

Axes in this file
    T  pictures with known labels
    Q  pictures asked
    P  pictures that are both, each asked of the others
    D  channels of a feature
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from droppos.errors import DataError
from droppos.measure.features import require_finite
from droppos.measure.intervals import Proportion

SIMILARITIES_AT_ONCE = 2**24
"""Largest block of the Q x T similarities held at a time, 64 MiB of float32, or ASKED_AT_ONCE."""
ASKED_AT_ONCE = 256
"""Pictures asked at a time, at least: each block reads all known features once."""


def check_labels(what: str, features: Tensor, labels: Tensor) -> None:
    """Refuse labels that do not go with the features, and features that are none.

    Raises:
        DataError: If there are none, not one each, or a picture has no label (negative).
        TrainingError: If a feature is not finite.
    """
    if len(labels) == 0 or len(labels) != len(features):
        raise DataError(
            f"{what} pictures need one label each, got {len(labels)} labels for {len(features)}; "
            "prepare them from a folder with a sub-folder per class"
        )
    if labels.min() < 0:
        raise DataError(
            f"{int((labels < 0).sum())} of {len(labels)} {what} pictures have no label; leave "
            "them out, or measure without labels (position accuracy, effective rank)"
        )
    # They would be put into some class all the same.
    require_finite(features, f"features of {what} pictures hold NaN or infinity")


def knn_accuracy(
    known: Float[Tensor, "T D"],
    known_labels: Int[Tensor, " T"],
    asked: Float[Tensor, "Q D"],
    asked_labels: Int[Tensor, " Q"],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> Proportion:
    """Label each picture by a vote of its nearest neighbours.

    Cosine similarity of features centred on the mean of the known ones (a constant common
    to all pictures says nothing, yet would make all of them alike); a neighbour's vote
    weighs exp(similarity / temperature), as in Wu et al. (CVPR 2018) and DINO.

    Args:
        known: Features of the pictures that may be neighbours.
        known_labels: Their classes, from 0.
        asked: Features of the pictures to label.
        asked_labels: Their true classes, from 0.
        k: Neighbours that vote; all known pictures when there are fewer.
        temperature: Smaller trusts the nearest more.

    Raises:
        DataError: If labels are missing.
    """
    check_labels("known", known, known_labels)
    check_labels("asked", asked, asked_labels)
    k = min(k, len(known))
    mean = known.mean(0)
    known, asked = F.normalize(known - mean, dim=1), F.normalize(asked - mean, dim=1)

    chunk = max(ASKED_AT_ONCE, SIMILARITIES_AT_ONCE // len(known))
    hits = 0
    for part, truth in zip(asked.split(chunk), asked_labels.split(chunk), strict=True):
        votes = _vote(part @ known.T, known_labels, k, temperature)
        hits += int((votes == truth).sum())
    return Proportion(hits, len(asked))


@dataclass(frozen=True, slots=True)
class KnnReport:
    """How well pictures are labelled by each other."""

    accuracy: Proportion
    """Pictures given their own label."""
    chance: float
    """Share of the largest class: what the best guess that looks at no picture scores."""

    @property
    def skill(self) -> float:
        """Accuracy corrected for chance: 0 looks at no picture, 1 is always right."""
        return self.accuracy.skill(self.chance)

    def metrics(self) -> dict[str, float]:
        """Name the figures for a ledger."""
        return {
            **self.accuracy.metrics("features/knn_accuracy"),
            "features/knn_chance": self.chance,
            "features/knn_skill": self.skill,
        }


def can_leave_one_out(labels: Int[Tensor, " P"]) -> bool:
    """Tell whether a picture could be right, and could be wrong: two classes, one of them twice."""
    sizes = labels.unique(return_counts=True)[1]
    return len(sizes) > 1 and int(sizes.max()) > 1


def knn_leave_one_out(
    features: Float[Tensor, "P D"],
    labels: Int[Tensor, " P"],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> KnnReport:
    """Label each picture by a vote of its nearest others; none votes for itself.

    The vote is that of `knn_accuracy`. Features are centred on the mean of all pictures, the asked
    one included: it holds no label, and so every pair of pictures has one similarity.

    A class with one picture cannot be found, which counts as wrong: the figure needs several
    pictures of a class. Features that say nothing score chance at most, in the mean; a little less
    in classes of equal size, for a picture's own class has one voter fewer than the others.

    Args:
        features: Of the pictures, each a neighbour of the others.
        labels: Their classes, from 0.
        k: Neighbours that vote; all others when there are fewer.
        temperature: Smaller trusts the nearest more.

    Raises:
        DataError: If labels are missing, or do not allow it (`can_leave_one_out`).
    """
    check_labels("measured", features, labels)
    if not can_leave_one_out(labels):
        raise DataError(
            f"k-NN among {len(labels)} pictures needs two classes, one of them with two pictures, "
            f"got {len(labels.unique())} classes; take more pictures, or measure effective rank"
        )
    k = min(k, len(features) - 1)
    features = F.normalize(features - features.mean(0), dim=1)

    chunk = max(1, SIMILARITIES_AT_ONCE // len(features))
    hits = 0
    for first in range(0, len(features), chunk):
        similarity = features[first : first + chunk] @ features.T
        similarity.diagonal(first).fill_(float("-inf"))
        votes = _vote(similarity, labels, k, temperature)
        hits += int((votes == labels[first : first + chunk]).sum())
    chance = int(labels.unique(return_counts=True)[1].max()) / len(labels)
    return KnnReport(Proportion(hits, len(labels)), chance)


def _vote(
    similarity: Float[Tensor, "Q T"], labels: Int[Tensor, " T"], k: int, temperature: float
) -> Int[Tensor, " Q"]:
    nearest, neighbour = similarity.topk(k, dim=1)
    # Less than 1 in the exponent changes no vote's share and cannot overflow.
    weight = ((nearest - 1) / temperature).exp()
    votes = weight.new_zeros(len(similarity), int(labels.max()) + 1)
    return votes.scatter_add_(1, labels[neighbour].long(), weight).argmax(1)
