"""The Ray cluster a job runs on: one that stands, or a private one on this machine."""

import logging
import os
import socket
from dataclasses import dataclass, replace
from typing import Any

import ray
from psutil import virtual_memory
from ray.exceptions import RayError, RayTaskError

from droppos.errors import ConfigError, DropposError
from pipelines.machines import read_cluster
from pipelines.memory import SHARE, Footprint, decode_tasks
from pipelines.recipe import Recipe
from pipelines.resources import Demand, Fit, most_cpus, solve

OBJECT_STORE_BYTES = 512 * 1024**2
"""Of a private cluster, at least; large windows and batches get more."""
MEMORY_SHARE = 0.3
"""Part of this machine's memory that a private cluster's object store may take, as Ray's own."""

CONNECT_S = 10.0
"""Seconds in which a cluster that stands has to answer."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Share:
    """CPUs of one run: training and decoding must not wait for each other's."""

    training: int
    decoding: int


def group_share(recipe: Recipe, crew: Recipe | None = None) -> Share:
    """Part the CPUs for one group of workers, on a cluster that may just have lost some.

    What is lost is waited for, so this refuses nothing.

    Args:
        recipe: Of the group.
        crew: The run with all its workers, where the group may be smaller.
    """
    training = recipe.run.workers * recipe.run.cpus_per_worker
    cluster = read_cluster()
    held = training
    if crew is not None and any(machine.count for machine in cluster.growth):
        # Machines that come back must find room to train: what decodes would take it.
        held = crew.run.workers * crew.run.cpus_per_worker
    left = most_cpus(cluster) - held - recipe.aside_cpus
    return Share(training, recipe.data.decode_cpus or max(left, 1))


def connect(recipe: Recipe, at_once: int = 1, *, shared_decoding: bool = False) -> Fit:
    """Join the cluster named by RAY_ADDRESS, or start a private one on this machine.

    A private cluster has as many logical CPUs as the run needs, even on a smaller machine: the
    processes share the cores then, and nothing waits for ever.

    Args:
        recipe: The run.
        at_once: Such runs at the same time, as a search has them.
        shared_decoding: Whether the CPUs that decode do so for all of them together.

    Raises:
        ConfigError: If the cluster cannot be reached, or the run does not fit it, at the largest it
            can grow to.
    """
    if not ray.is_initialized():
        if standing_address():
            join_standing()
        else:
            _start_private(recipe, at_once, shared_decoding)
    on_gpu = gpu_workers(recipe)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if gpus and not on_gpu and recipe.compute.device == "auto":
        _log.warning(
            "training on CPUs: %d GPUs are too few for %d workers; lower run.workers, and "
            "run.min_workers with it, to at most as many, or say compute.device cpu",
            *(gpus, min(recipe.sizes)),
        )
    demand = Demand.of(recipe, gpu=on_gpu, shared_decoding=shared_decoding)
    return solve(read_cluster(), demand, at_once)


def standing_address() -> str | None:
    """Give the address of the cluster that is to be joined, if there is one."""
    return os.environ.get("RAY_ADDRESS") or None


def join_standing() -> None:
    """Join the cluster of RAY_ADDRESS.

    Raises:
        ConfigError: If it cannot be reached.
    """
    address = standing_address() or ""
    try:
        host, _, port = address.rpartition(":")
        if port.isdigit() and "/" not in host:  # or Ray tries for minutes
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, RayError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster can be reached at RAY_ADDRESS={address} ({error}); start it, correct "
            "the address, or unset RAY_ADDRESS to work on this machine alone"
        ) from error


def _start_private(recipe: Recipe, at_once: int, shared_decoding: bool) -> None:
    held_by_run = recipe.run.workers * recipe.run.cpus_per_worker + recipe.aside_cpus
    held_cpus = at_once * held_by_run
    streams = 1 if shared_decoding else at_once
    spare = ((os.cpu_count() or 1) - held_cpus) // streams
    decoding = recipe.data.decode_cpus or max(1, spare)
    footprint = Footprint.of(recipe)
    held = streams * decoding * footprint.window + at_once * footprint.ahead
    start_private(held_cpus + streams * decoding, held, runs=at_once)


def start_private(cpus: int, held: int, runs: int = 1) -> None:
    """Start a private cluster on this machine.

    Args:
        cpus: Logical CPUs.
        held: Bytes of decoded pictures at once; the object store has room for them, as far as
            this machine's memory goes.
        runs: Runs at the same time.
    """
    # Ray warns on the terminal of four times as many processes as it would start at once. A run
    # has ten, nearly all of which wait.
    at_once = max(os.cpu_count() or 1, 3 * runs)
    # Ray keeps a little of the store to itself, so a few percent more than by the formula.
    wanted = min(1.05 * held / SHARE, MEMORY_SHARE * virtual_memory().total)
    ray.init(
        address="local",  # or it would join whatever cluster was last started on this machine
        num_cpus=cpus,
        object_store_memory=max(OBJECT_STORE_BYTES, int(wanted)),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _system_config={"worker_maximum_startup_concurrency": at_once},
    )


def result_of(refs: Any) -> Any:
    """Wait for tasks; what they raise for a person is raised as it was."""
    try:
        return ray.get(refs)
    except RayTaskError as error:
        if isinstance(error.cause, DropposError):
            raise error.cause from error
        raise


def buffer_mb_of(recipe: Recipe, at_once: int = 1) -> float | None:
    """Find the MB of decoded pictures that one of several such runs may hold in the cluster.

    Nodes that an autoscaler will add are taken to bring as much memory for each CPU as those that
    stand; None while there is none to go by, only a head that offers no CPU.
    """
    if recipe.data.buffer_mb is not None:
        return recipe.data.buffer_mb / at_once
    now = ray.cluster_resources()
    if not (cpus := now.get("CPU", 0)):
        return None
    grown = max(1.0, _most_cpus() / cpus)
    return SHARE * now.get("object_store_memory", 0) * grown / at_once / 1e6


def decode_tasks_of(recipe: Recipe, share: Share) -> int:
    """Count the windows that are decoded at once in the cluster this process has joined."""
    return decode_tasks(recipe, share.decoding, buffer_mb_of(recipe))


def _most_cpus() -> int:
    """Count the cluster's CPUs, at its largest where an autoscaler stands behind it."""
    return most_cpus(read_cluster())


def with_device(recipe: Recipe) -> Recipe:
    """Settle compute.device, once and in the driver, when the cluster is joined.

    A worker that sees a GPU it was not given must leave it alone.
    """
    device = "cuda" if gpu_workers(recipe) else "cpu"
    return replace(recipe, compute=replace(recipe.compute, device=device))


def gpu_workers(recipe: Recipe) -> bool:
    """Tell whether each training worker is to have a GPU.

    With compute.device auto it has one if the cluster shows enough of them now; a cluster that
    scales GPUs from zero shows none yet, so its recipes say cuda.
    """
    if recipe.compute.device == "auto":
        return ray.cluster_resources().get("GPU", 0) >= min(recipe.sizes)
    return recipe.compute.device == "cuda"
