"""The outbox: what is on its way to MLflow, so that nobody has to wait for it.

One thread sends the entries of a journal in their order. When the server is away it tries again,
slower each time, for as long as the run lasts; what is left then stays in the journal. Sending an
entry twice does no harm: MLflow keeps one of two equal values of a metric. And a metric's steps
only grow, so what MLflow has is the beginning of what was logged: at its start the outbox asks how
far that is, and leaves out what is not beyond.

One process writes a run. Their names grow (`pipelines.journal.next_writer`); the newest one puts
its into the run's tag `droppos.writer`, an older one finds it there and sends no more.
"""

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pipelines.journal import Artifact, Ended, Journal, Names, Row, Stored
from pipelines.secrets import redact

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from mlflow.tracking import MlflowClient

WRITER = "droppos.writer"
"""Tag that names the process that writes the run."""
ENDED = " ended"
"""What is added to its value once that process has ended the run."""

METRICS_PER_BATCH = 1000
NAMES_PER_BATCH = 100
"""MLflow's limits for one request (mlflow.utils.validation)."""

LOOK_S = 5.0
"""Seconds between two looks at who writes the run."""
SETTLE_S = 2 * LOOK_S
"""Seconds until what another writer had under way has arrived, or it has seen that it is none."""
_LINGER_S = 0.5
"""A batch waits so long for company: hundreds of small requests would slow a server down."""
_PAUSES_S = (0.25, 5.0)
"""First and longest pause between two tries."""
_HOPELESS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"}
"""Answers that trying again does not change."""

_log = logging.getLogger(__name__)


