"""Does it fit: what is accepted can be packed, what is refused cannot, and one number mends it."""

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from io import StringIO
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rich.console import Console

from droppos.config import Compute, Optim
from droppos.errors import ConfigError
from pipelines import cluster, machines, recipe_file
from pipelines.machines import Cluster, Limits, Machine, cluster_of, limits_of
from pipelines.prepare import prepare
from pipelines.recipe import Data, Recipe, Run
from pipelines.resources import Demand, Fit, FitError, most_cpus, solve, table

HEAD = Machine("head", {"CPU": 0})


def machine(cpus: float, gpus: float = 0, count: int = 1, name: str = "node") -> Machine:
    return Machine(name, {"CPU": cpus, "GPU": gpus}, count)


def stand(*kinds: Machine) -> Cluster:
    return Cluster(kinds)


def nodes_of(kinds: Sequence[Machine]) -> tuple[tuple[int, int], ...]:
    return tuple(sorted((kind.cpus, kind.gpus) for kind in kinds for _ in range(kind.count)))


@cache
def packs(nodes: tuple[tuple[int, int], ...], demand: Demand, workers: int, decoders: int) -> bool:
    """Try every way of putting workers on nodes, one by one, and then decode tasks."""
    if workers:
        for i, (cpus, gpus) in enumerate(nodes):
            left = (cpus - demand.cpus_per_worker, gpus - demand.gpu)
            if min(left) >= 0:
                others = tuple(sorted((*nodes[:i], left, *nodes[i + 1 :])))
                if packs(others, demand, workers - 1, decoders):
                    return True
        return False
    return sum(cpus for cpus, _ in nodes) >= decoders


def can_be_packed(cluster: Cluster, demand: Demand, at_once: int) -> bool:
    """Try every number of machines of each kind that an autoscaler may add."""
    for counts in product(*(range(kind.count + 1) for kind in cluster.growth)):
        if cluster.most_added is not None and sum(counts) > cluster.most_added:
            continue
        grown = [replace(kind, count=n) for kind, n in zip(cluster.growth, counts, strict=True)]
        nodes = nodes_of([*cluster.standing, *grown])
        if packs(nodes, demand, at_once * demand.workers, demand.decoding(at_once)):
            return True
    return False


kinds = st.builds(machine, st.integers(0, 5), st.integers(0, 2), st.integers(1, 2))
clusters = st.builds(
    Cluster,
    st.lists(kinds, min_size=1, max_size=2).map(tuple),
    st.lists(kinds, max_size=2).map(
        lambda found: tuple(replace(kind, name=f"kind{i}") for i, kind in enumerate(found))
    ),
    st.none() | st.integers(0, 3),
)
demands = st.builds(
    lambda workers, cpus, gpu, decode, shared: Demand(
        workers=workers,
        cpus_per_worker=cpus,
        gpu=gpu,
        decode_cpus=decode,
        shared_decoding=shared,
        sizes=tuple(size for size in range(1, workers) if 6 % size == 0),
    ),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
    st.none() | st.integers(1, 4),
    st.booleans(),
)


@settings(deadline=None)  # trying every packing takes its time
@given(cluster=clusters, demand=demands, at_once=st.integers(1, 3))
def test_what_is_accepted_can_be_packed_and_what_is_refused_cannot(
    cluster: Cluster, demand: Demand, at_once: int
) -> None:
    try:
        fit = solve(cluster, demand, at_once)
    except ConfigError:
        assert not can_be_packed(cluster, demand, at_once)
        return
    assert fit.left >= 0 and fit.decoding >= 1
    # What it shares out can be had, not only what was asked for.
    shared_out = replace(demand, decode_cpus=fit.decoding)
    assert can_be_packed(cluster, shared_out, at_once)


