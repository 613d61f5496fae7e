"""The history: what a run measured on its way to each checkpoint, kept beside it.

    HOME/history/steps-00000000-00001000.4f0c2a9e.jsonl
        metrics from step 0 on, up to the checkpoint of step 1000, one step a line; written by group
        4f0c2a9e before that checkpoint counts, and never deleted

    HOME/history/aside-00001000.jsonl
        the same of a checkpoint that was measured while training went on, or after its end

MLflow shows them; here is what it is made whole from when its server, or the driver with what it
had not sent, was away. :mod:`pipelines.beside` has the way they are written.

Imports no torch.
"""

import json
import logging
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from droppos.errors import DataError
from pipelines.beside import Beside, steps_files
from pipelines.journal import now_ms
from pipelines.storage import Place

FOLDER = "history"

_log = logging.getLogger(__name__)


class Logged(NamedTuple):
    """Metrics of a step."""

    step: int
    time_ms: int
    """When it was logged, in milliseconds since 1970."""
    values: Mapping[str, float]


class HistoryWriter(Beside[Logged]):
    """Keeps metrics in memory until a checkpoint counts."""

    def __init__(self, home: Place, group: str, start_step: int) -> None:
        """Start with nothing.

        Args:
            home: Folder of the run.
            group: Name of the group of workers.
            start_step: Its first step.
        """
        super().__init__(home / FOLDER, f"{group}.jsonl", _lines, start_step)

    def add(self, step: int, values: Mapping[str, float]) -> Logged:
        """Note metrics of a step, and give them with the time."""
        row = Logged(step, now_ms(), values)
        self.note(row)
        return row


def keep_late(home: Place, step: int, values: Mapping[str, float]) -> None:
    """Keep what a checkpoint came to that was measured after it was made, if storage takes it."""
    rows = [Logged(step, now_ms(), values)]
    try:
        (home / FOLDER / f"aside-{step:08d}.jsonl").write_bytes(_lines(rows))
    except DataError as error:
        _log.warning("the figures of step %d are only in MLflow: %s", step, error)


def _lines(rows: Sequence[Logged]) -> bytes:
    return "".join(json.dumps(row._asdict()) + "\n" for row in rows).encode()


def read(home: Place, stop_step: int, start_step: int = 0) -> Iterator[Logged]:
    """Read what was measured on the way to a checkpoint, in the order it was.

    Args:
        home: Folder of the run.
        stop_step: Step of the checkpoint.
        start_step: Files that end before this step are left out, but for what was measured aside.

    Raises:
        DataError: If storage refuses, or a file is damaged.
    """
    # All of these: they come late, when later steps are known.
    aside = deque((step, place) for step, place in _aside(home) if step <= stop_step)
    for file in steps_files(home / FOLDER):
        if start_step <= file.end <= stop_step:
            yield from _rows(file.place)
            while aside and aside[0][0] <= file.end:  # each after the checkpoint it is of
                yield from _rows(aside.popleft()[1])
    for _, place in aside:
        yield from _rows(place)


def _aside(home: Place) -> list[tuple[int, Place]]:
    """Find what was measured aside, by the step it is of."""
    folder = home / FOLDER
    found = (re.fullmatch(r"aside-(\d+)\.jsonl", name) for name in folder.children())
    return sorted((int(name[1]), folder / name[0]) for name in found if name)


def _rows(place: Place) -> Iterator[Logged]:
    try:
        for line in place.read_bytes().splitlines():
            yield Logged(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise DataError(f"{place} is damaged: {error!r}; was it changed?") from error


def bring(source: Place, step: int, target: Place) -> None:
    """Copy what was measured up to a checkpoint to the run that takes it over, in place of its own.

    Raises:
        DataError: If storage refuses.
    """
    for file in steps_files(target / FOLDER):
        file.place.delete()
    for file in steps_files(source / FOLDER):
        if file.end <= step:
            (target / FOLDER / file.place.name).write_bytes(file.place.read_bytes())
    for _, place in _aside(target):
        place.delete()
    for measured, place in _aside(source):
        if measured <= step:
            (target / FOLDER / place.name).write_bytes(place.read_bytes())


def curves(home: Place, stop_step: int) -> dict[str, list[tuple[int, float]]]:
    """Give steps and values of each metric on the way to a checkpoint.

    A step that was measured twice, by workers that went back, counts as it was the last time.

    Raises:
        DataError: As of `read`.
    """
    found: dict[str, dict[int, float]] = {}
    for row in read(home, stop_step):
        for name, value in row.values.items():
            found.setdefault(name, {})[row.step] = value
    return {name: sorted(values.items()) for name, values in found.items()}
