"""What tests of several folders share: photographs, a real S3 server and a real PostgreSQL."""

import os

# Read by torch once. Workers of pytest-xdist share the CPUs, and must not each spin on all.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Iterator
from pathlib import Path

import pytest
import skimage
from hypothesis import settings
from PIL import Image

# jaxtyping, told to check with tests.typechecker.check, imports only `tests` by itself.
import tests.typechecker  # noqa: F401
from pipelines.local_s3 import S3Server, s3_server
from tests import postgres as local_postgres

# How long an example takes is a matter of the machine, and of what else it does.
settings.register_profile("droppos", deadline=None)
settings.load_profile("droppos")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Take what is long, or shares, for slow too: `-m "not slow"` is all that takes seconds."""
    for item in items:
        if item.get_closest_marker("long") or item.get_closest_marker("shares"):
            item.add_marker("slow")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """Count the processes of `-n auto`: more than a few CPUs, for many tests wait for a server."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # xdist's own hook reads it
    return min(8, 3 * (os.cpu_count() or 1) // 2)


PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "galaxies": "hubble_deep_field.jpg",
    "motorcycle": "motorcycle_left.png",
    "rocket": "rocket.jpg",
}
"""Colour photographs that are in skimage's wheel, by what they show."""

TILE = 160
"""Side of a tile, in pixels."""
TILES = 12
"""Tiles of each photograph, and thus pictures of each class."""


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 72 JPEG tiles in six classes, cut from the photographs in skimage's wheel."""
    folder = tmp_path_factory.mktemp("photographs")
    # By path: skimage.data's functions may fetch what the wheel doesn't hold.
    source = Path(skimage.__file__).parent / "data"
    for name, file in PHOTOGRAPHS.items():
        _cut(source / file, folder / name)
    return folder


def _cut(photograph: Path, folder: Path) -> None:
    folder.mkdir()
    with Image.open(photograph) as file:
        image = file.convert("RGB")
    columns, rows = TILES // 3, 3
    for i in range(TILES):
        left = (image.width - TILE) * (i % columns) // (columns - 1)
        top = (image.height - TILE) * (i // columns) // (rows - 1)
        tile = image.crop((left, top, left + TILE, top + TILE))
        tile.save(folder / f"{i:02d}.jpg", quality=90)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server, started when the first test asks for it."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_env(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with the standard variables set to reach it for the length of a test."""
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    return s3


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """Address of an empty database."""
    if not local_postgres.found():
        pytest.skip("needs PostgreSQL's initdb, its user, and root")
    with local_postgres.postgres_server() as port:
        yield f"postgresql+psycopg2://{local_postgres.USER}@127.0.0.1:{port}/postgres"