@settings(deadline=None)  # trying every packing takes its time
@given(cluster=clusters, demand=demands, at_once=st.integers(1, 3))
def test_none_of_the_machines_that_it_says_are_added_could_be_left_out(
    cluster: Cluster, demand: Demand, at_once: int
) -> None:
    assume(can_be_packed(cluster, demand, at_once))
    added = solve(cluster, demand, at_once).added
    assert cluster.most_added is None or sum(added.values()) <= cluster.most_added

    def with_added(counts: Mapping[str, int]) -> bool:
        grown = [replace(kind, count=counts.get(kind.name, 0)) for kind in cluster.growth]
        return can_be_packed(Cluster((*cluster.standing, *grown)), demand, at_once)

    assert with_added(added)
    assert not any(with_added({**added, name: count - 1}) for name, count in added.items())


@settings(deadline=None)  # trying every packing takes its time
@given(cluster=clusters, demand=demands, at_once=st.integers(1, 3))
def test_the_number_it_names_fits_and_one_more_does_not(
    cluster: Cluster, demand: Demand, at_once: int
) -> None:
    """Of workers, the next size that could do the same run; of what is to be added, one less."""
    assume(not can_be_packed(cluster, demand, at_once))
    with pytest.raises(ConfigError) as refused:
        solve(cluster, demand, at_once)
    way_out = str(refused.value).rpartition("; ")[2]
    if match := re.fullmatch(r"lower (\S+) to (\d+)", way_out):
        field, number = match[1], int(match[2])
        if field == "search.max_concurrent":
            assert can_be_packed(cluster, demand, number)
            assert not can_be_packed(cluster, demand, number + 1)
            return
        assert not can_be_packed(cluster, demand, 1)
        name = field.rpartition(".")[2]
        steps = (*demand.sizes, demand.workers)
        more = steps[steps.index(number) + 1] if name == "workers" else number + 1
        assert can_be_packed(cluster, replace(demand, **{name: number}), 1)
        assert not can_be_packed(cluster, replace(demand, **{name: more}), 1)
        return
    assert way_out.startswith("add ")
    cpus, gpus = (
        int(found[1]) if (found := re.search(rf"(\d+) {what}", way_out)) else 0
        for what in ("CPU", "GPU")
    )

    def with_machine(cpus: int, gpus: int) -> Cluster:
        return replace(cluster, standing=(*cluster.standing, machine(cpus, gpus)))

    assert can_be_packed(with_machine(cpus, gpus), demand, 1)
    assert not can_be_packed(with_machine(cpus - 1, gpus), demand, 1)
    assert not gpus or not can_be_packed(with_machine(cpus, gpus - 1), demand, 1)


@pytest.mark.parametrize(
    ("cluster", "demand", "at_once", "complaint"),
    [
        (
            stand(machine(5)),
            Demand(decode_cpus=1),
            3,
            r"search\.max_concurrent 3: so many trials need 6 CPUs \(3 x run\.workers 1 x "
            r"run\.cpus_per_worker 1 to train, 3 x 1 to decode\), the cluster has 5 CPUs; "
            r"lower search\.max_concurrent to 2$",
        ),
        (
            stand(machine(5)),
            Demand(decode_cpus=3, shared_decoding=True),
            3,
            r"need 6 CPUs \(.* to train, 3 to decode\), .*; lower search\.max_concurrent to 2$",
        ),
        (stand(machine(1)), Demand(), 3, r"already one trial needs .*2 CPUs.* 1 CPU; add 1 CPU$"),
        (
            stand(machine(4)),
            Demand(workers=4, sizes=(1, 2)),
            1,
            r"^the run needs 5 CPUs .*the cluster has 4 CPUs; lower run\.workers to 2$",
        ),
        (stand(machine(4)), Demand(decode_cpus=8), 1, r"lower data\.decode_cpus to 3$"),
        (
            stand(machine(2, count=2)),
            Demand(cpus_per_worker=3),
            1,
            r"needs 4 CPUs .*the cluster has 4 CPUs, but a worker's 3 CPUs must be on one machine: "
            r"2 x 2 CPUs have room for 0 of 1; lower run\.cpus_per_worker to 2$",
        ),
        (
            stand(machine(8, gpus=2)),
            Demand(workers=4, gpu=True, sizes=(1, 2)),
            1,
            r"needs 5 CPUs and 4 GPUs .*has 8 CPUs and 2 GPUs; lower run\.workers to 2$",
        ),
        (
            stand(machine(2, gpus=4), machine(8)),
            Demand(workers=4, gpu=True, sizes=(1, 2)),
            1,
            r"has 10 CPUs and 4 GPUs, but a worker's 1 CPU \+ 1 GPU must be on one machine: "
            r"1 x 2 CPUs \+ 4 GPUs, 1 x 8 CPUs have room for 2 of 4; lower run\.workers to 2$",
        ),
        (
            stand(machine(8, gpus=2)),
            Demand(gpu=True),
            3,
            r"6 CPUs and 3 GPUs .*has 8 CPUs and 2 GPUs; lower search\.max_concurrent to 2$",
        ),
        (stand(machine(8)), Demand(gpu=True), 1, r"add a machine with 1 GPU and 1 CPU$"),
        (stand(HEAD), Demand(), 1, r"the cluster has 0 CPUs; add a machine with 2 CPUs$"),
        (
            Cluster((HEAD,), (machine(2, count=2),)),
            Demand(workers=5, sizes=(1,)),
            1,
            r"the cluster has 4 CPUs at its largest; lower run\.workers to 1$",
        ),
    ],
)
def test_a_refusal_says_what_is_needed_what_there_is_and_the_one_number(
    cluster: Cluster, demand: Demand, at_once: int, complaint: str
) -> None:
    with pytest.raises(FitError, match=complaint) as refused:
        solve(cluster, demand, at_once)
    error = refused.value
    assert str(error) == f"{error.found}; {error.way_out}"
    assert error.way_out.startswith(("lower ", "add "))
    sent = pickle.loads(pickle.dumps(error))  # as Ray does, out of a trial
    assert (type(sent), str(sent)) == (FitError, str(error))


