"""Steps without a finite gradient: counted, refused past a limit, and their pictures named."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.bad_steps import BadSteps, TooManyBadSteps
from pipelines.order import Schedule
from pipelines.passed import FILE, PassedOver, pass_over
from pipelines.prepare import prepare
from pipelines.shards import load_manifest, read_rows
from pipelines.storage import open_place

YES, NO = torch.tensor(True), torch.tensor(False)


def test_steps_are_counted_when_they_are_read_and_forgiven_by_a_checkpoint() -> None:
    bad = BadSteps(limit=2)
    for step, skipped in enumerate((NO, YES, NO, YES)):
        bad.note(step, skipped)
    assert bad.read() == [1, 3] and bad.read() == []
    assert not bad.too_many
    bad.refuse()  # two are allowed
    bad.forgive()
    bad.note(4, YES)
    assert bad.read() == [4] and bad.steps == [4]


def test_checkpoints_of_bad_steps_alone_forgive_none() -> None:
    bad = BadSteps(limit=3)
    for step in range(4):  # a checkpoint after every two
        bad.note(step, YES)
        bad.read()
        if step % 2:
            bad.forgive()
    assert bad.too_many
    bad.note(4, NO)
    bad.forgive()
    assert not bad.steps


def test_one_more_than_the_limit_names_them() -> None:
    bad = BadSteps(limit=1)
    for step in (7, 8):
        bad.note(step, YES)
    bad.read()
    assert bad.too_many
    with pytest.raises(TooManyBadSteps, match=r"2 steps .*\(7, 8\), run.bad_steps allows 1") as e:
        bad.refuse()
    assert e.value.steps == [7, 8]


def test_what_is_passed_over_adds_up_and_names_the_pictures(
    photographs: Path, tmp_path: Path
) -> None:
    prepare(str(photographs), str(tmp_path / "data"), shard_bytes=200_000, group_rows=5)
    data, home = open_place(str(tmp_path / "data")), open_place(str(tmp_path / "run"))
    schedule = Schedule(manifest=load_manifest(data), seed=3, global_batch=8, window=16, epochs=2)
    assert PassedOver.read(home, schedule) == PassedOver()
    assert pass_over(home, data, schedule, [10, 2]) == PassedOver(1, frozenset({2, 10}))
    assert pass_over(home, data, schedule, [4]) == PassedOver(2, frozenset({2, 4, 10}))

    other = replace(schedule, global_batch=4)
    assert PassedOver.read(home, other) == PassedOver()  # its steps have other pictures

    keys = json.loads((home / FILE).read_bytes())["pictures"]
    everything = [picture.key for picture in read_rows(data, load_manifest(data))]
    per_epoch = schedule.steps_per_epoch
    for step in (2, 4, 10):
        epoch, batch = divmod(step, per_epoch)
        rows = schedule.rows(epoch)[8 * batch : 8 * batch + 8]
        assert keys[str(step)] == [everything[row] for row in sorted(rows)]
