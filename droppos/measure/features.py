"""Frozen features of pictures: what k-NN, probe and effective rank look at.

Axes in this file
    P  pictures, B of them in a batch
    D  channels of a token
"""

from typing import cast

import torch
from jaxtyping import Float, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from droppos.errors import ConfigError, DataError, TrainingError
from droppos.model import normalise


def require_finite(features: Tensor, complaint: str) -> None:
    """Refuse features of a model that diverged: what is made of them looks like a figure.

    Args:
        features: Of any shape.
        complaint: What is to be said of those that hold NaN or infinity.

    Raises:
        TrainingError: If one is not finite.
    """
    if not features.isfinite().all():
        raise TrainingError(
            f"{complaint}; the model diverged: go back to an earlier checkpoint and lower "
            "optim.lr_per_256"
        )


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
    blocks: int = 1,
    batch: int = 64,
) -> Float[Tensor, "P D"]:
    """Run whole pictures through the encoder, on its device, in eval mode, and average patches.

    What a pre-training ends in serves its own task, and earlier blocks hold more of what others
    need: a linear probe is often asked of several at once (DINO, Caron et al., ICCV 2021).

    Args:
        encoder: Any timm vision transformer with a class token; its mode is put back after.
        pictures: Pictures of the encoder's size.
        blocks: Last blocks to take; D is the width times so many.
        batch: Pictures at a time; changes nothing but memory and time.

    Returns:
        The mean of each picture's patch tokens after the last norm, float32 on the CPU; of several
        blocks side by side, the earliest first.

    Raises:
        ConfigError: If the encoder has not so many blocks.
        DataError: If there are no pictures.
    """
    if not 1 <= blocks <= len(encoder.blocks):
        raise ConfigError(
            f"blocks must be from 1 to the {len(encoder.blocks)} that the encoder has, got {blocks}"
        )
    if len(pictures) == 0:
        raise DataError("there are no pictures to take features of; is the data set empty?")
    device = next(encoder.parameters()).device
    training = encoder.training
    encoder.eval()
    try:
        parts = []
        for part in pictures.split(batch):
            patches = encoder.get_intermediate_layers(normalise(part.to(device)), blocks, norm=True)
            means = [patch_mean(cast(Tensor, tokens), prefix_tokens=0) for tokens in patches]
            parts.append(torch.cat(means, dim=1).cpu())
    finally:
        encoder.train(training)
    return torch.cat(parts)