def test_decoding_gets_all_that_training_leaves() -> None:
    assert solve(stand(machine(9)), Demand(), 2).decoding == 3
    shared = solve(stand(machine(9)), Demand(shared_decoding=True), 2)
    assert (shared.decoding, shared.decoding_at_once, shared.left) == (7, 7, 0)
    bounded = solve(stand(machine(9)), Demand(decode_cpus=2), 2)
    assert (bounded.training, bounded.decoding, bounded.left) == (1, 2, 3)


def test_a_demand_takes_only_sizes_that_could_do_the_same_run() -> None:
    recipe = Recipe(
        optim=Optim(global_batch=48, accumulate=2),
        compute=Compute(strategy="fsdp2", shard_ranks=2),
        data=Data(decode_cpus=5),
        run=Run(workers=12, cpus_per_worker=3),
    )
    demand = Demand.of(recipe, gpu=True)
    assert (demand.workers, demand.cpus_per_worker, demand.decode_cpus) == (12, 3, 5)
    assert demand.sizes == (2, 4, 6, 8)
    for size in demand.sizes:
        replace(recipe, run=replace(recipe.run, workers=size))


def test_an_elastic_run_is_asked_for_at_its_smallest_size() -> None:
    recipe = Recipe(
        optim=Optim(global_batch=24),
        compute=Compute(strategy="ddp"),
        run=Run(workers=12, min_workers=5),
    )
    demand = Demand.of(recipe, gpu=False)
    assert (demand.workers, demand.sizes) == (6, (1, 2, 3, 4))
    with pytest.raises(ConfigError, match=r"run\.min_workers 6 x .*; lower run\.min_workers to 4$"):
        solve(stand(machine(5)), demand)


def shipped() -> Limits:
    return limits_of(yaml.safe_load((Path(__file__).parents[2] / "cluster.yaml").read_text()))


@pytest.mark.parametrize("name", ["vit_base_imagenet", "vit_large_imagenet"])
def test_the_shipped_cluster_grows_from_a_head_without_cpus_to_the_shipped_recipes(
    name: str,
) -> None:
    cluster = cluster_of([HEAD], [], shipped())
    assert most_cpus(cluster) == 2 * 48 + 8 + 4 * 16
    recipe = recipe_file.from_dict(recipe_file.read(name))
    fit = solve(cluster, Demand.of(recipe, gpu=True))
    assert (fit.gpus, fit.added["gpu"]) == (9, recipe.run.workers / 4)


