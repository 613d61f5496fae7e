"""The executor of the stream rests while nobody waits for it. `make bench-executor` has figures."""

import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback

from pipelines.order import Schedule
from pipelines.prepare import prepare
from pipelines.shards import load_manifest
from pipelines.source import make_dataset
from pipelines.storage import open_place
from pipelines.unhurried import Unhurried
from pipelines.windows import CropOptions

CROP = CropOptions(size=(32, 32), scale=(0.2, 1.0), flip=True)
BATCH = 8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray copies its own deprecated fields
def test_the_executor_rests_while_training_is_slower_than_reading(
    photographs: Path, tmp_path: Path, ray_cluster: None
) -> None:
    prepare(str(photographs), str(tmp_path / "data"))
    data = open_place(str(tmp_path / "data"))
    schedule = Schedule(
        manifest=load_manifest(data), seed=0, global_batch=BATCH, window=24, epochs=400
    )

    rounds: list[float] = []

    class Counter(ExecutionCallback):
        """Notes each round of the executor's loop, which runs in a thread of this process here."""

        def on_execution_step(self, executor: Any) -> None:
            rounds.append(time.monotonic())

    def rounds_of(callbacks: list[type[ExecutionCallback]]) -> tuple[int, list[int]]:
        """Count the rounds in the time of twenty slow steps, and list the pictures seen."""
        dataset = make_dataset(schedule, data, CROP, worker_batch=BATCH, decode_tasks=1)
        dataset.context.custom_execution_callback_classes[:] = callbacks
        seen: list[int] = []
        stream = iter(dataset.iter_batches(batch_size=BATCH, prefetch_batches=1))
        for number in range(25):
            batch = next(stream)
            seen += batch["row"].tolist()
            if number == 5:
                rounds.clear()
            if number >= 5:
                time.sleep(0.2)
        return len(rounds), seen

    resting, seen = rounds_of([Counter, Unhurried])
    spinning, also_seen = rounds_of([Counter])
    assert seen == also_seen
    assert resting < spinning / 2


@pytest.mark.slow
def test_the_stream_has_it(photographs: Path, tmp_path: Path, ray_cluster: None) -> None:
    prepare(str(photographs), str(tmp_path / "data"))
    data = open_place(str(tmp_path / "data"))
    schedule = Schedule(
        manifest=load_manifest(data), seed=0, global_batch=BATCH, window=24, epochs=1
    )
    dataset = make_dataset(schedule, data, CROP, worker_batch=BATCH)
    assert Unhurried in dataset.context.execution_callback_classes
    assert Unhurried not in ray.data.DataContext.get_current().execution_callback_classes
