"""What workers send one another, by closed forms, and what it costs between zones."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppos.config import Compute, Optim
from droppos.footprint import parameters
from pipelines.instances import Instance, find
from pipelines.plan.fleet import choice, fleet
from pipelines.plan.question import Question
from pipelines.plan.rings import LINE_SHARE, rings
from pipelines.plan.workload import workload
from pipelines.plan.zones import crossing
from pipelines.recipe import Recipe, Run

A100, H100, L40S = find("p4d.24xlarge"), find("p5.48xlarge"), find("g6e.2xlarge")
WEIGHTS = parameters(Recipe().model, Recipe().method)


def recipe(workers: int, accumulate: int = 1, **compute: object) -> Recipe:
    return Recipe(
        optim=Optim(global_batch=4096, accumulate=accumulate),
        run=Run(workers=workers),
        compute=Compute(**compute),  # pyright: ignore[reportArgumentType]
    )


def seconds(asked: Recipe, machine: Instance, per_machine: int, efa: bool = False) -> float:
    return rings(asked, machine, per_machine, efa).seconds


def sent(gb_s: float, share: float) -> float:
    """Seconds for all weights, four bytes each, at a share of GB/s."""
    return share * 4 * WEIGHTS / (LINE_SHARE * gb_s * 1e9)


@pytest.mark.parametrize(
    ("machine", "per_machine", "efa", "gb_s"),
    [
        (L40S, 1, False, 5 / 8),
        (H100, 8, False, 450),
        (H100, 4, False, 100 / 8),
        (H100, 4, True, 400),
        (A100, 4, True, 50),
    ],
)
def test_ddp_reduces_twice_around_the_ring(
    machine: Instance, per_machine: int, efa: bool, gb_s: float
) -> None:
    found = seconds(recipe(8, strategy="ddp"), machine, per_machine, efa)
    assert found == pytest.approx(sent(gb_s, 2 * 7 / 8), rel=0.05)  # and hops


def test_efa_changes_nothing_for_a_machine_with_one_card() -> None:
    assert L40S.efa_gbit is None
    assert seconds(recipe(8), L40S, 1, efa=True) == seconds(recipe(8), L40S, 1)


def test_fsdp2_gathers_twice_in_bf16_and_scatters_once_in_float32() -> None:
    ring = sent(5 / 8, 7 / 8)
    assert seconds(recipe(8), L40S, 1) == pytest.approx((0.5 + 0.5 + 1) * ring, rel=0.02)
    kept = recipe(8, reshard_after_forward=False)
    assert seconds(kept, L40S, 1) == pytest.approx((0.5 + 1) * ring, rel=0.02)
    twice = recipe(8, accumulate=2)
    assert seconds(twice, L40S, 1) == pytest.approx((1 + 1 + 1) * ring, rel=0.02)
    wide = recipe(8, precision="float32")
    assert seconds(wide, L40S, 1) == pytest.approx((1 + 1 + 1) * ring, rel=0.02)


@pytest.mark.parametrize(("efa", "times"), [(False, 2), (True, 4)])
def test_groups_of_shards_within_a_machine_spare_the_network_and_hops(
    efa: bool, times: int
) -> None:
    grouped = seconds(recipe(512, shard_ranks=8), H100, 8, efa)
    assert grouped < seconds(recipe(512), H100, 8, efa) / times


@given(shards=st.sampled_from([1, 2, 4, 8]), machine=st.sampled_from([A100, H100]))
def test_shards_within_one_machine_never_use_its_network(shards: int, machine: Instance) -> None:
    """Whatever the groups, each rank sends the same bytes: 8 - 8/k a weight, in bf16 and float32.

    So groups save hops, and nothing else.
    """
    found = rings(recipe(8, shard_ranks=shards), machine, 8, efa=False)
    unplugged = replace(machine, network_gbit=1e-9)
    assert rings(recipe(8, shard_ranks=shards), unplugged, 8, efa=False).seconds == found.seconds
    bytes_alone = sent(machine.link_gbyte_s, 2 * 7 / 8)
    assert bytes_alone <= found.seconds * (1 + 1e-6)
    assert found.seconds <= seconds(recipe(8), machine, 8) * (1 + 1e-6)
    assert found.crossing_bytes == 0


@given(shards=st.sampled_from([1, 2, 4, 8]), machines=st.sampled_from([2, 4, 8]))
def test_replicas_alone_go_between_machines_where_shards_stay_within(
    shards: int, machines: int
) -> None:
    """The whole gradient goes around the machines once each way, however many ranks share it."""
    found = rings(recipe(8 * machines, shard_ranks=shards), A100, 8, efa=False)
    assert found.shards.machines == 1
    assert found.replicas.machines == machines
    ranks = 8 * machines // shards
    sent_out = 2 * 4 * WEIGHTS * (ranks - 1) / ranks
    assert found.crossing_bytes == pytest.approx(2 * sent_out)
    assert found.seconds >= sent_out / (LINE_SHARE * 100e9 / 8)


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_one_worker_sends_nothing(strategy: str) -> None:
    found = rings(recipe(1, strategy=strategy), L40S, 1, efa=False)
    assert (found.seconds, found.crossing_bytes) == (0, 0)


def test_a_machine_in_another_zone_pays_for_both_ends_of_its_ring() -> None:
    """ViT-B over ImageNet, 800 epochs on 8 machines: 8 bytes a weight go in, and as many out."""
    asked = recipe(8)
    question = Question(pictures=1_281_167, picture_kb=110, machines=("g6e.2xlarge",))
    work = workload(asked, question)
    chosen = choice(asked, question)
    place = fleet(asked, L40S, chosen, 1000, 2e-3)
    assert place.decoders == 0
    found = crossing(work, place, rings(asked, L40S, 1, efa=False))
    ring = 249_600 * 2 * 7 / 8 * 8 * WEIGHTS
    crops = work.images * 224 * 224 * 3 * 2 * (1 / 8 * 7 / 8)  # those that it makes, and needs
    assert found.worker_usd == pytest.approx((ring + crops) * 0.02 / 1e9)
    assert found.worker_usd == pytest.approx(6460 + 675, rel=0.01)
    assert found.decoder_usd == 0


def test_crops_of_a_machine_that_decodes_in_another_zone_are_paid_once_each() -> None:
    asked = recipe(1)
    question = Question(pictures=1_281_167, picture_kb=110, machines=("g6e.2xlarge", "c7i.2xlarge"))
    work = workload(asked, question)
    place = fleet(asked, L40S, choice(asked, question), 10_000, 2e-3)
    assert place.decoders >= 2
    found = crossing(work, place, rings(asked, L40S, 1, efa=False))
    remote = work.images * place.remote * 224 * 224 * 3 * 0.02 / 1e9
    assert found.decoder_usd == pytest.approx(remote / place.decoders)
    assert found.worker_usd == pytest.approx(remote)  # one worker: all that others decode
