"""Effective rank: how many directions the features use, without any label."""

from math import exp

import torch
from jaxtyping import Float
from torch import Tensor

from droppos.measure.features import require_finite


def effective_rank(features: Float[Tensor, "P D"]) -> float:
    """Measure how evenly features spread over directions.

    The exponential of the entropy of the singular values, taken as a distribution: RankMe
    (Garrido et al., "RankMe: Assessing the Downstream Performance of Pretrained
    Self-Supervised Representations by Their Rank", ICML 2023). As there, features are not
    centred. Only features of the same pictures can be compared.

    Args:
        features: One row a picture.

    Returns:
        From 1 (all features on one line: collapse) to min(P, D) (all directions equally).

    Raises:
        TrainingError: If a feature is not finite.
    """
    pictures = features.shape[0]
    require_finite(
        features, f"features of {pictures} pictures hold NaN or infinity, so have no rank"
    )
    singular = torch.linalg.svdvals(features.double())
    total = singular.sum()
    if total == 0:
        return 1.0
    return exp(torch.special.entr(singular / total).sum().item())