def test_machines_that_stand_are_not_added_once_more() -> None:
    limits = Limits(
        (machine(16, count=4, name="decode"), machine(8, 1, 8, name="gpu")), machines=12
    )
    standing = [machine(8, 1), machine(8, 1), machine(16)]
    cluster = cluster_of([HEAD], standing, limits)
    assert [(kind.name, kind.count) for kind in cluster.growth] == [("decode", 3), ("gpu", 6)]
    assert cluster.most_added == 9
    assert most_cpus(cluster) == 128
    fit = solve(cluster, Demand(workers=3, gpu=True))
    assert fit.added == {"gpu": 1}
    assert solve(cluster, Demand(workers=2, gpu=True)).added == {}
    assert solve(cluster, Demand(decode_cpus=40)).added == {"decode": 1}  # no GPU for decoding
    assert solve(cluster_of([HEAD], [], limits), Demand(decode_cpus=40)).added == {"decode": 3}


def test_a_bound_on_all_machines_together_is_kept() -> None:
    limits = Limits((machine(16, count=4, name="decode"), machine(4, 1, 4, name="gpu")), machines=4)
    cluster = cluster_of([HEAD], [], limits)
    assert solve(cluster, Demand(workers=3, gpu=True)).cpus == 3 * 4 + 16
    with pytest.raises(ConfigError, match=r"has 16 CPUs and 4 GPUs at its largest"):
        solve(cluster, Demand(workers=4, gpu=True, decode_cpus=13))


def fake_ray(monkeypatch: pytest.MonkeyPatch, config: object, *nodes: dict[str, float]) -> None:
    """What Ray would say of a cluster; the autoscaler's limits are in `config`."""
    here = [{"Alive": True, "NodeID": f"n{i}", "Resources": has} for i, has in enumerate(nodes)]
    monkeypatch.setattr(machines.ray, "nodes", lambda: here)
    state = SimpleNamespace(get_cluster_config=lambda: config)
    monkeypatch.setattr(machines.ray._private.state, "state", state)
    monkeypatch.setattr(machines, "_of_head", lambda head: None)


def group(name: str, most: int, **resources: int) -> SimpleNamespace:
    return SimpleNamespace(name=name, resources=resources, min_count=0, max_count=most)


AT_HEAD = {machines.HEAD: 1.0, "memory": 1e9}


def test_a_hosted_autoscaler_tells_its_limits_by_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [group("head", 1, CPU=0), group("gpu", 4, CPU=8, GPU=1), group("cpu", -1, CPU=16)]
    limits = {"CPU": 72}
    config = SimpleNamespace(node_group_configs=groups, max_resources=limits)
    fake_ray(monkeypatch, config, AT_HEAD, {"CPU": 8.0, "GPU": 1.0, "memory": 1e9})
    cluster = machines.read_cluster()
    assert [(kind.name, kind.count) for kind in cluster.growth] == [("gpu", 3), ("cpu", 2)]
    fit = solve(cluster, Demand(workers=2, gpu=True))
    assert (fit.cpus, fit.gpus, fit.added) == (64, 4, {"gpu": 1})
    config.max_resources = {}
    assert solve(machines.read_cluster(), Demand(workers=2)).cpus == 32 + 16 * machines.UNLIMITED


def test_where_only_totals_are_known_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(node_group_configs=[], max_resources={"CPU": 64, "GPU": 8})
    fake_ray(monkeypatch, config, AT_HEAD)
    fit = solve(machines.read_cluster(), Demand(workers=8, cpus_per_worker=4, gpu=True))
    assert (fit.cpus, fit.gpus) == (64, 8)
    assert "only totals are known" in printed(fit)


