"""JPEG, read no further than it is needed: a crop costs the rows down to its lower edge.

Most of a JPEG's decoding is undoing its entropy coding, and that can only be done from the top
on. It can be left early: a frame header that says the picture is as high as the crop reaches
makes any decoder stop there. So the two bytes of the height are rewritten before libjpeg-turbo
sees them. The pixels are those of the whole picture's decoding, to the last bit.
"""

import struct
import zlib
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image

UNREADABLE = (
    OSError,
    SyntaxError,  # what Pillow's PNG reader raises for a broken chunk
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    RuntimeError,  # of AVIF; NotImplementedError, which is one, of DDS and BLP
    struct.error,
    zlib.error,
)
"""All that Pillow's readers were seen to raise for damaged files (tests damage some at random)."""

_SEQUENTIAL = {0xC0, 0xC1}
"""Start of frame: baseline or extended sequential, Huffman coded."""
_PROGRESSIVE = 0xC2
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""Every start of frame; the three left out are tables and reserved."""
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"


class Frame(NamedTuple):
    """What a JPEG's headers say."""

    width: int
    height: int
    height_at: int
    """Offset of the height's two bytes."""
    mcu_rows: int
    """Pixel rows that are coded together: 8 or 16, rarely more."""
    subsampled: bool
    """Whether colours have fewer rows than brightness, so that neighbouring rows mix."""
    one_scan: bool
    """Whether the rows come once, from the top to the bottom, so that the rest can be left out."""


def read_frame(data: bytes) -> Frame | None:
    """Read the headers of an upright 8-bit JPEG in grey or YCbCr, and see that it has an end.

    Returns:
        None for everything else (another format, CMYK, turned by EXIF, cut off, ...), which a
        more general decoder has to judge.
    """
    if data[:2] != b"\xff\xd8":
        return None
    try:
        return _walk(data)
    except IndexError:
        return None


def decode_rows(data: bytes, frame: Frame, bottom: int, factor: int = 1) -> NDArray[np.uint8]:
    """Decode the rows of a picture from the top down to at least ``bottom``.

    Args:
        data: The file.
        frame: What :func:`read_frame` read of it.
        bottom: Rows that are needed, of the full size.
        factor: 1, or 2, 4 or 8 to decode at a half, a quarter or an eighth of the size.

    Returns:
        RGB of shape (rows, columns, 3), at ``1 / factor`` of the size, rounded up.

    Damage inside the coded rows is not noticed, only an end that is missing: a data set's shards
    have checksums for that, and `prepare` has seen every picture whole.

    Raises:
        ValueError: If libjpeg-turbo can't decode it.
    """
    rows = _rows_to_decode(frame, bottom)
    if rows < frame.height:
        at = frame.height_at
        data = b"".join((data[:at], rows.to_bytes(2, "big"), data[at + 2 :]))
    # Not strict: what follows the last row that is wanted would be complained of.
    return simplejpeg.decode_jpeg(
        data,
        colorspace="RGB",
        min_height=-(-rows // factor),
        min_width=-(-frame.width // factor),
        min_factor=factor,
        strict=False,
    )


def _rows_to_decode(frame: Frame, bottom: int) -> int:
    if not frame.one_scan:
        return frame.height
    whole = -(-bottom // frame.mcu_rows) * frame.mcu_rows
    # Colours that have fewer rows are interpolated across the edge of what is coded together.
    return min(whole + frame.mcu_rows * frame.subsampled, frame.height)


def _walk(data: bytes) -> Frame | None:
    """Step from marker to marker up to the picture's first scan."""
    at = 2
    frame: tuple[int, int] | None = None
    while True:
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # fill bytes may precede a marker
            at += 1
            continue
        length = data[at + 2] << 8 | data[at + 3]
        body = at + 4
        if marker == 0xDA:
            break
        if marker in _FRAMES:
            frame = (marker, body)
        elif marker == 0xE1 and not _is_upright(data[body : body - 2 + length]):
            return None
        at += 2 + length
    if frame is None or data.rfind(b"\xff\xd9", at) < 0:
        return None
    return _frame(*frame, data, scanned=data[body])


def _frame(marker: int, at: int, data: bytes, scanned: int) -> Frame | None:
    """Read a start of frame whose body begins at ``at``."""
    height, width = data[at + 1] << 8 | data[at + 2], data[at + 3] << 8 | data[at + 4]
    components = data[at + 5]
    kind_is_plain = marker in _SEQUENTIAL or marker == _PROGRESSIVE
    if not kind_is_plain or data[at] != 8 or components not in {1, 3} or not width * height:
        return None
    vertical = [data[at + 7 + 3 * i] & 15 for i in range(components)]
    return Frame(
        width=width,
        height=height,
        height_at=at + 1,
        # A scan of one component is coded block by block, whatever its sampling says.
        mcu_rows=8 * max(vertical) if components > 1 else 8,
        subsampled=components > 1 and len(set(vertical)) > 1,
        one_scan=marker in _SEQUENTIAL and scanned == components,
    )


def _is_upright(segment: bytes) -> bool:
    """Tell whether an APP1 segment leaves the picture as it is."""
    if segment.startswith(_XMP):
        return b"Orientation" not in segment  # Pillow reads it, so whoever names it goes there
    if not segment.startswith(_EXIF):
        return True
    exif = Image.Exif()
    try:
        exif.load(segment)
        return exif.get(ExifTags.Base.Orientation, 1) == 1
    except UNREADABLE:
        return False
