"""The demo's pictures are real, the same everywhere, and parted by whole photographs."""

from pathlib import Path

import pytest
from PIL import Image

from droppos.errors import DataError
from pipelines.demo_pictures import (
    HOLDOUT,
    TILE,
    TRAIN,
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
    folders = {folder: {p.name for p in folder.iterdir()} for folder in _folders(written)}
    assert folders[written.train] == {photograph.name for photograph in TRAIN}
    assert folders[written.holdout] == {photograph.name for photograph in HOLDOUT}
    assert not {(p.package, p.path) for p in TRAIN} & {(p.package, p.path) for p in HOLDOUT}


def test_there_are_as_many_pictures_as_it_says(written: DemoPictures) -> None:
    assert len(_contents(written.train)) == written.train_pictures
    assert len(_contents(written.holdout)) == written.holdout_pictures


def test_every_picture_is_a_small_colour_square(written: DemoPictures) -> None:
    for folder in _folders(written):
        for path in folder.rglob("*.jpg"):
            with Image.open(path) as picture:
                assert (picture.format, picture.mode) == ("JPEG", "RGB")
                assert picture.size == (TILE, TILE)
            assert path.stat().st_size < 16_000


def test_no_two_pictures_are_equal(written: DemoPictures) -> None:
    contents = [*_contents(written.train).values(), *_contents(written.holdout).values()]
    assert len(set(contents)) == len(contents)


def test_a_second_call_writes_the_same_bytes(written: DemoPictures, tmp_path: Path) -> None:
    again = write_demo_pictures(tmp_path)
    assert _contents(again.train) == _contents(written.train)
    assert _contents(again.holdout) == _contents(written.holdout)


def test_a_photograph_that_is_not_installed_is_named() -> None:
    with pytest.raises(DataError, match=r"eagle \(skimage/data/eagle\.png\) is not installed"):
        Photograph("eagle", "skimage", "data/eagle.png").open()
    with pytest.raises(DataError, match="package no_such_package"):
        Photograph("eagle", "no_such_package", "eagle.png").open()


def _folders(pictures: DemoPictures) -> tuple[Path, Path]:
    return pictures.train, pictures.holdout
