"""Who writes a run: the newest attempt, and nobody else."""

from pathlib import Path

import pytest
import torch

from droppos.errors import ConfigError
from pipelines import checkpoints, stored_state
from pipelines.attempt import (
    Attempt,
    SupersededError,
    claim_for_driver,
    claim_for_group,
    taken_over,
)
from pipelines.storage import Place, open_place

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def home(tmp_path: Path) -> Place:
    return open_place(str(tmp_path))


def save(home: Place, step: int, attempt: Attempt) -> None:
    facts = {"made_by": attempt.group}
    stored_state.save(
        home, step, {"w": torch.ones(3)}, facts, checkpoints.Retention(3), may_write=attempt.check
    )


def test_a_later_group_of_the_same_driver_is_in_the_right(home: Place) -> None:
    driver = claim_for_driver(home)
    first = claim_for_group(home, driver, CPU)
    save(home, 1, first)
    second = claim_for_group(home, driver, CPU)
    with pytest.raises(SupersededError, match="taken over by process"):
        save(home, 2, first)
    save(home, 2, second)


def test_a_later_driver_is_in_the_right_even_before_its_workers_start(home: Place) -> None:
    older = claim_for_group(home, driver := claim_for_driver(home), CPU)
    claim_for_driver(home)
    with pytest.raises(SupersededError):
        save(home, 1, older)
    # Ray starts workers that were lost again; those of the older driver must not win it back.
    with pytest.raises(SupersededError):
        claim_for_group(home, driver, CPU)


def test_a_driver_that_cannot_begin_gives_the_run_back(home: Place) -> None:
    healthy = claim_for_group(home, claim_for_driver(home), CPU)
    with pytest.raises(ConfigError), taken_over(home) as taken:
        assert taken.driver != healthy.driver
        raise ConfigError("MLflow does not answer")
    save(home, 1, healthy)
    with pytest.raises(KeyboardInterrupt), taken_over(home) as taken:
        taken.begun = True
        raise KeyboardInterrupt
    with pytest.raises(SupersededError):
        save(home, 2, healthy)


def test_what_is_given_back_is_not_taken_from_a_third(home: Place) -> None:
    claim_for_driver(home)
    with pytest.raises(ConfigError), taken_over(home):
        third = claim_for_group(home, claim_for_driver(home), CPU)
        raise ConfigError("MLflow does not answer")
    save(home, 1, third)


def test_what_a_superseded_group_saves_neither_counts_nor_harms(home: Place) -> None:
    older = claim_for_group(home, claim_for_driver(home), CPU)
    save(home, 4, older)
    newer = claim_for_group(home, claim_for_driver(home), CPU)
    save(home, 8, newer)
    for step in (8, 12):  # a checkpoint that the newer has written already, and one it has not
        with pytest.raises(SupersededError):
            save(home, step, older)
    saved = checkpoints.newest(home)
    assert saved is not None
    assert (saved.step, saved.record["made_by"]) == (8, newer.group)
    stored_state.load(saved, {"w": torch.zeros(3)})
    assert (home / "checkpoints").children() == ["step-00000004", "step-00000008"]


def test_a_group_that_is_superseded_while_it_saves_does_not_count(home: Place) -> None:
    older = claim_for_group(home, claim_for_driver(home), CPU)
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # every part is written, complete.json is not
            claim_for_driver(home)
        older.check()

    with pytest.raises(SupersededError):
        stored_state.save(
            home, 4, {"w": torch.ones(3)}, {}, checkpoints.Retention(3), may_write=check
        )
    assert checkpoints.newest(home) is None
