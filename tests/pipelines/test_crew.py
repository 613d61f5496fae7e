"""How many workers a run may have, and what it is told to do about nodes that go and come."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from time import monotonic, sleep
from typing import Any

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.experimental.internal_kv import _internal_kv_get

from droppos.config import Compute, Optim
from droppos.errors import ConfigError
from pipelines import crew
from pipelines.crew import Advice, Room, advise, best_size, send_signal
from pipelines.recipe import Recipe, Run

NOW = 1000.0


def recipe(workers: int = 4, least: int | None = 1, batch: int = 16, accumulate: int = 1) -> Recipe:
    return Recipe(
        optim=Optim(global_batch=batch, accumulate=accumulate),
        compute=Compute(strategy="fsdp2"),
        run=Run(workers=workers, min_workers=least, notice_margin_s=20),
    )


def room(*cpus: float, gpus: float = 0, going: dict[str, float] | None = None) -> Room:
    nodes = {f"n{i}": {"CPU": count, "GPU": gpus} for i, count in enumerate(cpus)}
    return Room(nodes, going or {})


@given(
    workers=st.integers(1, 64),
    each=st.integers(1, 40),
    accumulate=st.integers(1, 6),
    least=st.integers(1, 64),
)
def test_any_size_does_the_same_steps_in_micro_batches_no_larger(
    workers: int, each: int, accumulate: int, least: int
) -> None:
    whole = recipe(workers, min(least, workers), workers * each * accumulate, accumulate)
    assert max(whole.sizes) == workers
    for size in whole.sizes:
        at = whole.at(size)
        assert at.run.workers == size
        assert at.worker_batch * size * at.optim.accumulate == whole.optim.global_batch
        assert at.worker_batch <= whole.worker_batch
    assert whole.at(workers).optim == whole.optim


def test_a_run_of_a_fixed_size_has_no_other() -> None:
    assert recipe(4, None).sizes == (4,)
    with pytest.raises(ConfigError, match=r"from 1 to run.workers \(4\).*got 5"):
        Run(workers=4, min_workers=5)


@pytest.mark.parametrize(
    ("there", "gpu", "cpus", "fit"),
    [
        (room(2, 2), False, 1, 3),  # one CPU is left to decode
        (room(2), False, 2, 0),
        (room(3, 3), False, 2, 2),
        (room(16, 16, gpus=8), True, 1, 16),
        (room(16, gpus=0), True, 1, 0),
        (room(), False, 1, 0),
    ],
)
def test_workers_fit_where_a_cpu_is_left_to_decode(
    there: Room, gpu: bool, cpus: int, fit: int
) -> None:
    whole = recipe()
    whole = replace(whole, run=replace(whole.run, cpus_per_worker=cpus))
    assert there.workers(whole, gpu) == fit


def test_the_best_size_shares_the_batch_evenly() -> None:
    assert [best_size(recipe(6, 1, 12), fit) for fit in range(8)] == [None, 1, 2, 3, 4, 4, 6, 6]
    assert best_size(recipe(4, 2), 1) is None


def told(there: Room, size: int, **changed: int) -> Advice:
    return advise(recipe(**changed), gpu=False, size=size, homes={"a", "b"}, room=there, now=NOW)


def test_without_news_a_group_goes_on() -> None:
    assert told(room(3, 2), 4) == Advice()
    assert told(room(1, 1), 4) == Advice()  # what is lost already tells itself


def test_room_for_more_is_taken_at_the_next_checkpoint() -> None:
    advice = told(room(3, 2), 2)
    assert advice.leave and not advice.urgent and not advice.save


def test_a_notice_is_a_checkpoint_and_a_move_if_there_is_where_to() -> None:
    advice = told(room(5, going={"a": NOW + 100}), 4)
    assert advice.save == {"a"} and advice.urgent and advice.leave
    assert told(room(5, going={"c": NOW + 100}), 4) == Advice()  # nobody works there


def test_with_nowhere_to_go_it_works_until_shortly_before() -> None:
    """As spot machines go, all at once say: two minutes of work are not thrown away."""
    assert told(room(going={"a": NOW + 100}), 4) == Advice(save=frozenset({"a"}))
    late = told(room(going={"a": NOW + 19}), 4)
    assert late.urgent and late.save == {"a"}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_signal_reaches_processes_on_their_node() -> None:
    here = ray.get_runtime_context().get_node_id()
    sleepers = [
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)
    ]
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    send_signal([(here, process.pid) for process in [gone, *sleepers]], signal.SIGKILL)
    assert [process.wait(10) for process in sleepers] == [-signal.SIGKILL] * 2


class Coordinator:
    """Stands in for Ray's, to be asked without a cluster."""

    def __init__(self, asked: list[int]) -> None:
        self.request_resources = self.cancel_request = self
        self.asked = asked

    def remote(self, name: str, bundles: Sequence[Any] = (), **how: Any) -> None:
        assert name.startswith("droppos-")
        self.asked.append(len(bundles))


