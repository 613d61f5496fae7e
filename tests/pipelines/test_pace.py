from dataclasses import replace

import pytest

from pipelines import pace
from pipelines.pace import Pace
from tests.pipelines.test_tally import batch_of


def test_images_operations_and_waiting_are_of_the_time_that_was_for_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(pace, "perf_counter", lambda: now)
    ours = Pace(global_batch=32, flops=1e9, peak=64e9)
    for _ in range(4):
        now += 2
        ours.count([replace(batch_of(0, [1], [0]), waited=0.5)])
    now += 50  # a checkpoint
    ours.pause()
    assert ours.images_per_s == pytest.approx(4 * 32 / 8)
    assert ours.flops_per_s == pytest.approx(16e9)
    assert ours.mfu == pytest.approx(0.25)
    assert ours.wait_fraction == pytest.approx(0.25)
