"""From the bytes of a picture file to the pixels of a crop: pure functions of bytes and seed.

Imports no torch, since every decode task imports it and torch would cost each four CPU-seconds.
JPEGs are decoded by libjpeg-turbo (:mod:`droppos.jpeg`), all else by Pillow; crops are resized by
fast_image_resize, whose SIMD code takes a fifth of Pillow's time.

How a picture becomes RGB, whatever it was: it is held upright (EXIF orientation); grey is
repeated; a palette is looked up; CMYK is converted by Pillow's rule; alpha is dropped, as usual
in the field, and what was drawn beneath it shows; of 16 bits the upper 8 are kept; of several
frames the first. Floating point has no agreed white, so it is refused.
"""

import hashlib
import warnings
from io import BytesIO
from math import ceil, exp, floor, log, sqrt
from random import Random
from threading import local
from typing import NamedTuple

import cykooz_resizer as resizer
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from droppos.errors import DataError
from droppos.jpeg import UNREADABLE, decode_rows, read_frame

MAX_PIXELS = 89_478_485
"""Pixels above which a picture is refused before it is decoded: where Pillow begins to warn of
decompression bombs, 256 MB of RGB."""
ASPECT = (3 / 4, 4 / 3)
"""Smallest and largest width / height of a random crop, before it is resized."""
TRIES = 10
"""Crops drawn before the largest centred one is taken."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation."""

_BICUBIC = resizer.ResizeOptions(
    resize_alg=resizer.ResizeAlg.convolution(resizer.FilterType.catmull_rom)
)
"""The bicubic filter of Pillow and torchvision (a = -0.5), widened when it makes smaller."""

_per_thread = local()

# Set once for the process, since `warnings.catch_warnings` is not safe in threads. The size is
# checked below, and an EXIF block that can't be read is no reason to speak or to fail.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class Box(NamedTuple):
    """A rectangle of a picture, in pixels; right and bottom are the first outside."""

    left: float
    top: float
    right: float
    bottom: float


def crop_seed(seed: int, epoch: int, key: str) -> int:
    """Seed of one picture's crop in one epoch, in [0, 2**64).

    The same on every machine and in every process, unlike ``hash``; so a resumed run, or one
    with other workers, sees the same crops.
    """
    text = f"{seed}/{epoch}/{key}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


class Crop(NamedTuple):
    """A random crop of a picture, as it travels."""

    pixels: NDArray[np.uint8]
    """RGB of shape (height, width, 3), not yet mirrored."""
    mirrored: bool
    """Whether it is to be mirrored: the device's work, since here it would take a third as long
    as all the rest."""


def random_crop(
    image_bytes: bytes,
    size: tuple[int, int],
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    flip: bool = True,
    scaled_decoding: bool = False,
    seed: int,
) -> Crop:
    """Decode a picture and cut the random crop that ``seed`` stands for.

    The crop is cut out, then resized: bicubic with antialiasing. It differs from Pillow's result
    by 0.15 of 255 in the mean (tests/droppos/test_pictures.py), because weights are rounded.

    Args:
        image_bytes: The file.
        size: Height and width of the result, in pixels.
        scale: Smallest and largest area of the crop, as a fraction of the picture's.
        flip: Mirror half of the crops.
        scaled_decoding: Decode a JPEG at a half, a quarter or an eighth of its size when the
            crop is still as large as the result. Quicker for large pictures; moves their pixels
            by 0.2 of 255 more in the mean.
        seed: From :func:`crop_seed`.

    Raises:
        DataError: If the bytes can't be decoded, or the picture is above MAX_PIXELS.
    """
    random = Random(seed)
    frame = read_frame(image_bytes)
    if frame is None or frame.width * frame.height > MAX_PIXELS:
        image = upright_rgb(image_bytes)
        box = random_box(image.width, image.height, scale, random)
        pixels = np.asarray(image)
    else:
        box = random_box(frame.width, frame.height, scale, random)
        factor = _factor(box, size) if scaled_decoding else 1
        try:
            pixels = decode_rows(image_bytes, frame, ceil(box.bottom), factor)
            box = Box(*(edge / factor for edge in box))
        except ValueError:  # rare kinds that Pillow may know; or it says what is wrong
            pixels = np.asarray(upright_rgb(image_bytes))
    return Crop(_resized_crop(pixels, box, size), flip and random.random() < 0.5)