@pytest.mark.parametrize(("least", "expected"), [(1, [5, 1, 0, 5, 0]), (None, [])])
def test_room_is_wanted_besides_what_runs_until_the_driver_leaves(
    least: int | None, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, leaving the cluster inside left the wish to the autoscaler, and raised."""
    joined, asked = True, list[int]()
    monkeypatch.setattr(crew.ray, "is_initialized", lambda: joined)
    monkeypatch.setattr(crew, "_coordinator", lambda: Coordinator(asked))
    wanted = crew.RoomWanted(recipe(workers=4, least=least), gpu=False)
    wanted.besides(running=0)
    wanted.besides(running=3)
    wanted.besides(running=4)
    wanted.besides(running=0)
    wanted.close()
    wanted.besides(running=0)
    joined = False
    wanted.close()
    assert asked == expected


def wished_for(cpus: int) -> int:
    """Count what the autoscaler is asked for, of bundles with so many CPUs."""
    wished = _internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL)
    return sum(each == {"CPU": cpus} for each in json.loads(wished or b"[]"))


def until_wished(count: int, cpus: int) -> None:
    ends = monotonic() + 60
    while wished_for(cpus) != count:
        assert monotonic() < ends, f"the autoscaler is asked for {wished_for(cpus)}, not {count}"
        sleep(0.2)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_room_is_wanted_beside_what_others_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, the next word of Ray's own coordinator wiped it out: no room for more was asked for."""
    monkeypatch.setattr(crew, "LAPSES_S", 5.0)
    monkeypatch.setattr(crew, "ASK_S", 0.5)
    whole = replace(recipe(), run=Run(name="whole", workers=4, min_workers=1, cpus_per_worker=7))
    train, wanted = crew._coordinator(), crew.RoomWanted(whole, gpu=False)
    wanted.besides(running=0)
    until_wished(4, cpus=7)
    wanted.besides(running=3)
    train.request_resources.remote("train", [{"CPU": 5}] * 3, expire_after_s=600)
    until_wished(3, cpus=5)
    sleep(6)  # longer than until it lapses
    ray.get(train.get_reserved_resources.remote("train", recompute=True))
    assert (wished_for(cpus=5), wished_for(cpus=7)) == (3, 1)
    wanted._ended.set()  # as if the driver were killed
    sleep(6)
    ray.get(train.get_reserved_resources.remote("train", recompute=True))
    assert (wished_for(cpus=5), wished_for(cpus=7)) == (3, 0)
    train.cancel_request.remote("train")
    until_wished(0, cpus=5)


def test_room_that_another_job_holds_is_none() -> None:
    whole = Room({"a": {"CPU": 8}}, {}, free={"CPU": 1})
    assert told(whole, 2) == Advice()
    assert told(replace(whole, free={"CPU": 2}), 2).leave
    with_most = advise(
        recipe(), gpu=False, size=2, homes=set(), room=replace(whole, free=None), most=2
    )
    assert with_most == Advice()


def test_shards_are_shared_evenly_too() -> None:
    whole = Recipe(
        optim=Optim(global_batch=24),
        compute=Compute(strategy="fsdp2", shard_ranks=4),
        run=Run(workers=12, min_workers=1),
    )
    assert whole.sizes == (4, 8, 12)
    with pytest.raises(ConfigError, match=r"run\.workers must be a multiple of.*4, got 6"):
        replace(whole, run=Run(workers=6))
