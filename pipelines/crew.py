"""The crew: how many workers a run may have now, and when it has to change them.

Ray Train can resize a group of workers by itself, but not to what a global batch can be shared
by, and it ends the group where it stands: all since the last checkpoint would be done again. So
the driver decides (:mod:`pipelines.supervisor`), and a group leaves after a checkpoint.
"""

import logging
import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from threading import Event, Lock, Thread
from time import time
from typing import Any

import ray
import ray._private.state
from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import (
    ResourceRequestPriority,
)
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.recipe import Recipe
from pipelines.words import counted

_log = logging.getLogger(__name__)

AT_HEAD = {"node:__internal_head__": 0.001}
"""Ray's own name for the head, there as long as the cluster is: a spot machine that goes would take
along what is to outlive it."""
ASK_S, LAPSES_S = 30.0, 180.0
"""Seconds after which the autoscaler is asked again, and after which what it was asked lapses: as
long as what Ray Train asks."""
CANCEL_S = 5
"""Seconds to wait until what was asked is taken back."""
SIGNAL_S = 10
"""Seconds to wait for a node to pass a signal on."""


@dataclass(frozen=True, slots=True)
class Room:
    """What the cluster's nodes offer; those that are about to go are not counted."""

    nodes: Mapping[str, Mapping[str, float]]
    """Resources of each node that will stay, by its identifier."""
    going: Mapping[str, float]
    """When each of the other nodes goes: seconds since 1970, infinite if it is not said."""
    free: Mapping[str, float] | None = None
    """Resources that nobody holds, this run or another; None if it is not known."""

    @classmethod
    def look(cls) -> "Room":
        """Look at the cluster this process has joined."""
        # Train's controller asks here, too; there is no public way to learn of a notice.
        notices = ray._private.state.state.get_draining_nodes()
        alive = [node for node in ray.nodes() if node["Alive"]]
        return cls(
            nodes={n["NodeID"]: n["Resources"] for n in alive if n["NodeID"] not in notices},
            going={
                node: deadline / 1000 if deadline else float("inf")
                for node, deadline in notices.items()
            },
            free=ray.available_resources(),
        )

    def has_free(self, need: Mapping[str, float]) -> bool:
        """Tell whether nobody holds so much: another job may have taken the nodes that came."""
        return self.free is None or all(
            self.free.get(name, 0) >= amount for name, amount in need.items()
        )

    def workers(self, recipe: Recipe, gpu: bool) -> int:
        """Count the workers that fit, with CPUs left over to decode for them and to measure.

        Args:
            recipe: Tells the CPUs of a worker.
            gpu: Whether a worker has a GPU.
        """
        cpus, need = recipe.run.cpus_per_worker, worker_resources(recipe, gpu)
        fit = sum(
            min(int(has.get(name, 0) // amount) for name, amount in need.items())
            for has in self.nodes.values()
        )
        all_cpus = int(sum(has.get("CPU", 0) for has in self.nodes.values()))
        return max(0, min(fit, (all_cpus - 1 - recipe.aside_cpus) // cpus))


def worker_resources(recipe: Recipe, gpu: bool) -> dict[str, float]:
    """Tell what one worker reserves of its node."""
    return {"CPU": float(recipe.run.cpus_per_worker)} | ({"GPU": 1.0} if gpu else {})


def more(recipe: Recipe, gpu: bool, workers: int) -> dict[str, float]:
    """Tell what so many more workers reserve."""
    return {name: workers * each for name, each in worker_resources(recipe, gpu).items()}


class RoomWanted:
    """What a run wants of the cluster's autoscaler, if it has one, besides what its group asks for.

    A group that runs with fewer workers asks for no more by itself, and a run that waits for a
    cluster that is still empty asks for nothing at all. Ray Train asks for the workers of a group
    and Ray Data for tasks, both through one actor that adds up what all of the cluster want and
    tells the autoscaler anew every 20 s: so it is asked here, too. A request of one's own
    (`ray.autoscaler.sdk`) would be overwritten, and one for workers that run be met twice. What is
    asked for is also kept from other jobs' tasks once it is there.

    What is asked for lapses unless it is asked again, so a driver that is killed keeps no machines.
    """

    def __init__(self, recipe: Recipe, gpu: bool) -> None:
        """Ask for nothing yet.

        Args:
            recipe: The run. With a fixed size (no run.min_workers) nothing is ever asked for: its
                group asks for all its workers, and waits.
            gpu: Whether a worker has a GPU.
        """
        self._each = worker_resources(recipe, gpu)
        self._workers = recipe.run.workers
        self._name = f"droppos-{recipe.home}"
        self._bundles = list[dict[str, float]]()
        self._lock = Lock()
        self._ended = Event()
        self._warned = False
        self._asking: Thread | None = None
        if recipe.run.min_workers is None:
            self._ended.set()

    def besides(self, running: int) -> None:
        """Ask for room for all workers but those of the group that runs, or is about to.

        Args:
            running: Its workers; to be told before it starts, and after it has ended.
        """
        self._bundles = [self._each] * (self._workers - running)
        if not running:  # later Ray Data asks for its own tasks, and would go without this one
            self._bundles.append({"CPU": 1})
        self._ask()
        if self._asking is None:
            self._asking = Thread(target=self._ask_again, name="room wanted", daemon=True)
            self._asking.start()

    def close(self) -> None:
        """Take it back, before the driver leaves the cluster; afterwards it does nothing."""
        with self._lock:
            if not self._ended.is_set() and ray.is_initialized():
                with suppress(Exception):  # a cluster that fails needs no room; its error is news
                    # Waited for: what is under way when the driver leaves may never arrive.
                    ray.get(_coordinator().cancel_request.remote(self._name), timeout=CANCEL_S)
            self._ended.set()

    def _ask_again(self) -> None:
        while not self._ended.wait(ASK_S):
            self._ask()

    def _ask(self) -> None:
        with self._lock:
            if self._ended.is_set() or not ray.is_initialized():  # Ray would start a cluster here
                return
            try:
                _coordinator().request_resources.remote(
                    self._name,
                    self._bundles,
                    expire_after_s=LAPSES_S,
                    priority=ResourceRequestPriority.LOW,  # groups that run come first
                )
            except Exception as error:
                if not self._warned:
                    _log.warning("the autoscaler cannot be asked for room now: %r", error)
                self._warned = True


def _coordinator() -> Any:
    """Find the actor that adds up what is asked of the autoscaler, anew each time: it may die."""
    return get_or_create_autoscaling_coordinator()


def best_size(recipe: Recipe, fit: int) -> int | None:
    """Choose the most workers that fit and can share a global batch; None if too few fit."""
    return max((size for size in recipe.sizes if size <= fit), default=None)


@dataclass(frozen=True, slots=True)
class Advice:
    """What a group of workers should do."""

    save: frozenset[str] = frozenset()
    """Nodes whose notice asks for a checkpoint now; a notice is worth one."""
    leave: str = ""
    """Why the group should end after a checkpoint; empty to go on."""
    urgent: bool = False
    """Leave at once, not after the next checkpoint that is due."""


def advise(
    recipe: Recipe,
    *,
    gpu: bool,
    size: int,
    homes: Collection[str],
    room: Room,
    most: int | None = None,
    now: float | None = None,
) -> Advice:
    """Tell a group what to do about nodes that go, and nodes that came.

    Args:
        recipe: The run, with all its workers.
        gpu: Whether a worker has a GPU.
        size: Workers of the group.
        homes: Nodes that they are on.
        room: The cluster as it is now.
        most: Workers that are known to be the most it has room for; None if nothing is known.
        now: Seconds since 1970; the clock's when not given.
    """
    now = time() if now is None else now
    fit = room.workers(recipe, gpu)
    best = best_size(recipe, fit if most is None else min(fit, most))
    notices = {node: at for node, at in room.going.items() if node in homes}
    if notices:
        soonest = min(notices.values())
        saves = frozenset(notices)
        if best is not None:
            return Advice(
                saves,
                f"a node is about to go, and {counted(best, 'worker fits', 'workers fit')} on the "
                "others",
                True,
            )
        if soonest - now < recipe.run.notice_margin_s:
            return Advice(saves, f"a node goes in {max(0, soonest - now):.0f} s", True)
        return Advice(saves)  # nowhere to go: until shortly before, it works as well as any
    if best is not None and best > size and room.has_free(more(recipe, gpu, best - size)):
        return Advice(leave=f"there is room for {counted(best, 'worker')} now, not only {size}")
    return Advice()


def send_signal(processes: Iterable[tuple[str, int]], number: int) -> None:
    """Send a signal to processes on the nodes where they are.

    A node that does not answer is passed over; Ray finds out about it by itself.

    Args:
        processes: Node and process, as workers tell them.
        number: Of the signal.
    """
    by_node: dict[str, list[int]] = {}
    for node, process in processes:
        by_node.setdefault(node, []).append(process)
    sent = [
        ray.remote(num_cpus=0)(_send_signal)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote(found, number)
        for node, found in by_node.items()
    ]
    ray.wait(sent, num_returns=len(sent), timeout=SIGNAL_S)


def _send_signal(processes: list[int], number: int) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)
