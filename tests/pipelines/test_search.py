"""Searches: on a real Ray, trials are real runs; what is refused is refused before any begins."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from time import sleep
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from mlflow.tracking import MlflowClient
from ray.tune.search import Searcher
from rich.console import Console

from droppos.config import Compute, Method, Model, Optim
from droppos.errors import ConfigError
from pipelines import checkpoints, recipe_file
from pipelines.groundwork import plan
from pipelines.prepare import prepare
from pipelines.proposals import Proposals, scheduler_of, source_of
from pipelines.recipe import Data, Measure, Recipe, Run, Search
from pipelines.recipe_file import to_yaml
from pipelines.search import RECORD, best_recipe, check, ready, search, shared_tracking
from pipelines.search_screen import SearchScreen
from pipelines.space import Point
from pipelines.storage import open_place
from pipelines.tracking import tracking_uri
from pipelines.trial_run import Common, TrialRun
from pipelines.trials import Record, State, TrialTable, trial_recipe

pytestmark = [
    # MLflow's own mapping of its tables uses what SQLAlchemy 2.1 deprecates.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning"),
]

SPACE = ("method.sigma=choice(0, 1)", "method.mask_ratio=uniform(0.4, 0.6)")


@pytest.fixture(scope="module")
def data(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    dest = str(tmp_path_factory.mktemp("data") / "photographs")
    prepare(str(photographs), dest, group_rows=16)
    return dest


@pytest.fixture
def tiny(data: str, tmp_path: Path) -> Recipe:
    """Four steps of a model of 30,000 parameters."""
    return Recipe(
        model=Model(
            size="tiny",
            image_size=(32, 32),
            patch_size=8,
            width=32,
            depth=1,
            heads=2,
            decoder_width=32,
            decoder_depth=1,
            decoder_heads=2,
        ),
        method=Method(attentive=False),
        optim=Optim(epochs=1, global_batch=16, warmup_epochs=0),
        compute=Compute(strategy="ddp", precision="float32", device="cpu"),
        data=Data(path=data, holdout=data, decode_cpus=1),
        run=Run(name="ratios", storage=str(tmp_path / "runs"), log_every=1, checkpoint_every=2),
        measure=Measure(pictures=16),
        search=Search(space=SPACE, trials=2, max_concurrent=2, objective="position_skill"),
    )


def changed(recipe: Recipe, section: str, **values: Any) -> Recipe:
    return replace(recipe, **{section: replace(getattr(recipe, section), **values)})


def steps_logged(client: MlflowClient, run: str) -> list[tuple[int, int]]:
    history = client.get_metric_history(run, "train/loss")
    return [(metric.step, metric.timestamp) for metric in history]


def points_of(recipe: Recipe, table: TrialTable | None = None) -> list[Point]:
    table = table or TrialTable(open_place(recipe.home))
    source, left = source_of(recipe, table)
    return [point for _ in range(left) if (point := source.next()) is not None]


def test_the_list_of_trials_is_the_same_whenever_it_is_asked_for(tiny: Recipe) -> None:
    two = points_of(tiny)
    four = points_of(changed(tiny, "search", trials=4))
    assert two == points_of(tiny) == four[:2]
    assert len({str(point) for point in four}) == 4


def test_a_trials_name_tells_its_values(tiny: Recipe) -> None:
    grid = ("method.sigma=grid(0, 1.5)", "method.attentive=choice(true, false)")
    tiny = changed(tiny, "search", space=grid, algorithm="grid")
    points = points_of(tiny)
    trials = [trial_recipe(tiny, plan(tiny), number, point) for number, point in enumerate(points)]
    assert [trial.run.name for trial in trials] == [
        "ratios-000-sigma=0-attentive=True",
        "ratios-001-sigma=0-attentive=False",
        "ratios-002-sigma=1.5-attentive=True",
        "ratios-003-sigma=1.5-attentive=False",
    ]
    assert all(trial.run.storage == tiny.home for trial in trials)


def test_what_was_tried_is_not_tried_again_and_what_was_under_way_comes_first(
    tiny: Recipe,
) -> None:
    for algorithm in ("random", "tpe"):
        tiny = changed(tiny, "search", algorithm=algorithm, trials=6)
        table = TrialTable(open_place(tiny.home))
        first = points_of(tiny)
        for number, point in enumerate(first[:3]):
            record = Record(number, trial_recipe(tiny, plan(tiny), number, point).run.name, point)
            record.state, record.objective = ("running", None) if number == 1 else ("finished", 0.5)
            table.records[record.name] = record
        source, left = source_of(tiny, table)
        assert left == 3
        proposals = Proposals(tiny, plan(tiny), table, source, left)
        asked = [proposals.suggest(str(number)) for number in range(5)]
        assert [each["number"] for each in asked[:4]] == [1, 3, 4, 5]
        assert asked[4] == Searcher.FINISHED
        assert not any(each["point"] in first[:3] for each in asked[1:4])


def test_tpe_looks_where_it_was_good(tiny: Recipe) -> None:
    search = {"space": ("method.sigma=uniform(0, 2)",), "algorithm": "tpe", "trials": 40}
    source, left = source_of(changed(tiny, "search", **search), TrialTable(open_place(tiny.home)))
    tried = []
    for _ in range(left):
        point = source.next()
        assert point is not None
        tried.append(float(point["method.sigma"]))  # type: ignore[arg-type]
        source.told(point, -abs(tried[-1] - 1.5))
    assert sum(abs(value - 1.5) < 0.25 for value in tried[20:]) > 10


def test_tpe_ends_when_a_space_is_drawn_out(tiny: Recipe) -> None:
    search = {"space": ("method.sigma=choice(0, 1)",), "algorithm": "tpe", "trials": 9}
    points = points_of(changed(tiny, "search", **search))
    assert sorted(point["method.sigma"] for point in points) == [0, 1]  # type: ignore[type-var]


def test_asha_knows_of_trials_that_were_measured_before(tiny: Recipe) -> None:
    tiny = changed(changed(tiny, "optim", epochs=9), "search", scheduler="asha", grace_epochs=1)
    table = TrialTable(open_place(tiny.home))
    states: list[State] = ["finished", "running", "stopped", "failed"]
    for number, state in enumerate(states):
        skill = 0.5 if number in {1, 2} else 0.2
        table.records[str(number)] = Record(
            number, str(number), {}, state=state, steps=36, history=[(4, skill)]
        )
    trial: Any = SimpleNamespace(trial_id="x7", config={"name": "new"})
    nobody: Any = None
    for ended, decision in ((TrialTable(open_place(tiny.home)), "CONTINUE"), (table, "STOP")):
        asha = scheduler_of(tiny, ended)
        asha.on_trial_add(nobody, trial)
        poor = {"epoch": 1.0, "objective": 0.21}  # only those that were under way did better
        assert asha.on_trial_result(nobody, trial, poor) == decision
    # One that goes on has another identifier, and is not held against itself.
    again: Any = SimpleNamespace(trial_id="x8", config={"name": "1"})
    asha = scheduler_of(tiny, table)
    asha.on_trial_add(nobody, again)
    assert asha.on_trial_result(nobody, again, {"epoch": 1.0, "objective": 0.01}) == "CONTINUE"


def test_a_trial_of_a_population_goes_on_from_the_checkpoint_of_another(tiny: Recipe) -> None:
    """It was killed after it took that over, and before it made one of its own."""
    for scheduler, goes_on in (("none", False), ("pbt", True)):
        searched = changed(tiny, "search", scheduler=scheduler)
        common = Common(searched, plan(searched), "knn", "parent", None, None)
        trial = TrialRun.__new__(TrialRun)
        trial.setup({"number": 0, "point": {}, "name": "it"}, common)
        assert trial._adopted == goes_on


def test_the_same_weights_are_taken_again_with_other_values(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not twice with the same: then its process died after it had gone on from there."""
    taken: list[str] = []
    monkeypatch.setattr(checkpoints, "at", lambda uri: uri)
    monkeypatch.setattr(checkpoints, "adopt", lambda home, saved: taken.append(saved))
    tiny = changed(tiny, "search", scheduler="pbt")
    common = Common(tiny, plan(tiny), "knn", "parent", None, None)
    (tmp_path / "checkpoint.json").write_text(json.dumps({"uri": "s3://bucket/other/step-9"}))
    for sigma in (1.0, 1.0, 2.0):
        trial = TrialRun.__new__(TrialRun)
        trial.setup({"number": 0, "point": {"method.sigma": sigma}, "name": "it"}, common)
        trial.load_checkpoint(str(tmp_path))
    assert len(taken) == 2


