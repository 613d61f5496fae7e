"""Position targets: the answer expected of a patch, and how much its answer counts.

A near miss is better than a wild one, so a target is a Gaussian bump around the true cell,
not a one-hot (paper section 3.3, position smoothing). A patch of empty sky can't be placed,
so patches count by their likeness to the class token (attentive reconstruction).

Axes in this file
    B  images on this rank
    P  patches of an image: its visible ones, or of those the scored
    N  cells in the patch grid (rows * columns)
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from droppos.config import Conformance, Grid
from droppos.errors import ConfigError

_AS_TRAINED = Grid(16, 16)
"""The grid for which the reference's published flags build their map."""


def smoothed_targets(
    grid: Grid, sigma: float, conformance: Conformance = "paper"
) -> Float[Tensor, "N N"]:
    """Build the target distribution for every true cell of the grid.

    Target of cell i over cells j is proportional to exp(-d^2 / sigma^2), d their distance in
    the grid (paper equation 8).

    Args:
        grid: Rows and columns of the patch grid.
        sigma: Width of the bump, in patches (not pixels). 0 gives one-hot rows.
        conformance: ``paper`` makes every row a distribution. ``reference`` scales columns and
            not rows, as the authors' code does, so a row of a grid of 6 x 6 sums to 0.886 to 1.110
            at sigma 1.
            ``reference_as_trained`` also measures distance as on a 16-wide grid, as its
            published flags had it for pictures that are 14 patches wide.

    Returns:
        Row i is the target of a patch that came from cell i.

    Raises:
        ConfigError: If ``sigma`` is negative, or ``reference_as_trained`` is asked for a grid
            other than 14 x 14.
    """
    if sigma < 0:
        raise ConfigError(f"sigma must be 0 or more, got {sigma}; 0 asks for the exact cell")
    if sigma == 0:
        return torch.eye(grid.cells)
    if conformance != "reference_as_trained":
        bump = _bump(grid, sigma)
    elif grid != Grid(14, 14):
        raise ConfigError(
            "method.conformance reference_as_trained reproduces a slip made on a grid of 14 x 14, "
            f"got {grid.rows} x {grid.columns}; use conformance=reference"
        )
    else:
        bump = _bump(_AS_TRAINED, sigma)
    sums = bump.sum(dim=1)  # the bump is symmetric: these are its column sums, too
    scaled = bump / sums[:, None] if conformance == "paper" else bump / sums[None, :]
    return scaled[: grid.cells, : grid.cells].float()


def _bump(grid: Grid, sigma: float) -> Float[Tensor, "N N"]:
    rows = torch.arange(grid.rows, dtype=torch.float64)
    columns = torch.arange(grid.columns, dtype=torch.float64)
    cells = torch.cartesian_prod(rows, columns).view(-1, 2)
    distance = torch.cdist(cells, cells)
    return torch.exp(-((distance / sigma) ** 2))  # sigma alone, squared, could vanish


def attentive_weights(
    similarity: Float[Tensor, "B P"],
    counted: Bool[Tensor, "B P"],
    tau: float,
) -> Float[Tensor, "B P"]:
    """Turn likeness to the class token into weights that sum to 1 over the counted patches.

    The paper's softmax runs over all N patches (equations 9 and 10); its normaliser is the
    same for every patch of an image, so it cancels when the counted ones are made to sum to 1.

    Args:
        similarity: Cosine of class token and patch, from a pass that sees the whole picture.
        counted: Which patches the weights are shared among.
        tau: Temperature; smaller trusts fewer patches.

    Returns:
        0 where not counted. An image with nothing counted has only zeros, never NaN.
    """
    logits = (similarity / tau).masked_fill(~counted, float("-inf"))
    logits = torch.where(counted.any(dim=1, keepdim=True), logits, 0.0)
    return torch.where(counted, logits.softmax(dim=1), 0.0)
