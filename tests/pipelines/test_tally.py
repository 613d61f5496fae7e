"""The tally on its own: what follows the schedule passes, and every way to depart from it is told.

One process plays all ranks; that several add up is shown on a real Ray in test_exactness.py.
"""

import numpy as np
import pytest
import torch

from droppos.errors import TrainingError
from pipelines.order import Schedule
from pipelines.shards import Manifest, Shard
from pipelines.stream import Batch
from pipelines.tally import Plan, Tally

B = 8
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(params=[2 * B, B // 2, B // 4])
def schedule(request: pytest.FixtureRequest) -> Schedule:
    """75 pictures, 9 steps an epoch, windows of 2 steps or parts of one."""
    shard = Shard("shard-0.parquet", 75, (10,) * 7 + (5,), bytes=0, sha256="", content="")
    return Schedule(
        manifest=Manifest(shards=(shard,)), seed=1, global_batch=B, window=request.param, epochs=2
    )


def step_of(schedule: Schedule, step: int, slots: range = range(B)) -> Batch:
    """What the stream should deliver, computed from whole epochs."""
    epoch, batch = divmod(step, schedule.steps_per_epoch)
    rows = schedule.rows(epoch)[batch * B :][slots.start : slots.stop]
    return batch_of(step, rows.tolist(), list(slots))


def batch_of(step: int, rows: list[int], slots: list[int]) -> Batch:
    return Batch(
        step=step,
        images=torch.zeros(len(rows), 1, 1, 3, dtype=torch.uint8),
        rows=torch.tensor(rows),
        slots=torch.tensor(slots, dtype=torch.int32),
        mirrored=torch.zeros(len(rows), dtype=torch.bool),
        problems={},
        waited=0.0,
    )


def test_the_plan_is_the_schedule_from_any_step_on(schedule: Schedule) -> None:
    whole = np.concatenate([schedule.rows(epoch) for epoch in range(2)]).reshape(-1, B)
    for start in range(schedule.steps):
        plan = Plan(schedule)
        for step in range(start, schedule.steps):
            np.testing.assert_array_equal(plan.rows(step), whole[step])


def test_a_run_that_follows_its_schedule_passes(schedule: Schedule) -> None:
    tally = Tally(schedule, 0, 0, CPU)
    for step in range(schedule.steps):
        micro = [step_of(schedule, step, range(4, 8)), step_of(schedule, step, range(4))]
        tally.count(micro)  # micro-batches in any order
        batch = schedule.position(step + 1).batch
        assert tally.settle() == batch * B
        assert tally.settle() == batch * B  # a second checkpoint of the same step


def test_a_resumed_group_counts_on_from_the_cursor(schedule: Schedule) -> None:
    tally = Tally(schedule, 5, 5 * B, CPU)
    for step in range(5, 12):
        tally.count([step_of(schedule, step)])
    assert tally.settle() == 3 * B

    begun_wrong = Tally(schedule, 5, 5 * B - 1, CPU)
    for step in range(5, 8):
        begun_wrong.count([step_of(schedule, step)])
    with pytest.raises(TrainingError, match=r"after step 9 .* on 71 pictures of epoch 0, .* 72"):
        begun_wrong.count([step_of(schedule, 8)])


def test_a_wrong_picture_is_told_before_it_is_trained_on(schedule: Schedule) -> None:
    right = step_of(schedule, 0)
    rows = right.rows.tolist()
    rows[3] = rows[2]
    with pytest.raises(
        TrainingError, match=rf"step 0 .* 1 wrong .* slot 3, .* found row {rows[2]}"
    ):
        Tally(schedule, 0, 0, CPU).count([batch_of(0, rows, list(range(B)))])
    with pytest.raises(TrainingError, match="step 1 came where step 0 is due"):
        Tally(schedule, 0, 0, CPU).count([step_of(schedule, 1)])
    with pytest.raises(TrainingError, match="slot 8, expected 0 to 7"):
        Tally(schedule, 0, 0, CPU).count([batch_of(0, right.rows.tolist(), list(range(1, B + 1)))])
    other_epoch = step_of(schedule, 9)
    with pytest.raises(TrainingError, match="step 0 was given"):
        Tally(schedule, 0, 0, CPU).count([batch_of(0, other_epoch.rows.tolist(), list(range(B)))])


def test_lost_pictures_are_told_at_the_next_count(schedule: Schedule) -> None:
    tally = Tally(schedule, 0, 0, CPU)
    tally.count([step_of(schedule, 0)])
    tally.count([step_of(schedule, 1, range(4))])  # as if the other half never came
    with pytest.raises(TrainingError, match=r"after step 2 .* on 12 pictures .* expected 16"):
        tally.settle()


def test_a_slot_twice_in_place_of_another_is_told_though_the_sum_is_right(
    schedule: Schedule,
) -> None:
    rows = step_of(schedule, 0).rows.tolist()
    slots = [0, 2, 2, 2, 4, 5, 6, 7]  # of the same sum as 0 to 7
    tally = Tally(schedule, 0, 0, CPU)
    tally.count([batch_of(0, [rows[slot] for slot in slots], slots)])
    with pytest.raises(TrainingError, match="some came twice, and others never"):
        tally.settle()


def test_the_end_of_an_epoch_is_counted_without_a_checkpoint(schedule: Schedule) -> None:
    tally = Tally(schedule, 0, 0, CPU)
    tally.count([step_of(schedule, 0, range(7))])
    for step in range(1, 8):
        tally.count([step_of(schedule, step)])
    with pytest.raises(TrainingError, match="on 71 pictures of epoch 0, expected 72"):
        tally.count([step_of(schedule, 8)])
