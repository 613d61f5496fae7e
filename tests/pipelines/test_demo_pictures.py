"""The demo's pictures are real, the same everywhere, and parted by whole photographs."""

from pathlib import Path

import pytest
from PIL import Image

from droppos.errors import DataError
from pipelines.demo_pictures import (
    HOLDOUT,
    HOLDOUT_TILES,
    TILE,
    TRAIN,
    TRAIN_TILES,
    DemoPictures,
    Photograph,
    write_demo_pictures,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> DemoPictures:
    return write_demo_pictures(tmp_path_factory.mktemp("pictures"))


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.jpg"))}


def test_no_photograph_is_both_trained_on_and_measured_on(written: DemoPictures) -> None:
    assert {path.name for path in written.train.iterdir()} == {p.name for p in TRAIN}
    assert {path.name for path in written.holdout.iterdir()} == {p.name for p in HOLDOUT}
    assert not {(p.package, p.path) for p in TRAIN} & {(p.package, p.path) for p in HOLDOUT}


def test_every_photograph_gives_as_many_pictures(written: DemoPictures) -> None:
    for folder, count in ((written.train, TRAIN_TILES), (written.holdout, HOLDOUT_TILES)):
        assert {len(list(path.iterdir())) for path in folder.iterdir()} == {count}


def test_every_picture_is_a_small_colour_square(written: DemoPictures) -> None:
    for folder in written:
        for path in folder.rglob("*.jpg"):
            with Image.open(path) as picture:
                assert (picture.format, picture.mode) == ("JPEG", "RGB")
                assert picture.size == (TILE, TILE)
            assert path.stat().st_size < 16_000


def test_no_two_pictures_are_equal(written: DemoPictures) -> None:
    contents = [*_contents(written.train).values(), *_contents(written.holdout).values()]
    assert len(set(contents)) == len(contents)


@pytest.mark.shares
def test_a_second_call_writes_the_same_bytes(written: DemoPictures, tmp_path: Path) -> None:
    again = write_demo_pictures(tmp_path)
    assert _contents(again.train) == _contents(written.train)
    assert _contents(again.holdout) == _contents(written.holdout)


def test_a_photograph_that_is_not_installed_is_named() -> None:
    with pytest.raises(DataError, match=r"eagle \(skimage/data/eagle\.png\) is not installed"):
        Photograph("eagle", "skimage", "data/eagle.png").open()
    with pytest.raises(DataError, match="package no_such_package"):
        Photograph("eagle", "no_such_package", "eagle.png").open()
