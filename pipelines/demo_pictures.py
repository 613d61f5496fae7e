"""The embedded pictures: photographs that lie inside packages droppos installs anyway.

`make demo` must not ask for a download. scikit-image, scikit-learn (MLflow needs it) and
Matplotlib each bring a few photographs in their wheels; cut into overlapping tiles at several
scales they are a small data set with real edges, colours and textures. Nothing is copied into
this repository, and nothing here is used but as pixels.

Left out: what is no photograph of a scene (drawings, text, tissue, retina, stars), and the
wheel's grey textures, whose pieces all look alike.

Where they come from, as the packages tell it:
    astronaut   Eileen Collins, NASA; public domain
    chelsea     a cat, Stefan van der Walt; CC0
    coffee      Rachel Michetti; CC0
    motorcycle  left view of a stereo pair, Middlebury 2014 (Scharstein et al., GCPR 2014)
    rocket      DSCOVR on Falcon 9, SpaceX; public domain
    china       danielbuechele, Flickr; CC BY 2.0
    flower      vultilion, Flickr; CC BY 2.0
    hopper      Grace Hopper, US Navy; public domain
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from math import ceil
from pathlib import Path

from PIL import Image

from droppos.errors import DataError

TILE = 96
"""Height and width of a tile, in pixels: half as much again as a crop of the demo."""

SPANS = (1.0, 0.75, 0.5, 0.35)
"""Side of a tile's view, as a fraction of the photograph's shorter side: overview to detail."""


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
    Photograph("motorcycle", "skimage", "data/motorcycle_left.png"),
    Photograph("rocket", "skimage", "data/rocket.jpg"),
    Photograph("flower", "sklearn", "datasets/images/flower.jpg"),
    Photograph("hopper", "matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
)
"""What a demo learns from."""

HOLDOUT = (
    Photograph("coffee", "skimage", "data/coffee.png"),
    Photograph("chelsea", "skimage", "data/chelsea.png"),
    Photograph("china", "sklearn", "datasets/images/china.jpg"),
)
"""What it is measured on: whole photographs, so no pixel of them is ever trained on."""


@dataclass(frozen=True, slots=True)
class DemoPictures:
    """Two folders of JPEG tiles, one sub-folder for each photograph."""

    train: Path
    train_pictures: int
    holdout: Path
    holdout_pictures: int


def write_demo_pictures(folder: Path) -> DemoPictures:
    """Cut the photographs into tiles and write them below a folder, the same on each call.

    Training tiles overlap by three quarters, so that random crops of them see edges at every
    place; held-out tiles by half, so that their number says more.

    Args:
        folder: Where ``train/`` and ``holdout/`` go; made if missing.

    Raises:
        DataError: If a package does not bring its photographs.
    """
    train, holdout = folder / "train", folder / "holdout"
    return DemoPictures(
        train,
        _write(TRAIN, train, overlap=0.75),
        holdout,
        _write(HOLDOUT, holdout, overlap=0.5),
    )


def _write(photographs: tuple[Photograph, ...], folder: Path, overlap: float) -> int:
    written = 0
    for photograph in photographs:
        target = folder / photograph.name
        target.mkdir(parents=True, exist_ok=True)
        for number, tile in enumerate(_tiles(photograph.open(), overlap)):
            # Full colour resolution: a piece is 8 pixels wide, half of that would blur its edge.
            tile.save(target / f"{number:04d}.jpg", quality=92, subsampling=0)
            written += 1
    return written


def _tiles(photograph: Image.Image, overlap: float) -> Iterator[Image.Image]:
    """Cut square tiles at every scale, row by row; the outermost ones touch the border."""
    for span in SPANS:
        scale = TILE / (span * min(photograph.size))
        width, height = (max(TILE, round(scale * side)) for side in photograph.size)
        scaled = photograph.resize((width, height), Image.Resampling.LANCZOS)
        for y, x in product(_starts(height, overlap), _starts(width, overlap)):
            yield scaled.crop((x, y, x + TILE, y + TILE))


def _starts(length: int, overlap: float) -> list[int]:
    """Place tiles evenly along a side, each overlapping the next by at least a fraction."""
    gaps = ceil((length - TILE) / (TILE * (1 - overlap)))
    return [round(i * (length - TILE) / gaps) for i in range(gaps + 1)] if gaps else [0]
