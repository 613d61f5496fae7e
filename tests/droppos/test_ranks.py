"""A step is the same however it is spread: real processes on gloo, float32."""

from typing import Any

import pytest
import torch

from tests.droppos.ranks import (
    SAME,
    SPOILT,
    Case,
    alike,
    create,
    distance,
    everything,
    run_program,
    train,
)

pytestmark = pytest.mark.shares


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    state = create(Case("single", 1))
    return {"losses": torch.tensor(train(state)), "state": everything(state)}


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    run_program("tests.droppos.ranks", folder)
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.parametrize("case", SAME, ids=lambda case: case.name)
def test_a_run_is_that_of_one_process(
    case: Case, alone: dict[str, Any], spread: dict[str, Any]
) -> None:
    found = spread["same"][case.name]
    alike(found["losses"], alone["losses"])
    assert found["state"].keys() == alone["state"].keys()
    assert distance(found["state"], alone["state"]) < 1e-3


@pytest.mark.parametrize("case", SPOILT, ids=lambda case: case.name)
def test_one_ranks_bad_batch_is_passed_over_by_all(case: Case, spread: dict[str, Any]) -> None:
    found = spread["spoilt"][case.name]
    assert found["skipped"].tolist() == [1.0] * case.world
    assert found["steps"] == 4
    assert found["before"].keys() == found["after"].keys()
    for name, value in found["before"].items():
        assert torch.equal(found["after"][name], value), name
    assert not found["skipped_again"]
    moved = [not torch.equal(found["at_last"][n], value) for n, value in found["after"].items()]
    assert sum(moved) > len(moved) / 2
    assert all(value.isfinite().all() for value in found["at_last"].values())


def test_shards_that_do_not_fill_the_ranks_are_refused(spread: dict[str, Any]) -> None:
    assert spread["refused"] == (
        "compute.shard_ranks must be a divisor of the 4 ranks, got 3; "
        "take 1, or another number of workers"
    )
