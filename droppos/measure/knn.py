"""Nearest neighbours: what features are worth before anything is trained on them.

Axes in this file
    T  pictures with known labels
    Q  pictures asked
    D  channels of a feature
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from droppos.errors import DataError
from droppos.measure.intervals import Proportion

SIMILARITIES_AT_ONCE = 2**24
"""Largest block of the Q x T similarities held at a time: 64 MiB of float32."""


def check_labels(what: str, features: Tensor, labels: Tensor) -> None:
    """Refuse labels that do not go with the features.

    Raises:
        DataError: If there are none, not one each, or a picture has no label (negative).
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
    classes = int(known_labels.max()) + 1
    mean = known.mean(0)
    known, asked = F.normalize(known - mean, dim=1), F.normalize(asked - mean, dim=1)

    chunk = max(1, SIMILARITIES_AT_ONCE // len(known))
    hits = 0
    for part, truth in zip(asked.split(chunk), asked_labels.split(chunk), strict=True):
        similarity, neighbour = (part @ known.T).topk(k, dim=1)
        # Less than 1 in the exponent changes no vote's share and cannot overflow.
        weight = ((similarity - 1) / temperature).exp()
        votes = torch.zeros(len(part), classes, device=part.device)
        votes.scatter_add_(1, known_labels[neighbour].long(), weight)
        hits += int((votes.argmax(1) == truth).sum())
    return Proportion(hits, len(asked))