class Outbox:
    """Sends a journal to MLflow."""

    def __init__(self, client: "MlflowClient", journal: Journal, *, living: bool = True) -> None:
        """Take a journal; nothing is sent yet.

        Args:
            client: Reaches the server.
            journal: What to send.
            living: Whether this process writes the run. Otherwise what another left is sent, if
                none has written the run since: a later one has gone over the same steps.
        """
        self._client = client
        self._journal = journal
        self._living = living
        self._run_id = journal.about.run_id
        self.failing = False
        """Whether the newest try to send something failed in a way that may pass."""
        self.superseded = False
        """Whether another process writes the run now, so that nothing more is sent."""
        self.sent = 0
        """Entries that MLflow took, or had already."""
        self.refused = 0
        """Entries that it will never take."""
        self._floor: dict[str, int] | None = None
        """Step up to which MLflow has each metric; None before it was asked."""
        self._looked_at = float("-inf")
        self._closing = threading.Event()
        self._closing_at = float("inf")
        self._arrived = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Send from a thread of its own, from now on."""
        # A daemon: a request that hangs must not keep a process alive that is done.
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """Learn that the journal has a new entry; returns at once."""
        self._arrived.set()

    def close(self, patience_s: float) -> None:
        """Send what is left, for at most the patience."""
        self._closing_at = time.monotonic() + patience_s
        self._closing.set()
        self._arrived.set()
        if self._thread is None:
            self._run()
        else:
            # A request under way when the patience ends may take its own time limit.
            self._thread.join(patience_s + 30)

    def _run(self) -> None:
        for batch in self._batches():
            self._deliver(batch)

    def _batches(self) -> Iterator[list[Stored]]:
        """Cut the journal into requests: rows that follow each other, or one other entry.

        The first is empty: an older writer is to learn soon that it is none any more.
        """
        yield []
        while not self.superseded and time.monotonic() < self._closing_at:
            self._arrived.clear()
            found = self._journal.pending(1)
            if not found:
                if self._closing.is_set():
                    return
                self._arrived.wait()
                continue
            if isinstance(found[0].entry, Row):
                self._closing.wait(_LINGER_S)
                found = _portion(self._journal.pending(METRICS_PER_BATCH))
            yield found

    def _deliver(self, batch: list[Stored]) -> None:
        """Send a batch, trying until it is taken or the patience ends; raises nothing."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        pause, longest = _PAUSES_S
        while time.monotonic() < self._closing_at:
            try:
                self._look()
                if self.superseded:
                    return
                if batch:
                    self._send(batch)
                    self._journal.take(batch[-1].end)
                self.failing = False
                self.sent += len(batch)
                return
            # MLflow lets boto's own errors through when its artifacts are on S3.
            except (
                *(MlflowException, OSError, SQLAlchemyError),
                *(Boto3Error, BotoCoreError, ClientError),
            ) as error:
                if batch and getattr(error, "error_code", None) in _HOPELESS:
                    kind = type(batch[0].entry).__name__
                    _log.warning("MLflow cannot take a %s: %s", kind, redact(str(error)))
                    self.refused += len(batch)
                    self._journal.take(batch[-1].end)
                    return
                self.failing = True
            (time.sleep if self._closing.is_set() else self._closing.wait)(pause)
            pause = min(2 * pause, longest)

    def _look(self) -> None:
        """Find out how far MLflow is, and now and then, whether another writes the run now.

        Raises:
            MlflowException: If the server is away.
        """
        if self._floor is None:
            self._floor = last_steps(self._claim() if self._living else self._inherit())
        elif self._living and time.monotonic() > self._looked_at + LOOK_S:
            self._judge(self._client.get_run(self._run_id))
        else:
            return
        self._looked_at = time.monotonic()

    def _claim(self) -> "Run":
        run = self._inherit()
        before = writer_of(run)
        if self.superseded or before == self._name:
            return run
        self._client.set_tag(self._run_id, WRITER, self._name)
        if before and not before.endswith(ENDED):
            # It was killed, or writes still and is about to learn that it should not.
            self._closing.wait(SETTLE_S)
            run = self._client.get_run(self._run_id)
        return run

    def _inherit(self) -> "Run":
        run = self._client.get_run(self._run_id)
        self._judge(run)
        return run

    def _judge(self, run: "Run") -> None:
        self.superseded = bool(self._name) and writer_of(run).removesuffix(ENDED) > self._name

    @property
    def _name(self) -> str:
        return self._journal.about.writer

    def _send(self, batch: Sequence[Stored]) -> None:
        client, run_id = self._client, self._run_id
        match batch[0].entry:
            case Row():
                if metrics := self._metrics(batch):
                    client.log_batch(run_id, metrics=metrics, synchronous=True)
            case Names(params, tags):
                self._send_names(params, tags)
            case Artifact(name, content):
                folder, _, base = name.rpartition("/")
                with TemporaryDirectory() as scratch:  # MLflow names it as it is called there
                    (Path(scratch) / base).write_bytes(content)
                    client.log_artifact(run_id, str(Path(scratch) / base), folder or None)
            case Ended(status, time_ms):
                self._looked_at = float("-inf")
                self._look()
                if not self.superseded:
                    client.set_terminated(run_id, status, time_ms)
                    client.set_tag(run_id, WRITER, self._name + ENDED)

    def _send_names(self, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        for some in _portions(params):
            sent = [Param(*item) for item in some]
            self._client.log_batch(self._run_id, params=sent, synchronous=True)
        for some in _portions(tags):
            sent = [RunTag(*item) for item in some]
            self._client.log_batch(self._run_id, tags=sent, synchronous=True)

    def _metrics(self, batch: Sequence[Stored]) -> "list[Metric]":
        from mlflow.entities import Metric

        floor = self._floor or {}
        return [
            Metric(name, value, row.time_ms, row.step)
            for row in (stored.entry for stored in batch)
            if isinstance(row, Row)
            for name, value in row.values.items()
            if row.step > floor.get(name, -1)
        ]


def writer_of(run: "Run") -> str:
    """Name the process that writes a run, or has ended it; empty if none ever did."""
    return run.data.tags.get(WRITER, "")


def last_steps(run: "Run") -> dict[str, int]:
    """Tell the highest step of each metric of a run."""
    # Only the protocol form of a run has the steps of its newest values; the histories have them
    # too, at a request for every 25,000 values.
    return {metric.key: metric.step for metric in run.data.to_proto().metrics}


def _portion(found: Sequence[Stored]) -> list[Stored]:
    """Take the rows at the beginning, as many as one request may hold."""
    portion: list[Stored] = []
    metrics = 0
    for stored in found:
        if not isinstance(stored.entry, Row):
            break
        metrics += len(stored.entry.values)
        if portion and metrics > METRICS_PER_BATCH:
            break
        portion.append(stored)
    return portion


def _portions(names: Mapping[str, str]) -> Iterator[list[tuple[str, str]]]:
    items = list(names.items())
    for start in range(0, len(items), NAMES_PER_BATCH):
        yield items[start : start + NAMES_PER_BATCH]