def center_crop(
    image_bytes: bytes, size: tuple[int, int], *, ratio: float = 224 / 256
) -> NDArray[np.uint8]:
    """Decode a picture and cut its middle, the same each time: for measuring.

    A picture that is hardly larger than the result is not cut smaller than that, and one that is
    smaller is taken whole: what were cut off would only be enlarged away.

    Args:
        image_bytes: The file.
        size: Height and width of the result, in pixels.
        ratio: Side of the crop over that of the largest that fits: 224 / 256 is "resize the
            short side to 256, cut 224".

    Returns:
        RGB of shape (height, width, 3).

    Raises:
        DataError: If the bytes can't be decoded, or the picture is above MAX_PIXELS.
    """
    image = upright_rgb(image_bytes)
    height, width = size
    fit = min(image.width / width, image.height / height)
    fit = max(fit * ratio, min(fit, 1.0))
    return _resized(image, _centred(image.width, image.height, width * fit, height * fit), size)


def upright_size(image_bytes: bytes) -> tuple[int, int]:
    """Decode a picture to the last pixel, as training will, and measure it.

    Returns:
        Width and height of the picture held upright, in pixels.

    Raises:
        DataError: If the bytes can't be decoded, or the picture is above MAX_PIXELS.
    """
    return upright_rgb(image_bytes).size


def random_box(width: int, height: int, scale: tuple[float, float], random: Random) -> Box:
    """Draw a crop of a picture of ``width`` by ``height`` pixels.

    The field's usual way: area uniform in ``scale``, log of width / height uniform, place
    uniform; when TRIES of them don't fit, the largest centred box within ASPECT.
    """
    for _ in range(TRIES):
        # random() alone: the one draw that Python promises to keep the same for ever.
        area = width * height * (scale[0] + (scale[1] - scale[0]) * random.random())
        low, high = log(ASPECT[0]), log(ASPECT[1])
        aspect = exp(low + (high - low) * random.random())
        w, h = round(sqrt(area * aspect)), round(sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(random.random() * (width - w + 1))
            top = int(random.random() * (height - h + 1))
            return Box(left, top, left + w, top + h)
    aspect = min(max(width / height, ASPECT[0]), ASPECT[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return _centred(width, height, max(1, w), max(1, h))


def _centred(width: int, height: int, w: float, h: float) -> Box:
    left, top = max(0.0, (width - w) / 2), max(0.0, (height - h) / 2)
    return Box(left, top, min(width, left + w), min(height, top + h))


def _factor(box: Box, size: tuple[int, int]) -> int:
    """Find the coarsest decoding in which a crop is still as large as its result."""
    height, width = size
    room = min((box.bottom - box.top) / height, (box.right - box.left) / width)
    return next((factor for factor in (8, 4, 2) if room >= factor), 1)


def _resized_crop(pixels: NDArray[np.uint8], box: Box, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Cut out a box and resize it; what lies around it has no influence."""
    left, top = floor(box.left), floor(box.top)
    cut = pixels[top : ceil(box.bottom), left : ceil(box.right)]
    height, width = size
    source = resizer.ImageData(cut.shape[1], cut.shape[0], resizer.PixelType.U8x3, cut.tobytes())
    result = resizer.ImageData(width, height, resizer.PixelType.U8x3)
    _own_resizer().resize(source, result, _BICUBIC)
    return np.frombuffer(result.get_buffer(), np.uint8).reshape(height, width, 3)


def _own_resizer() -> resizer.Resizer:
    """Give this thread its resizer, which keeps scratch memory and serves one call at a time."""
    if not hasattr(_per_thread, "resizer"):
        _per_thread.resizer = resizer.Resizer()
    return _per_thread.resizer


def _resized(image: Image.Image, box: Box, size: tuple[int, int]) -> NDArray[np.uint8]:
    height, width = size
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


def upright_rgb(image_bytes: bytes) -> Image.Image:
    """Decode a picture whole, to upright RGB.

    Raises:
        DataError: If the bytes can't be decoded, or the picture is above MAX_PIXELS.
    """
    if not image_bytes:
        raise DataError("cannot decode a picture: it has 0 bytes")
    try:
        with Image.open(BytesIO(image_bytes)) as image:
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                raise DataError(
                    f"will not decode a picture of {image.width} x {image.height} = {pixels} "
                    f"pixels, more than {MAX_PIXELS}; make it smaller"
                )
            image.load()
            turn = _UPRIGHT.get(_orientation(image))
            upright = image if turn is None else image.transpose(turn)
            return _rgb(upright)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"will not decode a picture: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise DataError("cannot decode a picture: no format Pillow knows") from error
    except UNREADABLE as error:
        raise DataError(f"cannot decode a picture: {error}") from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) when there is none or it can't be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except UNREADABLE:
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise DataError("cannot decode a picture of floating point: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        # Pillow's own conversion cuts 16-bit values off at 255 instead of scaling them.
        values = np.asarray(image, dtype=np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(
                f"cannot decode a picture of integers from {values.min()} to {values.max()}, "
                "which do not say what is white: save it with 8 or 16 bits"
            )
        values >>= 8
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns when a palette has transparency otherwise
    return image.convert("RGB")
