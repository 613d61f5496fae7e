"""Decoding no further than needed gives the very pixels of decoding it all."""

from io import BytesIO
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from droppos.jpeg import decode_rows, read_frame


def jpeg(width: int, height: int, seed: int = 0, mode: str = "RGB", **options: Any) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(noise).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


@settings(deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    part=st.floats(0, 1),
    seed=st.integers(0, 999),
    mode=st.sampled_from(["RGB", "L"]),
    subsampling=st.sampled_from([0, 1, 2]),
    progressive=st.booleans(),
    restart=st.sampled_from([0, 1, 3]),
)
def test_the_rows_down_to_any_edge_are_those_of_the_whole_picture(
    width: int,
    height: int,
    part: float,
    seed: int,
    mode: str,
    subsampling: int,
    progressive: bool,
    restart: int,
) -> None:
    data = jpeg(
        width,
        height,
        seed,
        mode,
        subsampling=subsampling,
        progressive=progressive,
        restart_marker_blocks=restart,
    )
    frame = read_frame(data)
    assert frame is not None
    assert (frame.width, frame.height) == (width, height)
    bottom = max(1, round(part * height))
    rows = decode_rows(data, frame, bottom)
    whole = simplejpeg.decode_jpeg(data, colorspace="RGB")
    np.testing.assert_array_equal(rows[:bottom], whole[:bottom])


@pytest.mark.parametrize("subsampling", [0, 2])
def test_rows_below_the_edge_are_left_out(subsampling: int) -> None:
    data = jpeg(64, 640, subsampling=subsampling)
    frame = read_frame(data)
    assert frame is not None
    assert len(decode_rows(data, frame, 100)) <= 128 + 16
    assert len(decode_rows(data, frame, 640)) == 640


def test_a_progressive_picture_is_decoded_whole() -> None:
    data = jpeg(64, 640, progressive=True)
    frame = read_frame(data)
    assert frame is not None
    assert len(decode_rows(data, frame, 100)) == 640


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_decoding_at_a_fraction_rounds_up(factor: int) -> None:
    data = jpeg(101, 67)
    frame = read_frame(data)
    assert frame is not None
    assert decode_rows(data, frame, 67, factor).shape == (-(-67 // factor), -(-101 // factor), 3)


def test_what_a_general_decoder_must_judge_has_no_frame() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    whole = jpeg(32, 32)
    others = {
        "another format": b"\x89PNG" + bytes(100),
        "nothing": b"",
        "CMYK": jpeg(32, 32, mode="CMYK"),
        "turned by EXIF": jpeg(32, 32, exif=turned),
        "cut off": whole[:-2],
        "only headers": whole[:150],
        "no height": whole.replace((32).to_bytes(2, "big") * 2, bytes(2) + b"\0\x20", 1),
    }
    assert {name for name, data in others.items() if read_frame(data) is not None} == set()
    upright = Image.Exif()
    upright[0x0112] = 1
    assert read_frame(jpeg(32, 32, exif=upright)) is not None
    assert read_frame(whole + b"something after the end") is not None
