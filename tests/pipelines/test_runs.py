"""Runs by name: listed, shown, compared, and gone on with."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from droppos.config import Method
from droppos.errors import ConfigError, DataError
from pipelines.attempt import claim_for_driver
from pipelines.cli import main
from pipelines.ledger import Ledger
from pipelines.recipe import Recipe, Run
from pipelines.recipe_file import to_yaml
from pipelines.runs import Registry, next_command, recipe_of, resumable
from pipelines.storage import Place, open_place
from pipelines.tracking import Where

# MLflow's own mapping of its tables uses what SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")


def recipe(storage: Path, name: str, sigma: float) -> Recipe:
    return Recipe(run=Run(name=name, storage=str(storage)), method=Method(sigma=sigma))


@contextmanager
def ledger(ours: Recipe, parent: str | None = None) -> Iterator[Ledger]:
    with Ledger.open(ours, "abc", resume=False, parent_run=parent) as opened:
        yield opened


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs, and a trial of one of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        folder = tmp_path_factory.mktemp("runs")
        for name, sigma in ("first", 1.0), ("second", 2.0), ("second", 0.0):
            ours = recipe(folder, name, sigma)
            with ledger(ours) as opened:
                opened.log(7, {"holdout/position/skill": sigma / 10})
            (open_place(ours.home) / "recipe.yaml").write_bytes(to_yaml(ours).encode())
            claim_for_driver(open_place(ours.home))
        with ledger(recipe(folder, "trial", 1.0), opened.run_id) as trial:
            trial.log(1, {"train/loss": 1})
    return folder


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def registry(storage: Path) -> Registry:
    return Registry(Where(storage=str(storage)))


def test_the_newest_come_first_and_trials_are_left_out(registry: Registry) -> None:
    runs = registry.newest(10)
    assert [run.name for run in runs] == ["second", "second", "first"]
    assert [run.metrics["holdout/position/skill"] for run in runs] == [0.0, 0.2, 0.1]
    assert [run.step for run in runs] == [7, 7, 7]
    assert len(registry.newest(2)) == 2


def test_a_name_means_the_newest_run_of_that_name_and_an_id_one(registry: Registry) -> None:
    assert registry.run("second").metrics["holdout/position/skill"] == 0.0
    for run in registry.newest(10):
        assert registry.run(run.run_id[:12]) == run
    assert registry.run("trial").parent == registry.run("second").run_id


def test_what_differs_is_compared(registry: Registry) -> None:
    comparison = registry.compare(["first", "second"])
    assert comparison.fields == {"method.sigma": ["1.0", "0.0"], "run.name": ["first", "second"]}
    assert comparison.metrics == {"holdout/position/skill": [0.1, 0.0]}
    assert registry.run("second").changed["method.sigma"] == "0.0"
    assert "method.mask_ratio" not in registry.run("second").changed


def test_a_run_that_is_not_there_is_told_with_those_that_are(registry: Registry) -> None:
    with pytest.raises(DataError, match=r"no run 'third'; the newest are: second, second, first"):
        registry.run("third")


def test_no_database_and_no_experiment_are_errors(storage: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there are no runs: .*--storage"):
        Registry(Where(storage=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match=r"no experiment 'x'; it has .*droppos"):
        Registry(Where(experiment="x", storage=str(storage)))


def test_a_run_is_gone_on_with_by_its_own_recipe(registry: Registry, storage: Path) -> None:
    assert recipe_of(registry.run("second")) == recipe(storage, "second", 0.0)
    with pytest.raises(DataError, match="trial"):
        recipe_of(registry.run("trial"))


def test_a_run_is_gone_on_with_where_its_folder_lies(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No MLflow is asked: its database may be lost, and the folder elsewhere than it was."""
    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(storage / "second", moved)
    there = recipe(tmp_path / "elsewhere", "moved", 0.0)
    nowhere = Where(storage=str(tmp_path / "none"))
    assert resumable(f"{moved}/", nowhere) == there
    assert resumable(f"file://{moved}", nowhere) == there
    monkeypatch.chdir(moved.parent)
    assert resumable("moved", nowhere) == resumable("./moved", nowhere) == there
    assert (
        resumable("moved/history/..", nowhere) == resumable("../elsewhere/moved", nowhere) == there
    )
    (moved.parent / "first").mkdir()  # a folder of that name that is no run's
    shutil.copy(moved / "recipe.yaml", moved.parent / "first")
    by_name = resumable("first", Where(storage=str(storage)))
    assert by_name == recipe(storage, "first", 1.0)


def test_a_folder_without_a_run_is_told(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("[]")  # anybody's
    with pytest.raises(DataError, match=r"is no run's folder: name that of a pre-training"):
        resumable(str(tmp_path), Where())
    claim_for_driver(open_place(str(tmp_path)))
    with pytest.raises(ConfigError, match="no recipe"):
        resumable(str(tmp_path), Where())
    with pytest.raises(DataError, match=r"droppos resume FOLDER"):
        resumable("lost", Where(storage=str(tmp_path)))
    with pytest.raises(ConfigError, match="a place must be a path, got '~nobody-here'"):
        resumable("~nobody-here", Where())


def test_a_run_may_lie_at_the_root(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a container mounts its folder."""
    root = Place("/second", str(storage / "second"), pafs.LocalFileSystem(), pafs.LocalFileSystem())
    monkeypatch.setattr("pipelines.runs.open_reachable", lambda uri: root)
    assert resumable("/second", Where()).home == "/second"


def test_what_goes_on_with_a_run_is_named(registry: Registry, storage: Path) -> None:
    run = registry.run("second")
    there = Where(storage=str(storage))
    assert next_command(run, there) == f"droppos resume second --storage {storage}"
    secret = Where(uri="https://me:word@mlflow.example")
    assert next_command(run, secret) == "droppos resume second"
    search = replace(run, tags={"command": "droppos search ratios.yaml --run.name 'a b'"})
    assert next_command(search, there).endswith("ratios.yaml --run.name 'a b' --resume")
    launched = replace(run, tags={"command": "cli.py search droppos-launch.yaml"})
    assert next_command(launched, there) == "droppos launch RECIPE --job search --resume"
    odd = replace(run, tags={"command": "droppos pretrain '--data.path s3://b/x?key=***"})
    assert next_command(odd, there).startswith("droppos resume second")
    tuned = replace(run, tags={"command": "droppos finetune runs/vit --resume"})
    assert next_command(tuned, there) == tuned.tags["command"]


def test_the_terminal_shows_them(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["runs", "--storage", str(storage)])
    listed = capsys.readouterr().err
    assert "first" in listed and "FINISHED" in listed
    main(["runs", "second", "--storage", str(storage)])
    assert "method.sigma" in capsys.readouterr().err
    main(["runs", "first", "second", "--storage", str(storage)])
    assert "Fields that differ" in capsys.readouterr().err
    main(["sync", str(storage)])
    assert "nothing waits" in capsys.readouterr().err
