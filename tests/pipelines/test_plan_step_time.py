"""Seconds of a step by formula: arithmetic, launches and rings."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppos.config import Compute, Optim
from droppos.flops import step_flops
from droppos.footprint import parameters
from pipelines.instances import Instance, find
from pipelines.plan.step_time import LINE_SHARE, OVERLAP, communication_s, step_time
from pipelines.recipe import Recipe, Run

H100, L40S = find("p5.48xlarge"), find("g6e.2xlarge")


def recipe(workers: int, batch: int = 4096, accumulate: int = 1, **compute: object) -> Recipe:
    return Recipe(
        optim=Optim(global_batch=batch, accumulate=accumulate),
        run=Run(workers=workers),
        compute=Compute(**compute),  # pyright: ignore[reportArgumentType]
    )


def sent(gb_s: float, share: float) -> float:
    """Seconds for all weights, four bytes each, at a share of GB/s."""
    weights = parameters(Recipe().model, Recipe().method)
    return share * 4 * weights / (LINE_SHARE * gb_s * 1e9)


def test_arithmetic_is_flops_over_a_share_of_the_peak() -> None:
    found = step_time(recipe(8), H100, 8, 0.3)
    flops = 512 * step_flops(Recipe().model, Recipe().method)
    assert found.arithmetic_s == pytest.approx(flops / (0.3 * 989e12))
    assert found.bound == "GPU step"
    slow = step_time(recipe(8, precision="float32"), H100, 8, 0.3)
    assert slow.arithmetic_s == pytest.approx(found.arithmetic_s * 989 / 67)


def test_a_cpu_trains_at_the_pace_that_was_measured() -> None:
    cpus = replace(recipe(1, 8, precision="float32"), run=Run(cpus_per_worker=2))
    found = step_time(cpus, find("c7i.2xlarge"), 1, 0.3)
    assert found.seconds == pytest.approx(6.2, rel=0.02)  # docs/step.md


def test_few_images_take_what_their_kernels_take_to_launch() -> None:
    found = step_time(recipe(8, 8), H100, 8, 0.3)
    assert found.launch_s > found.arithmetic_s
    assert found.bound == "kernel launches"
    assert step_time(recipe(8, 32, 4), H100, 8, 0.3).launch_s == 4 * found.launch_s


def test_a_measured_pace_takes_the_place_of_arithmetic() -> None:
    found = step_time(recipe(8), H100, 8, 0.3, images_per_worker_s=100)
    assert found.compute_s == pytest.approx(5.12)


@pytest.mark.parametrize(
    ("machine", "per_machine", "gb_s"), [(L40S, 1, 5 / 8), (H100, 8, 450), (H100, 4, 400)]
)
def test_ddp_reduces_twice_around_the_ring(
    machine: Instance, per_machine: int, gb_s: float
) -> None:
    found = communication_s(recipe(8, strategy="ddp"), machine, per_machine)
    assert found == pytest.approx(sent(gb_s, 2 * 7 / 8), rel=0.05)  # and hops


def test_fsdp2_gathers_twice_in_bf16_and_scatters_once_in_float32() -> None:
    ring = sent(5 / 8, 7 / 8)
    assert communication_s(recipe(8), L40S, 1) == pytest.approx((0.5 + 0.5 + 1) * ring, rel=0.02)
    kept = recipe(8, reshard_after_forward=False)
    assert communication_s(kept, L40S, 1) == pytest.approx((0.5 + 1) * ring, rel=0.02)
    twice = recipe(8, accumulate=2)
    assert communication_s(twice, L40S, 1) == pytest.approx((1 + 1 + 1) * ring, rel=0.02)
    wide = recipe(8, precision="float32")
    assert communication_s(wide, L40S, 1) == pytest.approx((1 + 1 + 1) * ring, rel=0.02)


def test_groups_of_shards_within_a_machine_spare_the_network_and_hops() -> None:
    grouped = communication_s(recipe(512, shard_ranks=8), H100, 8)
    assert grouped < communication_s(recipe(512), H100, 8) / 4


def test_one_worker_sends_nothing() -> None:
    assert communication_s(recipe(1), L40S, 1) == 0


@given(workers=st.sampled_from([1, 2, 4, 8, 16, 64, 512, 4096]), images=st.integers(1, 64))
def test_a_step_is_no_shorter_than_its_parts(workers: int, images: int) -> None:
    found = step_time(recipe(workers, workers * images), L40S, 1, 0.3)
    assert found.seconds >= max(found.arithmetic_s, found.launch_s)
    assert found.seconds >= found.communication_s
    assert found.exposed_s <= found.communication_s
    hidden = found.communication_s <= OVERLAP * found.compute_s
    assert hidden == (found.seconds == found.compute_s)


@given(images=st.integers(1, 500))
def test_more_images_never_take_less(images: int) -> None:
    def seconds(images: int) -> float:
        return step_time(recipe(8, 8 * images), L40S, 1, 0.3).seconds

    assert seconds(images) <= seconds(images + 1)
