"""The faults of a drill: what each does, what tells of it, and when it is recovered from."""

import signal
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from time import time

import ray

from droppos.errors import ConfigError
from pipelines import checkpoints
from pipelines.drill_stage import NOTICE_S, Outage, Stage, Worker, kept_nodes
from pipelines.notices import drain_node
from pipelines.storage import Place


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong, on purpose."""

    key: str
    """How a person asks for it."""
    name: str
    strike: Callable[[list[Worker]], threading.Event]
    """Does it, to workers in the order of their ranks; the event is set when it is over."""
    notices: frozenset[str]
    """Kinds of event that tell of it first."""
    restarts: bool = True
    """Whether workers must start again to recover."""
    back: str = ""
    """Kind of event that must come once it is over, or it is not recovered from."""
    any_size: bool = False
    """Whether it may strike while the run is smaller than it could be."""


def faults_for(
    stage: Stage, home: Place, outage_s: float, only: Collection[str] = ()
) -> list[Fault]:
    """List what can go wrong on a stage, in the order it will.

    Args:
        stage: Where the run is.
        home: Folder of the run.
        outage_s: Seconds that storage and MLflow are away.
        only: Keys of those that are wanted; all when empty.

    Raises:
        ConfigError: If a key is none of this stage's.
    """

    def signalled(key: str, name: str, number: int, *notices: str) -> Fault:
        return Fault(
            key, name, lambda crew: _done(stage.signal, crew[-1:], number), frozenset(notices)
        )

    faults = [
        signalled("kill", "worker killed (-9)", signal.SIGKILL, "lost"),
        signalled("term", "worker told to go (SIGTERM)", signal.SIGTERM, "leave"),
        signalled("hang", "worker frozen (hangs)", signal.SIGSTOP, "stall", "hang"),
        Fault(
            "damage",
            "worker and checkpoint lost",
            lambda crew: _damage(stage, home, crew),
            frozenset({"lost"}),
        ),
    ]
    if (storage := stage.storage) is not None:
        faults.append(
            Fault(
                "storage",
                f"storage away for {outage_s:g} s",
                lambda _: Outage(storage.kill, storage.start, outage_s).over,
                frozenset({"stall", "not_saved"}),
                restarts=False,
                back="checkpoint",
            )
        )
    if (tracking := stage.tracking) is not None:
        faults.append(
            Fault(
                "mlflow",
                f"MLflow away for {outage_s:g} s",
                lambda _: Outage(tracking.kill, tracking.start, outage_s).over,
                frozenset({"ledger_away"}),
                restarts=False,
                back="ledger_back",
            )
        )
    if stage.has_nodes_to_spare:
        faults += _node_faults(stage)
    keys = [fault.key for fault in faults]
    if unknown := [key for key in only if key not in keys]:
        raise ConfigError(
            f"there is no fault {unknown[0]!r} here; expected some of {', '.join(keys)} (storage "
            "and mlflow only where the drill has started them; notice, node and grow only where "
            "there are nodes that hold neither the cluster's head nor this process)"
        )
    if "grow" in only and not {"notice", "node"} <= set(only):
        raise ConfigError(
            f"the fault grow needs a run that was made smaller, got {', '.join(only)}; "
            "ask for notice, node and grow together"
        )
    return [fault for fault in faults if not only or fault.key in only]


def _node_faults(stage: Stage) -> list[Fault]:
    faults = [
        Fault(
            "notice",
            "spot notice, node goes",
            lambda crew: _preempt(stage, crew, NOTICE_S),
            frozenset({"notice"}),
        ),
        Fault(
            "node",
            "node killed (-9)",
            lambda crew: _done(stage.kill_node, _node_to_lose(crew)),
            frozenset({"lost"}),
        ),
    ]
    if stage.brings_nodes:
        faults.append(
            Fault(
                "grow",
                "node comes",
                lambda _: _done(stage.add_node),
                frozenset({"leave"}),
                any_size=True,
            )
        )
    return faults


def _done(act: Callable[..., object], *given: object) -> threading.Event:
    act(*given)
    over = threading.Event()
    over.set()
    return over


def _damage(stage: Stage, home: Place, crew: list[Worker]) -> threading.Event:
    """Kill a worker, and change one byte of the checkpoint that the next ones will ask for."""
    stage.signal(crew[-1:], signal.SIGKILL)
    saved = checkpoints.newest(home)
    assert saved is not None
    file = saved.place / max(saved.files, key=lambda name: saved.files[name].bytes)
    data = bytearray(file.read_bytes())
    data[-len(data) // 4] ^= 255
    file.write_bytes(bytes(data))
    return _done(lambda: None)


def _node_to_lose(crew: list[Worker]) -> str:
    """Choose a node that trains, and that the cluster and this process can do without."""
    kept = kept_nodes()
    return next((node for node, _ in reversed(crew) if node not in kept), "")


def _preempt(stage: Stage, crew: list[Worker], notice_s: float) -> threading.Event:
    """Tell Ray that a node will go, as a watcher of spot notices does, and let it go then."""
    if not (node := _node_to_lose(crew)):
        return _done(lambda: None)
    drain_node(ray.get_runtime_context().gcs_address, node, "drill: spot notice", time() + notice_s)
    return Outage(lambda: None, lambda: stage.kill_node(node), notice_s).over
