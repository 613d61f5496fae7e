"""The benchmark's own arithmetic, on few pictures; its figures are in docs/data.md."""

from pathlib import Path

import pytest

from tests.benchmarks.bounded_copies import (
    CROPS,
    TILE,
    Original,
    compared,
    copied,
    drawn,
    originals,
    speeds,
    wheels,
)


@pytest.fixture(scope="module")
def pictures(photographs: Path) -> list[Original]:
    files = sorted((photographs / "cat").iterdir())[:4]
    return [drawn(image, number) for number, image in enumerate(originals(files))]


def test_originals_do_not_differ_from_themselves(pictures: list[Original]) -> None:
    result = compared("original", [picture.image for picture in pictures], pictures)
    assert (result.difference, result.psnr) == (0, float("inf"))
    assert result.enlarged == 1  # tiles of 160 pixels have no box of 224
    assert len(pictures[0].boxes) == CROPS


def test_smaller_and_worse_copies_differ_more(pictures: list[Original]) -> None:
    sizes = [(128, 95, "4:4:4"), (128, 90, "4:2:0"), (96, 90, "4:2:0"), (48, 30, "4:2:0")]
    results = [
        compared("copy", [copied(picture, *size) for picture in pictures], pictures)
        for size in sizes
    ]
    # Boxes that were shifted or not scaled with the copy would differ by tens.
    assert [r.difference for r in results] == sorted(r.difference for r in results)
    assert results[0].difference < 4
    assert [r.psnr for r in results] == sorted((r.psnr for r in results), reverse=True)
    assert results[0].kilobytes > results[3].kilobytes


def test_large_photographs_are_cut_and_the_detailed_half_is_kept() -> None:
    hubble, cat = (next(f for f in wheels() if name in f.name) for name in ("hubble", "chelsea"))
    pictures = [drawn(image, 0) for image in originals([hubble, cat])]
    assert [picture.size for picture in pictures] == [(451, 300), TILE, TILE]


def test_speeds_are_of_every_set_and_decoder(pictures: list[Original]) -> None:
    images = [picture.image for picture in pictures]
    tiny = [copied(picture, 16, 50, "4:2:0") for picture in pictures]
    rows = speeds([images, tiny])
    assert all(fast > slow for slow, fast in zip(*rows, strict=True))
