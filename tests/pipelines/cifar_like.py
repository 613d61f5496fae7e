"""A package as CIFAR-10 comes in, of few pictures: patches of real photographs, 32 x 32 pixels."""

import base64
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.evidence import cifar as module
from pipelines.evidence.cifar import CLASSES, FILE, SIDE, Cifar, cifar

BATCHES = 5


def pictures(photographs: Path, number: int) -> tuple[np.ndarray, list[int]]:
    """Cut patches of photographs; the label is the photograph, of which there are six."""
    tiles = sorted(photographs.glob("*/*.jpg"))
    names = sorted({tile.parent.name for tile in tiles})
    random = np.random.default_rng(number)
    cut, labels = [], []
    for i in range(number):
        tile = tiles[(7 * i) % len(tiles)]
        with Image.open(tile) as image:
            pixels = np.asarray(image.resize((80, 80)))
        top, left = random.integers(0, 80 - SIDE, 2)
        cut.append(pixels[top : top + SIDE, left : left + SIDE])
        labels.append(names.index(tile.parent.name))
    return np.stack(cut), labels


def write_package(file: Path, photographs: Path, train: int, test: int) -> None:
    """Write a package of the same layout, with so many pictures to train and to test on."""
    assert train % BATCHES == 0
    shown, labels = pictures(photographs, train)
    asked, truth = pictures(photographs, test)
    # The six photographs are the first six classes; the others have no picture.
    assert max(labels) < len(CLASSES)
    held = {
        f"data_batch_{1 + i}.png": _png(part) for i, part in enumerate(np.split(shown, BATCHES))
    } | {
        "test_batch.png": _png(asked),
        "train_lables.json": json.dumps(labels).encode(),
        "test_lables.json": json.dumps(truth).encode(),
    }
    with tarfile.open(file, "w:gz") as archive:
        for name, data in held.items():
            about = tarfile.TarInfo(f"package/{name}")
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))


def prepare_like(folder: Path, photographs: Path, train: int, test: int) -> Cifar:
    """Prepare so many pictures as the experiment does, whatever their package hashes to."""
    package = folder / FILE
    package.parent.mkdir(parents=True)
    write_package(package, photographs, train, test)
    digest = hashlib.sha512(package.read_bytes()).digest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHA512", base64.b64encode(digest).decode())
        return cifar(folder)


def _png(rows: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(rows.reshape(len(rows), -1, 3)).save(data, "PNG")
    return data.getvalue()
