"""Measuring aside: training goes on meanwhile, and what is found is what the loop would find."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from droppos.config import Compute, Method, Optim
from droppos.errors import ConfigError, StorageError
from pipelines import aside as module
from pipelines import checkpoints, history
from pipelines.aside import Aside
from pipelines.groundwork import plan
from pipelines.holdout import measure_checkpoint
from pipelines.machines import Cluster, Machine
from pipelines.news import told
from pipelines.prepare import prepare
from pipelines.pretrain import pretrain
from pipelines.recipe import Data, Measure, Recipe, Run, Search, Tracking
from pipelines.resources import Demand, solve
from pipelines.run_report import run_report
from pipelines.storage import Place, open_place
from pipelines.trials import objective_of
from tests.droppos.tiny import TINY

# Notices of Ray, MLflow and SQLAlchemy about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def recipe(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """72 pictures in batches of 12, for 10 epochs, one measured every two."""
    folder = tmp_path_factory.mktemp("aside")
    prepare(str(photographs), str(folder / "data"), group_rows=10)
    return Recipe(
        model=TINY,
        method=Method(mask_ratio=0.25),
        optim=Optim(epochs=10, global_batch=12, warmup_epochs=1, lr_per_256=2e-2),
        compute=Compute(strategy="ddp", precision="float32", device="cpu"),
        data=Data(
            path=str(folder / "data"), holdout=str(folder / "data"), window=24, decode_cpus=2
        ),
        run=Run(
            name="aside",
            storage=str(folder / "runs"),
            log_every=1,
            checkpoint_every=1000,
            keep_checkpoints=9,
        ),
        measure=Measure(every_epochs=2, mask_ratio=0.25, pictures=40, aside=True),
        tracking=Tracking(uri=f"sqlite:///{folder}/mlflow.db"),
    )


def test_it_has_cpus_of_its_own(recipe: Recipe) -> None:
    aside = replace(recipe, measure=replace(recipe.measure, aside_cpus=3))
    cluster = Cluster(standing=(Machine("node", {"CPU": 16.0}),))
    two = replace(aside, data=replace(aside.data, decode_cpus=None))
    assert solve(cluster, Demand.of(two, gpu=False)).decoding == 12
    with pytest.raises(ConfigError, match=r"needs 6 CPUs .* 2 to decode, 3 to measure\)"):
        solve(Cluster(standing=(Machine("node", {"CPU": 5.0}),)), Demand.of(aside, gpu=False))
    loop = replace(two, measure=replace(two.measure, aside=False))
    assert solve(cluster, Demand.of(loop, gpu=False)).decoding == 15


def test_what_must_know_its_figures_at_once_is_refused(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match=r"keep_best.*measure\.aside"):
        replace(recipe, run=replace(recipe.run, keep_best="holdout/position/skill"))
    with pytest.raises(ConfigError, match=r"measure\.aside is True: a search"):
        objective_of(replace(recipe, search=Search()))


@pytest.mark.slow
def test_steps_are_taken_while_a_checkpoint_is_measured(recipe: Recipe, ray_cluster: None) -> None:
    events: list[Mapping[str, Any]] = []
    outcome = pretrain(recipe, on_event=events.append)
    assert outcome.finished
    assert not [event for event in events if event["kind"] == "not_measured"]

    found = [
        e for e in events if e["kind"] == "metrics" and "holdout/position/skill" in e["values"]
    ]
    begun = [event for event in events if event["kind"] == "measuring"]
    assert [event["step"] for event in found] == [event["step"] for event in begun]
    steps = [event["step"] for event in found]
    assert steps == sorted(set(steps)) and all(step % 12 == 0 for step in steps)
    assert steps[-1] == outcome.steps == 60
    during = events[events.index(begun[0]) : events.index(found[0])]
    trained = [e["step"] for e in during if e["kind"] == "metrics" and "train/loss" in e["values"]]
    assert trained and max(trained) > begun[0]["step"]

    saved = checkpoints.newest(open_place(recipe.home))
    assert saved is not None and saved.step == 60
    expected = measure_checkpoint(recipe, saved, probe=True)
    assert "holdout/features/probe_accuracy_low_95" in expected
    assert found[-1]["values"] == pytest.approx(expected, rel=1e-5)
    kept = history.curves(open_place(recipe.home), 60)["holdout/features/probe_accuracy"]
    assert [step for step, _ in kept] == steps
    assert "nothing was measured" not in run_report(saved)
    assert {n: v for n, v in outcome.metrics.items() if n in expected} == found[-1]["values"]


def test_a_measurement_that_fails_with_its_storage_ends_nothing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = checkpoints.Saved(open_place(str(tmp_path)), 12, {}, {}, {}, "")

    def away(*_: object) -> bool:
        raise StorageError("storage does not answer")

    aside = Aside(recipe, plan(recipe))
    monkeypatch.setattr(module, "result_of", away)
    monkeypatch.setattr(Place, "exists", away)
    event = aside._told(saved, None)
    assert (event["kind"], event["error"]) == ("not_measured", "storage does not answer")


@pytest.mark.slow
def test_a_measurement_that_fails_is_told_and_the_newest_is_next(
    recipe: Recipe, ray_cluster: None, tmp_path: Path
) -> None:
    schedule = plan(recipe)
    aside = Aside(recipe, schedule)

    def gone(step: int) -> checkpoints.Saved:
        return checkpoints.Saved(open_place(str(tmp_path / "gone")), step, {}, {}, {}, "")

    aside.offer(gone(11))  # no epoch has ended
    assert list(aside.look()) == []
    aside.offer(gone(12))
    assert [event["kind"] for event in aside.look()] == ["measuring"]
    aside.offer(gone(24))
    aside.offer(gone(36))
    events = list(aside.finish())
    assert [(event["kind"], event["step"]) for event in events] == [
        ("not_measured", 12),
        ("measuring", 36),
        ("not_measured", 36),
    ]
    assert "step 12 was not measured: it was deleted" in str(told(events[0]))

    aside.offer(gone(48))
    assert [event["kind"] for event in aside.look()] == ["measuring"]
    list(aside.cancel())
    assert list(aside.finish()) == []
