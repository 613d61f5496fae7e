"""A machine's own notice that it will be taken back, passed on to Ray.

A spot machine of EC2 learns from its metadata service that it will be interrupted, two minutes
before, and now and then earlier that this has become likely (a rebalance recommendation). Nothing
in Ray asks for either. So a watcher on each machine does, and has Ray drain the node: nothing new
is put there, and a run saves and leaves (:mod:`pipelines.crew`).
"""

import fcntl
import json
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from http.client import HTTPException
from pathlib import Path
from tempfile import gettempdir
from time import monotonic, sleep
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from droppos.errors import ConfigError, DropposError

METADATA = "http://169.254.169.254"
"""Where EC2 serves a machine's metadata, to that machine alone."""
POLL_S = 2.0
"""Seconds between two looks. Amazon advises five; of two minutes each second is worth having."""
PATIENCE_S = 5.0
"""Seconds to wait for an answer from a service on this very machine."""
NEARBY = build_opener(ProxyHandler({}))
"""Opens what this very machine serves: no proxy can, and it would be told tokens."""
TOKEN_S = 6 * 3600
"""Seconds that a metadata token is asked for; the most there is."""

_log = logging.getLogger(__name__)


class Kind(IntEnum):
    """What a notice says; of two, the larger counts."""

    REBALANCE = 1
    """An interruption has become likely. It may come soon, late or never."""
    INTERRUPTION = 2
    """The machine will be taken back."""


@dataclass(frozen=True, slots=True)
class Notice:
    """What a machine was told of its end."""

    kind: Kind
    at: float | None
    """When it ends, in seconds since 1970; None if it is not said."""

    def __str__(self) -> str:
        """Tell it as Ray keeps it: why a node is drained."""
        return f"EC2 {self.kind.name.lower()} notice"


class Metadata:
    """EC2's instance metadata service, version 2: each question carries a token it gave out."""

    def __init__(self, base: str | None = None, clock: Callable[[], float] = monotonic) -> None:
        """Ask nothing yet.

        Args:
            base: Its address; by default AWS_EC2_METADATA_SERVICE_ENDPOINT, as for Amazon's own
                tools, else the one that every EC2 machine has.
            clock: Seconds that pass.
        """
        named = base or os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or METADATA
        self._base = named.rstrip("/")
        self._clock = clock
        self._token, self._until = "", 0.0

    def get(self, path: str) -> str | None:
        """Read a value; None where there is none.

        Raises:
            OSError: If the service does not answer, or with an error.
        """
        if self._clock() >= self._until:
            lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)}
            self._token = self._ask("api/token", "PUT", lifetime)
            self._until = self._clock() + TOKEN_S / 2
        try:
            return self._ask(f"meta-data/{path}", "GET", {"X-aws-ec2-metadata-token": self._token})
        except HTTPError as error:
            if error.code == 404:
                return None
            self._until = 0.0  # whatever it minds, the next question has a new token
            raise

    def _ask(self, path: str, method: str, headers: dict[str, str]) -> str:
        request = Request(f"{self._base}/latest/{path}", method=method, headers=headers)
        try:
            with NEARBY.open(request, timeout=PATIENCE_S) as answer:
                return answer.read().decode()
        except HTTPException as error:  # no OSError of Python's, but as far from an answer
            raise OSError(str(error)) from error


def read_notice(metadata: Metadata) -> Notice | None:
    """Look whether this machine is to go.

    Raises:
        OSError: If the metadata service does not answer.
        ValueError: If what it says is not understood.
    """
    # Only spot machines have these; the rebalance stays when an interruption follows it.
    if said := metadata.get("spot/instance-action"):
        return Notice(Kind.INTERRUPTION, _time(said, "time"))
    if metadata.get("events/recommendations/rebalance"):
        return Notice(Kind.REBALANCE, None)
    return None


def _time(said: str, name: str) -> float:
    try:
        return datetime.fromisoformat(json.loads(said)[name]).timestamp()
    except (TypeError, KeyError) as error:
        raise ValueError(f"no {name} in {said!r}") from error


