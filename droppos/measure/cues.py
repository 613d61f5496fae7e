"""Cues of place that are no content: how far each alone tells a patch's cell, without a model.

A shortcut is something that stands in the frame and not in the scene: a border, a mark, the lens's
fall-off or colour fringes, the grid of a compression. For each there are a few statistics of a
patch which it moves and which what the patch shows moves evenly, wherever it stands. A classifier
that knows only these is fitted on half of the pictures and asked for the cells of the other half.

Light comes from above, so brightness tells something of height in any album; that is layout, and
no fault of the camera. A lens is the same turned upside down, and layout is not. So for lens cues
the classifier is fitted on every picture both ways up: what turns with the picture cancels.

Sources: Doersch, Gupta, Efros (ICCV 2015) for chromatic aberration, boundaries and textures that
continue; Noroozi, Favaro (ECCV 2016) for low-level statistics, edges and aberration in jigsaws.
The statistics here are our own.

Axes in this file
    P  pictures
    N  cells in the patch grid (rows * columns)
    K  statistics of a patch
    h, w  rows and columns of a patch's pixels
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from droppos.config import Grid
from droppos.errors import DataError
from droppos.measure.edits import flatten_marks
from droppos.measure.intervals import Proportion, design_effect
from droppos.measure.position import neighbours

Cue = Literal["borders", "marks", "fall_off", "fringes", "grid"]
CUES: tuple[Cue, ...] = get_args(Cue)

LENS: frozenset[Cue] = frozenset({"fall_off", "fringes"})
"""Cues that stay where they are when the picture is turned upside down."""
FLAT = 6
"""A line of pixels that differ by at most so many of 255 levels is a border's: black as JPEG keeps
it, not as it was drawn."""
LEAST_PICTURES = 16
"""Below, a cell's mean is noise."""
NOWHERE = 1e4
"""Statistic of a cell that is out of question."""
PLAIN = 0.5
"""Share of a picture's patches, those of least detail, that are asked for marks and fall-off."""
PIXELS = 16
"""Largest side at which a patch's pixels are looked at; a larger patch is averaged down to it."""


