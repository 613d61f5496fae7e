"""The audit: did a run train on exactly its schedule? Answered from storage, without its process.

What was trained on stands in the ids that run.record_ids keeps; what should have been follows
from the checkpoint's recipe and the data set's manifest alone. Nothing else of the run is asked.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from droppos.errors import DataError
from pipelines import checkpoints
from pipelines.beside import StepsFile
from pipelines.facts import data_changes, data_facts
from pipelines.ids import FOLDER, id_files, read_ids
from pipelines.order import Schedule
from pipelines.passed import FILE as PASSED_FILE
from pipelines.passed import PassedOver
from pipelines.recipe_file import from_dict
from pipelines.shards import load_manifest
from pipelines.storage import open_place

READERS = 8
"""Files of ids that are read at once, since object storage is slow to begin."""


@dataclass(frozen=True, slots=True)
class EpochAudit:
    """One epoch, or what is committed of it."""

    epoch: int
    expected: int
    """Pictures the schedule has for it, each once."""
    seen: int
    """Pictures that were trained on."""
    missing: int
    """Pictures of the schedule that were not."""
    twice: int
    """Times that a picture came again."""
    out_of_order: int
    """Pictures in another step than the schedule's, or in an epoch that leaves them out."""

    @property
    def is_exact(self) -> bool:
        """Whether it is the schedule."""
        return self.seen == self.expected and not (self.missing or self.twice or self.out_of_order)


@dataclass(frozen=True, slots=True)
class Audit:
    """A run, up to its newest checkpoint or the one that was named."""

    run: str
    step: int
    """Steps that are committed."""
    epochs: list[EpochAudit]
    """Each that has begun."""
    gaps: list[tuple[int, int]]
    """First step, and step after the last, of which no ids are kept at all."""
    passed: int = 0
    """Steps that were passed over: their pictures were taken, and nothing moved."""

    @property
    def inexact(self) -> list[EpochAudit]:
        """Epochs that are not as planned."""
        return [epoch for epoch in self.epochs if not epoch.is_exact]

    @property
    def is_exact(self) -> bool:
        """Whether every committed step is the schedule's."""
        return not self.inexact

    @property
    def verdict(self) -> str:
        """All of it in one sentence."""
        pictures = sum(epoch.expected for epoch in self.epochs)
        if self.is_exact:
            exact = (
                f"the run trained on exactly the schedule up to step {self.step:,}: "
                f"{pictures:,} pictures in {len(self.epochs):,} epochs, none missing, none twice"
            )
            if not self.passed:
                return exact
            return (
                f"{exact}; {self.passed:,} steps of these changed no weight, their gradient being "
                f"not finite ({PASSED_FILE} names their pictures)"
            )
        wrong = self.inexact
        verdict = (
            f"what is recorded is NOT the schedule up to step {self.step:,}: "
            f"{len(wrong):,} of {len(self.epochs):,} epochs differ, the first is {wrong[0].epoch}"
        )
        if self.gaps:
            gaps = ", ".join(f"{first:,} to {end - 1:,}" for first, end in self.gaps[:5])
            verdict += f"; no ids are kept of steps {gaps}: was run.record_ids off then?"
        return verdict


def audit(run: str) -> Audit:
    """Compare a run's recorded ids with its schedule.

    Args:
        run: Folder of a run, or of one of its checkpoints; path or s3:// URI.

    Raises:
        DataError: If there is no checkpoint, the run recorded no ids, or its data set is gone or
            another by now.
        ConfigError: If another version of droppos wrote its recipe.
    """
    saved = checkpoints.at(run)
    home = saved.home
    schedule = schedule_of(saved)
    files = [file for file in id_files(home) if file.end <= saved.step]
    if not files and saved.step:
        raise DataError(
            f"{home} has no {FOLDER}/ of what it trained on up to step {saved.step}: the run was "
            "made without run.record_ids; start it with --run.record-ids True"
        )
    epochs = range(-(-saved.step // schedule.steps_per_epoch))
    found = [_epoch(schedule, epoch, saved.step, files) for epoch in epochs]
    passed = sum(step < saved.step for step in PassedOver.read(home, schedule).steps)
    return Audit(home.uri, saved.step, found, gaps(files, saved.step), passed)


def schedule_of(saved: checkpoints.Saved) -> Schedule:
    """Lay out again the run that a checkpoint is from.

    Raises:
        DataError: If its data set is gone, or another by now, or it is of no pre-training.
        ConfigError: If another version of droppos wrote its recipe.
    """
    checkpoints.require_recipe(saved)
    recipe = from_dict(saved.record["recipe"])
    assert recipe.data.path is not None
    manifest = load_manifest(open_place(recipe.data.path))
    if manifest.digest != saved.record["manifest"]:
        changes = data_changes(saved.record.get("data"), data_facts(manifest))
        raise DataError(
            f"the data set {recipe.data.path} was changed after the run: {'; '.join(changes)}; "
            "the audit needs the one it was trained on: put it back"
        )
    return Schedule.of(recipe, manifest)


def gaps(files: list[StepsFile], stop_step: int) -> list[tuple[int, int]]:
    """Find the steps before stop_step that no file speaks of; files are sorted by first step."""
    found, covered = [], 0
    for first, end in [*((file.first, file.end) for file in files), (stop_step, stop_step)]:
        if first > covered:
            found.append((covered, first))
        covered = max(covered, end)
    return found


def _epoch(schedule: Schedule, epoch: int, stop_step: int, files: list[StepsFile]) -> EpochAudit:
    """Hold one epoch's ids against its schedule, in a few arrays as long as the data set."""
    first = epoch * schedule.steps_per_epoch
    end = min(first + schedule.steps_per_epoch, stop_step)
    planned = schedule.rows(epoch)[: (end - first) * schedule.global_batch]
    steps = np.full(schedule.manifest.rows, -1, np.int64)  # of each row; -1 where it has none
    steps[planned] = first + np.arange(len(planned)) // schedule.global_batch

    times = np.zeros(schedule.manifest.rows, np.int64)
    seen = out_of_order = 0
    for step, said_epoch, row in _records(files, first, end):
        known = (said_epoch == epoch) & (row >= 0) & (row < len(steps))
        times += np.bincount(row[known], minlength=len(times))
        seen += len(row)
        out_of_order += len(row) - int((steps[row[known]] == step[known]).sum())
    return EpochAudit(
        epoch=epoch,
        expected=len(planned),
        seen=seen,
        missing=int((times[planned] == 0).sum()),
        twice=int(np.maximum(times - 1, 0).sum()),
        out_of_order=out_of_order,
    )


Records = tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]
"""Step, epoch and row of pictures, as they were recorded."""


def _records(files: list[StepsFile], first: int, end: int) -> Iterator[Records]:
    """Read what was recorded from step first to before step end, a file at a time."""
    wanted = [file for file in files if file.first < end and file.end > first]
    with ThreadPoolExecutor(READERS) as pool:
        for file, table in zip(wanted, pool.map(read_ids, wanted), strict=True):
            step, epoch, row = (column.to_numpy().astype(np.int64) for column in table.columns)
            # A step that its own file's name denies must not slip through between two epochs.
            inside = (step >= file.first) & (step < file.end)
            step_or_first = np.where(inside, step, file.first)
            mine = (step_or_first >= first) & (step_or_first < end)
            yield np.where(inside, step, -1)[mine], epoch[mine], row[mine]
