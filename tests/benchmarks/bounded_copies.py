"""Measure bounded copies: their size, how fast they decode, what they do to training's crops.

    python -m tests.benchmarks.bounded_copies [FOLDER] [--pictures 200]

Without a folder, the ten photographs in the wheels of scikit-image and scikit-learn. A photograph
of at least 1000 x 750 pixels is cut into tiles of 500 x 375, ImageNet's usual size, of which the
more detailed half is kept, since tiles of sky decode two to three times as fast as ImageNet's
pictures. JPEGs that are smaller stay as they are; all else becomes JPEG of quality 97, 4:4:4.

Speeds are per second of CPU time of the one thread that works. Every picture is decoded from all
sets in turn, five times, and its fastest time of each counts: a disturbed one is only ever slower.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from io import BytesIO
from math import log10
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console

from droppos.bounded import CHROMA, QUALITY, bounded_size, encode
from droppos.pictures import Box, crop_seed, random_box, random_crop, upright_rgb

SHORT_SIDES = (256, 320, 384, 512)
QUALITIES = (85, 90, 95)
VARIANTS = [(side, quality, CHROMA) for side in SHORT_SIDES for quality in QUALITIES]
VARIANTS.insert(SHORT_SIDES.index(320) * len(QUALITIES) + 2, (320, QUALITY, "4:4:4"))
CROP = 224
"""Side of a crop, in pixels."""
CROPS = 8
"""Crops drawn of each picture."""
SCALE = (0.2, 1.0)
"""Area of a crop, as a fraction of the picture's."""
TILE = (500, 375)
"""Width and height of a tile, in pixels."""
ROUNDS = 5

WHEELS = {
    "skimage": "data/astronaut.png data/chelsea.png data/coffee.png data/hubble_deep_field.jpg "
    "data/ihc.png data/motorcycle_left.png data/retina.jpg data/rocket.jpg",
    "sklearn": "datasets/images/china.jpg datasets/images/flower.jpg",
}
"""Photographs in a wheel, below the package's folder."""


class Original(NamedTuple):
    """A picture and crops of it."""

    image: bytes
    size: tuple[int, int]
    """Width and height, in pixels."""
    boxes: list[Box]
    crops: list[np.ndarray]
    """What each box holds, at CROP x CROP."""


class Result(NamedTuple):
    """One row of the table."""

    name: str
    kilobytes: float
    """Of a picture, on average."""
    speeds: list[float]
    """Pictures per CPU second, of each decoder."""
    difference: float
    """Mean absolute difference from the original's crops, of 255."""
    psnr: float
    """Of all crops together, in dB; infinite for the original."""
    enlarged: float
    """Share of the crops whose box is under CROP pixels wide or high."""


def wheels() -> list[Path]:
    """Find the photographs in the wheels, by path: skimage.data's functions may download."""
    found: list[Path] = []
    for package, names in WHEELS.items():
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None, f"{package} is not installed"
        found += [Path(spec.origin).parent / name for name in names.split()]
    return found


