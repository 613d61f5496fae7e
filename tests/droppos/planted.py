"""Tiles of photographs, and shortcuts planted into them: what the detector must tell apart.

Each planter stands for something that happens: a letterbox, a watermark, a lens that is dark at
its edge, one whose colours part at its edge, a JPEG of low quality made small. A layout is no
shortcut: it is planted, too, to be let through.
"""

from collections.abc import Callable
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.demo_pictures import Photograph

Tile = NDArray[np.uint8]


def tiles(
    photographs: tuple[Photograph, ...], each: int, side: int, seed: int = 0
) -> NDArray[np.uint8]:
    """Cut sharp square tiles of several scales, dealt out in turn by photograph."""
    random = np.random.default_rng(seed)
    opened = [photograph.open() for photograph in photographs]
    cut = [_tile(photograph, side, random) for _ in range(each) for photograph in opened]
    return np.stack(cut)


def _tile(photograph: Image.Image, side: int, random: np.random.Generator) -> Tile:
    span = float(np.exp(random.uniform(*np.log((0.3, 0.9))))) * min(photograph.size)
    left, top = (random.uniform(0, length - span) for length in photograph.size)
    box = (left, top, left + span, top + span)
    return np.asarray(photograph.resize((side, side), Image.Resampling.BICUBIC, box))


def planted(pictures: NDArray[np.uint8], plant: Callable[[Tile], Tile]) -> NDArray[np.uint8]:
    return np.stack([plant(picture) for picture in pictures])


def _grid(picture: Tile) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    height, width = picture.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return y, x


def _as_pixels(values: NDArray[np.float64]) -> Tile:
    return values.round().clip(0, 255).astype(np.uint8)


def letterbox(picture: Tile) -> Tile:
    """Black bars above and below, of a tenth of the height together with a thin frame."""
    boxed = picture.copy()
    bar, frame = picture.shape[0] // 12, 2
    boxed[:bar], boxed[-bar:] = 2, 2
    boxed[:, :frame], boxed[:, -frame:] = 2, 2
    return boxed


def watermark(picture: Tile) -> Tile:
    """A pattern that shines through everywhere, of the same strength in each picture."""
    pattern = np.random.default_rng(7).normal(0, 14, (picture.shape[0] // 2, picture.shape[1] // 2))
    large = pattern.repeat(2, axis=0).repeat(2, axis=1)
    return _as_pixels(picture + large[..., None])


def fall_off(picture: Tile) -> Tile:
    """A lens that lets through a quarter as much light in the corners as in the middle."""
    y, x = _grid(picture)
    return _as_pixels(picture / ((1 + 0.5 * (x * x + y * y)) ** 2)[..., None])


def fringes(picture: Tile) -> Tile:
    """A lens that draws red larger and blue smaller, by 3 % each: a pixel and a half at 48."""
    height, width = picture.shape[:2]
    around = 8  # or the smaller channel would have a dark rim
    wide = np.pad(picture, ((around, around), (around, around), (0, 0)), mode="edge")
    channels = []
    for channel, zoom in zip(Image.fromarray(wide).split(), (1.03, 1.0, 0.97), strict=True):
        half_x, half_y = width / 2 / zoom, height / 2 / zoom
        x, y = wide.shape[1] / 2, wide.shape[0] / 2
        box = (x - half_x, y - half_y, x + half_x, y + half_y)
        channels.append(channel.resize((width, height), Image.Resampling.BICUBIC, box))
    return np.asarray(Image.merge("RGB", channels))


def blocks(picture: Tile) -> Tile:
    """A strongly compressed JPEG of more pixels, made small: its blocks are no longer patches."""
    height, width = picture.shape[:2]
    large = Image.fromarray(picture).resize(
        (width * 7 // 6, height * 7 // 6), Image.Resampling.BICUBIC
    )
    buffer = BytesIO()
    large.save(buffer, "JPEG", quality=8)
    coarse = Image.open(buffer).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(coarse.convert("RGB"))


def layout(picture: Tile) -> Tile:
    """Light from above: content, as far as a lens is concerned."""
    y, _ = _grid(picture)
    return _as_pixels(picture * (1 - 0.5 * y)[..., None] * 0.8)


def centred(pictures: int, side: int) -> NDArray[np.uint8]:
    """Bright things in the middle of a noisy backdrop, none quite like another: content."""
    random = np.random.default_rng(3)
    made = []
    for _ in range(pictures):
        y, x = _grid(np.empty((side, side, 3), dtype=np.uint8))
        height, width = random.uniform(0.35, 0.65, 2)
        down, right = random.uniform(-0.12, 0.12, 2)
        inside = ((y - down) / height) ** 2 + ((x - right) / width) ** 2 < 1
        shades = np.where(inside[..., None], random.uniform(140, 230, 3), random.uniform(30, 90, 3))
        made.append(_as_pixels(shades + random.normal(0, 12, (side, side, 3))))
    return np.stack(made)
