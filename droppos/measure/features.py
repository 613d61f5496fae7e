"""Frozen features of pictures: what k-NN, probe and effective rank look at.

Axes in this file
    P  pictures, B of them in a batch
    D  channels of a token
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from droppos.errors import DataError
from droppos.model import normalise


class Features(NamedTuple):
    """Two summaries of each picture, float32 on the CPU."""

    class_token: Float[Tensor, "P D"]
    """The class token after the last norm."""
    patch_mean: Float[Tensor, "P D"]
    """Mean of the patch tokens after the last norm."""


def patch_mean(tokens: Float[Tensor, "B T D"], prefix_tokens: int = 1) -> Float[Tensor, "B D"]:
    """Average the patch tokens, in float32: the summary by which DropPos is judged.

    Its loss is of the patches. The class token is trained only through what patches take from it.
    """
    return tokens[:, prefix_tokens:].float().mean(dim=1)


@torch.no_grad()
def extract_features(
    encoder: VisionTransformer,
    pictures: UInt8[Tensor, "P rows columns 3"],
    *,
    batch: int = 64,
) -> Features:
    """Run whole pictures through the encoder, on its device, in eval mode.

    Args:
        encoder: Any timm vision transformer with a class token; its mode is put back after.
        pictures: Pictures of the encoder's size.
        batch: Pictures at a time; changes nothing but memory and time.

    Raises:
        DataError: If there are no pictures.
    """
    if len(pictures) == 0:
        raise DataError("there are no pictures to take features of; is the data set empty?")
    device = next(encoder.parameters()).device
    training = encoder.training
    encoder.eval()
    try:
        parts = [_summaries(encoder, part.to(device)) for part in pictures.split(batch)]
    finally:
        encoder.train(training)
    class_tokens, patch_means = zip(*parts, strict=True)
    return Features(torch.cat(class_tokens), torch.cat(patch_means))


def _summaries(
    encoder: VisionTransformer, pictures: UInt8[Tensor, "B rows columns 3"]
) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
    tokens = encoder.forward_features(normalise(pictures)).float()
    # A copy: on a CPU the slice alone would keep all tokens of all batches alive.
    return tokens[:, 0].to("cpu", copy=True), patch_mean(tokens, encoder.num_prefix_tokens).cpu()
