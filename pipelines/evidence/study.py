"""The study: which cells there are, and who works on them, until all figures are known.

It can be interrupted at any time, and goes on where it was: figures are in the CSV as soon as they
are known, and a training under way goes on from its checkpoint.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from droppos.errors import ConfigError, TrainingError
from pipelines.evidence.arms import ARMS, BY_NAME, Arm, Name, figures_of
from pipelines.evidence.results import Key, Row, known_rows, read_rows, write_rows

if TYPE_CHECKING:
    from pipelines.evidence.cifar import Cifar

POLL_S = 2
RESULTS = "results.csv"


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """How much is compared."""

    budget: int = 5
    """What each arm may compute, in epochs of DropPos as published."""
    seeds: int = 3
    """Trainings of each arm."""
    curve: tuple[int, ...] = (10, 20, 40)
    """Larger budgets, at which a few arms are trained once: what more computing gives."""
    curve_arms: tuple[str, ...] = ("paper", "no_attentive", "pixels")
    """Those arms."""
    ablations: bool = True
    """Try the paper's settings beside others by `droppos search`, once all else is known."""
    at_once: int | None = None
    """Cells worked on at the same time, each by one thread; one for each CPU when not given."""
    minutes: float | None = None
    """Stop after so long, to go on another time; not before all is known when not given."""
    only: tuple[str, ...] = ()
    """Some cells, as ARM/BUDGET/SEED; all of them when not given."""

    def __post_init__(self) -> None:
        for name in ("budget", "seeds", "at_once"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
        for arm in self.curve_arms:
            if arm not in BY_NAME:
                raise ConfigError(
                    f"--curve-arms has no arm {arm!r}; there are {', '.join(BY_NAME)}"
                )
        known = {str(cell.name) for cell in self._all()}
        for text in self.only:
            if text not in known:
                raise ConfigError(
                    f"--only names no cell {text!r} of this study; such as "
                    f"{', '.join(sorted(known)[:3])} are, ARM/BUDGET/SEED"
                )

    def cells(self) -> list["Planned"]:
        """List the cells, those first that say most about all."""
        return [cell for cell in self._all() if not self.only or str(cell.name) in self.only]

    def budget_of(self, arm: Arm) -> int:
        """Tell what an arm computes; nothing, where nothing is trained."""
        return self.budget if arm.kind in {"pre-trained", "supervised"} else 0

    def _all(self) -> Iterator["Planned"]:
        for seed in range(self.seeds):
            for arm in ARMS:
                if arm.kind == "pixels":
                    if seed == 0:
                        yield Planned.of(Name(arm.name, 0, 0))
                else:
                    yield Planned.of(Name(arm.name, self.budget_of(arm), seed))
        for budget in self.curve:
            for arm in self.curve_arms:
                yield Planned.of(Name(arm, budget, 0), curve=True)


@dataclass(frozen=True, slots=True)
class Planned:
    """A cell, and what is to be known of it."""

    name: Name
    figures: tuple[str, ...]

    @classmethod
    def of(cls, name: Name, curve: bool = False) -> "Planned":
        """Ask of a cell what its arm allows."""
        return cls(name, tuple(figures_of(name.about, curve)))

    def missing(self, rows: dict[Key, Row]) -> list[str]:
        """List the figures that are not known."""
        name = self.name
        return [
            figure
            for figure in self.figures
            if (name.arm, name.budget, name.seed, figure) not in rows
        ]


def run(
    study: Study, data: "Cifar", folder: Path, out: Path, say: Callable[[str], None]
) -> dict[Key, Row]:
    """Work until all figures of the study are known, or its time is over.

    Args:
        study: What is compared.
        data: Prepared data sets.
        folder: Where cells keep their checkpoints and logs.
        out: Folder of the raw results.
        say: Told of each figure.

    Returns:
        All rows of the CSV, also those of other studies.

    Raises:
        TrainingError: If a cell failed.
        DataError: If the CSV cannot be read.
    """
    cells = study.cells()
    rows = _collect(out, folder, cells, say)
    waiting = [cell for cell in cells if cell.missing(rows)]
    say(f"{len(cells) - len(waiting)} of {len(cells)} cells are known")
    at_once = study.at_once or os.cpu_count() or 1
    end = float("inf") if study.minutes is None else time.monotonic() + 60 * study.minutes
    working: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while (waiting or working) and time.monotonic() < end:
            while waiting and len(working) < at_once:
                cell = waiting.pop(0)
                say(f"{cell.name}: {', '.join(cell.missing(rows))}")
                working[str(cell.name)] = _start(cell, rows, data, folder)
            time.sleep(POLL_S)
            rows = _collect(out, folder, cells, say)
            for name, process in list(working.items()):
                if process.poll() is not None:
                    del working[name]
                    _require_success(name, process.returncode, folder)
    finally:
        for process in working.values():
            process.send_signal(signal.SIGTERM)
        for process in working.values():
            process.wait()
    return _collect(out, folder, cells, say)


def _start(
    cell: Planned, rows: dict[Key, Row], data: "Cifar", folder: Path
) -> subprocess.Popen[bytes]:
    own = _folder(folder, cell.name)
    own.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", "pipelines.evidence.cell"]
    told = [str(cell.name), str(own), json.dumps(asdict(data)), *cell.missing(rows)]
    with (own / "log").open("ab") as log:
        return subprocess.Popen(
            [*command, *told],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # cells share no CPU
        )


def _require_success(name: str, code: int, folder: Path) -> None:
    if code:
        log = _folder(folder, Name.parse(name)) / "log"
        last = log.read_text().strip().splitlines()[-1:]
        raise TrainingError(
            f"cell {name} failed with exit status {code} ({' '.join(last)}); its log is {log}"
        )


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
