"""Windows whose crops are augmented where they are decoded: what fine-tuning streams.

timm's RandAugment works on Pillow images, two or three milliseconds each: the training workers
would be held up by it, the tasks that decode are as many as one likes. It imports torch there,
which costs each process four CPU-seconds, once.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
from PIL import Image
from ray.data.block import Block, BlockAccessor

from droppos.errors import ConfigError
from droppos.pictures import crop_seed
from pipelines.order import Window
from pipelines.windows import read_window

TRANSLATED = 0.45
"""Longest shift over the image's shorter side, as timm's training takes it."""


def read_augmented(window: Window, start: int, *, augment: str, **told: Any) -> Iterator[Block]:
    """Read a window as `read_window` does, and augment each crop.

    What is drawn depends on seed, epoch and picture alone, so a resumed run sees the same images.

    Args:
        window: The window.
        start: First turn to read.
        augment: timm's name of a RandAugment.
        **told: As `read_window` takes them.

    Yields:
        Blocks as its.
    """
    transform = rand_augment(augment, min(told["crop"].size))
    for block in read_window(window, start, **told):
        columns = cast(
            dict[str, np.ndarray], BlockAccessor.for_block(block).to_batch_format("numpy")
        )
        images = np.array(columns["image"])
        for place, row in enumerate(columns["row"]):
            seed = crop_seed(window.seed, window.epoch, f"augment/{row}")
            # timm draws from both; a process of Ray's does one task at a time.
            random.seed(seed)
            np.random.seed(seed % 2**32)
            images[place] = np.asarray(transform(Image.fromarray(images[place])))
        yield BlockAccessor.batch_to_arrow_block({**columns, "image": images})


def rand_augment(name: str, side: int) -> Callable[[Image.Image], Image.Image]:
    """Make timm's augmentation, with the settings of its training scripts.

    Args:
        name: Such as ``rand-m9-mstd0.5-inc1``.
        side: Shorter side of the images, in pixels.

    Raises:
        ConfigError: If timm knows no such RandAugment.
    """
    from timm.data.auto_augment import posterize, rand_augment_transform

    from droppos.model import IMAGENET_MEAN

    settings = {
        "translate_const": int(TRANSLATED * side),
        "img_mean": tuple(round(255 * share) for share in IMAGENET_MEAN),
        "interpolation": Image.Resampling.BICUBIC,
    }
    try:
        made = rand_augment_transform(name, settings)
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"augment must be one of timm's RandAugments, got {name!r}, of which timm says "
            f"{error!r}; rand-m9-mstd0.5-inc1 is the published one, an empty name does none"
        ) from error

    def posterize_a_bit(image: Image.Image, bits: int, **told: Any) -> Image.Image:
        """Keep one bit where timm's greatest magnitude keeps none, which Pillow 13 refuses."""
        return posterize(image, max(1, bits), **told)

    for operation in made.ops:
        if operation.aug_fn is posterize:
            operation.aug_fn = posterize_a_bit
    return made
