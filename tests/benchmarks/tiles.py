"""ImageNet-like pictures for benchmarks, cut from large photographs."""

from collections.abc import Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path
from random import Random

import skimage
import sklearn
from PIL import Image

SIZE = (500, 375)
"""Width and height of a tile: the most common size in ImageNet."""
QUALITY = 97
"""So that, without chroma subsampling, a tile takes as long to decode as ImageNet's pictures do;
quality 90 decodes two to three times too fast."""
USUAL = (Path("/usr/share/backgrounds"), Path("/usr/share/wallpapers"))
"""Where Debian's packages of photographs (lomiri-wallpapers-16.04, mate-backgrounds, ...) go."""
PER_PHOTOGRAPH = 120


def write_tiles(folder: Path, count: int, photographs: Path | None = None) -> str:
    """Write ``count`` tiles as JPEGs in two class folders below ``folder``.

    Args:
        folder: Where they go.
        count: Number of tiles.
        photographs: Folder of large JPEGs; by default Debian's wallpapers, else the photographs
            in the wheels of scikit-image and scikit-learn, enlarged.

    Returns:
        What they were cut from, for the record.
    """
    roots = [photographs] if photographs else [root for root in USUAL if root.is_dir()]
    files = sorted({f.resolve() for root in roots for f in root.rglob("*.jp*g")})
    source = f"photographs of {', '.join(str(root) for root in roots)}"
    if not files:
        files = _from_wheels()
        source = "photographs of scikit-image and scikit-learn (install large ones to be realistic)"
    tiles = sorted((tile for file in files for tile in _tiles(file)), key=len, reverse=True)
    half = tiles[: max(1, len(tiles) // 2)]
    Random(0).shuffle(half)
    for number in range(count):
        target = folder / f"class{number % 2}" / f"{number:05d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(half[number % len(half)])
    used = half[:count]
    size = sum(len(tile) for tile in used) / len(used)
    return (
        f"{count} tiles of {source}, {len(used)} of them distinct, {size / 1000:.0f} KB on average"
    )


def _from_wheels() -> list[Path]:
    wheels = Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets"
    return sorted(f for wheel in wheels for f in wheel.rglob("*.jp*g"))


def _tiles(file: Path) -> Iterator[bytes]:
    with Image.open(file) as opened:
        photograph = opened.convert("RGB")
    if photograph.width < 2 * SIZE[0] or photograph.height < 2 * SIZE[1]:
        photograph = photograph.resize((photograph.width * 2, photograph.height * 2))
    return islice(_cut(photograph), PER_PHOTOGRAPH)


def _cut(photograph: Image.Image) -> Iterator[bytes]:
    width, height = SIZE
    for top in range(0, photograph.height - height + 1, height):
        for left in range(0, photograph.width - width + 1, width):
            file = BytesIO()
            tile = photograph.crop((left, top, left + width, top + height))
            tile.save(file, "JPEG", quality=QUALITY, subsampling=0)
            yield file.getvalue()
