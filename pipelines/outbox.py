"""The outbox: what is on its way to MLflow, so that nobody has to wait for it.

One thread sends entries in the order they were put in. When the server is away it tries
again, slower each time, until its patience ends; from then on entries go to a spool file, one
JSON object a line, and each is tried once, so that delivery goes on when the server is back.
Sending an entry twice does no harm: MLflow keeps one of two equal values of a metric.
"""

import json
import logging
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.tracking import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]
"""How a run ended, in MLflow's words. KILLED: a person stopped it."""

METRICS_PER_BATCH = 1000
NAMES_PER_BATCH = 100
"""MLflow's limits for one request (mlflow.utils.validation)."""

_LINGER_S = 0.5
"""A batch waits so long for company: hundreds of small requests would slow a server down."""
_PAUSES_S = (0.25, 5.0)
"""First and longest pause between two tries."""
_HOPELESS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED"}
"""Answers that trying again does not change."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Point:
    """One value of a metric."""

    metric: str
    value: float
    step: int
    time_ms: int


@dataclass(frozen=True, slots=True)
class Names:
    """Parameters and tags."""

    params: Mapping[str, str]
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class File:
    """An artifact: a file of this machine."""

    artifact: str
    source: Path


@dataclass(frozen=True, slots=True)
class Text:
    """An artifact: a text."""

    artifact: str
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of the run."""

    status: Status
    time_ms: int


Entry = Point | Names | File | Text | Ended


class Outbox:
    """Sends the entries of one MLflow run from a thread of its own."""

    def __init__(
        self, client: "MlflowClient", run_id: str, spool_file: Path, patience_s: float
    ) -> None:
        """Start the thread.

        Args:
            client: Reaches the server.
            run_id: MLflow run that everything belongs to.
            spool_file: Gets what could not be sent; made when needed.
            patience_s: Seconds to go on trying when the server is away, and to close.
        """
        self.spool_file = spool_file
        self.spooled = 0
        """Entries that were not delivered."""
        self._client = client
        self._run_id = run_id
        self._patience_s = patience_s
        self.failing = False
        """Whether the newest try to send something failed in a way that may pass."""
        self._away = False
        self._closing = threading.Event()
        self._closing_at = float("inf")
        self._entries: deque[Entry] = deque()
        self._arrived = threading.Event()
        # A daemon: a request that hangs must not keep a process alive that is done.
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Take an entry; returns at once."""
        self._entries.append(entry)
        self._arrived.set()

    def close(self, last: Entry) -> None:
        """Send what is left and `last`, for at most the patience, and spool the rest."""
        self._closing_at = time.monotonic() + self._patience_s
        self._entries.append(last)
        self._closing.set()
        self._arrived.set()
        # A request under way when the patience ends may take its own time limit.
        self._thread.join(self._patience_s + 30)
        while self._entries:  # the thread is gone, or hangs in a request
            self._spool([self._entries.popleft()])

    def _run(self) -> None:
        for batch in self._batches():
            self._deliver(batch)

    def _batches(self) -> Iterator[list[Entry]]:
        """Cut the queue into requests: points that follow each other, or one other entry."""
        while self._wait():
            batch = [self._entries.popleft()]
            if isinstance(batch[0], Point):
                self._closing.wait(_LINGER_S)
                while (
                    len(batch) < METRICS_PER_BATCH
                    and self._entries
                    and isinstance(self._entries[0], Point)
                ):
                    batch.append(self._entries.popleft())
            yield batch

    def _wait(self) -> bool:
        """Wait for an entry; False when there will be none."""
        while not self._entries:
            if self._closing.is_set():
                return False
            self._arrived.wait()
            self._arrived.clear()
        return True

    def _deliver(self, batch: list[Entry]) -> None:
        """Send a batch, or spool it; raises nothing."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError
        from mlflow.exceptions import MlflowException

        pause, longest = _PAUSES_S
        give_up_at = time.monotonic() + (0 if self._away else self._patience_s)
        while time.monotonic() < self._closing_at:
            try:
                self._send(batch)
                self._away = self.failing = False
                return
            # MLflow lets boto's own errors through when its artifacts are on S3.
            except (MlflowException, OSError, Boto3Error, BotoCoreError, ClientError) as error:
                code = getattr(error, "error_code", None)
                if code in _HOPELESS or isinstance(error, FileNotFoundError):
                    _log.warning("MLflow cannot take a %s: %s", type(batch[0]).__name__, error)
                    break
                self.failing = True
                if time.monotonic() + pause > min(give_up_at, self._closing_at):
                    self._away = True
                    break
            time.sleep(pause)
            pause = min(2 * pause, longest)
        self._spool(batch)

    def _send(self, batch: list[Entry]) -> None:
        client, run_id = self._client, self._run_id
        match batch[0]:
            case Point():
                client.log_batch(run_id, metrics=_metrics(batch), synchronous=True)
            case Names(params, tags):
                for some in _portions(params):
                    client.log_batch(run_id, params=_params(some), synchronous=True)
                for some in _portions(tags):
                    client.log_batch(run_id, tags=_tags(some), synchronous=True)
            case File(artifact, source):
                folder, _, name = artifact.rpartition("/")
                with TemporaryDirectory() as scratch:  # MLflow names it as it is called there
                    copy = shutil.copyfile(source, Path(scratch) / name)
                    client.log_artifact(run_id, str(copy), folder or None)
            case Text(artifact, text):
                client.log_text(run_id, text, artifact)
            case Ended(status, time_ms):
                client.set_terminated(run_id, status, time_ms)

    def _spool(self, batch: list[Entry]) -> None:
        self.spooled += len(batch)
        lines = [
            json.dumps({"kind": type(entry).__name__, **asdict(entry)}, default=str)
            for entry in batch
        ]
        try:
            self.spool_file.parent.mkdir(parents=True, exist_ok=True)
            with self.spool_file.open("a") as file:
                file.write("\n".join(lines) + "\n")
        except OSError as error:
            _log.warning("%d values are lost: %s cannot be written", len(batch), error.filename)


def _portions(names: Mapping[str, str]) -> Iterator[list[tuple[str, str]]]:
    items = list(names.items())
    for start in range(0, len(items), NAMES_PER_BATCH):
        yield items[start : start + NAMES_PER_BATCH]


def _metrics(batch: list[Entry]) -> "list[Metric]":
    from mlflow.entities import Metric

    return [Metric(p.metric, p.value, p.time_ms, p.step) for p in batch if isinstance(p, Point)]


def _params(items: list[tuple[str, str]]) -> "list[Param]":
    from mlflow.entities import Param

    return [Param(name, value) for name, value in items]


def _tags(items: list[tuple[str, str]]) -> "list[RunTag]":
    from mlflow.entities import RunTag

    return [RunTag(name, value) for name, value in items]
