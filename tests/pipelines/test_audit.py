"""The audit of runs whose ids were written by hand: the truth passes, each planted lie is found."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from droppos.config import Model, Optim
from droppos.errors import DataError
from pipelines import checkpoints, stored_state
from pipelines.attempt import Attempt
from pipelines.audit import audit, gaps, schedule_of
from pipelines.beside import StepsFile, forget_after
from pipelines.cli import main
from pipelines.facts import facts
from pipelines.ids import FOLDER, SCHEMA, IdWriter, id_files, read_ids
from pipelines.order import Schedule
from pipelines.recipe import Data, Recipe, Run
from pipelines.shards import MANIFEST, Manifest, Picture, ShardWriter, load_manifest
from pipelines.storage import Place, open_place
from pipelines.stream import Batch

B, STEPS = 12, 10
"""75 pictures: 6 steps an epoch and 3 pictures left over; the run stands in its second epoch."""

Lie = Callable[[dict[str, list[int]]], None]


def write_data(place: Place, changed: int | None = None) -> Manifest:
    """Pictures that nobody decodes; `changed` is another one than in the same set without it."""
    writer = ShardWriter(place, group_rows=10)
    for row in range(75):
        image = b"other" if row == changed else b"%05d" % row
        writer.add(Picture(image, f"{row}.jpg", None, 8, 8))
    manifest = Manifest(shards=(writer.close_shard(),))
    (place / MANIFEST).write_bytes(manifest.to_json().encode())
    return manifest


def batch_of(step: int, rows: list[int]) -> Batch:
    return Batch(
        step=step,
        images=torch.zeros(len(rows), 1, 1, 3, dtype=torch.uint8),
        rows=torch.tensor(rows),
        slots=torch.zeros(len(rows), dtype=torch.int32),
        mirrored=torch.zeros(len(rows), dtype=torch.bool),
        problems={},
        waited=0.0,
    )


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    write_data(open_place(str(tmp_path / "data")))
    return Recipe(
        model=Model(size="tiny"),
        optim=Optim(epochs=3, global_batch=B, warmup_epochs=1),
        data=Data(path=str(tmp_path / "data"), window=24),
        run=Run(name="run", storage=str(tmp_path), workers=2, record_ids=True),
    )


def save(recipe: Recipe, step: int) -> None:
    manifest = load_manifest(open_place(str(recipe.data.path)))
    stored_state.save(
        open_place(recipe.home),
        step,
        {"w": torch.ones(1)},
        facts(recipe, manifest),
        checkpoints.Retention(3),
    )


@pytest.fixture
def run(recipe: Recipe) -> str:
    """Checkpoints at 4 and 10, each with the ids of two ranks."""
    home = open_place(recipe.home)
    save(recipe, 4)
    saved = checkpoints.at(recipe.home)
    schedule = schedule_of(saved)
    record(home, schedule, 0, 4)
    record(home, schedule, 4, STEPS)
    save(recipe, STEPS)
    return recipe.home


def record(home: Place, schedule: Schedule, first: int, end: int) -> None:
    for rank in range(2):
        writer = IdWriter(Attempt(home, "driver", "group"), schedule, rank, first)
        for step in range(first, end):
            epoch, batch = schedule.position(step).epoch, schedule.position(step).batch
            rows = schedule.rows(epoch).reshape(-1, B)[batch]
            writer.add([batch_of(step, rows[rank::2].tolist())])
        writer.cut(end)()


def plant(run: str, lie: Lie, file: int = 0) -> None:
    """Rewrite one file of ids, as lists by column."""
    place = id_files(open_place(run))[file].place
    columns = read_ids(id_files(open_place(run))[file]).to_pydict()
    lie(columns)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=SCHEMA), sink)
    place.write_bytes(sink.getvalue())


def test_the_truth_passes(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = audit(run)
    assert found.is_exact and found.step == STEPS
    assert [(epoch.expected, epoch.seen) for epoch in found.epochs] == [(72, 72), (48, 48)]
    main(["audit", run])
    said = " ".join(capsys.readouterr().err.split())
    assert "exactly the schedule up to step 10: 120 pictures in 2 epochs" in said


def test_an_older_checkpoint_is_audited_up_to_itself(run: str) -> None:
    found = audit(f"{run}/checkpoints/step-00000004")
    assert found.is_exact and found.step == 4
    assert [epoch.expected for epoch in found.epochs] == [48]


def doubled(columns: dict[str, list[int]]) -> None:
    for column in columns.values():
        column.append(column[0])


def lost(columns: dict[str, list[int]]) -> None:
    for column in columns.values():
        column.pop()


def replaced(columns: dict[str, list[int]]) -> None:
    columns["row"][1] = columns["row"][0]


def swapped(columns: dict[str, list[int]]) -> None:
    columns["row"][0], columns["row"][-1] = columns["row"][-1], columns["row"][0]


def wrong_epoch(columns: dict[str, list[int]]) -> None:
    columns["epoch"][0] = 1


def foreign(columns: dict[str, list[int]]) -> None:
    columns["row"][0] = 75


def wrong_step(columns: dict[str, list[int]]) -> None:
    columns["step"][0] = 7


@pytest.mark.parametrize(
    ("lie", "seen", "missing", "twice", "out_of_order"),
    [
        (doubled, 73, 0, 1, 0),
        (lost, 71, 1, 0, 0),
        (replaced, 72, 1, 1, 0),
        (swapped, 72, 0, 0, 2),
        (wrong_epoch, 72, 1, 0, 1),
        (foreign, 72, 1, 0, 1),
        (wrong_step, 72, 0, 0, 1),
    ],
)
def test_a_planted_lie_is_found(
    run: str, lie: Lie, seen: int, missing: int, twice: int, out_of_order: int
) -> None:
    plant(run, lie)
    found = audit(run)
    assert not found.is_exact
    (epoch,) = found.inexact
    assert asdict(epoch) == {
        "epoch": 0,
        "expected": 72,
        "seen": seen,
        "missing": missing,
        "twice": twice,
        "out_of_order": out_of_order,
    }


def test_a_lie_ends_the_command_with_1(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    plant(run, lost, file=3)  # the second rank's, of the second checkpoint
    with pytest.raises(SystemExit) as ended:
        main(["audit", run])
    assert ended.value.code == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "NOT the schedule up to step 10: 1 of 2 epochs differ, the first is 1" in said


def test_a_file_that_is_gone_is_named_by_its_steps(run: str) -> None:
    for file in id_files(open_place(run))[:2]:
        file.place.delete()
    assert "no ids are kept of steps 0 to 3: was run.record_ids off" in audit(run).verdict


def test_a_tail_that_no_checkpoint_committed_is_left_out_and_deleted(run: str) -> None:
    home = open_place(run)
    record(home, schedule_of(checkpoints.at(run)), STEPS, 14)
    assert audit(run).is_exact
    assert len(id_files(home)) == 6
    forget_after(home / FOLDER, STEPS)
    assert len(id_files(home)) == 4
    forget_after(home / FOLDER, 4)
    assert {file.end for file in id_files(home)} == {4}


def test_gaps_are_steps_of_which_nothing_is_kept() -> None:
    place = open_place("/nowhere")
    files = [StepsFile(place, 0, 4), StepsFile(place, 0, 4), StepsFile(place, 8, 12)]
    assert gaps(files, 12) == [(4, 8)]
    assert gaps(files, 20) == [(4, 8), (12, 20)]
    assert gaps([], 3) == [(0, 3)]


def test_a_run_without_ids_is_told_how_to_have_them(recipe: Recipe) -> None:
    save(recipe, 4)
    with pytest.raises(DataError, match=r"no ids/ .* --run\.record-ids True"):
        audit(recipe.home)


def test_a_run_without_a_checkpoint_is_told(recipe: Recipe) -> None:
    with pytest.raises(DataError, match="has no checkpoint"):
        audit(recipe.home)


def test_data_that_is_gone_or_changed_is_told(run: str, recipe: Recipe) -> None:
    data = open_place(str(recipe.data.path))
    data.delete()
    write_data(data, changed=7)
    with pytest.raises(DataError, match="was changed after the run: content: pictures"):
        audit(run)
    data.delete()
    with pytest.raises(DataError, match=r"data is not a prepared data set"):
        audit(run)


def test_a_damaged_file_of_ids_is_named(run: str) -> None:
    place = id_files(open_place(run))[0].place
    place.write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=place.name):
        audit(run)


def test_what_was_recorded_is_read_back_as_it_was(run: str) -> None:
    tables = [read_ids(file) for file in id_files(open_place(run))]
    epochs = np.concatenate([table["epoch"].to_numpy() for table in tables])
    rows = np.concatenate([table["row"].to_numpy() for table in tables])
    assert len(np.unique(rows[epochs == 0])) == 72
