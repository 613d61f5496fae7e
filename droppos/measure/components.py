"""Principal components of patch features: what sets patches apart, whatever picture they are of.

Axes in this file
    P  pictures
    N  cells in the patch grid (rows * columns)
    D  channels of a token
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from droppos.errors import DataError
from droppos.measure.features import require_finite
from droppos.model import normalise

SHOWN = 3
"""Components: as many as a colour has channels."""
TAILS = 0.02
"""Share of patches at either end of a component that are drawn in its full colour: a few odd
patches would leave no contrast to the others."""


@dataclass(frozen=True, slots=True)
class Components:
    """The first three principal components of the patches of some pictures, all together."""

    colours: Float[Tensor, "P N 3"]
    """Red, green and blue are the first, second and third component, each stretched to [0, 1]."""
    explained: tuple[float, ...]
    """Share of the patches' variance along each."""
    place: float
    """Share of all their variance that the cell alone explains, whatever the picture shows."""


def components(features: Float[Tensor, "P N D"]) -> Components:
    """Find the directions in which patches differ most, and how far each patch goes along them.

    The pictures share them, so that one colour means one thing throughout. A direction's sign is
    free; it is chosen so that the channel which moves most along it moves up.

    Raises:
        DataError: If the features have less than three directions.
        TrainingError: If one is not finite.
    """
    require_finite(features, "features hold NaN or infinity, so have no components")
    pictures, cells, width = features.shape
    patches = features.flatten(0, 1).double()
    patches = patches - patches.mean(dim=0)
    if min(patches.shape) <= SHOWN:
        raise DataError(
            f"{pictures * cells} patches of {width} channels have no {SHOWN} principal components; "
            "take more pictures"
        )
    _, spread, directions = torch.linalg.svd(patches, full_matrices=False)
    directions = directions[:SHOWN]
    strongest = directions.abs().argmax(dim=1, keepdim=True)
    along = patches @ (directions * directions.gather(1, strongest).sign()).T
    low, high = along.quantile(torch.tensor([TAILS, 1 - TAILS], dtype=along.dtype), dim=0)
    # A direction along which nothing differs is drawn in its middle.
    flat = high <= low
    scaled = ((along - low) / torch.where(flat, 1, high - low)).clamp(0, 1)
    colours = torch.where(flat, 0.5, scaled).float().unflatten(0, (pictures, cells))
    variance = spread.square()
    total = variance.sum().clamp(min=torch.finfo(variance.dtype).tiny)
    shares = tuple((variance[:SHOWN] / total).tolist())
    return Components(colours, shares, _place(patches.unflatten(0, (pictures, cells))))


def _place(patches: Float[Tensor, "P N D"]) -> float:
    """Share out the variance of centred patches between cell and picture.

    Epsilon squared (Kelley 1935), not eta squared: that one finds about 1 / P where there is none.
    """
    pictures, cells, _ = patches.shape
    total = patches.square().sum()
    if pictures < 2 or total == 0:
        return 0.0
    within = (patches - patches.mean(dim=0)).square().sum()
    noise = within / (cells * (pictures - 1))
    return max(0.0, float((total - within - (cells - 1) * noise) / total))


@torch.no_grad()
def patch_features(
    encoder: VisionTransformer, pictures: UInt8[Tensor, "P rows columns 3"]
) -> Float[Tensor, "P N D"]:
    """Run whole pictures through the encoder, in eval mode; its patch tokens after the last norm.

    Returns:
        float32 on the CPU.
    """
    device = next(encoder.parameters()).device
    tokens = encoder.forward_features(normalise(pictures.to(device)))
    return tokens[:, encoder.num_prefix_tokens :].float().cpu()
