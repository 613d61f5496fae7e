"""A run goes on at any number of ranks and by any strategy: real processes on gloo, float32."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from tests.droppos.ranks import Case, alike, create, distance, everything, run_program, train
from tests.pipelines.reshard import LEGS, STEPS

pytestmark = pytest.mark.shares


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("reshard")
    run_program("tests.pipelines.reshard", folder)
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(4)]


def test_each_leg_begins_with_the_bits_that_the_one_before_ended_with(
    found: list[list[dict[str, Any]]],
) -> None:
    legs = found[0]
    assert [leg["step"] for leg in legs] == [STEPS * number for number in range(len(LEGS))]
    for before, after in pairwise(legs):
        assert before["ended"].keys() == after["begun"].keys()
        for name, value in before["ended"].items():
            assert torch.equal(after["begun"][name], value), name


def test_all_legs_together_are_one_run(found: list[list[dict[str, Any]]]) -> None:
    state = create(Case("single", 1))
    losses = torch.tensor(train(state, steps=STEPS * len(LEGS)))
    alike(torch.cat([leg["losses"] for leg in found[0]]), losses)
    assert distance(found[0][-1]["ended"], everything(state)) < 1e-3


def test_each_rank_that_was_there_goes_on_with_its_own_random_numbers(
    found: list[list[dict[str, Any]]],
) -> None:
    second, third = found[1][:2]  # rank 1, on 2 and then on 4 ranks
    assert not torch.equal(second["next"], found[0][1]["next"])
    assert torch.equal(third["random"], second["next"])