@dataclass(frozen=True, slots=True)
class Probe:
    """How far one cue alone tells the cell of a patch."""

    cue: Cue
    accuracy: Proportion
    """Patches of pictures not fitted on that are put into exactly their cell, of those that can
    be asked for it: for marks and fall-off a picture's plainest."""
    chance: float
    """1 of the cells that are asked for: all, or for the grid those inside."""

    @property
    def times_chance(self) -> float:
        """Accuracy over chance: 1 tells nothing."""
        return self.accuracy.value / self.chance

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval, in times chance."""
        return self.accuracy.interval[0] / self.chance


def probe_cues(pictures: UInt8[Tensor, "P rows columns 3"], grid: Grid) -> dict[Cue, Probe]:
    """Ask of each cue how well it alone tells where a patch was.

    Args:
        pictures: At least `LEAST_PICTURES`, a multiple of the grid in height and width.
        grid: Rows and columns of the patch grid.

    Raises:
        DataError: If there are too few pictures.
    """
    if len(pictures) < LEAST_PICTURES:
        raise DataError(
            f"{len(pictures)} pictures are too few to look for shortcuts; "
            f"give {LEAST_PICTURES} at least, some hundred tell more"
        )
    return {cue: _probe(cue, pictures, grid) for cue in CUES}


def _probe(cue: Cue, pictures: UInt8[Tensor, "P rows columns 3"], grid: Grid) -> Probe:
    upright = STATISTICS[cue](pictures, grid)
    turned = STATISTICS[cue](pictures.flip(1, 2), grid) if cue in LENS else upright
    speaks = ~upright.isnan().any(dim=2)
    asks = speaks.any(dim=0)
    cells = int(asks.sum()) or grid.cells  # where all is silent, every answer is missing
    hits = torch.zeros(len(pictures), dtype=torch.int64)
    for half in (0, 1):
        known, asked = slice(half, None, 2), slice(1 - half, None, 2)
        guessed = _guess(torch.cat([upright[known], turned[known]]), upright[asked])
        hits[asked] = (guessed == torch.arange(grid.cells)).sum(dim=1)
    # Where a picture has a border, what else it would say counts as missed.
    each = int(speaks.sum(dim=1).max()) or cells
    return Probe(cue, clustered(hits, each), 1 / cells)


def _guess(known: Float[Tensor, "Q N K"], asked: Float[Tensor, "P N K"]) -> Int[Tensor, "P N"]:
    """Classify by the nearest cell's mean, in the metric of the spread within cells (LDA).

    Returns:
        Cells; -1 where a patch says nothing.
    """
    silent = asked.isnan().any(dim=2)
    spoken = known.flatten(0, 1)[~known.isnan().any(dim=2).flatten()]
    if len(spoken) == 0:
        return torch.full(silent.shape, -1)
    scale = spoken.abs().median(dim=0).values.clamp(min=1e-6)
    # A few strong edges would drown a small shift of all the rest.
    known, asked = torch.asinh(known / scale), torch.asinh(asked / scale)
    means = known.nanmean(dim=0)
    # Lines of black on white move many pixels as one: rounded to float32, such a spread has no
    # Cholesky factor.
    within = (known - means).flatten(0, 1).nan_to_num(0.0).double()
    spread = within.T @ within / len(spoken)
    ridge = 1e-3 * spread.diagonal().mean().clamp(min=1e-9)
    inverse = torch.linalg.inv(spread + ridge * torch.eye(len(spread)).double())
    whiten = torch.linalg.cholesky(inverse).to(asked.dtype)
    # A cell in which no patch speaks is nobody's answer.
    means = means.nan_to_num(NOWHERE)
    guessed = torch.cdist(asked.nan_to_num(0.0) @ whiten, means @ whiten).argmin(dim=2)
    return torch.where(silent, -1, guessed)


def clustered(hits: Int[Tensor, " P"], each: int) -> Proportion:
    """Count hits among ``each`` patches of a picture; the interval allows for unlike pictures."""
    total, found = len(hits) * each, int(hits.sum())
    rate = found / total
    independent = each * rate * (1 - rate)
    spread = hits.double().var().item() if independent and len(hits) > 1 else independent
    effect = spread / independent if independent else 1.0
    return Proportion(found, total, design_effect(effect, len(hits), each))


def patches_of(planes: Float[Tensor, "P C rows columns"], grid: Grid) -> Float[Tensor, "P N C h w"]:
    """Cut pictures into their cells, row by row."""
    rows, columns = grid
    height, width = planes.shape[2] // rows, planes.shape[3] // columns
    tiles = planes.unflatten(3, (columns, width)).unflatten(2, (rows, height))
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def _cells(
    pictures: UInt8[Tensor, "P rows columns 3"] | Float[Tensor, "P rows columns 3"], grid: Grid
) -> Float[Tensor, "P N 3 h w"]:
    return patches_of(pictures.permute(0, 3, 1, 2).float(), grid)


def _runs(cells: Float[Tensor, "P N 3 h w"]) -> Float[Tensor, "P N 4"]:
    """Measure how deep flat lines go into a patch from each of its sides, as a share of it."""

    def run(lines: Bool[Tensor, "P N lines"]) -> Float[Tensor, "P N"]:
        return lines.float().cumprod(dim=2).mean(dim=2)

    across = ((cells.amax(4) - cells.amin(4)).amax(2)) <= FLAT
    down = ((cells.amax(3) - cells.amin(3)).amax(2)) <= FLAT
    sides = (run(across), run(across.flip(2)), run(down), run(down.flip(2)))
    return torch.stack(sides, dim=2)


def _borders(pictures: UInt8[Tensor, "P rows columns 3"], grid: Grid) -> Float[Tensor, "P N 4"]:
    runs = _runs(_cells(pictures, grid))
    # A patch that is flat all over may be sky, or a wall.
    return torch.where(runs.amin(2, keepdim=True) == 1, 0.0, runs)


def _silent_at_borders(
    statistics: Float[Tensor, "P N K"], cells: Float[Tensor, "P N 3 h w"]
) -> Float[Tensor, "P N K"]:
    """Let patches that touch a border say nothing (NaN): it is a cue of its own."""
    return torch.where((_runs(cells) > 0).any(2, keepdim=True), torch.nan, statistics)


def _marks(pictures: UInt8[Tensor, "P rows columns 3"], grid: Grid) -> Float[Tensor, "P N K"]:
    """Take a patch's pixels, without mean and slope: a mark is the same in each picture.

    And it shines through where else there is least to be seen, away from what stands in the middle.
    """
    cells = _cells(pictures, grid)
    grey = cells.mean(dim=2)
    side = (min(PIXELS, grey.shape[2]), min(PIXELS, grey.shape[3]))
    detail = _detail(F.adaptive_avg_pool2d(grey, side)).flatten(2)
    contrast = detail.abs().mean(dim=2, keepdim=True)
    return _silent_at_borders(_where_plain(detail / (contrast + 1), grey), cells)


def _detail(grey: Float[Tensor, "P N h w"]) -> Float[Tensor, "P N h w"]:
    down, across = _ramps(grey)
    mean = grey.mean(dim=(2, 3), keepdim=True)
    return grey - mean - _slope(grey, down) * down - _slope(grey, across) * across


def _ramps(grey: Float[Tensor, "P N h w"]) -> tuple[Float[Tensor, "h 1"], Float[Tensor, "1 w"]]:
    height, width = grey.shape[2:]
    return torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)[None]


def _slope(grey: Float[Tensor, "P N h w"], ramp: Tensor) -> Float[Tensor, "P N 1 1"]:
    """Fit a plane's slope along one axis; it rises by twice that over the patch."""
    along = ramp.square().expand(grey.shape[2:]).sum()
    return (grey * ramp).sum(dim=(2, 3), keepdim=True) / along


