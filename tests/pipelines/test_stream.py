"""The stream on a real Ray: what arrives is the schedule, whoever reads and whatever broke off.

The data is uneven on purpose: pictures of every fourth row group take a hundred times as long to
decode, so tasks finish in another order than they start.
"""

from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from droppos.config import Model
from droppos.errors import DataError, TrainingError
from droppos.pictures import crop_seed, random_crop
from pipelines import recipe as recipes
from pipelines.order import Schedule
from pipelines.shards import Manifest, Picture, ShardWriter, read_rows
from pipelines.sharing import Sharing
from pipelines.source import block_rows, crop_options, data_config, make_dataset, stream_of
from pipelines.storage import Place, open_place
from pipelines.stream import Batch, batches
from pipelines.windows import CropOptions

CROP = CropOptions(size=(16, 24), scale=(0.2, 1.0), flip=True)
ROWS = 197
GROUP = 16
GLOBAL_BATCH = 16
BAD = (5, 6, 100)

pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    # Ray's own: it sets a setting it calls deprecated whenever it makes a DataContext.
    pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning:ray.data.context"),
]


class Data(NamedTuple):
    place: Place
    manifest: Manifest


class Seen(NamedTuple):
    """One picture as a worker got it."""

    row: int
    ok: bool
    mirrored: bool
    pixels: bytes


def jpeg(row: int, side: int) -> bytes:
    noise = np.random.default_rng(row).integers(0, 256, (side, side, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


def write(place: Place, images: list[bytes]) -> Data:
    """Write four row groups a shard."""
    writer = ShardWriter(place, group_rows=GROUP)
    shards = []
    for row, image in enumerate(images, 1):
        writer.add(Picture(image, f"{row - 1:04d}.jpg", None, 32, 32))
        if row % (4 * GROUP) == 0 or row == len(images):
            shards.append(writer.close_shard())
    return Data(place, Manifest(shards=tuple(shards)))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Data:
    sides = [600 if row // GROUP % 4 == 0 else 32 for row in range(ROWS)]
    images = [jpeg(row, side) for row, side in enumerate(sides)]
    return write(open_place(str(tmp_path_factory.mktemp("uneven"))), images)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Data:
    images = [jpeg(row, 32) for row in range(ROWS)]
    for row in BAD:
        images[row] = images[row][:100]
    return write(open_place(str(tmp_path_factory.mktemp("damaged"))), images)


def schedule_of(data: Data, **changes: int) -> Schedule:
    settings = {"seed": 3, "global_batch": GLOBAL_BATCH, "window": 40, "epochs": 2} | changes
    return Schedule(manifest=data.manifest, **settings)


def consume(
    data: Data,
    *,
    workers: int = 1,
    accumulate: int = 1,
    start: int = 0,
    stop: int | None = None,
    decode_cpus: int = 2,
    windows_per_execution: int = 2000,
    window: int = 40,
    sharing: Sharing | None = None,
) -> dict[tuple[int, int], Seen]:
    """Read as Ray Train has its workers read, a thread for each; key what is seen by step, slot."""
    schedule = schedule_of(data, window=window)
    worker_batch = schedule.global_batch // (workers * accumulate)
    dataset = make_dataset(
        schedule,
        data.place,
        CROP,
        worker_batch=worker_batch,
        start_step=start,
        decode_tasks=decode_cpus,
        windows_per_execution=windows_per_execution,
        sharing=sharing,
    )
    shards = data_config().configure({"train": dataset}, workers, None, None)

    def run(rank: int) -> list[Batch]:
        return list(
            batches(
                shards[rank]["train"],
                worker_batch=worker_batch,
                start_step=start,
                stop_step=schedule.steps if stop is None else stop,
                accumulate=accumulate,
            )
        )

    seen: dict[tuple[int, int], Seen] = {}
    with ThreadPoolExecutor(workers) as pool:
        for share in pool.map(run, range(workers)):
            for batch in share:
                assert batch.images.shape == (worker_batch, *CROP.size, 3)
                each = zip(batch.images, batch.mirrored, batch.slots, batch.rows, strict=True)
                for image, mirrored, slot, row in each:
                    assert (batch.step, int(slot)) not in seen
                    seen[batch.step, int(slot)] = Seen(
                        int(row),
                        int(row) not in batch.problems,
                        bool(mirrored),
                        image.numpy().tobytes(),
                    )
    return seen


def expected(data: Data, window: int = 40) -> dict[tuple[int, int], Seen]:
    """What must arrive, computed in this process without Ray."""
    schedule = schedule_of(data, window=window)
    pictures = list(read_rows(data.place, data.manifest))
    seen: dict[tuple[int, int], Seen] = {}
    for epoch in range(schedule.epochs):
        for turn, row in enumerate(schedule.rows(epoch).tolist(), epoch * schedule.rows_per_epoch):
            crop = random_crop(
                pictures[row].image,
                size=CROP.size,
                scale=CROP.scale,
                flip=CROP.flip,
                seed=crop_seed(schedule.seed, epoch, pictures[row].key),
            )
            seen[divmod(turn, schedule.global_batch)] = Seen(
                row, True, crop.mirrored, crop.pixels.tobytes()
            )
    return seen


def after(seen: dict[tuple[int, int], Seen], step: int) -> dict[tuple[int, int], Seen]:
    return {place: each for place, each in seen.items() if place[0] >= step}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "accumulate", "decode_cpus", "window"),
    [(1, 1, 2, 40), (4, 1, 1, 8), (2, 2, 2, 40), (2, 1, 2, 4)],
)
def test_global_batches_are_those_of_the_schedule_whoever_reads(
    uneven: Data, workers: int, accumulate: int, decode_cpus: int, window: int
) -> None:
    """Windows of whole global batches, and of a half and a quarter of one."""
    seen = consume(
        uneven, workers=workers, accumulate=accumulate, decode_cpus=decode_cpus, window=window
    )
    assert seen == expected(uneven, window)
    for epoch in range(2):
        rows = {each.row for (step, _), each in seen.items() if step // 12 == epoch}
        assert len(rows) == uneven.manifest.rows - uneven.manifest.rows % GLOBAL_BATCH


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "start"), [(2, 17), (4, 23)])
def test_a_resumed_run_sees_exactly_the_rest(uneven: Data, workers: int, start: int) -> None:
    assert consume(uneven, workers=workers, start=start) == after(expected(uneven), start)


