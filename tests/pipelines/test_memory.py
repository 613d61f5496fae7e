"""Memory of the stream: the formula, and slow training on a real Ray that spills nothing."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppos.config import Model, Optim
from pipelines import cluster
from pipelines.memory import SHARE, Footprint, decode_tasks
from pipelines.prepare import prepare
from pipelines.recipe import Data, Recipe, Run
from tests.pipelines import slow_consumer

GB = 1000.0
"""MB of a gigabyte."""


def a_recipe(*, window: int = 1024, batch: int = 1024, workers: int = 4, **data: float) -> Recipe:
    return Recipe(
        model=Model(image_size=(224, 224)),
        optim=Optim(global_batch=batch),
        data=replace(Data(window=window), **data),
        run=Run(workers=workers),
    )


def test_a_window_of_1024_crops_of_224_pixels_has_154_mb() -> None:
    footprint = Footprint.of(a_recipe())
    assert footprint.window == 1024 * 224 * 224 * 3
    assert footprint.ahead == 4 * footprint.window
    assert footprint.total(10) == 14 * footprint.window


@given(
    window=st.integers(64, 10_000),
    batch=st.integers(1, 1024).map(lambda n: 4 * n),
    cpus=st.integers(1, 500),
    buffer_mb=st.floats(1, 1e6),
)
def test_what_is_started_fits_or_is_one(
    window: int, batch: int, cpus: int, buffer_mb: float
) -> None:
    recipe = a_recipe(window=window, batch=batch)
    tasks = decode_tasks(recipe, cpus, buffer_mb)
    footprint = Footprint.of(recipe)
    assert 1 <= tasks <= cpus
    assert tasks == 1 or footprint.total(tasks) <= buffer_mb * 1e6
    assert tasks == cpus or footprint.total(tasks + 1) > buffer_mb * 1e6


def test_fewer_tasks_than_cpus_is_said_with_the_way_out(caplog: pytest.LogCaptureFixture) -> None:
    assert decode_tasks(a_recipe(), 16, 16 * GB) == 16
    assert not caplog.records
    assert decode_tasks(a_recipe(), 16, 2 * GB) == 8
    assert "only 8 of 16 decode CPUs are used" in caplog.text
    assert "lower data.window (1024), raise data.buffer_mb" in caplog.text


def test_nodes_to_come_bring_memory_unless_the_recipe_bounds_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on cluster.yaml, whose head offers no CPU and whose other nodes come when asked for."""
    standing = {"CPU": 8.0, "object_store_memory": 4e9}
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: standing)
    monkeypatch.setattr(cluster, "_most_cpus", lambda: 64)
    assert cluster.buffer_mb_of(a_recipe()) == 8 * 2 * GB
    assert cluster.buffer_mb_of(a_recipe(), at_once=4) == 4 * GB
    assert cluster.buffer_mb_of(a_recipe(buffer_mb=500.0), at_once=4) == 125
    standing = {"object_store_memory": 4e9}
    assert cluster.buffer_mb_of(a_recipe()) is None
    assert cluster.decode_tasks_of(a_recipe(), cluster.Share(training=4, decoding=60)) == 60


def test_ray_data_would_not_take_more_of_the_stores_than_we_plan_with() -> None:
    from ray.data._internal.execution.resource_manager import ResourceManager

    assert ResourceManager.DEFAULT_OBJECT_STORE_MEMORY_LIMIT_FRACTION >= SHARE


def slow_run(folder: Path, window: int, tasks: int, rounds: int) -> dict[str, int]:
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("slow_consumer.py"))]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [*command, str(folder), str(window), str(tasks), str(rounds)],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_training_slower_than_reading_spills_nothing(tmp_path: Path, photographs: Path) -> None:
    for copy in range(20):  # 1,440 pictures
        shutil.copytree(photographs, tmp_path / "pictures" / str(copy))
    prepare(str(tmp_path / "pictures"), str(tmp_path / "data"), group_rows=20)
    store = slow_consumer.STORE
    recipe = replace(
        a_recipe(window=256, batch=slow_consumer.BATCH, workers=1),
        model=Model(image_size=(slow_consumer.SIDE, slow_consumer.SIDE)),
    )
    tasks = decode_tasks(recipe, slow_consumer.CPUS, SHARE * store / 1e6)
    assert tasks == 3
    held = slow_run(tmp_path / "data", 256, tasks, rounds=4)
    assert held["spilled"] == 0
    # What is read ahead of training fills the plan. Some blocks stand above it: those that tasks
    # have put into the store before Ray Data counts them; how many is a matter of moments.
    assert SHARE * store / 2 < held["peak"] < store
