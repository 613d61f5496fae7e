"""The ways of bringing pictures to a training process that the ingest benchmark compares.

Each runs in a process of its own (``python -m tests.benchmarks.contenders NAME FOLDER``) and says
``MARK n`` when n pictures have arrived: once after its warm-up and once at its end. All cut
random resized crops of 224 pixels, 0.2 to 1 of the area, bicubic, half of them mirrored.
"""

import os
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import count, islice
from multiprocessing import Pool
from pathlib import Path
from random import Random

import numpy as np

from pipelines.local_s3 import S3Server
from pipelines.prepare import prepare as pack

SIDE = 224
SCALE = (0.2, 1.0)
BATCH = 256
PROCESSES = 2
"""That decode, of every contender."""
STORE = 1000 * 2**20
"""Bytes of Ray's object store: for two windows of 1024 crops, and what lies ahead of training."""
WARM_UP = 2048
"""Pictures before the first mark."""
MEASURED = 8192
"""Pictures between the marks: whole rounds of two windows of 1024, since two tasks that started
together also end together, and their pictures come in bursts."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to bring pictures in."""

    says: str
    """What it is, for the table."""
    arrive: Callable[[Path], Iterator[int]]
    """Yields the size of each batch, as it is in the training process's memory."""
    measured: int = MEASURED
    """Pictures between its marks; fewer where they take long."""


def prepare(folder: Path, s3: S3Server) -> None:
    """Pack the tiles of ``folder`` for the contenders that stream shards."""
    tiles = str(folder / "tiles")
    pack(tiles, str(folder / "shards"))
    pack(tiles, f"{s3.bucket('bench')}/shards")
    pack(tiles, str(folder / "bounded"), short_side=320)


def difference_from_pillow(folder: Path) -> float:
    """Compare 200 crops with Pillow's bicubic ones: mean absolute difference, of 255."""
    from PIL import Image

    from droppos.pictures import random_box, random_crop

    differences = []
    for seed, file in enumerate(sorted((folder / "tiles").rglob("*.jpg"))[:200]):
        ours = random_crop(file.read_bytes(), (SIDE, SIDE), scale=SCALE, seed=seed).pixels
        with Image.open(file) as picture:
            box = random_box(picture.width, picture.height, SCALE, Random(seed))
            theirs = picture.crop(box).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        differences.append(np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).mean())
    return float(np.mean(differences))


def floor(folder: Path) -> Iterator[int]:
    """Read, decode and crop in loops, by our decoder: what nothing around it can beat.

    In as many processes as all others decode in, for cores that share memory slow each other.
    """
    files = sorted((folder / "tiles").rglob("*.jpg"))
    with Pool(PROCESSES) as pool:
        starts = ((files, start) for start in count(0, BATCH))
        yield from pool.imap_unordered(_crop_batch, islice(starts, 1000))


def _crop_batch(job: tuple[list[Path], int]) -> int:
    from droppos.pictures import crop_seed, random_crop

    files, start = job
    batch = np.empty((BATCH, SIDE, SIDE, 3), np.uint8)
    for i in range(BATCH):
        file = files[(start + i) % len(files)]
        seed = crop_seed(0, start + i, file.name)
        batch[i] = random_crop(file.read_bytes(), (SIDE, SIDE), scale=SCALE, seed=seed).pixels
    return len(batch)


def torchvision(folder: Path) -> Iterator[int]:
    """Use a DataLoader over an ImageFolder, as the field does."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    torch.set_num_threads(1)
    pictures = ImageFolder(str(folder / "tiles"), _transform())
    loader = DataLoader(
        pictures,
        BATCH,
        shuffle=True,
        num_workers=PROCESSES,
        persistent_workers=True,
        drop_last=True,
    )
    while True:
        for images, _ in loader:
            yield len(images)


def read_images(folder: Path) -> Iterator[int]:
    """Use Ray Data's own reader of picture files, and map the same transforms."""
    import ray.data
    from PIL import Image

    _start_ray()
    transform = _transform()

    def crop(row: dict) -> dict:
        return {"image": transform(Image.fromarray(row["image"])).numpy()}

    while True:
        pictures = ray.data.read_images(str(folder / "tiles"), mode="RGB").map(crop)
        for batch in pictures.iter_torch_batches(batch_size=BATCH, drop_last=True):
            yield len(batch["image"])


def ours(folder: Path) -> Iterator[int]:
    """Stream shards from a folder."""
    return (len(batch.images) for batch in _stream(str(folder / "shards")))


def s3(folder: Path) -> Iterator[int]:
    """Stream shards from an S3 server, over HTTP."""
    return (len(batch.images) for batch in _stream("s3://bench/shards"))


def prepared(folder: Path) -> Iterator[int]:
    """Stream copies whose short side is 320."""
    return (len(batch.images) for batch in _stream(str(folder / "bounded")))


def float32(folder: Path) -> Iterator[int]:
    """Stream shards, and mirror and normalise on the CPU, for a comparison like with like."""
    from droppos.model import normalise

    return (
        len(normalise(batch.images, batch.mirrored)) for batch in _stream(str(folder / "shards"))
    )


def _stream(uri: str) -> Iterator:
    import torch

    from pipelines.order import Schedule
    from pipelines.shards import load_manifest
    from pipelines.source import data_config, make_dataset
    from pipelines.storage import open_place
    from pipelines.stream import batches
    from pipelines.windows import CropOptions

    torch.set_num_threads(1)
    _start_ray()
    data = open_place(uri)
    schedule = Schedule(
        manifest=load_manifest(data),
        seed=0,
        global_batch=BATCH,
        window=1024,
        epochs=1000,
    )
    crop = CropOptions((SIDE, SIDE), SCALE, flip=True)
    dataset = make_dataset(schedule, data, crop, worker_batch=BATCH, decode_tasks=PROCESSES)
    (shard,) = data_config().configure({"train": dataset}, 1, None, None)
    return batches(shard["train"], worker_batch=BATCH, start_step=0, stop_step=schedule.steps)


def _transform() -> Callable:
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                SIDE, scale=SCALE, interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def _start_ray() -> None:
    import logging

    import ray
    from ray.data import DataContext

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=PROCESSES,
        object_store_memory=STORE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


CONTENDERS = {
    "read_images": Contender("Ray's read_images + map, float32", read_images, 2048),
    "torchvision": Contender("DataLoader(ImageFolder), float32", torchvision, 4096),
    "ours": Contender("our stream from a folder, uint8", ours),
    "floor": Contender("decode and crop in a loop, nothing else", floor),
    "s3": Contender("our stream from S3, uint8", s3),
    "prepared": Contender("our stream of copies with short side 320", prepared),
    "float32": Contender("our stream from a folder, float32 and normalised", float32),
}
"""In the order of a round: what is compared runs one after the other, as the machine is then."""


def main() -> None:
    """Run one contender between its two marks."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    arrived, marked, first = 0, False, 0
    arrivals = CONTENDERS[name].arrive(folder)  # kept: its processes end with it
    measured = CONTENDERS[name].measured
    for pictures in arrivals:
        arrived += pictures
        if not marked and arrived >= WARM_UP:
            marked = True
            first = arrived
            print(f"MARK {arrived}", flush=True)
        if marked and arrived >= first + measured:
            print(f"MARK {arrived}", flush=True)
            break
    sys.stdin.read()  # until the other side has added up what all processes used
    if isinstance(arrivals, Generator):
        arrivals.close()  # ends processes that would hold on to our standard output
    os._exit(0)  # Ray's end with this one


if __name__ == "__main__":
    main()
