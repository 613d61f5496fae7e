"""The plan of a run: what it says hangs together, and what cannot be planned is told."""

import json
import re
from dataclasses import replace
from io import StringIO
from math import inf, isfinite, nan
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from droppos.config import Compute, Model, Optim
from droppos.errors import ConfigError, DataError
from pipelines import cli, recipe_file
from pipelines.instances import catalogue
from pipelines.order import Schedule
from pipelines.plan.figures import as_json, money_figures, pace_figures, saving_figures
from pipelines.plan.fleet import choice, fleet
from pipelines.plan.job import Plan, plan
from pipelines.plan.option import Option, option
from pipelines.plan.question import RANGES, Question
from pipelines.plan.report import notes, show_plan
from pipelines.plan.scaling import SIZES, scale
from pipelines.plan.workload import workload
from pipelines.prepare import prepare
from pipelines.recipe import Data, Recipe, Run
from pipelines.shards import load_manifest
from pipelines.storage import open_place

IMAGENET = Question(
    pictures=1_281_167,
    picture_kb=110,
    machines=("g6e.2xlarge", "g6e.12xlarge", "p5.48xlarge", "c7i.4xlarge"),
)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return recipe_file.from_dict(recipe_file.read("vit_base_imagenet"))


@pytest.fixture(scope="module")
def imagenet(recipe: Recipe) -> Plan:
    return plan(recipe, IMAGENET)


@pytest.fixture(scope="module")
def by_efa(recipe: Recipe) -> Plan:
    return plan(recipe, replace(IMAGENET, efa=True))


