"""Who works on the cells of a study: a process for each, so many at once, until all is known.

It can be interrupted at any time, and goes on where it was: figures are in the CSV as soon as they
are known, and a pre-training under way goes on from its checkpoint.
"""

import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from droppos.errors import ConfigError, TrainingError
from pipelines.evidence.arms import Name
from pipelines.evidence.cifar import Cifar
from pipelines.evidence.results import Key, Row, known_rows, read_rows, write_rows
from pipelines.evidence.study import Planned, Study

POLL_S = 2
RESULTS = "results.csv"

_log = logging.getLogger(__name__)


@contextmanager
def only_study(folder: Path) -> Iterator[None]:
    """Be the only study of a folder: two would train the same cells.

    Raises:
        ConfigError: If there is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ConfigError(
                f"process {lock.read().strip()} works in {folder} already; wait for it, end it, or "
                "name another --folder"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def known(study: Study, folder: Path, out: Path, say: Callable[[str], None]) -> dict[Key, Row]:
    """Give what is known, after taking what cells have left in their folders into the CSV.

    Args:
        study: Whose cells are looked at; --again forgets them first.
        folder: Where cells keep their checkpoints and logs.
        out: Folder of the raw results.
        say: Told of each figure that the CSV lacked.

    Raises:
        DataError: If the CSV cannot be read.
    """
    cells = study.cells()
    if study.again:
        rows = read_rows(out / RESULTS)
        names = {cell.name for cell in cells}
        kept = [row for row in rows.values() if Name(row.arm, row.budget, row.seed) not in names]
        write_rows(out / RESULTS, kept)
        for name in names:
            shutil.rmtree(_folder(folder, name), ignore_errors=True)
    return _collect(out, folder, cells, say)


def work(
    study: Study,
    waiting: list[Planned],
    data: Cifar,
    folder: Path,
    out: Path,
    say: Callable[[str], None],
) -> None:
    """Work until all figures of some cells are known, or the study's time is over.

    A cell that fails does not keep others from being worked on.

    Args:
        study: What is compared.
        waiting: Its cells of which something is not known.
        data: Prepared data sets.
        folder: Where cells keep their checkpoints and logs.
        out: Folder of the raw results.
        say: Told of each figure.

    Raises:
        TrainingError: In the end, naming each cell that failed.
        DataError: If the CSV cannot be read.
    """
    cells, waiting = waiting, list(waiting)
    rows = _collect(out, folder, cells, say)
    at_once = study.at_once or len(os.sched_getaffinity(0))
    end = float("inf") if study.minutes is None else time.monotonic() + 60 * study.minutes
    working: dict[Planned, subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    try:
        while (waiting or working) and time.monotonic() < end:
            while waiting and len(working) < at_once:
                cell = waiting.pop(0)
                say(f"{cell.name}: {', '.join(cell.missing(rows))}")
                working[cell] = _start(cell, rows, data, folder)
            time.sleep(POLL_S)
            ended = [cell for cell, process in working.items() if process.poll() is not None]
            rows = _collect(out, folder, cells, say)
            for cell in ended:
                code = working.pop(cell).returncode
                if code or cell.missing(rows):
                    failed.append(_why(cell.name, code, folder))
                    _log.warning("%s; the others go on", failed[-1])
    finally:
        for process in working.values():
            process.send_signal(signal.SIGTERM)
        for process in working.values():
            process.wait()
    _collect(out, folder, cells, say)
    if failed:
        raise TrainingError(
            f"{'; '.join(failed)}. What was known is kept; the same command tries them again"
        )


def _start(
    cell: Planned, rows: dict[Key, Row], data: Cifar, folder: Path
) -> subprocess.Popen[bytes]:
    own = _folder(folder, cell.name)
    own.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", "pipelines.evidence.cell"]
    told = [str(cell.name), str(own), json.dumps(asdict(data)), *cell.missing(rows)]
    with (own / "log").open("wb") as log:
        return subprocess.Popen(
            [*command, *told],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # cells share no CPU
        )


def _why(name: Name, code: int, folder: Path) -> str:
    log = _folder(folder, name) / "log"
    if code == 0:
        return (
            f"cell {name} took figures of another recipe or protocol than the study's: was a file "
            "edited under it?"
        )
    if code < 0:
        killed = signal.Signals(-code).name
        hint = ": was memory short? Try a lower --at-once" if killed == "SIGKILL" else ""
        return f"cell {name} was ended by {killed}{hint}; its log is {log}"
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    return f"cell {name} failed ({' '.join(last)}); its log is {log}"


def _collect(
    out: Path, folder: Path, cells: Sequence[Planned], say: Callable[[str], None]
) -> dict[Key, Row]:
    """Put what cells have left in their folders into the CSV."""
    rows = read_rows(out / RESULTS)
    new = {
        row.key: row
        for cell in cells
        for row in known_rows(_folder(folder, cell.name)).values()
        if row.key not in rows
    }
    for row in new.values():
        say(f"{row.arm}/{row.budget}/{row.seed}: {row.figure} {row.value:.4g}")
    if new:
        rows |= new
        write_rows(out / RESULTS, rows.values())
    return rows


def _folder(folder: Path, name: Name) -> Path:
    return folder / "cells" / name.folder