def check_head(address: str) -> None:
    """See that a head's address can be one, and tell early if nothing answers there.

    A head that is not reached just now may be one that is starting, so the watch goes on.

    Args:
        address: host:port.

    Raises:
        ConfigError: If it is of another form.
    """
    host, _, port = address.rpartition(":")
    if not re.fullmatch(r"[\w.-]+|\[[\da-fA-F:.]+\]", host) or not (
        re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 2**16
    ):
        raise ConfigError(
            f"the head's address must be host:port, got {address!r}; on a machine of Ray's cluster "
            "launcher it is $RAY_HEAD_IP:6379"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE_S).close()
    except OSError as error:
        _log.warning(
            "no head answers at %s (%s); a notice is passed on only if one does",
            address,
            error,
        )


def drain_node(address: str, node: str, why: str, at: float | None) -> bool:
    """Have Ray put nothing new on a node that will go, and tell those that are there.

    Args:
        address: Of the head: host:port.
        node: Identifier of the node.
        why: What people read.
        at: When it goes, in seconds since 1970; None if it is not known. Draining it once more
            with a time sets that.

    Returns:
        Whether Ray took it.
    """
    # Imported here: what watches for days should not hold Ray's memory on each machine.
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
    from ray.core.generated import autoscaler_pb2

    reasons = autoscaler_pb2.DrainNodeReason  # pyright: ignore[reportAttributeAccessIssue]
    taken, refusal = GcsClient(address=address).drain_node(
        node,
        reasons.Value("DRAIN_NODE_REASON_PREEMPTION"),
        why,
        0 if at is None else int(at * 1000),
    )
    if not taken:
        _log.warning("Ray does not drain node %s: %s", node, refusal)
    return taken


def own_node(address: str) -> str:
    """Find the identifier of the Ray node on this machine.

    Args:
        address: Of the head: host:port.

    Raises:
        DropposError: If there is none that is alive, or several.
    """
    from ray._private.services import (
        node_ip_address_from_perspective,  # pyright: ignore[reportAttributeAccessIssue]
    )
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
    from ray.core.generated import gcs_pb2

    here = node_ip_address_from_perspective(address)
    alive = gcs_pb2.GcsNodeInfo.ALIVE  # pyright: ignore[reportAttributeAccessIssue]
    nodes = GcsClient(address=address).get_all_node_info()
    found = [
        node.hex()
        for node, info in nodes.items()
        if info.state == alive and info.node_manager_address == here
    ]
    if len(found) != 1:
        raise DropposError(
            f"{len(found)} live Ray nodes at {here} of the cluster at {address}, one was expected; "
            "is Ray started on this machine?"
        )
    return found[0]


def watch(
    address: str,
    metadata: Metadata | None = None,
    *,
    drain: Callable[[str, Notice], bool] | None = None,
    wait: Callable[[float], None] = sleep,
) -> None:
    """Watch this machine's metadata until it is to be interrupted, and have its node drained.

    A metadata service or a head that does not answer is asked again; each trouble is told once.

    Args:
        address: Of the head: host:port.
        metadata: Where to look; this machine's by default.
        drain: Passes a notice on, and tells whether it was taken; to Ray by default.
        wait: Lets so many seconds pass.
    """
    metadata, drain = metadata or Metadata(), drain or _drain_this_machine
    passed_on, trouble = 0, ""
    while passed_on < Kind.INTERRUPTION:
        try:
            notice = read_notice(metadata)
            if notice is not None and notice.kind > passed_on and drain(address, notice):
                passed_on = notice.kind
                _log.warning("%s, at %s: the node is drained", notice, notice.at)
            trouble = ""
        except Exception as error:  # whatever it is, the notice is still to come
            if trouble != str(error):
                trouble = str(error)
                _log.warning("not heard or not passed on, trying again: %s", trouble)
        if passed_on < Kind.INTERRUPTION:
            wait(POLL_S)


def _drain_this_machine(address: str, notice: Notice) -> bool:
    return drain_node(address, own_node(address), str(notice), notice.at)


@contextmanager
def only_one(what: str, folder: Path | None = None) -> Iterator[None]:
    """Be the only process of this machine that does something, while the block runs.

    Args:
        what: It does, in a word or two.
        folder: Where they find each other; the machine's temporary one by default.

    Raises:
        ConfigError: If there is one.
    """
    name = (folder or Path(gettempdir())) / f"droppos-{what}.lock"
    with name.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"this machine has its {what} already: another process holds {name}; one is enough"
            ) from None
        yield
