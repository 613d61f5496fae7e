"""The faults of a drill: what each does, what tells of it, and when it is recovered from."""

import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import time

import ray
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
from ray.core.generated import autoscaler_pb2

from pipelines import checkpoints
from pipelines.crew import send_signal
from pipelines.drill_stage import Outage, Stage
from pipelines.storage import Place

Worker = tuple[str, int]
"""Node and process of a worker."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong, on purpose."""

    name: str
    strike: Callable[[list[Worker]], threading.Event]
    """Does it, to workers in the order of their ranks; the event is set when it is over."""
    notices: frozenset[str]
    """Kinds of event that tell of it first."""
    restarts: bool = True
    """Whether workers must start again to recover."""
    back: str = ""
    """Kind of event that must come once it is over, or it is not recovered from."""
    at_checkpoint: bool = False
    """Whether it strikes when a checkpoint has just been completed."""
    any_size: bool = False
    """Whether it may strike while the run is smaller than it could be."""


def faults_for(stage: Stage, home: Place, outage_s: float) -> list[Fault]:
    """List what can go wrong on a stage, in the order it will.

    Args:
        stage: Where the run is.
        home: Folder of the run.
        outage_s: Seconds that storage and MLflow are away, and between a notice and the end.
    """
    lost = frozenset({"lost"})
    faults = [
        Fault(
            "worker killed (-9)", lambda crew: _done(send_signal, crew[-1:], signal.SIGKILL), lost
        ),
        Fault(
            "worker told to go (SIGTERM)",
            lambda crew: _done(send_signal, crew[-1:], signal.SIGTERM),
            frozenset({"checkpoint", "group"}),
        ),
        Fault(
            "worker frozen (hangs)",
            lambda crew: _done(send_signal, crew[-1:], signal.SIGSTOP),
            frozenset({"stall", "hang"}),
        ),
        Fault(
            "checkpoint damaged, worker killed",
            lambda crew: _damage(home, crew),
            lost,
            at_checkpoint=True,
        ),
    ]
    if (storage := stage.storage) is not None:
        faults.append(
            Fault(
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
                f"MLflow away for {outage_s:g} s",
                lambda _: Outage(tracking.kill, tracking.start, outage_s).over,
                frozenset({"ledger_away"}),
                restarts=False,
                back="ledger_back",
            )
        )
    faults += [
        Fault(
            f"spot notice of {outage_s:g} s, node goes",
            lambda crew: _preempt(stage, crew, outage_s),
            frozenset({"notice"}),
        ),
        Fault(
            "node killed (-9)",
            lambda crew: _done(stage.kill_node, _node_to_lose(crew)),
            lost,
        ),
    ]
    if stage.brings_nodes:
        faults.append(
            Fault(
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


def _damage(home: Place, crew: list[Worker]) -> threading.Event:
    """Change one byte of the newest checkpoint, and kill a worker, so that it is asked for."""
    saved = checkpoints.newest(home)
    assert saved is not None
    file = saved.place / max(saved.files, key=lambda name: saved.files[name].bytes)
    data = bytearray(file.read_bytes())
    data[-len(data) // 4] ^= 255
    file.write_bytes(bytes(data))
    return _done(send_signal, crew[-1:], signal.SIGKILL)


def _node_to_lose(crew: list[Worker]) -> str:
    """Choose a node that trains, and is not this process's own."""
    here = ray.get_runtime_context().get_node_id()
    return next((node for node, _ in reversed(crew) if node != here), crew[-1][0])


def _preempt(stage: Stage, crew: list[Worker], notice_s: float) -> threading.Event:
    """Tell Ray that a node will go, as a watcher of spot notices does, and let it go then."""
    node = _node_to_lose(crew)
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    reasons = autoscaler_pb2.DrainNodeReason  # pyright: ignore[reportAttributeAccessIssue]
    client.drain_node(
        node,
        reasons.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "drill: spot notice",
        int((time() + notice_s) * 1000),
    )
    return Outage(lambda: None, lambda: stage.kill_node(node), notice_s).over
