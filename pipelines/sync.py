"""Sync: what earlier processes did not get to MLflow is sent now.

From journals that nobody holds any more, on this machine; and from a run's folder, whose history
has what was measured up to its newest checkpoint, wherever its driver ran.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from droppos.errors import ConfigError, DataError
from pipelines import checkpoints, history
from pipelines.journal import About, Ended, Journal, Row, Stored, files_beside, journals
from pipelines.ledger import pointer
from pipelines.outbox import Outbox, send_file, told
from pipelines.secrets import MARK, redact
from pipelines.storage import Place, open_reachable
from pipelines.tracking import client_of, missing_database, reachable

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_log = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""Seconds to go on trying for each run."""


@dataclass(frozen=True, slots=True)
class Synced:
    """What became of one run's entries."""

    run_name: str
    run_id: str
    uri: str
    """MLflow, without secrets."""
    source: str
    """Journal, or folder of the run."""
    sent: int = 0
    """Entries that MLflow has now: it took them, or had them already."""
    refused: int = 0
    """Entries that it will never take; the log says why."""
    left: int = 0
    """Entries that still wait: it does not answer."""
    overtaken: int = 0
    """Entries of a past that a later process, which has not ended, goes over again; they stay."""
    error: str = ""
    """Why they cannot be sent."""
    living: bool = False
    """Whether a process writes the run at this moment, and sends them itself."""


def sync(where: str, patience_s: float = PATIENCE_S) -> list[Synced]:
    """Send what waits.

    Args:
        where: Folder of runs (with a folder ``spool`` in it) or of a spool, on this machine; or
            the folder of one run, on this machine or s3://.
        patience_s: Seconds to go on trying for each run.

    Returns:
        What became of each run's entries; empty if nothing waits.

    Raises:
        ConfigError: If an address was kept without its password, and MLFLOW_TRACKING_URI is
            another.
        DataError: If there is no such folder.
    """
    place = open_reachable(where)
    if known := pointer(place):
        return [_sync_home(place, known, patience_s)]
    folder = Path(place.path)
    if place.is_s3 or not folder.is_dir():
        raise DataError(
            f"{where} is neither a run's folder nor a folder of this machine; name the folder of "
            "runs whose spool holds journals (droppos-runs, say), or one run's"
        )
    return list(
        _sync_spool(folder / "spool" if (folder / "spool").is_dir() else folder, patience_s)
    )


def _sync_spool(folder: Path, patience_s: float) -> Iterator[Synced]:
    for path in journals(folder):
        try:
            journal = Journal.adopt(path)
        except DataError as error:
            yield Synced("", path.name.partition("-")[0], "", str(path), error=str(error))
            continue
        if journal is None and not path.exists():
            continue
        if journal is None:
            yield Synced("", path.name.partition("-")[0], "", str(path), living=True)
            continue
        try:
            if not _has_end(journal.pending(2**31)):  # its process was killed
                journal.append(Ended("KILLED", int(path.stat().st_mtime * 1000)))
            yield _send(journal, str(path), patience_s)
        except ConfigError as error:
            about = journal.about
            left = journal.left()
            yield Synced(
                about.run_name, about.run_id, about.uri, str(path), left=left, error=str(error)
            )
        finally:
            journal.close()


def _has_end(entries: list[Stored]) -> bool:
    return any(isinstance(stored.entry, Ended) for stored in entries)


def _sync_home(home: Place, known: dict[str, str], patience_s: float) -> Synced:
    saved = checkpoints.newest(home)
    with TemporaryDirectory() as scratch:
        about = About(known["uri"], known["run_id"], home.name, home.uri, writer="")
        journal = Journal.create(Path(scratch), about)
        for row in history.read(home, saved.step) if saved else ():
            journal.append(Row(row.step, row.time_ms, row.values))
        synced = _send(journal, home.uri, patience_s)
        journal.close()
    return synced


def _send(journal: Journal, source: str, patience_s: float) -> Synced:
    about = journal.about
    uri = real_uri(about.uri)
    if file := missing_database(uri):
        raise ConfigError(f"there is no database {file} any more; was the folder moved?")
    with reachable(uri):
        client = client_of(uri)
    outbox = Outbox(client, journal, living=False)
    outbox.close(patience_s)
    if not outbox.stopped:
        _send_files(client, journal)
    left = journal.left()
    return Synced(
        about.run_name,
        about.run_id,
        about.uri,
        source,
        sent=outbox.sent,
        refused=outbox.refused,
        left=0 if outbox.superseded else left,
        overtaken=left if outbox.superseded else 0,
        error="MLflow has no such run any more" if outbox.gone else "",
    )


def _send_files(client: "MlflowClient", journal: Journal) -> None:
    """Send the files that MLflow's store did not take before."""
    folder = files_beside(journal.path)
    try:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = file.relative_to(folder).as_posix()
            send_file(client, journal.about.run_id, name, file.read_bytes())
            file.unlink()
        shutil.rmtree(folder, ignore_errors=True)
    except Exception as error:  # whatever the store's client lets through
        _log.warning("files in %s are not taken yet: %s", folder, told(error))


def real_uri(known: str) -> str:
    """Find the address that was kept without its secrets.

    Raises:
        ConfigError: If it had some, and MLFLOW_TRACKING_URI is another address.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    if redact(given) == known:
        return given
    if redact(known) != known or MARK in known:
        raise ConfigError(
            f"MLflow's address {known} was kept without its password; set MLFLOW_TRACKING_URI to "
            "the whole address"
        )
    return known
