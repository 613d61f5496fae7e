"""Location awareness: how well a place can be read from frozen features that were told none.

Every patch of a picture enters the encoder with its looks alone; a linear classifier then reads
each patch's cell from its token. A model that knows where parts of things belong has put that
there; one that copies positions through has nothing to copy.

Axes in this file
    P  pictures, B of them in a batch
    N  cells in the patch grid
    D  channels of a token
"""

import torch
from jaxtyping import Float, Int, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from droppos.encoder import encode
from droppos.measure.probe import ProbeReport, linear_probe
from droppos.model import normalise


def location_probe(
    encoder: VisionTransformer,
    train: UInt8[Tensor, "P rows columns 3"],
    test: UInt8[Tensor, "Q rows columns 3"],
    *,
    stand_in: Float[Tensor, "1 1 D"] | None = None,
) -> ProbeReport:
    """Fit a linear classifier from a patch's token to its cell, and score it on other pictures.

    Args:
        encoder: Any timm vision transformer with a class token, in eval mode.
        train: Pictures to fit on.
        test: Pictures to score on. Patches of one picture are easy or hard together, so the
            interval of the accuracy is too narrow; compare seeds.
        stand_in: What the model was trained to see in place of a position; nothing by default.
    """
    return linear_probe(
        *unplaced_tokens(encoder, train, stand_in), *unplaced_tokens(encoder, test, stand_in)
    )


@torch.no_grad()
def unplaced_tokens(
    encoder: VisionTransformer,
    pictures: UInt8[Tensor, "P rows columns 3"],
    stand_in: Float[Tensor, "1 1 D"] | None = None,
    batch: int = 100,
) -> tuple[Float[Tensor, "PN D"], Int[Tensor, " PN"]]:
    """Encode all patches of pictures without their positions, on the encoder's device.

    Returns:
        The patches' tokens after the last norm, picture by picture, and the cell of each; both on
        the CPU.
    """
    device = next(encoder.parameters()).device
    parts = []
    for images in pictures.split(batch):
        patches = encoder.patch_embed(normalise(images.to(device)))
        if stand_in is not None:
            patches = patches + stand_in
        parts.append(encode(encoder, patches)[:, 1:].cpu())
    tokens = torch.cat(parts)
    cells = torch.arange(tokens.shape[1]).repeat(len(tokens))
    return tokens.flatten(0, 1), cells


def pixel_location_probe(
    train: UInt8[Tensor, "P rows columns 3"], test: UInt8[Tensor, "Q rows columns 3"], patch: int
) -> ProbeReport:
    """Do the same with a patch's own pixels for a token: what no model has to add.

    Args:
        train: Pictures to fit on.
        test: Pictures to score on.
        patch: Side of a patch, in pixels.
    """
    return linear_probe(*_pixel_tokens(train, patch), *_pixel_tokens(test, patch))


def _pixel_tokens(
    pictures: UInt8[Tensor, "P rows columns 3"], patch: int
) -> tuple[Float[Tensor, "PN D"], Int[Tensor, " PN"]]:
    cells = normalise(pictures).unfold(2, patch, patch).unfold(3, patch, patch)
    tokens = cells.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    return tokens.flatten(0, 1), torch.arange(tokens.shape[1]).repeat(len(tokens))
