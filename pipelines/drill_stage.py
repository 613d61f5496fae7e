"""What a drill plays on: a cluster of real nodes, with storage and MLflow that it may take away.

On a machine of its own it starts all of these; on a cluster that stands (RAY_ADDRESS) it takes
what is there, and leaves alone what it could not bring back.
"""

import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from droppos.errors import ConfigError
from pipelines.cluster import join_standing, standing_address
from pipelines.crew import send_signal
from pipelines.local_mlflow import LocalMlflow
from pipelines.local_s3 import LocalS3
from pipelines.recipe import Recipe

NODES = 3
"""Nodes of a local cluster that train and decode, each with CPUs for both workers."""
STORE_BYTES = 100 * 2**20
"""Object store of each."""
NOTICE_S = 30
"""Seconds between a spot notice and the node's end: the shortest that clouds give."""
HEALTH_MS = 1000
"""Milliseconds between two looks of a local cluster at its nodes."""


Worker = tuple[str, int]
"""Node and process of a worker."""


class Outage:
    """Something that is away for some seconds, and then comes back by itself."""

    def __init__(self, stop: Callable[[], None], start: Callable[[], None], seconds: float) -> None:
        """Take it away at once."""
        self._start = start
        self.over = threading.Event()
        """Set when it is back."""
        stop()
        self._timer = threading.Timer(seconds, self._bring_back)
        self._timer.daemon = True
        self._timer.start()

    def _bring_back(self) -> None:
        self._start()
        self.over.set()


class Stage:
    """The cluster as this process sees it, joined; storage and tracking are in `recipe`."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        """The run, with storage and tracking of this stage."""
        self.storage: LocalS3 | None = None
        """Storage that may be taken away; None if it is not ours."""
        self.tracking: LocalMlflow | None = None
        """MLflow that may be taken away; None if it is not ours."""
        self._exits = ExitStack()

    @property
    def brings_nodes(self) -> bool:
        """Whether `add_node` does; on a standing cluster its autoscaler must."""
        return False

    @property
    def has_nodes_to_spare(self) -> bool:
        """Whether there are nodes that may be lost."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return bool(alive - kept_nodes())

    def add_node(self) -> None:
        """Start one more node; returns at once."""
        raise NotImplementedError

    def signal(self, workers: list[Worker], number: int) -> None:
        """Send a signal to workers on their nodes."""
        send_signal(workers, number)

    def kill_node(self, node: str) -> None:
        """Kill a node's raylet by a task on it: with its parent, all of the node's work ends."""
        ray.remote(num_cpus=0)(_kill_parent).options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False), max_retries=0
        ).remote()

    def __enter__(self) -> Self:
        """Join the cluster that stands."""
        join_standing()
        self._exits.callback(ray.shutdown)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop all that was started here."""
        self._exits.close()


class LocalStage(Stage):
    """Nodes, an S3 server and an MLflow server of this machine, until the block ends."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        """Plan it; nothing runs yet.

        Args:
            recipe: The run. With run.storage on s3://, or a tracking.uri, those are taken as they
                are, and not taken away.
            folder: Where servers keep their data.
        """
        super().__init__(recipe)
        self._folder = folder

    def __enter__(self) -> Self:
        """Start everything."""
        try:
            self._start()
        except BaseException:
            self._exits.close()
            raise
        return self

    def _start(self) -> None:
        recipe = self.recipe
        if not recipe.run.storage.startswith("s3://"):
            self.storage = LocalS3(self._folder / "s3")
            self._exits.callback(self.storage.kill)
            self.storage.start()
            self._set_environment(self.storage.server.env)
            bucket = self.storage.server.bucket("drill")  # the folder is this drill's own
            recipe = replace(recipe, run=replace(recipe.run, storage=f"{bucket}/runs"))
        if recipe.tracking.uri is None:
            self.tracking = LocalMlflow(self._folder / "mlflow")
            self._exits.callback(self.tracking.kill)
            self.tracking.start()
            recipe = replace(recipe, tracking=replace(recipe.tracking, uri=self.tracking.uri))
        self.recipe = recipe
        self._start_nodes()

    def _start_nodes(self) -> None:
        from ray.cluster_utils import Cluster

        # Ray leaves a cluster's address in this folder, for every `ray.init` of the machine to
        # find. Short, for there are sockets in it.
        scratch = tempfile.mkdtemp(prefix="ray-")
        self._exits.callback(shutil.rmtree, scratch, ignore_errors=True)
        self._set_environment({"RAY_TMPDIR": scratch})
        health = {"health_check_initial_delay_ms": HEALTH_MS, "health_check_period_ms": HEALTH_MS}
        head = {
            "num_cpus": 0,
            "object_store_memory": STORE_BYTES,
            "include_dashboard": False,
            "_system_config": health,
        }
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._exits.callback(self._cluster.shutdown)
        for _ in range(NODES):
            self.add_node()
        self._cluster.wait_for_nodes()
        names = ("AWS_", "OMP_NUM_THREADS")
        ray.init(
            address=self._cluster.address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {k: v for k, v in os.environ.items() if k.startswith(names)}},
        )
        # Before its nodes end, or Ray ends this process with them.
        self._exits.callback(ray.shutdown)

    @property
    def brings_nodes(self) -> bool:
        """Yes."""
        return True

    def signal(self, workers: list[Worker], number: int) -> None:
        """Send a signal at once: all nodes are this machine."""
        for _, process in workers:
            os.kill(process, number)

    def kill_node(self, node: str) -> None:
        """Kill a node's raylet; with its parent, all of the node's work ends."""
        for each in self._cluster.worker_nodes:
            if each.node_id == node:
                os.kill(each.all_processes["raylet"][0].process.pid, signal.SIGKILL)

    def add_node(self) -> None:
        """Start one more node; returns at once."""
        run = self.recipe.run
        self._cluster.add_node(
            num_cpus=run.workers * run.cpus_per_worker,
            object_store_memory=STORE_BYTES,
            wait=False,
        )

    def _set_environment(self, values: dict[str, str]) -> None:
        """Set variables for this process and those it starts, until the block ends."""
        for name, value in values.items():
            self._exits.callback(_restore, name, os.environ.get(name))
            os.environ[name] = value


def kept_nodes() -> set[str]:
    """Name the nodes that may not be lost: the cluster's head, and this process's own."""
    head = {node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"]}
    return head | {ray.get_runtime_context().get_node_id()}


def _kill_parent() -> None:
    os.kill(os.getppid(), signal.SIGKILL)


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def stage_for(recipe: Recipe, folder: Path) -> Stage:
    """Choose where to play: the cluster of RAY_ADDRESS, or one of this machine.

    Raises:
        ConfigError: If a standing cluster is to be used without storage that its nodes share.
    """
    if not standing_address():
        return LocalStage(recipe, folder)
    if not recipe.run.storage.startswith(("s3://", "/", "file://")):
        raise ConfigError(
            f"run.storage {recipe.run.storage!r} is a folder of this process only; on the cluster "
            "of RAY_ADDRESS name one that all nodes share: --run.storage s3://BUCKET/FOLDER"
        )
    return Stage(recipe)