@pytest.mark.slow
def test_an_epoch_may_be_an_execution_of_its_own(uneven: Data) -> None:
    seen = consume(uneven, workers=2, start=7, windows_per_execution=1)
    assert seen == after(expected(uneven), 7)


@pytest.mark.slow
def test_a_run_may_stop_early(uneven: Data) -> None:
    seen = consume(uneven, start=1, stop=3)
    assert {step for step, _ in seen} == {1, 2}


@pytest.mark.slow
def test_trials_side_by_side_have_each_window_decoded_once(uneven: Data) -> None:
    """Three of them, one of which goes on from a checkpoint."""
    starts = {"first": 0, "second": 0, "resumed": 8}
    sharing = Sharing.start(capacity=6, patience_s=60)
    schedule = schedule_of(uneven)
    stream = stream_of(schedule, uneven.place, CROP, GLOBAL_BATCH)
    trials = {name: sharing.of(name) for name in starts}
    for name, start in starts.items():
        trials[name].join(stream, start * GLOBAL_BATCH)

    def trial(name: str) -> dict[tuple[int, int], Seen]:
        return consume(uneven, start=starts[name], sharing=trials[name])

    with ThreadPoolExecutor() as pool:
        seen = dict(zip(starts, pool.map(trial, starts), strict=True))
    whole = expected(uneven)
    assert seen == {name: after(whole, start) for name, start in starts.items()}
    windows = [window.first + window.size for e in range(2) for window in schedule.windows(e)]
    rest = sum(end > 8 * GLOBAL_BATCH for end in windows)
    assert sharing.shared.taken == 2 * len(windows) + rest
    # The resumed one begins alone, and meets nobody; the others are one pack.
    assert sharing.shared.decoded == len(windows) + rest


@pytest.mark.slow
def test_a_picture_that_cannot_be_decoded_is_replaced_and_flagged(damaged: Data) -> None:
    whole = consume(damaged)
    assert {each.row for each in whole.values() if not each.ok} <= set(BAD)
    assert sum(not each.ok for each in whole.values()) >= len(BAD)
    good = {(step // 12, each.pixels) for (step, _), each in whole.items() if each.ok}
    for (step, _), each in whole.items():
        assert (step // 12, each.pixels) in good
    assert consume(damaged, workers=4, start=10) == after(whole, 10)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_a_window_without_a_good_picture_names_some(tmp_path: Path, shared: bool) -> None:
    hopeless = write(open_place(str(tmp_path)), [b"not a picture"] * 64)
    sharing = Sharing.start(capacity=6, patience_s=60).of("a") if shared else None
    with pytest.raises(DataError, match=r"^none of the 48 pictures .*\.jpg: .*prepare"):
        consume(hopeless, sharing=sharing)


@pytest.mark.slow
def test_a_loop_that_starts_elsewhere_than_its_data_is_told(uneven: Data) -> None:
    dataset = make_dataset(
        schedule_of(uneven), uneven.place, CROP, worker_batch=GLOBAL_BATCH, start_step=2
    )
    (shard,) = data_config().configure({"train": dataset}, 1, None, None)
    with pytest.raises(TrainingError, match=r"expected 16 pictures of step 1, .* of steps 2 to 2"):
        next(batches(shard["train"], worker_batch=GLOBAL_BATCH, start_step=1, stop_step=9))


@pytest.mark.slow
def test_a_loop_longer_than_its_data_is_told(uneven: Data) -> None:
    with pytest.raises(TrainingError, match="ended before step 24"):
        consume(uneven, start=23, stop=25)


def test_every_field_of_a_recipe_that_tells_of_crops_acts() -> None:
    data = recipes.Data(crop_scale=(0.4, 0.9), flip=False, scaled_decoding=True)
    recipe = recipes.Recipe(model=Model(image_size=(32, 48), patch_size=16), data=data)
    assert crop_options(recipe) == CropOptions(
        size=(32, 48), scale=(0.4, 0.9), flip=False, scaled_decoding=True
    )


def test_a_start_beyond_the_end_is_refused(uneven: Data) -> None:
    with pytest.raises(TrainingError, match="cannot start at step 25: the run has 24 steps"):
        make_dataset(schedule_of(uneven), uneven.place, CROP, worker_batch=4, start_step=25)


@pytest.mark.parametrize(
    ("worker_batch", "window", "rows"),
    [
        (1, 1024, 1),
        (7, 1036, 7),
        (256, 1024, 256),
        (512, 1024, 256),
        (1000, 1000, 250),
        (1000, 500, 250),
        (127, 1016, 127),
        (134, 1072, 134),
        (521, 1042, 521),
        (4096, 1024, 256),
    ],
)
def test_blocks_divide_micro_batch_and_window(worker_batch: int, window: int, rows: int) -> None:
    assert block_rows(worker_batch, window) == rows