def test_without_an_autoscaler_what_stands_is_all(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ray(monkeypatch, None, AT_HEAD, {"CPU": 4.0}, {"CPU": 4.0})
    cluster = machines.read_cluster()
    assert (most_cpus(cluster), cluster.growth) == (8, ())


def test_runs_and_searches_are_solved_on_the_cluster_they_join(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_ray(monkeypatch, None, AT_HEAD, {"CPU": 5.0, "GPU": 2.0})
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 5.0, "GPU": 2.0})
    cpu, gpu = (Recipe(compute=Compute(device=device)) for device in ("cpu", "cuda"))
    run = cluster.connect(cpu)
    assert (run.training, run.decoding, run.training_gpus) == (1, 4, 0)
    with pytest.raises(ConfigError, match=r"lower search\.max_concurrent to 2$"):
        cluster.connect(cpu, 4)
    shared = cluster.connect(cpu, 4, shared_decoding=True)
    assert (shared.training, shared.decoding) == (1, 1)
    with pytest.raises(ConfigError, match=r"lower search\.max_concurrent to 2$"):
        cluster.connect(gpu, 4, shared_decoding=True)
    # Each worker of compute.device auto has a GPU where the cluster has any.
    assert cluster.connect(Recipe(), 2).training_gpus == 1


def printed(fit: Fit) -> str:
    console = Console(file=StringIO(), width=80)
    console.print(table(fit))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("shared", [False, True])
def test_the_table_fits_80_columns_and_adds_up(shared: bool) -> None:
    cluster = cluster_of([HEAD], [], shipped())
    demand = Demand(workers=2, cpus_per_worker=2, gpu=True, decode_cpus=8, shared_decoding=shared)
    text = printed(solve(cluster, demand, 4))
    assert max(map(len, text.splitlines())) <= 80
    rows = [line.split() for line in text.splitlines()]
    training, decoding, left, whole = (
        next(row for row in rows if row[:1] == [name])
        for name in ("training", "decoding", "left", "of")
    )
    assert training[-3:] == ["4", "16", "8"]
    assert decoding[-2:] == ["8" if shared else "32", "0"]
    for column in (-2, -1):
        parts = (int(row[column]) for row in (training, decoding, left))
        assert sum(parts) == int(whole[column])
    assert "all at once only when the autoscaler has added" in " ".join(text.split())


def test_the_launchers_file_is_found_by_the_autoscaler_that_was_given_it(tmp_path: Path) -> None:
    """As `ray up` starts it on the head, beside others; what matters are the process's flags."""
    config = {
        "head_node_type": "head",
        "max_workers": 5,
        "available_node_types": {
            "head": {"resources": {"CPU": 0}},
            "gpu": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 2},
            "decode": {"resources": {"CPU": 16}},
        },
    }
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    sleeps = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    monitors = [
        subprocess.Popen(
            [*sleeps, f"--gcs-address=10.0.0.1:{port}", f"--autoscaling-config={tmp_path / file}"],
            stdout=subprocess.PIPE,
        )
        for port, file in (("1", "none.yaml"), ("65001", "ours.yaml"))
    ]
    try:
        for monitor in monitors:
            assert monitor.stdout is not None
            monitor.stdout.readline()
        found = machines.launcher_limits("65001")
    finally:
        for monitor in monitors:
            monitor.kill()
            monitor.communicate()
    gpu = Machine("gpu", {"CPU": 8, "GPU": 1}, 2)
    assert found == Limits((gpu, Machine("decode", {"CPU": 16}, 5)), machines=5)
    assert machines.launcher_limits("65001") is None  # it has ended


@pytest.mark.long
def test_without_the_solver_two_trials_on_two_cpus_wait_for_ever(
    tmp_path: Path, photographs: Path
) -> None:
    prepare(str(photographs), str(tmp_path / "data"), group_rows=8)
    script = str(Path(__file__).with_name("starved.py"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, str(tmp_path / "data")],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    steps = told["steps"]
    # Each worker has its CPU, and nothing is read: no batch, no end, no error.
    assert (told["starved"], told["ended"]) == ([0, 0], 0)
    # It was the CPUs and nothing else: one trial ends, and the other gets all its batches.
    assert told["freed"] == steps
    # The solver refuses that very demand at once, and what it accepts instead runs through.
    assert told["refused"].endswith("lower search.max_concurrent to 1")
    assert told["refused_cpu_s"] < 1
    assert told["accepted"] == steps
