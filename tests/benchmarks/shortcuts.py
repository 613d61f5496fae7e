"""How far each cue is found in photographs with and without it: the table of docs/shortcuts.md.

    PYTHONPATH=. python tests/benchmarks/shortcuts.py

The sets of the first table are those on which the threshold was chosen (the tests' as well). Those
of the second had no part in it: photographs that scikit-image brings and the demo does not use.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from droppos.config import Grid
from droppos.measure.cues import CUES, probe_cues
from pipelines.demo_pictures import HOLDOUT, TRAIN, Photograph
from tests.droppos import planted as plants

GRID = Grid(6, 6)
SIDE = 48
OTHERS = ("brick", "camera", "cell", "coins", "grass", "gravel", "microaneurysms", "moon")


def sets(tiles: NDArray[np.uint8]) -> dict[str, NDArray[np.uint8]]:
    """Plant each cue by itself."""
    return {
        "ordinary": tiles,
        "light from above": plants.planted(tiles, plants.layout),
        "letterbox": plants.planted(tiles, plants.letterbox),
        "watermark": plants.planted(tiles, plants.watermark),
        "fall-off": plants.planted(tiles, plants.fall_off),
        "fringes": plants.planted(tiles, plants.fringes),
        "JPEG blocks": plants.planted(tiles, plants.blocks),
    }


def faces() -> NDArray[np.uint8]:
    """Read a hundred faces, each in the middle of its picture."""
    (root,) = find_spec("skimage").submodule_search_locations  # pyright: ignore
    grey = (255 * np.load(Path(root) / "data/lfw_subset.npy")[:100]).astype(np.uint8)
    large = [Image.fromarray(face).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for face in grey]
    return np.stack([np.asarray(face.convert("RGB")) for face in large])


def show(title: str, rows: dict[str, NDArray[np.uint8]]) -> None:
    """Print the interval's lower end of each cue, in times chance."""
    print(f"\n| {title} | pictures |", " | ".join(CUES), "|")
    print("|---" * (2 + len(CUES)) + "|")
    for name, pictures in rows.items():
        probes = probe_cues(torch.from_numpy(pictures), GRID)
        lows = [f"{probes[cue].low:.1f}" for cue in CUES]
        print(f"| {name} | {len(pictures)} |", " | ".join(lows), "|", flush=True)


def main() -> None:
    """Print both tables."""
    photographs = plants.tiles(TRAIN + HOLDOUT, each=18, side=SIDE)
    show("chosen on", sets(photographs))
    others = tuple(Photograph(name, "skimage", f"data/{name}.png") for name in OTHERS)
    subjects = plants.centred(180, SIDE)
    rest = {"centred subjects": subjects, "faces": faces()}
    show("not chosen on", sets(plants.tiles(others, each=22, side=SIDE, seed=1)) | rest)


if __name__ == "__main__":
    main()
