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

from pipelines.journal import Artifact, Ended, Journal, Names, Row, Stored, files_beside
from pipelines.secrets import redact
from pipelines.tracking import active_run

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
TRIES_OF_A_FILE = 4
"""Tries to send a file, some seconds in all, before metrics go on without it."""
PART = -2
"""End of what is a part of an entry, and not its last one: nothing is taken with it."""
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
        self.gone = False
        """Whether there is no such run any more, so that what another left is not sent."""
        self.sent = 0
        """Entries that MLflow took, or had already."""
        self.refused = 0
        """Entries that it will never take."""
        self._floor: dict[str, int] | None = None
        """Step up to which MLflow has each metric; None before it was asked."""
        self._have: dict[str, set[int]] = {}
        """Steps that MLflow has of a metric, where entries are from storage and fill gaps, too."""
        self._rows_only = False
        self._files_fail = False
        self._looked_at = float("-inf")
        self._closing = threading.Event()
        self._closing_at = float("inf")
        self._arrived = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def stopped(self) -> bool:
        """Whether nothing more is sent, whatever waits."""
        return self.superseded or self.gone

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
        while not self.stopped and time.monotonic() < self._closing_at:
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

    def _deliver(self, batch: Sequence[Stored]) -> None:
        """Send a batch, trying until it is taken or the patience ends; raises nothing."""
        pause, longest = _PAUSES_S
        tries = refusals = 0
        while time.monotonic() < self._closing_at and not self.stopped:
            tries += 1
            try:
                self._look()
                if self.stopped:
                    return
                self._send(batch)
            # Whatever a client of MLflow's, of its database or of its artifacts lets through: the
            # run goes on, and so does this thread.
            except Exception as error:
                refusals += self._is_hopeless(error)
                if batch and refusals > 1:  # once may be a run that was restored meanwhile
                    self._refused(batch, error)
                    return
                self._fails(error)
            else:
                self.failing = False
                self._taken(batch, len(batch))
                return
            if batch and isinstance(batch[0].entry, Artifact) and self._set_aside(batch, tries):
                return
            (time.sleep if self._closing.is_set() else self._closing.wait)(pause)
            pause = min(2 * pause, longest)

    def _taken(self, batch: Sequence[Stored], sent: int) -> None:
        self.sent += sent
        if batch and batch[-1].end != PART:
            self._journal.take(batch[-1].end)

    def _fails(self, error: Exception) -> None:
        if not self.failing:
            _log.warning("MLflow cannot be written now, and is tried again: %s", told(error))
        self.failing = True

    def _is_hopeless(self, error: Exception) -> bool:
        """Tell whether trying again changes nothing: MLflow is there, and the run; it says no."""
        return getattr(error, "error_code", None) in _HOPELESS and not self._is_gone()

    def _is_gone(self) -> bool:
        """Tell whether the run was deleted; it may be restored, so nothing is given up."""
        from mlflow.exceptions import MlflowException

        try:
            gone = active_run(self._client, self._run_id) is None
        except MlflowException:  # the server is away
            gone = False
        self.gone = gone and not self._living  # who lives waits for it to be restored
        return gone

    def _refused(self, batch: Sequence[Stored], error: Exception) -> None:
        """Find what it is that MLflow does not take, and send the rest."""
        if len(batch) > 1:
            middle = len(batch) // 2
            self._deliver(batch[:middle])
            self._deliver(batch[middle:])
            return
        entry, end = batch[0]
        if isinstance(entry, Row) and len(entry.values) > 1:
            # The row's place is the last value's: it is taken once, when all of it was tried.
            *before, last = (
                Row(entry.step, entry.time_ms, {name: value})
                for name, value in entry.values.items()
            )
            for row in before:
                self._deliver([Stored(row, PART)])
            self._deliver([Stored(last, end)])
            return
        what = next(iter(entry.values)) if isinstance(entry, Row) else type(entry).__name__
        _log.warning("MLflow will never take %s: %s", what, told(error))
        self.refused += 1
        self._taken(batch, 0)

    def _set_aside(self, batch: Sequence[Stored], tries: int) -> bool:
        """Keep a file apart if MLflow takes metrics, but its store of artifacts takes no file."""
        if tries < (1 if self._files_fail else TRIES_OF_A_FILE):
            return False
        entry = batch[0].entry
        assert isinstance(entry, Artifact)
        path = files_beside(self._journal.path) / entry.name
        try:
            self._client.get_run(self._run_id)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(entry.content)
        except Exception:  # MLflow itself is away, or the disk is full: the file waits in its turn
            return False
        if not self._files_fail:
            _log.warning("MLflow's store takes no files; they are kept in %s", path.parent)
        self._files_fail = True
        self.failing = False
        self._taken(batch, 0)
        return True

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
        run = self._client.get_run(self._run_id)
        self._judge(run)
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
        self.gone = run.info.lifecycle_stage != "active"
        # Of a run that this writer, or a later one, has ended, only rows are filled in.
        before = writer_of(run)
        self._rows_only = before.endswith(ENDED) and before.removesuffix(ENDED) >= self._name > ""
        if not self._rows_only:
            self._judge(run)
        return run

    def _judge(self, run: "Run") -> None:
        self.superseded = bool(self._name) and writer_of(run).removesuffix(ENDED) > self._name

    @property
    def _name(self) -> str:
        return self._journal.about.writer

    def _send(self, batch: Sequence[Stored]) -> None:
        client, run_id = self._client, self._run_id
        if not batch:
            return
        match batch[0].entry:
            case Row():
                if metrics := self._metrics(batch):
                    client.log_batch(run_id, metrics=metrics, synchronous=True)
            case _ if self._rows_only:
                pass
            case Names(params, tags):
                self._send_names(params, tags)
            case Artifact(name, content):
                send_file(client, run_id, name, content)
                self._files_fail = False
            case Ended(status, time_ms):
                self._looked_at = float("-inf")
                self._look()
                if not self.superseded:
                    client.set_terminated(run_id, status, time_ms)
                    client.set_tag(run_id, WRITER, self._name + ENDED)

    def _send_names(self, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        for some in _portions(tags):  # first: a parameter that MLflow refuses must not cost them
            sent = [RunTag(*item) for item in some]
            self._client.log_batch(self._run_id, tags=sent, synchronous=True)
        for some in _portions(params):
            sent = [Param(*item) for item in some]
            self._client.log_batch(self._run_id, params=sent, synchronous=True)

    def _metrics(self, batch: Sequence[Stored]) -> "list[Metric]":
        from mlflow.entities import Metric

        return [
            Metric(name, value, row.time_ms, row.step)
            for row in (stored.entry for stored in batch)
            if isinstance(row, Row)
            for name, value in row.values.items()
            if not self._has(name, row.step)
        ]

    def _has(self, name: str, step: int) -> bool:
        """Tell whether MLflow has a metric's value of a step, or is beyond."""
        floor = (self._floor or {}).get(name, -1)
        if step > floor or self._name:
            return step <= floor
        if name not in self._have:  # from storage: what lies before may have gaps
            found = self._client.get_metric_history(self._run_id, name)
            self._have[name] = {metric.step for metric in found}
        return step in self._have[name]


def send_file(client: "MlflowClient", run_id: str, name: str, content: bytes) -> None:
    """Log an artifact under a name, whatever file it comes from."""
    folder, _, base = name.rpartition("/")
    with TemporaryDirectory() as scratch:  # MLflow names it as it is called there
        (Path(scratch) / base).write_bytes(content)
        client.log_artifact(run_id, str(Path(scratch) / base), folder or None)


def told(error: Exception) -> str:
    """Tell an error in a line, without secrets."""
    return (redact(str(error)).strip().splitlines() or [repr(error)])[0][:500]


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
