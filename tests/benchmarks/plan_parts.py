"""Parts of the pipeline, each measured alone: the step, a checkpoint, decoding."""

import os
import pickle
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from time import perf_counter, process_time

import ray
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from droppos.step import MicroBatch, TrainState, train_step
from pipelines.checkpoints import Retention
from pipelines.cluster import start_private
from pipelines.kept_state import kept_state
from pipelines.memory import Footprint
from pipelines.recipe import Recipe
from pipelines.saver import Saver
from pipelines.shards import load_manifest
from pipelines.source import crop_options
from pipelines.storage import open_place
from pipelines.stream_gauge import Fit, stream_for
from pipelines.worker import create_state

WARM_UP = 3
"""Steps that are not counted."""


@dataclass(frozen=True, slots=True)
class Training:
    """A step and a checkpoint of all workers, on images that lie in memory."""

    step_s: float
    """Median, of the clock."""
    cpu_s: float
    """Of one worker's process in a step, mean."""
    blocked_s: float
    write_s: float


@dataclass(frozen=True, slots=True)
class Decoding:
    """The stream into a process that only takes it."""

    picture_s: float
    """Of the clock, by one task."""
    cpu_s: float
    """CPU seconds of all of Ray's processes for a picture."""
    others: float
    """Cores that other programs used meanwhile."""


def measure_training(recipe: Recipe, seconds: float) -> Training:
    """Train in processes of their own for a while, then save twice."""
    with tempfile.TemporaryDirectory(prefix="parts-") as folder:
        mp.spawn(_train, (recipe, folder, seconds), nprocs=recipe.run.workers)
        found = [
            pickle.loads((Path(folder) / f"{rank}").read_bytes())
            for rank in range(recipe.run.workers)
        ]
    return Training(*(fmean(each[i] for each in found) for i in range(4)))


def _train(rank: int, recipe: Recipe, folder: str, seconds: float) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(recipe.run.cpus_per_worker)
    workers = recipe.run.workers
    store = dist.FileStore(f"{folder}/store", workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=workers)
    state = create_state(recipe, steps_per_epoch=10**6)
    batches = _batches(recipe, rank)
    times: list[float] = []
    going = torch.ones(1)
    cpu = process_time()
    while going.item():
        began = perf_counter()
        train_step(state, batches)
        times.append(perf_counter() - began)
        if len(times) == WARM_UP:
            cpu, end = process_time(), perf_counter() + seconds
        if rank == 0 and len(times) > WARM_UP:
            going[0] = perf_counter() < end
        dist.broadcast(going, 0)  # so that all ranks take as many
    counted = times[WARM_UP:]
    found = (median(counted), (process_time() - cpu) / len(counted), *_save(state, folder))
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


def _batches(recipe: Recipe, rank: int) -> list[MicroBatch]:
    images = recipe.worker_batch
    shape = (images, *recipe.model.image_size, 3)
    return [
        MicroBatch(
            torch.randint(0, 256, shape, dtype=torch.uint8),
            torch.arange(images) + rank * images,
            torch.arange(images) % 2 == 0,
        )
        for _ in range(recipe.optim.accumulate)
    ]


def _save(state: TrainState, folder: str) -> tuple[float, float]:
    """Save twice, since the first one also makes what it writes with."""
    home = open_place(f"{folder}/home")
    saver = Saver(home, Retention(2), state.device, may_write=lambda: None, timeout_s=60)
    blocked = write = 0.0
    for step in (1, 2):
        began = perf_counter()
        saver.begin(step, kept_state(state), {"cursor": {"step": step}})
        blocked = perf_counter() - began
        done = saver.finish()
        assert done is not None
        write = done.seconds
    saver.close()
    return blocked, write


def measure_decoding(recipe: Recipe, seconds: float) -> Decoding:
    """Run the stream into this process, decoded by one task."""
    assert recipe.data.path is not None
    data = open_place(recipe.data.path)
    footprint = Footprint.of(recipe)
    start_private(1, footprint.total(1))
    try:
        found = stream_for(
            data,
            load_manifest(data),
            crop_options(recipe),
            decode_cpus=1,
            fit=Fit(recipe.optim.global_batch, recipe.data.window),
            warm_up=seconds / 3,
            seconds=seconds,
        )
    finally:
        ray.shutdown()
    assert found.per_core_s is not None and found.others is not None
    return Decoding(1 / found.per_s, 1 / found.per_core_s, found.others)
