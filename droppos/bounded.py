"""Bounded copies: pictures made smaller once, so that every epoch decodes less.

A copy is a plain JPEG of upright RGB pixels, nothing else: what was turned by its EXIF block, had
alpha, a palette, 16 bits or CMYK, is in the copy as `droppos.pictures` would have decoded it.
Colour profiles are neither applied nor kept, since decoding for training ignores them too: the
copy of a wide-gamut picture looks pale in a viewer, exactly as the model would have seen it.

Imports numpy and Pillow only, as `droppos.pictures`.
"""

import tempfile
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from droppos.errors import ConfigError, DataError
from droppos.pictures import upright_rgb

SMALLEST = 16
"""Least short side that can be asked for, in pixels: one patch."""
LONGEST = 65_500
"""Longest side of a JPEG, in pixels: libjpeg's own limit."""
QUALITY = 90
"""JPEG quality when none is given: docs/data.md has what others cost."""
CHROMA = "4:2:0"
"""Colour at half the resolution: of ImageNet-like pictures 1.4 times the decodes per second of
4:4:4, for another 0.3 to 0.5 of 255 in the crops. A quality of 95 undoes that difference, and still
decodes faster than 4:4:4 at 90 (docs/data.md)."""


class TooLongError(DataError):
    """The copy would be longer than a JPEG can be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """How large a picture may stay, and how its copy is stored if it is larger."""

    short_side: int
    """Pixels of a copy's short side; pictures up to it are left as they are."""
    quality: int = QUALITY
    """JPEG quality of copies, 1 to 100."""

    def __post_init__(self) -> None:
        if self.short_side < SMALLEST:
            raise ConfigError(
                f"short_side must be at least {SMALLEST} pixels, got {self.short_side}; 320 suits "
                "crops of 224"
            )
        if not 1 <= self.quality <= 100:
            raise ConfigError(
                f"quality must be from 1 to 100, got {self.quality}; leave it out for {QUALITY}"
            )

    @classmethod
    def asked(cls, short_side: int | None, quality: int | None) -> "Bound | None":
        """Build the bound of a command line, where either may be left out.

        Raises:
            ConfigError: If a value is out of range, or there is a quality of nothing.
        """
        if short_side is None:
            if quality is not None:
                raise ConfigError(
                    f"quality {quality} is that of bounded copies, but no short_side is given, so "
                    "pictures are kept as they are; give a short side too, or leave quality out"
                )
            return None
        return cls(short_side=short_side, quality=QUALITY if quality is None else quality)


class Copy(NamedTuple):
    """A picture that is within its bound."""

    image: bytes
    """Its file: the very one that was given, or a JPEG."""
    width: int
    """Pixels, held upright."""
    height: int
    """Pixels, held upright."""
    is_smaller: bool
    """Whether it was made smaller; if not, its bytes are untouched."""


def bounded_copy(image_bytes: bytes, bound: Bound) -> Copy:
    """Make a picture smaller if its short side is above the bound.

    A picture within the bound stays as it is, of whatever format: a PNG icon would lose by
    becoming a JPEG, and there is nothing to gain from one more compression of a small JPEG.

    Args:
        image_bytes: The file.
        bound: Short side and quality.

    Raises:
        DataError: If the bytes can't be decoded, or the picture is above MAX_PIXELS.
        TooLongError: If the copy's long side would be above LONGEST.
    """
    image = upright_rgb(image_bytes)
    width, height = bounded_size(image.width, image.height, bound.short_side)
    if (width, height) == image.size:
        return Copy(image_bytes, width, height, is_smaller=False)
    if max(width, height) > LONGEST:
        raise TooLongError(
            f"a copy of {image.width} x {image.height} pixels would have {width} x {height}, "
            f"and no side of a JPEG can be above {LONGEST}; cut the picture"
        )
    # Of Pillow's filters the one that moves crops least: by 0.60 of 255 at a short side of 320,
    # where bicubic moves them by 0.68, Hamming by 1.0, a box by 1.5.
    smaller = image.resize((width, height), Image.Resampling.LANCZOS)
    return Copy(encode(smaller, bound.quality), width, height, is_smaller=True)


def bounded_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height, in pixels, that a picture has within the bound; never more than its own."""
    shorter = min(width, height)
    if shorter <= short_side:
        return width, height
    # In whole numbers, rounded half up: the same on every machine.
    scaled = [(2 * side * short_side + shorter) // (2 * shorter) for side in (width, height)]
    return scaled[0], scaled[1]


def encode(image: Image.Image, quality: int, chroma: str = CHROMA) -> bytes:
    """Write RGB as a baseline JPEG without metadata.

    Args:
        image: RGB.
        quality: 1 to 100.
        chroma: Subsampling, as Pillow names it.
    """
    image.info = {}  # Pillow would carry a JPEG's comment over
    # Into a file, if one without a name: into memory, Pillow's encoder keeps Python's lock, and
    # two threads write no more pictures per second than one. Standard Huffman tables, since with
    # optimize=True Pillow guesses the size of its buffer, and fails where noise makes that too
    # small; and 3.5 % fewer bytes decode no faster. Progressive would decode at half the speed.
    with tempfile.TemporaryFile() as file:
        image.save(
            file,
            "JPEG",
            quality=quality,
            subsampling=chroma,
            progressive=False,
            optimize=False,
        )
        file.seek(0)
        return file.read()
