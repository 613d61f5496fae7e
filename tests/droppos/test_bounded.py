from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from droppos.bounded import LONGEST, Bound, TooLongError, bounded_copy, bounded_size, encode
from droppos.errors import ConfigError, DataError
from droppos.pictures import upright_rgb

BOUND = Bound(short_side=32, quality=95)
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"]


def _encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _open(data: bytes) -> Image.Image:
    image = Image.open(BytesIO(data))
    image.load()
    return image


def _ramp(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards, blue is constant."""
    x = np.linspace(40, 215, width).round().astype(np.uint8)
    y = np.linspace(40, 215, height).round().astype(np.uint8)
    ramp = np.full((height, width, 3), 128, np.uint8)
    ramp[..., 0], ramp[..., 1] = x, y[:, None]
    return Image.fromarray(ramp)


def _in_mode(image: Image.Image, mode: str) -> bytes:
    if mode == "I;16":
        grey = np.asarray(image.convert("L")).astype(np.uint16)
        return _encode(Image.fromarray(grey << 8), "TIFF")
    return _encode(image.convert(mode), "TIFF" if mode == "CMYK" else "PNG")


@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(1, 120),
    height=st.integers(1, 120),
    short_side=st.integers(16, 60),
    mode=st.sampled_from(MODES),
)
def test_a_picture_is_within_the_bound_and_never_larger(
    width: int, height: int, short_side: int, mode: str
) -> None:
    data = _in_mode(_ramp(width, height), mode)
    copy = bounded_copy(data, Bound(short_side=short_side))
    assert _open(copy.image).size == (copy.width, copy.height)
    if min(width, height) <= short_side:
        assert copy == (data, width, height, False)
        return
    assert copy.is_smaller
    assert min(copy.width, copy.height) == short_side
    long_side = max(width, height) * short_side / min(width, height)
    assert abs(max(copy.width, copy.height) - long_side) <= 0.5
    image = _open(copy.image)
    assert (image.format, image.mode) == ("JPEG", "RGB")


@given(width=st.integers(1, 10**6), height=st.integers(1, 10**6), short_side=st.integers(16, 2000))
def test_sizes_never_grow_and_turn_with_the_picture(
    width: int, height: int, short_side: int
) -> None:
    w, h = bounded_size(width, height, short_side)
    assert w <= width and h <= height
    assert min(w, h) == min(width, height, short_side)
    assert bounded_size(height, width, short_side) == (h, w)


@pytest.mark.parametrize("mode", MODES)
def test_a_copy_shows_what_training_would_have_decoded(mode: str) -> None:
    data = _in_mode(_ramp(120, 80), mode)
    copy = bounded_copy(data, BOUND)
    expected = upright_rgb(data).resize((48, 32), Image.Resampling.LANCZOS)
    assert copy[1:3] == (48, 32)
    difference = np.asarray(_open(copy.image), np.int16) - np.asarray(expected)
    # Black and white, and 256 colours, are dithered: noise, which JPEG keeps less well.
    assert np.abs(difference).mean() < (8 if mode in {"1", "P"} else 1.5)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_upright_in_its_copy_and_not_turned_again(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _encode(_ramp(120, 80), "JPEG", exif=exif, quality=95)
    copy = bounded_copy(data, BOUND)
    assert (copy.width, copy.height) == ((48, 32) if orientation < 5 else (32, 48))
    again = upright_rgb(copy.image)
    assert again.size == (copy.width, copy.height)
    expected = np.asarray(upright_rgb(data).resize(again.size, Image.Resampling.LANCZOS), np.int16)
    assert np.abs(np.asarray(again) - expected).mean() < 1.5


def test_a_turned_picture_is_bounded_by_its_upright_short_side() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = _encode(_ramp(32, 200), "JPEG", exif=exif)
    assert bounded_copy(data, BOUND) == (data, 200, 32, False)


def test_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (80, 80), colour) for colour in ("red", "blue")]
    data = _encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    red, _, blue = np.asarray(_open(bounded_copy(data, BOUND).image)).mean((0, 1))
    assert red > 250 and blue < 5


def test_a_copy_is_a_baseline_jpeg_in_one_scan_without_metadata() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a description"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = _encode(
        _ramp(120, 80),
        "JPEG",
        exif=exif,
        icc_profile=profile,
        comment=b"a comment",
        progressive=True,
    )
    copy = bounded_copy(data, BOUND).image
    image = _open(copy)
    assert not {"exif", "icc_profile", "comment", "progressive"} & set(image.info)
    assert copy.count(b"\xff\xc0") == 1  # start of a baseline frame
    assert copy.count(b"\xff\xda") == 1  # start of a scan


def test_a_profile_does_not_move_pixels() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    plain, marked = (
        bounded_copy(_encode(_ramp(120, 80), "PNG", **options), BOUND)
        for options in ({}, {"icc_profile": profile})
    )
    assert plain == marked


def test_a_better_quality_is_nearer_and_larger() -> None:
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (80, 80, 3), dtype=np.uint8))
    data = _encode(noise, "PNG")
    expected = np.asarray(noise.resize((32, 32), Image.Resampling.LANCZOS), np.int16)
    copies = [bounded_copy(data, Bound(short_side=32, quality=q)).image for q in (30, 80, 100)]
    assert len(copies[0]) < len(copies[1]) < len(copies[2])
    far = [np.abs(np.asarray(_open(copy)) - expected).mean() for copy in copies]
    assert far[0] > far[1] > far[2]


@pytest.mark.parametrize("chroma", ["4:2:0", "4:4:4"])
@pytest.mark.parametrize("quality", [1, 94, 100])
def test_noise_that_hardly_shrinks_is_written_whole(quality: int, chroma: str) -> None:
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (400, 500, 3), dtype=np.uint8))
    image = _open(encode(noise, quality, chroma))  # Pillow's own guesses fail from 85, 4:4:4, on
    assert image.size == noise.size


def test_a_picture_longer_than_a_jpeg_can_be_is_refused() -> None:
    ratio = LONGEST // 16 + 1
    data = _encode(Image.new("1", (20 * ratio, 20)), "PNG")
    with pytest.raises(TooLongError, match=f"would have {16 * ratio} x 16, and no side"):
        bounded_copy(data, Bound(short_side=16))
    data = _encode(Image.new("1", (20 * (ratio - 1), 20)), "PNG")
    assert _open(bounded_copy(data, Bound(short_side=16)).image).size == (16 * (ratio - 1), 16)


@pytest.mark.parametrize("data", [b"", b"words", _encode(_ramp(99, 99), "JPEG")[:-200]])
def test_what_cannot_be_decoded_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="cannot decode a picture"):
        bounded_copy(data, BOUND)


def test_impossible_bounds_are_refused() -> None:
    with pytest.raises(ConfigError, match="short_side must be at least 16 pixels, got 15"):
        Bound.asked(15, None)
    for quality in (0, 101):
        with pytest.raises(ConfigError, match=f"quality must be from 1 to 100, got {quality}"):
            Bound.asked(320, quality)
    with pytest.raises(ConfigError, match="quality 90 is that of bounded copies, but no short_si"):
        Bound.asked(None, 90)
    assert Bound.asked(None, None) is None
    assert Bound.asked(16, None) == Bound(short_side=16, quality=90)
    assert Bound.asked(320, 1) == Bound(short_side=320, quality=1)