def test_a_plan_hangs_together(imagenet: Plan) -> None:
    work, best = imagenet.work, imagenet.best
    assert work.steps == 800 * (1_281_167 // 4096)
    for each in imagenet.options:
        flow, bill = each.flow, each.on_demand
        assert flow.images_per_s <= 1.01 * min(per_s for _, per_s in each.bounds)
        assert bill.hours >= 0.99 * work.images / flow.images_per_s / 3600
        assert bill.usd == pytest.approx(bill.hours * bill.usd_per_hour + bill.requests_usd)
        assert each.spot is not None and each.spot.hours >= 0.99 * bill.hours
        assert each.fleet.machines * each.fleet.machine.gpus >= imagenet.recipe.run.workers
        assert each.decode_cpus_needed <= each.fleet.decode_cpus
    usd = [min(each.on_demand.usd, each.spot.usd) for each in imagenet.options if each.spot]
    assert usd == sorted(usd)
    assert best.cheaper.usd == usd[0]
    assert [each.fleet.machine.name for each in imagenet.options] != list(IMAGENET.machines[:3])


def test_each_size_names_what_bounds_it(imagenet: Plan, by_efa: Plan) -> None:
    step, ring = "GPU step", "communication"
    # 64 images a GPU of eight p5 take less time than their gradients do through one card of each,
    # and more than through all 32; 8 images a GPU take less than either.
    assert imagenet.best.fleet.machine.name == by_efa.best.fleet.machine.name == "p5.48xlarge"
    assert [each.bound for each in imagenet.scaling] == [step, ring, ring, ring]
    assert [each.bound for each in by_efa.scaling] == [step, step, ring, ring]


def test_each_size_has_the_same_steps_and_loses_little(imagenet: Plan) -> None:
    assert [each.gpus for each in imagenet.scaling] == list(SIZES)
    for each in imagenet.scaling:
        assert each.option is not None
        assert 0 <= each.lost < 0.5
        assert each.option.recipe.optim.global_batch == imagenet.recipe.optim.global_batch


def test_a_size_that_cannot_be_says_why_in_the_report_too(recipe: Recipe) -> None:
    shared = replace(
        recipe,
        run=replace(recipe.run, workers=16),
        compute=replace(recipe.compute, strategy="fsdp2", shard_ranks=16),
    )
    found = plan(shared, replace(IMAGENET, machines=("p4d.24xlarge", "c7i.4xlarge")))
    assert [each.option is None for each in found.scaling] == [True, False, False, False]
    assert found.scaling[0].bound == "shard_ranks"
    assert row("bound by", found)[0] == "shard_ranks"
    assert all(json.dumps(each) for each in as_json(found)["scaling"])


def row(label: str, found: Plan) -> list[str]:
    """Read one row of the report: its cells, of which those that are empty are left out."""
    console = Console(width=200, record=True, file=StringIO())
    show_plan(console, found)
    rows = [line.strip() for line in console.export_text().splitlines()]
    last = [line for line in rows if line.startswith(label)][-1]
    return re.split(r"\s{2,}", last)[1:]


def test_a_gpu_too_small_for_a_size_bounds_it(recipe: Recipe) -> None:
    question = replace(IMAGENET, machines=("g6e.2xlarge",))
    tiny = replace(planned(recipe, question), memory_bytes=1e8)
    work, chosen = workload(recipe, question), choice(recipe, question)
    sizes = scale(recipe, work, chosen, question, tiny)
    # Micro-batches keep whole gradients, 0.37 GB; one image a GPU needs none.
    assert [each.bound for each in sizes[:3]] == ["memory of a GPU"] * 3
    assert [each.used for each in sizes] == [0, 0, 0, 4096]


def test_without_losses_nothing_is_lost_and_no_interval_is_advised(recipe: Recipe) -> None:
    often = replace(recipe, run=replace(recipe.run, checkpoint_every=2))
    found = plan(often, replace(IMAGENET, machines=("g6e.12xlarge",), rate=0, hardware_rate=0))
    assert not [note for note in notes(found) if "checkpoint_every" in note]
    assert all(each.lost == 0 for each in found.scaling)
    assert not [each for each in found.scaling if each.bound == "lost machines"]
    told = {figure.name: figure.value for figure in saving_figures(found.best)}
    assert told["lost to saving and losses"] > 0
    assert row("% lost to failures", found) == ["0"] * 4


def test_an_interval_longer_than_the_run_is_told_as_never(recipe: Recipe) -> None:
    rare = replace(IMAGENET, machines=("g6e.12xlarge",), rate=0, hardware_rate=1e-12)
    found = planned(recipe, rare)
    assert found.on_demand.best_interval_s < inf
    assert found.on_demand.best_steps == inf


def test_a_run_shorter_than_its_interval_ends_all_the_same(recipe: Recipe) -> None:
    """Its last step is saved in any case."""
    rarely = replace(recipe, run=replace(recipe.run, checkpoint_every=10**9))
    found = planned(rarely, replace(IMAGENET, machines=("g6e.12xlarge",)))
    assert found.spot is not None
    assert 0 < found.on_demand.hours < inf and 0 < found.spot.hours < inf


def test_more_gpus_than_images_of_a_step_have_nothing_to_do(recipe: Recipe) -> None:
    small = replace(recipe, optim=replace(recipe.optim, global_batch=512))
    last = plan(small, IMAGENET).scaling[-1]
    assert (last.gpus, last.used) == (4096, 512)
    assert last.bound == "the batch: 0.12 images a GPU"


def test_many_machines_on_a_bad_day_are_bound_by_those_that_are_lost(recipe: Recipe) -> None:
    question = replace(IMAGENET, machines=("g6e.2xlarge",), rate=0.2)
    scaling = plan(recipe, question).scaling
    lost = [each.lost for each in scaling]
    assert lost == sorted(lost)
    assert scaling[-1].bound == "lost machines"
    assert scaling[0].bound != "lost machines"


def test_more_gpus_are_never_slower_while_arithmetic_bounds(by_efa: Plan) -> None:
    by_size = [each.option for each in by_efa.scaling if each.bound == "GPU step"]
    paces = [each.flow.images_per_s for each in by_size if each is not None]
    assert len(paces) >= 2
    assert paces == sorted(paces)


def test_few_decode_cpus_bound_the_pace(recipe: Recipe) -> None:
    starved = replace(recipe, data=replace(recipe.data, decode_cpus=4))
    question = replace(IMAGENET, machines=("p5.48xlarge",), decode_per_core=400)
    found = plan(starved, question).best
    assert found.bound == "decoding CPUs"
    # A task waits for storage before it decodes, so a little less than 4 x 400.
    assert 1450 < found.flow.images_per_s < 1600
    assert found.flow.waiting > 0.9


def test_tiny_files_are_bound_by_the_requests_of_a_prefix(recipe: Recipe) -> None:
    question = replace(
        IMAGENET, machines=("p5.48xlarge",), decode_per_core=5000, images_per_worker_s=1e5
    )
    found = planned(recipe, replace(question, picture_kb=2))
    assert found.bound == "object store"
    assert found.requests_s == pytest.approx(5500, rel=0.02)


def planned(recipe: Recipe, question: Question) -> Option:
    """Plan for one machine type, without other sizes."""
    chosen = choice(recipe, question)
    return option(recipe, workload(recipe, question), chosen, question, chosen.training[0])


@pytest.mark.parametrize("spot", [False, True])
@pytest.mark.parametrize("factor", [1.01, 2, 10])
def test_cost_rises_with_price(factor: float, spot: bool, recipe: Recipe, tmp_path: Path) -> None:
    machine = catalogue()["g6e.12xlarge"]
    assert machine.spot is not None

    def usd(factor: float) -> float:
        file = tmp_path / f"{factor}.yaml"
        file.write_text(
            "priced: 2026-10-01\nmachines:\n"
            f"  ours: {{cpus: 48, memory_gb: 384, gpu: L40S, gpus: 4, network_gbit: 100, "
            f"on_demand: {machine.on_demand * factor}, spot: {machine.spot * factor}}}\n"
        )
        found = planned(recipe, replace(IMAGENET, machines=("ours",), catalogue=str(file)))
        assert found.spot is not None
        return (found.spot if spot else found.on_demand).usd

    assert usd(1) < usd(factor)


@given(rate=st.floats(0, 0.05), more=st.floats(1.5, 10))
@settings(max_examples=8, deadline=None)
def test_more_interruptions_never_cost_less(rate: float, more: float, recipe: Recipe) -> None:
    def expected(rate: float) -> float:
        bill = planned(recipe, replace(IMAGENET, machines=("g6e.12xlarge",), rate=rate)).spot
        assert bill is not None
        return bill.expected_factor

    assert expected(rate) <= expected(rate * more)


def test_machines_that_decode_are_added_until_it_keeps_up(recipe: Recipe) -> None:
    chosen = choice(recipe, IMAGENET)
    small = next(each for each in chosen.training if each.name == "g6e.2xlarge")
    none = fleet(recipe, small, chosen, 1000, 2e-3)
    assert (none.machines, none.own_cpus, none.decoders, none.remote) == (8, 48, 0, 0)
    some = fleet(recipe, small, chosen, 40_000, 2e-3)
    assert some.decode_cpus >= 1.2 * 80 > some.decode_cpus - 16
    assert some.remote == pytest.approx(1 - 48 / some.decode_cpus)
    price = some.usd_per_hour(spot=False)
    assert price == pytest.approx(8 * 2.24208 + 3 * 0.714 + 0.2016)


def test_without_a_choice_the_clusters_machines_are_taken(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choice(recipe, Question()).source == "those of cluster.yaml"
    names = [each.name for each in choice(recipe, Question()).training]
    assert names == ["g6e.12xlarge", "g6e.2xlarge"]
    monkeypatch.chdir(tmp_path)
    assert len(choice(recipe, Question()).training) > 3
    Path("cluster.yaml").write_text("available_node_types: {head: {}}")
    with pytest.raises(ConfigError, match=r"cluster\.yaml does not tell its machine types"):
        choice(recipe, Question())


def test_a_run_on_cpus_shares_its_cores_with_decoding() -> None:
    demo = recipe_file.from_dict(recipe_file.read("demo"))
    question = replace(IMAGENET, machines=("m7i.large",), pictures=3584, picture_kb=3)
    alone = replace(demo, run=replace(demo.run, workers=1), data=replace(demo.data, decode_cpus=1))
    found = plan(alone, question)
    assert found.best.service.cores_s > 0
    assert found.scaling == ()


def test_the_data_set_is_counted_in_its_manifest(photographs: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    prepare(str(photographs), str(data), group_rows=10)
    recipe = Recipe(data=Data(path=str(data), window=24), optim=Optim(global_batch=12))
    found = workload(recipe, Question())
    manifest = load_manifest(open_place(str(data)))
    schedule = Schedule(manifest=manifest, seed=0, global_batch=12, window=24, epochs=800)
    assert found.pictures == manifest.rows
    assert found.steps == schedule.steps
    assert found.window == schedule.rows_per_window
    assert found.picture_bytes == manifest.size / manifest.rows
    assert found.source == "counted in the manifest"
    assert workload(recipe, Question(picture_kb=7)).picture_bytes == 7000


@pytest.mark.parametrize(
    ("question", "told"),
    [
        ({"machines": ("g6e.3xlarge",)}, "'g6e.3xlarge' is not known"),
        ({"machines": ("c7i.4xlarge",)}, "no machine type among c7i.4xlarge has a GPU"),
        ({"pictures": None}, "neither data.path nor --pictures and --picture-kb are set"),
        ({"pictures": 100}, "optim.global_batch 4096 is larger than the data set of 100"),
    ],
)
def test_what_cannot_be_planned_is_told(
    recipe: Recipe, question: dict[str, object], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        plan(recipe, replace(IMAGENET, **question))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("rate", -0.1, "--rate must be from 0 to 60, got -0.1"),
        ("missed", 1.5, "--missed must be from 0 to 1, got 1.5"),
        ("mfu", 0, "--mfu must be from 0.0001 to 1, got 0"),
        ("restart_s", inf, "--restart-s must be from 0 to 86400, got inf"),
        ("hardware_rate", nan, "--hardware-rate must be from 0 to 60, got nan"),
        ("decode_per_core", 1e-300, r"--decode-per-core must be from 1 to 1e\+06, got 1e-300"),
        ("pictures", -3, r"--pictures must be from 1 to 1e\+12, got -3"),
        ("picture_kb", 1e12, "--picture-kb must be from 0.01 to 20000, got"),
        ("seed", -1, "--seed must be from 0 to .*, got -1"),
    ],
)
def test_a_figure_out_of_its_range_is_refused(field: str, value: float, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Question(**{field: value})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize(
    ("field", "kind"),
    [("seed", int), ("decode_per_core", float), ("picture_kb", float), ("rate", float)],
)
def test_a_plan_ends_at_both_ends_of_a_figures_range(
    recipe: Recipe, field: str, kind: type, end: int
) -> None:
    extreme = {field: kind(RANGES[field][end])}
    question = replace(IMAGENET, machines=("g6e.12xlarge", "c7i.4xlarge"), **extreme)
    assert isfinite(plan(recipe, question).best.on_demand.hours)


def test_memory_too_small_names_the_micro_batches_that_fit(recipe: Recipe) -> None:
    question = replace(IMAGENET, machines=("g5.xlarge",))
    large = replace(
        recipe, model=Model(size="huge"), run=replace(recipe.run, workers=1, cpus_per_worker=1)
    )
    with pytest.raises(ConfigError, match=r"needs .* GB .* set optim\.accumulate to (\d+)") as told:
        plan(large, question)
    accumulate = int(str(told.value).split("optim.accumulate to ")[1].split(":")[0])
    fitting = replace(large, optim=replace(large.optim, accumulate=accumulate))
    assert plan(fitting, question).best.fits
    half = replace(large, optim=replace(large.optim, accumulate=accumulate // 2))
    with pytest.raises(ConfigError, match=r"set optim\.accumulate"):
        plan(half, question)


def test_a_model_that_no_gpu_holds_is_told() -> None:
    vast = Recipe(
        model=Model(size="huge", width=4096, depth=64, heads=32),
        optim=Optim(global_batch=2),
        compute=Compute(strategy="ddp"),
        run=Run(workers=2),
    )
    with pytest.raises(ConfigError, match=r"take more workers, compute\.activation_checkpointing"):
        plan(vast, replace(IMAGENET, machines=("g5.2xlarge",)))


def test_a_worker_without_room_is_told(recipe: Recipe) -> None:
    greedy = replace(recipe, run=replace(recipe.run, cpus_per_worker=16))
    with pytest.raises(ConfigError, match=r"more than the 8 CPUs of a g6e\.2xlarge"):
        plan(greedy, IMAGENET)


def test_the_report_tells_model_from_measurement(imagenet: Plan) -> None:
    console = Console(width=100, record=True)
    show_plan(console, imagenet)
    text = console.export_text()
    for words in ("simulated", "by formula", "assumed", "measured on one machine", "list price of"):
        assert words in text
    for size in SIZES:
        assert f"{size:,} GPUs" in text
    assert f"on {imagenet.best.fleet.machine.name}" in text


def test_what_a_person_gives_is_not_called_assumed(recipe: Recipe) -> None:
    question = replace(IMAGENET, machines=("g6e.12xlarge",))
    usual = planned(recipe, question)
    told = {figure.name: figure.how for figure in money_figures(usual, question)}
    assert told["interruptions of a machine"] == "assumed"
    own = replace(question, rate=0.3, mfu=0.4)
    given = planned(recipe, own)
    told = {figure.name: figure.how for figure in money_figures(given, own)}
    assert told["interruptions of a machine"] == "given"
    pace = {figure.name: figure.how for figure in pace_figures(given, own, "given")}
    assert pace["step: arithmetic"] == "by formula, 40% of the peak given"


def test_a_machine_with_many_cards_sends_through_one_unless_efa_is_given(recipe: Recipe) -> None:
    two = replace(recipe, run=replace(recipe.run, workers=16))
    question = replace(IMAGENET, machines=("p4d.24xlarge",))
    one_card, efa = plan(two, question), plan(two, replace(question, efa=True))
    told = [
        {figure.name: figure for figure in pace_figures(each.best, each.question, "given")}
        for each in (one_card, efa)
    ]
    assert [each["between machines"].value for each in told] == [100, 400]
    assert told[1]["between machines"].how == "EFA, given"
    ratio = told[0]["step: communication"].value / told[1]["step: communication"].value
    assert 3 < ratio < 4  # hops stay
    assert [note for note in notes(one_card) if "--efa" in note and "400 Gbit/s" in note]
    assert not [note for note in notes(efa) if "--efa" in note]
    # What comes from storage goes through the one card either way.
    assert one_card.best.service.storage_s == efa.best.service.storage_s


def test_what_another_zone_would_cost_is_told_with_its_price(recipe: Recipe) -> None:
    question = replace(IMAGENET, machines=("g6e.2xlarge", "c7i.4xlarge"))
    found = planned(recipe, question)
    told = {figure.name: figure for figure in money_figures(found, question)}
    across = told["machine in another zone"]
    assert across.value == found.crossing.worker_usd > found.on_demand.usd
    assert across.how == "by formula, 0.01 USD per GB each way"
    assert "  one that decodes" not in told  # none is needed
    alone = planned(replace(recipe, run=replace(recipe.run, workers=1)), question)
    assert alone.fleet.decoders == alone.crossing.worker_usd == 0
    assert not [each for each in money_figures(alone, question) if "zone" in each.name]


def test_crops_travel_between_machines_wherever_they_are_decoded(recipe: Recipe) -> None:
    """Ray deals them out in order: of 8 machines that decode for themselves, 7/8 go elsewhere."""
    found = planned(recipe, replace(IMAGENET, machines=("g6e.2xlarge",)))
    assert (found.fleet.machines, found.fleet.remote) == (8, 0)
    pixels = found.flow.images_per_s * 7 / 8 * 3 * 224 * 224
    assert found.pixels_bytes_s == pytest.approx(pixels)


def test_the_command_prints_json_and_refuses_what_the_parser_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = "plan vit_base_imagenet --json --pictures 1281167 --picture-kb 110 --machines"
    cli.main([*words.split(), "p5.48xlarge", "--run.workers", "16"])
    found = json.loads(capsys.readouterr().out)
    assert found["options"][0]["machine"] == "p5.48xlarge"
    assert found["options"][0]["machines"] == 2
    assert {each["gpus"] for each in found["scaling"]} == set(SIZES)
    assert all(
        each["how"] for part in found["best"].values() if part != "p5.48xlarge" for each in part
    )
    with pytest.raises(SystemExit):
        cli.main([*words.split(), "p5.48xlarge", "--rate", "-1"])
    with pytest.raises(SystemExit):
        cli.main(["plan", "--run.workers", "8", "vit_base_imagenet"])


def test_a_data_set_that_is_not_there_is_told(recipe: Recipe, tmp_path: Path) -> None:
    lost = replace(recipe, data=replace(recipe.data, path=str(tmp_path / "none")))
    with pytest.raises(DataError, match="none"):
        plan(lost, Question(machines=("p5.48xlarge",)))
