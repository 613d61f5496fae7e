"""Seconds of a step by formula: arithmetic, launches, and what of the rings is not hidden."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppos.config import Compute, Optim
from droppos.flops import step_flops
from pipelines.instances import find
from pipelines.plan.question import Question
from pipelines.plan.rings import rings
from pipelines.plan.step_time import OVERLAP, step_time
from pipelines.recipe import Recipe, Run

USUAL = Question()
H100, L40S = find("p5.48xlarge"), find("g6e.2xlarge")


def recipe(workers: int, batch: int = 4096, accumulate: int = 1, **compute: object) -> Recipe:
    return Recipe(
        optim=Optim(global_batch=batch, accumulate=accumulate),
        run=Run(workers=workers),
        compute=Compute(**compute),  # pyright: ignore[reportArgumentType]
    )


def test_arithmetic_is_flops_over_a_share_of_the_peak() -> None:
    found = step_time(recipe(8), H100, USUAL, 0)
    flops = 512 * step_flops(Recipe().model, Recipe().method)
    assert found.arithmetic_s == pytest.approx(flops / (0.3 * 989e12))
    assert found.bound == "GPU step"
    slow = step_time(recipe(8, precision="float32"), H100, USUAL, 0)
    assert slow.arithmetic_s == pytest.approx(found.arithmetic_s * 989 / 67)


def test_a_cpu_trains_at_the_pace_that_was_measured() -> None:
    cpus = replace(recipe(1, 8, precision="float32"), run=Run(cpus_per_worker=2))
    found = step_time(cpus, find("c7i.2xlarge"), USUAL, 0)
    assert found.seconds == pytest.approx(6.2, rel=0.02)  # docs/step.md


def test_few_images_take_what_their_kernels_take_to_launch() -> None:
    found = step_time(recipe(8, 8), H100, USUAL, 0)
    assert found.launch_s > found.arithmetic_s
    assert found.bound == "kernel launches"
    assert step_time(recipe(8, 32, 4), H100, USUAL, 0).launch_s == 4 * found.launch_s


def test_a_measured_pace_takes_the_place_of_arithmetic() -> None:
    found = step_time(recipe(8), H100, Question(images_per_worker_s=100), 0)
    assert found.compute_s == pytest.approx(5.12)


@given(workers=st.sampled_from([1, 2, 4, 8, 16, 64, 512, 4096]), images=st.integers(1, 64))
def test_a_step_is_no_shorter_than_its_parts(workers: int, images: int) -> None:
    asked = recipe(workers, workers * images)
    found = step_time(asked, L40S, USUAL, rings(asked, L40S, 1, efa=False).seconds)
    assert found.seconds >= max(found.arithmetic_s, found.launch_s)
    assert found.seconds >= found.communication_s
    assert found.exposed_s <= found.communication_s
    hidden = found.communication_s <= OVERLAP * found.compute_s
    assert hidden == (found.seconds == found.compute_s)


@given(images=st.integers(1, 500))
def test_more_images_never_take_less(images: int) -> None:
    def seconds(images: int) -> float:
        return step_time(recipe(8, 8 * images), L40S, USUAL, 0.1).seconds

    assert seconds(images) <= seconds(images + 1)
