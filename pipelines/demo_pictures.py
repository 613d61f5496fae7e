"""The embedded pictures: photographs that lie inside packages droppos installs anyway.

`make demo` must not ask for a download. scikit-image, scikit-learn (MLflow needs it) and
Matplotlib each bring a few photographs in their wheels. Nothing is copied into this repository.

Ten photographs are few, and two minutes of two CPUs are short, so tiles are cut to teach one
thing well, that pieces which belong together look alike:

- Tiles are soft, as if out of focus, and each channel is stretched to its full range. A small
  model learns from smooth, strong colours how to place pieces at all: it left the level of a
  guess after some 130 steps of 32 tiles, after some 350 where soft tiles were not stretched.
- Training tiles are turned by quarters and have their channels exchanged. Without, the model
  learnt these photographs by heart (orange is left of white), and was right about twice as
  often on them as on held-out ones.

Held-out tiles come from other photographs, upright and with their channels in order.

Where the photographs come from, as the packages tell it:
    astronaut   Eileen Collins, NASA; public domain
    chelsea     a cat, by Stefan van der Walt; CC0
    china       by danielbuechele, Flickr; CC BY 2.0
    coffee      by Rachel Michetti; CC0
    flower      by vultilion, Flickr; CC BY 2.0
    hopper      Grace Hopper, US Navy; public domain
    motorcycle  left view of a stereo pair; Middlebury 2014 (Scharstein et al., GCPR 2014)
    retina      by Mikael Häggström; CC0
    rocket      Falcon 9, SpaceX; public domain
    tissue      colon, by the Center for Microscopy and Molecular Imaging; no known restrictions
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from droppos.errors import DataError

TILE = 64
"""Height and width of a tile, in pixels."""
SPANS = (0.25, 0.5)
"""Least and largest side of what a tile shows, as a fraction of the photograph's shorter side."""
SOFTNESS = (0.02, 0.12)
"""Least and largest radius (one deviation) of a training tile's blur, as a fraction of its side."""
HOLDOUT_SOFTNESS = 0.04
"""Radius of a held-out tile's blur: what it shows is still plain to see."""
TRAIN_TILES, HOLDOUT_TILES = 512, 64
"""Tiles of one photograph."""


@dataclass(frozen=True, slots=True)
class Photograph:
    """A file inside an installed package."""

    name: str
    package: str
    path: str
    """Below the package's folder."""

    def open(self) -> Image.Image:
        """Read the photograph.

        Raises:
            DataError: If the installed package does not bring it.
        """
        spec = find_spec(self.package)  # finds the folder without importing the package
        roots = list(spec.submodule_search_locations or []) if spec else []
        files = [file for root in roots if (file := Path(root) / self.path).is_file()]
        if not files:
            raise DataError(
                f"the demo's photograph {self.name} ({self.package}/{self.path}) is not "
                f"installed; expected it in the package {self.package}: install droppos anew "
                "(make demo does), or prepare a folder of your own pictures"
            )
        with Image.open(files[0]) as picture:
            return picture.convert("RGB")


TRAIN = (
    Photograph("astronaut", "skimage", "data/astronaut.png"),
    Photograph("flower", "sklearn", "datasets/images/flower.jpg"),
    Photograph("hopper", "matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    Photograph("motorcycle", "skimage", "data/motorcycle_left.png"),
    Photograph("retina", "skimage", "data/retina.jpg"),
    Photograph("rocket", "skimage", "data/rocket.jpg"),
    Photograph("tissue", "skimage", "data/ihc.png"),
)
"""What a demo learns from."""

HOLDOUT = (
    Photograph("chelsea", "skimage", "data/chelsea.png"),
    Photograph("china", "sklearn", "datasets/images/china.jpg"),
    Photograph("coffee", "skimage", "data/coffee.png"),
)
"""What it is measured on: whole photographs, so training sees no part of them."""


class DemoPictures(NamedTuple):
    """Two folders of JPEG tiles, in each a folder for every photograph."""

    train: Path
    holdout: Path


def write_demo_pictures(
    folder: Path, train_tiles: int = TRAIN_TILES, holdout_tiles: int = HOLDOUT_TILES
) -> DemoPictures:
    """Cut the photographs into tiles and write them below a folder, the same on each call.

    Args:
        folder: Where ``train/`` and ``holdout/`` go; made if missing.
        train_tiles: Tiles of each photograph to learn from.
        holdout_tiles: Tiles of each other one.

    Raises:
        DataError: If a package does not bring its photograph.
    """
    pictures = DemoPictures(folder / "train", folder / "holdout")
    for seed, photograph in enumerate(TRAIN):
        _write(
            _training_tiles(photograph.open(), seed, train_tiles), pictures.train / photograph.name
        )
    for seed, photograph in enumerate(HOLDOUT, start=len(TRAIN)):
        _write(
            _holdout_tiles(photograph.open(), seed, holdout_tiles),
            pictures.holdout / photograph.name,
        )
    return pictures


def _training_tiles(photograph: Image.Image, seed: int, tiles: int) -> Iterator[Image.Image]:
    random = np.random.default_rng(seed)
    for _ in range(tiles):
        tile = _tile(photograph, random, _between(random, SOFTNESS))
        pixels = np.rot90(np.asarray(tile), int(random.integers(4)))
        yield Image.fromarray(np.ascontiguousarray(pixels[..., random.permutation(3)]))


def _holdout_tiles(photograph: Image.Image, seed: int, tiles: int) -> Iterator[Image.Image]:
    random = np.random.default_rng(seed)
    for _ in range(tiles):
        yield _tile(photograph, random, HOLDOUT_SOFTNESS)


def _tile(photograph: Image.Image, random: np.random.Generator, softness: float) -> Image.Image:
    side = _between(random, SPANS) * min(photograph.size)
    left, top = (random.uniform(0, length - side) for length in photograph.size)
    box = (left, top, left + side, top + side)
    tile = photograph.resize((TILE, TILE), Image.Resampling.LANCZOS, box, reducing_gap=2)
    soft = tile.filter(ImageFilter.GaussianBlur(softness * TILE))
    return ImageOps.autocontrast(soft, cutoff=1)  # the outermost 1 % of pixels may clip


def _between(random: np.random.Generator, bounds: tuple[float, float]) -> float:
    """Draw a size evenly in its logarithm: as many from 1 to 2 as from 2 to 4."""
    return float(np.exp(random.uniform(*np.log(bounds))))


def _write(tiles: Iterator[Image.Image], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, tile in enumerate(tiles):
        # Full colour resolution: halved, a piece of 8 pixels would have colours of 4.
        tile.save(folder / f"{number:04d}.jpg", quality=92, subsampling=0)