def test_the_best_recipe_is_a_run_beside_the_search(tiny: Recipe) -> None:
    point = points_of(tiny)[0]
    best = best_recipe(tiny, plan(tiny), Record(0, "any", point))
    assert (best.run.name, best.run.storage) == ("ratios-best", tiny.run.storage)
    assert best.method.sigma == point["method.sigma"]
    assert best.search == Search()


@pytest.mark.parametrize(
    ("section", "values", "complaint"),
    [
        ("data", {"path": None}, r"data\.path is not set"),
        ("run", {"min_workers": 1}, "trials of a search have a fixed size"),
        ("data", {"holdout": None}, r"data\.holdout is not set: a search compares"),
        ("method", {"objective": "pixels"}, r"pixels has no positions, and search\.objective"),
        ("search", {"scheduler": "asha"}, "from epoch 10 on, but they have 1 epochs"),
        ("search", {"scheduler": "pbt", "trials": 3}, "whole population of 3 at once"),
        (
            "search",
            {"scheduler": "pbt", "space": ("optim.epochs=choice(1, 2)",)},
            r"optim\.epochs does not allow",
        ),
        (
            "search",
            {"space": ("method.objective=choice(position, pixels)",), "trials": 9},
            "pixels",
        ),
        ("search", {"space": ("optim.global_batch=choice(16, 1600)",), "trials": 9}, "larger than"),
        ("search", {"algorithm": "grid"}, r"grid needs grid\(\.\.\.\) or choice"),
        ("search", {"space": ("data.path=choice(a, b)",)}, "may not vary"),
    ],
)
def test_what_could_not_be_compared_or_run_is_refused_before_the_start(
    tiny: Recipe, section: str, values: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        search(changed(tiny, section, **values))
    assert not Path(tiny.home).exists()


def test_another_patch_grid_is_another_figure(tiny: Recipe) -> None:
    tiny = changed(tiny, "model", image_size=(224, 224), patch_size=None, width=None, heads=None)
    sizes = ("model.size=choice(base, huge)",)
    tiny = changed(changed(tiny, "model", size="base"), "search", space=sizes, trials=9)
    with pytest.raises(ConfigError, match=r"model\.size huge has a patch grid of \(16, 16\)"):
        check(tiny, plan(tiny), "position_skill")
    check(tiny, plan(tiny), "knn")


def test_a_search_is_gone_on_with_only_as_it_was_begun(tiny: Recipe) -> None:
    record = open_place(tiny.home) / RECORD
    _, _, fixed = ready(tiny, resume=True)
    assert not record.exists()
    record.write_bytes(json.dumps(fixed).encode())
    ready(changed(tiny, "search", trials=9, max_concurrent=1), resume=True)
    with pytest.raises(ConfigError, match=r"optim\.epochs: 1 there, 2 now"):
        ready(changed(tiny, "optim", epochs=2), resume=True)
    with pytest.raises(ConfigError, match="already has a search; add --resume"):
        ready(tiny, resume=False)
    # One that an older droppos began, which did not know a field, goes on.
    del fixed["method.guide"]
    record.write_bytes(json.dumps(fixed).encode())
    with pytest.raises(ConfigError, match=r"method\.guide: 'picture' there, 'student' now"):
        ready(changed(tiny, "method", guide="student"), resume=True)
    ready(tiny, resume=True)


@pytest.mark.parametrize(
    ("given", "shared"),
    [
        ("https://mlflow.example", "https://mlflow.example"),
        ("https://me:secret@mlflow.example", None),
    ],
)
def test_a_password_is_not_written_into_recipes(
    given: str, shared: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert shared_tracking(Recipe()) == shared


def test_a_relative_database_is_the_same_one_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    assert shared_tracking(Recipe()) == f"sqlite:///{tmp_path}/mlflow.db"


@contextmanager
def a_search(recipe: Recipe, folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A search in a process of its own, on the tests' cluster."""
    file = folder / "search.yaml"
    file.write_text(to_yaml(recipe))
    root = Path(__file__).parents[2]
    address = ray.get_runtime_context().gcs_address
    with (folder / "search.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", "search", str(file)],
            stdout=log,
            stderr=log,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), "RAY_ADDRESS": address},
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_search_goes_on_and_its_trials_are_runs(tiny: Recipe, tmp_path: Path) -> None:
    """A short trial ends before the kill, a long one is under way."""
    tiny = changed(tiny, "measure", every_epochs=5)
    tiny = changed(tiny, "search", space=("optim.epochs=grid(1, 60)",), algorithm="grid")
    tiny = changed(tiny, "run", checkpoint_every=8, log_every=4)
    with a_search(tiny, tmp_path) as process:
        while process.poll() is None:
            first, second, *_ = [*TrialTable(open_place(tiny.home)), None, None]
            if first and second and first.state == "finished" and second.history:
                break
            sleep(0.2)
        assert process.poll() is None, (tmp_path / "search.log").read_text()
    home, client = open_place(tiny.home), MlflowClient(tracking_uri(tiny))
    first, second, *_ = TrialTable(home)
    assert (first.state, second.state) == ("finished", "running")
    assert first.tracking_run is not None
    before = steps_logged(client, first.tracking_run)

    heard: list[Mapping[str, Any]] = []
    screen = SearchScreen(Console(file=StringIO()))  # holds locks, so it cannot be pickled

    def on_event(event: Mapping[str, Any]) -> None:
        heard.append(event)
        screen.event(event)

    outcome = search(tiny, resume=True, on_event=on_event)

    assert outcome.finished
    assert [trial.state for trial in outcome.trials] == ["finished"] * 2, outcome.trials
    assert [trial.step for trial in outcome.trials] == [4, 240]
    assert steps_logged(client, first.tracking_run) == before
    run = outcome.trials[1].tracking_run
    assert run is not None
    steps = [step for step, _ in steps_logged(client, run)]
    assert steps == list(range(4, 241, 4))  # also those that the killed process had not sent
    told = [event for event in heard if event["kind"] == "trial" and event["trial"] == second.name]
    begun = next(event["step"] for event in told if event["state"] == "running" and event["steps"])
    assert begun >= 8
    assert outcome.best is not None
    assert outcome.best.objective == max(trial.objective for trial in outcome.trials)  # type: ignore[type-var]

    parent = client.get_run(outcome.tracking_run)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["best.trial"] == outcome.best.name
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.mlflow.parentRunId = '{outcome.tracking_run}'"
    )
    assert {child.info.run_name for child in children} == {trial.name for trial in outcome.trials}
    assert all(child.info.status == "FINISHED" for child in children)
    files = {file.path for file in client.list_artifacts(outcome.tracking_run, "search")}
    assert files == {"search/best.yaml", "search/report.html", "search/trials.json"}
    assert "<h1>Search ratios</h1>" in (outcome.folder / "report.html").read_text()

    assert outcome.best_recipe is not None
    flags = list(recipe_file.flags(recipe_file.read(str(outcome.best_recipe))))
    assert "--optim.epochs" in flags
    best = recipe_file.from_dict(recipe_file.read(str(outcome.best_recipe)))
    assert best.optim.epochs == outcome.best.point["optim.epochs"]
    assert best.home == f"{outcome.home}-best"
    assert checkpoints.newest(open_place(best.home)) is None

    again = search(tiny, resume=True)
    assert (again.trials, again.best) == (outcome.trials, outcome.best)
    with pytest.raises(ConfigError, match="already has a search; add --resume"):
        search(tiny)
    with pytest.raises(ConfigError, match=r"measure\.seed: 0 there, 1 now"):
        search(changed(tiny, "measure", seed=1), resume=True)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_one_of_a_population_goes_on_from_the_other_and_ctrl_c_saves_both(
    tiny: Recipe, tmp_path: Path
) -> None:
    """Which of the two is better is a matter of luck here, and of no matter."""
    tiny = changed(tiny, "optim", epochs=5000)
    tiny = changed(tiny, "measure", every_epochs=20)
    tiny = changed(tiny, "run", checkpoint_every=80)
    pbt: dict[str, Any] = {"algorithm": "grid", "scheduler": "pbt"}
    tiny = changed(tiny, "search", space=("optim.lr_per_256=choice(1e-4, 2e-2)",), **pbt)
    home = open_place(tiny.home)
    with a_search(tiny, tmp_path) as process:
        log = tmp_path / "search.log"
        while not (homes := [home / record.name for record in TrialTable(home)]) or not any(
            (each / "adopted").exists() for each in homes
        ):
            assert process.poll() is None, log.read_text()
            sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=200) == 130, log.read_text()
    assert "Traceback" not in log.read_text()
    for each in homes:
        if (each / "adopted").exists():
            (other,) = set(homes) - {each}
            start, values = json.loads((each / "adopted").read_bytes())
            assert values.keys() == {"optim.lr_per_256"}
            assert start.startswith(f"{other}/checkpoints/step-")
    client = MlflowClient(tracking_uri(tiny))
    for record in TrialTable(home):
        assert record.state == "stopped"
        saved = checkpoints.newest(home / record.name)
        assert saved is not None and 0 < saved.step < record.steps
        assert record.tracking_run is not None
        assert client.get_run(record.tracking_run).info.status == "KILLED"
        steps = [step for step, _ in steps_logged(client, record.tracking_run)]
        assert steps == sorted(set(steps))
