"""Counterfactual pictures: the scene without a cue, and cues without a scene.

Each edit takes a cue of place out of every picture of a set and leaves the scene, as far as that
can be done. What stands still in the frame is found from the set itself.

Axes in this file
    P  pictures
    C  channels
"""

from math import ceil

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from droppos.config import Grid

RIM = 0.12
"""Share of height and width that is cut away on each side to lose a border."""
LARGEST_SHIFT = 4
"""Pixels by which a picture is moved, either way: over half the pitch of JPEG's blocks."""
STILL = 0.5
"""A pixel is still if it differs between pictures by less than this share of the usual."""


def chimera(
    pictures: UInt8[Tensor, "P rows columns 3"], grid: Grid, seed: int
) -> UInt8[Tensor, "P rows columns 3"]:
    """Exchange patches between pictures, each staying in its cell.

    No scene is left, as far as there are as many pictures as cells; whatever a patch alone tells
    of its cell is. Every patch of the set is used exactly once.
    """
    random = np.random.default_rng(seed)
    steps = random.permutation(len(pictures))
    height, width = pictures.shape[1] // grid.rows, pictures.shape[2] // grid.columns
    mixed = torch.empty_like(pictures)
    for cell in range(grid.cells):
        row, column = divmod(cell, grid.columns)
        down = slice(row * height, (row + 1) * height)
        across = slice(column * width, (column + 1) * width)
        step = int(steps[cell % len(pictures)])
        mixed[:, down, across] = pictures[:, down, across].roll(step, dims=0)
    return mixed


def crop_borders(pictures: UInt8[Tensor, "P rows columns 3"]) -> UInt8[Tensor, "P rows columns 3"]:
    """Cut the rim away and enlarge what is left to the size it had."""
    height, width = pictures.shape[1:3]
    down, across = ceil(RIM * height), ceil(RIM * width)
    inner = _planes(pictures)[:, :, down : height - down, across : width - across]
    large = F.interpolate(inner, (height, width), mode="bicubic", align_corners=False)
    return _pixels(large)


def flatten_marks(pictures: UInt8[Tensor, "P rows columns 3"]) -> UInt8[Tensor, "P rows columns 3"]:
    """Take away what the pictures have in common at fixed pixels.

    A mark that shines through is subtracted: it is the detail of the mean picture. One that covers
    is filled from around it: its pixels are still. Broad shades are no mark, and stay. Where a mark
    drove pixels to black or white it cannot be subtracted: some of it is left there, and as it is
    weaker in such pictures the mean has less of it, so some is left in the others, too.
    """
    planes = _planes(pictures)
    mean = planes.mean(dim=0, keepdim=True)
    clear = planes - (mean - _blur(mean, _broad(planes)))
    spread = planes.std(dim=0).mean(dim=0)
    still = spread < STILL * spread.median()
    return _pixels(_fill(clear, still))


def _fill(
    planes: Float[Tensor, "P C rows columns"], still: Bool[Tensor, "rows columns"]
) -> Float[Tensor, "P C rows columns"]:
    """Put the mean of what is around, without the pixels to fill, in their place."""
    moving = (~still).to(planes.dtype)[None, None]
    weight = _blur(moving, _broad(planes))
    around = _blur(planes * moving, _broad(planes)) / weight.clamp(min=1e-6)
    # Far from all that moves there is nothing to fill from: a wide border stays.
    return torch.where(still & (weight[0, 0] > 1e-3), around, planes)


def flatten_fall_off(
    pictures: UInt8[Tensor, "P rows columns 3"],
) -> UInt8[Tensor, "P rows columns 3"]:
    """Divide by the set's mean field of brightness, where that is a lens's.

    The mean logarithm of each channel is fitted by planes, squares and the fourth power of the
    radius, the rim left out, for it may be a border. Only what is the same turned upside down is
    taken away: a plane is where the light comes from.
    """
    planes = _planes(pictures)
    logs = (planes + 4).log().mean(dim=0)
    height, width = logs.shape[1:]
    y = torch.linspace(-1, 1, height)[:, None].expand(height, width)
    x = torch.linspace(-1, 1, width)[None].expand(height, width)
    even = [x * x, y * y, x * y, (x * x + y * y) ** 2]
    terms = torch.stack([torch.ones_like(x), x, y, *even], dim=2)
    inner = (
        slice(ceil(RIM * height), -ceil(RIM * height)),
        slice(ceil(RIM * width), -ceil(RIM * width)),
    )
    found = torch.linalg.lstsq(terms[inner].flatten(0, 1), logs[:, *inner].flatten(1).T).solution
    field = (terms[..., 3:] @ found[3:]).permute(2, 0, 1)
    field = field - field.mean(dim=(1, 2), keepdim=True)
    return _pixels((planes + 4) * (-field).exp() - 4)


def grey(pictures: UInt8[Tensor, "P rows columns 3"]) -> UInt8[Tensor, "P rows columns 3"]:
    """Drop colour, and with it the fringes of colour."""
    return _pixels(_planes(pictures).mean(dim=1, keepdim=True).expand(-1, 3, -1, -1))


def shift_grid(
    pictures: UInt8[Tensor, "P rows columns 3"], seed: int
) -> UInt8[Tensor, "P rows columns 3"]:
    """Move each picture by some pixels of its own, so that blocks have no fixed phase."""
    height, width = pictures.shape[1:3]
    reach = LARGEST_SHIFT
    padded = F.pad(_planes(pictures), (reach, reach, reach, reach), mode="reflect")
    shifts = np.random.default_rng(seed).integers(0, 2 * reach, size=(len(pictures), 2)).tolist()
    moved = [
        plane[:, down : down + height, across : across + width]
        for plane, (down, across) in zip(padded, shifts, strict=True)
    ]
    return _pixels(torch.stack(moved))


def _broad(planes: Float[Tensor, "P C rows columns"]) -> float:
    """Width of what still counts as detail, in pixels."""
    return min(planes.shape[2:]) / 16


def _blur(planes: Float[Tensor, "P C rows columns"], sigma: float) -> Tensor:
    """Smooth by a Gaussian; the edge is repeated outwards."""
    reach = ceil(3 * sigma)
    weights = torch.exp(-torch.arange(-reach, reach + 1).float().square() / (2 * sigma**2))
    weights = weights / weights.sum()
    channels = planes.shape[1]
    across = weights.expand(channels, 1, 1, -1)
    padded = F.pad(planes, (reach, reach, reach, reach), mode="replicate")
    smooth = F.conv2d(padded, across, groups=channels)
    return F.conv2d(smooth, across.transpose(2, 3), groups=channels)


def _planes(pictures: UInt8[Tensor, "P rows columns 3"]) -> Float[Tensor, "P 3 rows columns"]:
    return pictures.permute(0, 3, 1, 2).float()


def _pixels(planes: Float[Tensor, "P 3 rows columns"]) -> UInt8[Tensor, "P rows columns 3"]:
    return planes.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