def _fall_off(pictures: UInt8[Tensor, "P rows columns 3"], grid: Grid) -> Float[Tensor, "P N 2"]:
    """Take the slope of brightness, in logarithms, where there is least detail: a lens multiplies.

    Brightness itself tells of what stands in the middle, and its slope does at that thing's edge;
    a lens darkens an empty wall as well.
    """
    cells = _cells(pictures, grid)
    grey = (cells.mean(dim=2) + 4).log()
    slopes = torch.stack([_slope(grey, ramp)[..., 0, 0] for ramp in _ramps(grey)], dim=2)
    return _silent_at_borders(_where_plain(slopes, grey), cells)


def _where_plain(
    statistics: Float[Tensor, "P N K"], grey: Float[Tensor, "P N h w"]
) -> Float[Tensor, "P N K"]:
    """Let only those patches of a picture speak in which least is to be seen."""
    detail = _detail(grey).square().mean(dim=(2, 3))
    plain = detail.argsort(dim=1).argsort(dim=1) < PLAIN * grey.shape[1]
    return torch.where(plain[..., None], statistics, torch.nan)


def _fringes(pictures: UInt8[Tensor, "P rows columns 3"], grid: Grid) -> Float[Tensor, "P N 2"]:
    """Find how far blue is shifted against red, in pixels, by least squares on the edges."""
    cells = _cells(pictures, grid)
    grey = cells.mean(dim=2)
    down, across = torch.gradient(grey, dim=(2, 3))
    colour = cells[:, :, 0] - cells[:, :, 2]
    colour = colour - colour.mean(dim=(2, 3), keepdim=True)
    dd, aa, da = (
        (x * y).mean(dim=(2, 3)) for x, y in ((down, down), (across, across), (down, across))
    )
    dc, ac = ((x * colour).mean(dim=(2, 3)) for x in (down, across))
    faint = 4.0  # of 255, squared: a patch without edges says nothing
    determinant = (dd + faint) * (aa + faint) - da.square()
    shift = torch.stack(
        [
            (dc * (aa + faint) - ac * da) / determinant,
            (ac * (dd + faint) - dc * da) / determinant,
        ],
        dim=2,
    )
    return _silent_at_borders(shift, cells)


def _grid(pictures: UInt8[Tensor, "P rows columns 3"], grid: Grid) -> Float[Tensor, "P N K"]:
    """Compare each line's step with those of its neighbours: blocks put more on their edges.

    Of any pitch, where it is not a patch's: a grid in phase with the patches tells nothing.
    """
    # A mark has steps, too, and so has a fixed shade, always the same; those of blocks go up and
    # down by chance.
    clear = flatten_marks(pictures).float()
    cells = _cells(clear - clear.mean(dim=0), grid)
    uneven = [
        steps[:, :, 1:-1] - (steps[:, :, :-2] + steps[:, :, 2:]) / 2
        for steps in _steps(cells.mean(dim=2))
    ]
    inside = neighbours(grid).flatten() == 8
    # Where a crop was resized its last pixels are of another sharpness: that is no grid.
    spoken = torch.where(torch.from_numpy(inside)[:, None], torch.cat(uneven, dim=2), torch.nan)
    return _silent_at_borders(spoken, _cells(pictures, grid))


def _steps(grey: Float[Tensor, "P N h w"]) -> tuple[Tensor, Tensor]:
    """Find the mean size of the step from each line of a patch to the next, in logarithms."""
    faint = 0.1  # of 255: a flat patch has no steps to compare
    down = grey.diff(dim=2).abs().mean(dim=3)
    across = grey.diff(dim=3).abs().mean(dim=2)
    return (down + faint).log(), (across + faint).log()


STATISTICS: dict[Cue, Callable[[Tensor, Grid], Tensor]] = {
    "borders": _borders,
    "marks": _marks,
    "fall_off": _fall_off,
    "fringes": _fringes,
    "grid": _grid,
}