def originals(files: list[Path]) -> list[bytes]:
    """Read pictures, and cut the large ones into tiles, as the header says."""
    whole: list[bytes] = []
    tiles: list[bytes] = []
    for file in files:
        data = file.read_bytes()
        image = upright_rgb(data)
        if image.width >= 2 * TILE[0] and image.height >= 2 * TILE[1]:
            tiles += [encode(tile, 97, "4:4:4") for tile in _cut(image)]
        else:
            is_jpeg = file.suffix.lower() in {".jpg", ".jpeg"}
            whole.append(data if is_jpeg else encode(image, 97, "4:4:4"))
    detailed = sorted(tiles, key=len, reverse=True)[: (len(tiles) + 1) // 2]
    return whole + detailed


def _cut(image: Image.Image) -> Iterator[Image.Image]:
    width, height = TILE
    for top in range(0, image.height - height + 1, height):
        for left in range(0, image.width - width + 1, width):
            yield image.crop((left, top, left + width, top + height))


def drawn(image_bytes: bytes, number: int) -> Original:
    """Draw a picture's crops."""
    image = upright_rgb(image_bytes)
    random = Random(crop_seed(0, 0, str(number)))
    boxes = [random_box(image.width, image.height, SCALE, random) for _ in range(CROPS)]
    return Original(image_bytes, image.size, boxes, [_crop(image, box) for box in boxes])


def _crop(image: Image.Image, box: Box) -> np.ndarray:
    pixels = image.resize((CROP, CROP), Image.Resampling.BICUBIC, box=box)
    return np.asarray(pixels).astype(np.int16)


def copied(original: Original, short_side: int, quality: int, chroma: str) -> bytes:
    """Do what `droppos.bounded` does, with any chroma subsampling."""
    image = upright_rgb(original.image)
    size = bounded_size(image.width, image.height, short_side)
    if size == image.size:
        return original.image
    return encode(image.resize(size, Image.Resampling.LANCZOS), quality, chroma)


def decoders() -> dict[str, Callable[[bytes, int], object]]:
    """What is timed, of a picture and its number; the last is what training does with it."""
    found: dict[str, Callable[[bytes, int], object]] = {
        "Pillow": lambda data, _: Image.open(BytesIO(data)).load()
    }
    if find_spec("simplejpeg"):
        import simplejpeg

        found["simplejpeg"] = lambda data, _: simplejpeg.decode_jpeg(data)
    found["random_crop"] = lambda data, number: random_crop(
        data, (CROP, CROP), scale=SCALE, seed=crop_seed(0, 0, str(number))
    )
    return found


def speeds(sets: list[list[bytes]]) -> list[list[float]]:
    """Pictures per CPU second, of each set by each decoder."""
    uses = list(decoders().values())
    count = len(sets[0])
    best = np.full((len(sets), len(uses), count), np.inf)
    for number in [*range(count)] * ROUNDS:
        for row, images in enumerate(sets):
            for column, use in enumerate(uses):
                start = time.thread_time()
                use(images[number], number)
                took = time.thread_time() - start
                best[row, column, number] = min(best[row, column, number], took)
    return (count / best.sum(axis=2)).tolist()


def compared(name: str, images: list[bytes], originals: list[Original]) -> Result:
    """Compare the same crops, by relative box, of two sets of pictures; speeds come later."""
    absolute: list[float] = []
    squared: list[float] = []
    small: list[bool] = []
    for data, original in zip(images, originals, strict=True):
        image = upright_rgb(data)
        x, y = image.width / original.size[0], image.height / original.size[1]
        for box, crop in zip(original.boxes, original.crops, strict=True):
            scaled = Box(box.left * x, box.top * y, box.right * x, box.bottom * y)
            difference = _crop(image, scaled) - crop
            absolute.append(float(np.abs(difference).mean()))
            squared.append(float(np.square(difference, dtype=np.int64).mean()))
            small.append(min(scaled.right - scaled.left, scaled.bottom - scaled.top) < CROP)
    error = statistics.fmean(squared)
    return Result(
        name,
        statistics.fmean(map(len, images)) / 1e3,
        [],
        statistics.fmean(absolute),
        10 * log10(255**2 / error) if error else float("inf"),
        statistics.fmean(small),
    )


def measured(images: list[bytes]) -> list[Result]:
    """Make and measure every variant that changes a picture; the first row is the originals'."""
    first = [drawn(image, number) for number, image in enumerate(images)]
    sets = {"original": images}
    for side, quality, chroma in VARIANTS:
        copies = [copied(original, side, quality, chroma) for original in first]
        if copies != images:
            name = f"{side}, quality {quality}" + (f", {chroma}" if chroma != CHROMA else "")
            sets[name] = copies
    results = [compared(name, copies, first) for name, copies in sets.items()]
    timed = speeds(list(sets.values()))
    return [result._replace(speeds=row) for result, row in zip(results, timed, strict=True)]


def show(console: Console, results: list[Result]) -> None:
    """Print the table, in Markdown."""
    head = ["copies", "kB", *(f"{name}/s" for name in decoders())]
    rows = [[*head, "difference", "PSNR", "enlarged"]]
    whole = results[0]
    for result in results:
        share = f"{result.kilobytes:.1f} ({result.kilobytes / whole.kilobytes:.0%})"
        times = [
            f"{speed:,.0f} ({speed / before:.1f} x)"
            for speed, before in zip(result.speeds, whole.speeds, strict=True)
        ]
        exact = result.psnr == float("inf")
        far = ["0", "-"] if exact else [f"{result.difference:.2f}", f"{result.psnr:.1f}"]
        rows.append([result.name, share, *times, *far, f"{result.enlarged:.0%}"])
    rows.insert(1, ["---"] * len(rows[0]))
    for row in rows:
        console.print(f"| {' | '.join(row)} |", highlight=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="pictures instead of the wheels'")
    parser.add_argument("--pictures", type=int, default=200, help="at most so many are measured")
    arguments = parser.parse_args()
    suffixes = Image.registered_extensions()
    files = (
        wheels()
        if arguments.folder is None
        else sorted(f for f in arguments.folder.rglob("*") if f.suffix.lower() in suffixes)
    )
    images = originals(files)
    Random(0).shuffle(images)
    images = images[: arguments.pictures]
    console = Console()
    console.print(f"{len(images)} pictures of {len(files)} files, {CROPS} crops of each")
    show(console, measured(images))


if __name__ == "__main__":
    main()
