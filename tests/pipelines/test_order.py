"""The order is checked as a whole: every row once, shuffled well, and nothing else decides."""

from hashlib import sha256
from time import perf_counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppos.errors import ConfigError
from pipelines.order import Position, Schedule
from pipelines.shards import Manifest, Shard

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def a_manifest(sizes: list[int]) -> Manifest:
    """Six row groups a shard, of the given sizes; no file is read here."""
    parts = [tuple(sizes[start : start + 6]) for start in range(0, len(sizes), 6)]
    return Manifest(
        shards=tuple(
            Shard(f"shard-{index}.parquet", sum(part), part, bytes=0, sha256="", content="")
            for index, part in enumerate(parts)
        )
    )


def a_schedule(rows: int = 10_000, **changes: int) -> Schedule:
    settings = {"seed": 0, "global_batch": 64, "window": 1024, "epochs": 3} | changes
    return Schedule(manifest=a_manifest([100] * (rows // 100)), **settings)


@given(sizes, st.integers(1, 64), st.integers(1, 500), st.integers(0, 2**40), st.integers(0, 900))
def test_an_epoch_is_every_row_once_minus_the_remainder(
    sizes: list[int], global_batch: int, window: int, seed: int, epoch: int
) -> None:
    manifest = a_manifest(sizes)
    global_batch = min(global_batch, manifest.rows)
    schedule = Schedule(
        manifest=manifest, seed=seed, global_batch=global_batch, window=window, epochs=1000
    )
    rows = schedule.rows(epoch)
    assert len(rows) == schedule.rows_per_epoch == manifest.rows - manifest.rows % global_batch
    assert len(np.unique(rows)) == len(rows)
    assert rows.min() >= 0
    assert rows.max() < manifest.rows


@given(sizes, st.integers(1, 64), st.integers(1, 500))
def test_windows_tile_the_run_in_step_with_its_global_batches(
    sizes: list[int], global_batch: int, window: int
) -> None:
    manifest = a_manifest(sizes)
    global_batch = min(global_batch, manifest.rows)
    schedule = Schedule(
        manifest=manifest, seed=1, global_batch=global_batch, window=window, epochs=2
    )
    windows = [window for epoch in range(2) for window in schedule.windows(epoch)]
    assert len(windows) == 2 * schedule.windows_per_epoch
    place = 0
    for each in windows:
        assert each.first == place
        assert each.size % global_batch == 0 or global_batch % each.size == 0
        place += each.size
    assert place == schedule.steps * global_batch


@pytest.mark.parametrize(
    ("global_batch", "window", "rows"),
    [
        (64, 1000, 1024),
        (1024, 1024, 1024),
        (4096, 1024, 1024),
        (5000, 1024, 1000),
        (5003, 1024, 5003),
        (4096, 1, 1),
        (1031, 30, 1031),
        (514, 10, 257),
        (64, 90_000, 9984),
    ],
)
def test_a_window_is_whole_batches_or_a_whole_fraction_of_one(
    global_batch: int, window: int, rows: int
) -> None:
    assert a_schedule(global_batch=global_batch, window=window).rows_per_window == rows


def test_a_window_touches_few_groups_beyond_its_rows() -> None:
    for window in a_schedule().windows(0):
        assert len(window.groups) <= window.size // 100 + 2


def test_each_epoch_and_each_seed_has_an_order_of_its_own() -> None:
    orders = [a_schedule(seed=seed).rows(epoch) for seed in range(2) for epoch in range(3)]
    for i, one in enumerate(orders):
        assert all(np.mean(one == other) < 0.01 for other in orders[:i])


def test_the_remainder_is_another_one_each_epoch() -> None:
    schedule = a_schedule(rows=1000, global_batch=300)
    left_out = [frozenset(range(1000)) - set(schedule.rows(epoch).tolist()) for epoch in range(3)]
    assert [len(rows) for rows in left_out] == [100] * 3
    assert len(set(left_out)) == 3


def test_the_order_stays_what_it_was() -> None:
    """A run resumed with a newer numpy or droppos must see the same order."""
    rows = a_schedule().rows(2).astype("<i8")
    assert rows[:4].tolist() == [6266, 1612, 1410, 6288]
    assert sha256(rows.tobytes()).hexdigest()[:16] == "e3ed55a4c9f1696a"


def test_place_in_the_epoch_tells_nothing_of_place_in_the_data() -> None:
    schedule = a_schedule(rows=100_000, window=4096)
    places = np.arange(schedule.rows_per_epoch)
    for epoch in range(3):
        # Row groups of 100 rows count as one draw each: 1 / sqrt(1000) is one standard error.
        assert abs(np.corrcoef(schedule.rows(epoch), places)[0, 1]) < 3 / np.sqrt(1000)


def test_neighbours_in_a_shard_are_spread_over_batches() -> None:
    schedule = a_schedule(rows=100_000, window=4096)
    batches = schedule.rows(0).reshape(-1, schedule.global_batch)
    # 64 rows of about 41 groups: all from one group would be 64, independent draws about 1.6.
    of_one_group = [np.unique(batch // 100, return_counts=True)[1].max() for batch in batches]
    assert np.mean(of_one_group) < 6
    neighbours = np.abs(np.diff(schedule.rows(0))) == 1
    assert neighbours.mean() < 0.002


def test_batches_of_class_sorted_shards_hold_many_classes() -> None:
    schedule = a_schedule(rows=100_000, window=4096)
    classes = schedule.rows(0).reshape(-1, schedule.global_batch) // 1000
    held = [len(np.unique(batch)) for batch in classes]
    # 64 draws from 100 classes hold 47.4; from the 41 groups of a window somewhat fewer.
    assert np.mean(held) > 25


def test_an_epoch_of_imagenet_is_planned_in_a_moment() -> None:
    schedule = a_schedule(rows=1_281_100, global_batch=1024, window=4096)
    start = perf_counter()
    windows = list(schedule.windows(0))
    windows[-1].rows()
    assert perf_counter() - start < 10  # a second on a quiet machine; picture by picture, minutes
    assert len(windows) == 313


def test_a_position_is_readable() -> None:
    schedule = a_schedule()
    assert schedule.steps_per_epoch == 156
    assert schedule.position(0) == Position(epoch=0, batch=0)
    assert schedule.position(157) == Position(epoch=1, batch=1)


def test_a_batch_larger_than_the_data_names_both() -> None:
    with pytest.raises(ConfigError, match=r"global_batch 256 .* 100 pictures"):
        a_schedule(rows=100, global_batch=256)


@pytest.mark.parametrize("name", ["global_batch", "window", "epochs"])
def test_numbers_that_make_no_order_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        a_schedule(**{name: 0})
