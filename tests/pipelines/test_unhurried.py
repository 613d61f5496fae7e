"""The executor of the stream rests while nobody waits for it. `make bench-executor` has figures."""

import statistics
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
from pipelines.unhurried import ROUND_S, Unhurried
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

    looks: list[tuple[float, int]] = []

    class Look(ExecutionCallback):
        """Notes when a round has ended, and the blocks that wait to be fetched."""

        def on_execution_step(self, executor: Any) -> None:
            looks.append((time.monotonic(), len(executor._output_node[1].output_queue)))

    def idle_rounds(callbacks: list[type[ExecutionCallback]]) -> tuple[list[float], list[int]]:
        """List the seconds of rounds that changed nothing, and the pictures."""
        dataset = make_dataset(schedule, data, CROP, worker_batch=BATCH, decode_tasks=1)
        dataset.context.custom_execution_callback_classes[:] = callbacks
        seen: list[int] = []
        looks.clear()
        stream = iter(dataset.iter_batches(batch_size=BATCH, prefetch_batches=1))
        for _ in range(12):
            seen += next(stream)["row"].tolist()
            time.sleep(4 * ROUND_S)
        threes = zip(looks, looks[1:], looks[2:], strict=False)
        return [
            after - start
            for (_, earlier), (start, before), (after, later) in threes
            if 0 < earlier == before == later
        ], seen

    # No ratio of rounds: how many a spinning loop makes, the machine's other work decides.
    resting, seen = idle_rounds([Look, Unhurried])
    spinning, also_seen = idle_rounds([Look])
    assert seen == also_seen
    assert statistics.median(resting) >= ROUND_S
    assert statistics.median(spinning) < ROUND_S


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
