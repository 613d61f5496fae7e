"""Frozen features of pictures: what k-NN, probe and effective rank look at.

Axes in this file
    P  pictures, B of them in a batch
    D  channels of a token
"""

import torch
from jaxtyping import Float, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from droppos.errors import DataError
from droppos.model import normalise


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
) -> Float[Tensor, "P D"]:
    """Run whole pictures through the encoder, on its device, in eval mode, and average patches.

    Args:
        encoder: Any timm vision transformer with a class token; its mode is put back after.
        pictures: Pictures of the encoder's size.
        batch: Pictures at a time; changes nothing but memory and time.

    Returns:
        The mean of each picture's patch tokens after the last norm, float32 on the CPU.

    Raises:
        DataError: If there are no pictures.
    """
    if len(pictures) == 0:
        raise DataError("there are no pictures to take features of; is the data set empty?")
    device = next(encoder.parameters()).device
    training = encoder.training
    encoder.eval()
    try:
        parts = [
            patch_mean(
                encoder.forward_features(normalise(part.to(device))), encoder.num_prefix_tokens
            ).cpu()
            for part in pictures.split(batch)
        ]
    finally:
        encoder.train(training)
    return torch.cat(parts)
