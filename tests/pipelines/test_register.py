"""Registered backbones: what goes in is what comes out, with droppos and without."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.models import Model as MlflowModel

from droppos.config import Model
from droppos.errors import ConfigError, DataError, TrainingError
from droppos.measure.features import extract_features
from droppos.model import DropPos
from pipelines import checkpoints, register, stored_state
from pipelines.backbone import open_backbone
from pipelines.checkpoints import Saved
from pipelines.cli import main
from pipelines.export import export_checkpoint
from pipelines.facts import facts
from pipelines.groundwork import located
from pipelines.ledger import Ledger
from pipelines.recipe import Data, Recipe, Run, Tracking
from pipelines.register import Registered
from pipelines.registry import EXPORT, check_alias, check_name, fetch, parse
from pipelines.shards import Manifest, Shard
from pipelines.start import read_start
from pipelines.storage import open_place
from pipelines.tracking import for_files

# MLflow's own mapping of its tables uses what SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")

DATA = Manifest(shards=(Shard("shard-00000.parquet", 4, (4,), bytes=9, sha256="s", content="c"),))
PICTURES = np.random.default_rng(0).integers(0, 256, (3, 24, 32, 3), dtype=np.uint8)
TINY = Model(
    size="tiny",
    image_size=(24, 32),
    patch_size=8,
    width=32,
    depth=1,
    heads=2,
    decoder_width=32,
    decoder_heads=2,
)


class World:
    """A run that MLflow knows, and what was registered of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self.recipe = Recipe(
            model=TINY,
            data=Data(path=str(folder / "data")),
            run=Run(name="run", storage=str(folder)),
            tracking=Tracking(uri=self.uri),
        )
        with Ledger.open(self.recipe, DATA.digest, resume=False) as ledger:
            self.run_id = ledger.run_id
        self.saved = self.save(2)
        self.client = MlflowClient(self.uri)
        self.before = self.client.get_run(self.run_id).info
        self.first = self.register(self.recipe.home, "droppos", "candidate")

    def save(self, step: int) -> Saved:
        torch.manual_seed(step)
        state = {"model": DropPos(TINY, self.recipe.method).state_dict()}
        home, told = open_place(self.recipe.home), facts(self.recipe, DATA)
        return stored_state.save(home, step, state, told, checkpoints.Retention(9))

    def register(
        self, backbone: str, name: str, alias: str | None = None, **more: Any
    ) -> Registered:
        return register.register(backbone, name, alias, experiment="droppos", **more)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def here(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", world.uri)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def features(uri: str) -> torch.Tensor:
    return extract_features(open_backbone(uri).encoder, torch.from_numpy(PICTURES))


def test_a_run_becomes_a_version_that_names_its_checkpoint(world: World, here: Path) -> None:
    assert (world.first.version, world.first.run_id) == ("1", world.run_id)
    version = world.client.get_model_version_by_alias("droppos", "candidate")
    assert version.tags == {
        "droppos.checkpoint.uri": world.saved.uri,
        "droppos.checkpoint.step": "2",
        "droppos.checkpoint.complete_sha256": world.saved.sha256,
    }
    outputs = world.client.get_run(world.run_id).outputs
    (logged,) = outputs.model_outputs
    assert logged.step == 2 and f"/{logged.model_id}/" in version.source
    assert list(here.iterdir()) == []  # no mlruns in whatever folder it was called


def test_the_run_it_belongs_to_keeps_its_status_and_its_end(world: World) -> None:
    now = world.client.get_run(world.run_id).info
    assert (now.status, now.end_time) == (world.before.status, world.before.end_time)


def test_a_version_has_signature_example_and_pinned_packages_and_no_pickle(world: World) -> None:
    version = world.client.get_model_version_by_alias("droppos", "candidate")
    folder = Path(version.source.removeprefix("file://"))
    model = MlflowModel.load(str(folder))
    assert model.signature is not None
    assert model.signature.inputs.inputs[0].shape == (-1, 24, 32, 3)
    assert model.signature.inputs.inputs[0].type == np.dtype("uint8")
    assert model.signature.outputs.inputs[0].shape == (-1, 32)
    assert model.saved_input_example_info is not None
    needs = (folder / "requirements.txt").read_text().splitlines()
    assert {need.partition("==")[0] for need in needs} >= {"torch", "timm", "numpy", "safetensors"}
    assert not any("+" in need for need in needs)
    kinds = {file.suffix for file in folder.rglob("*") if file.is_file()}
    assert kinds == {"", ".json", ".yaml", ".txt", ".py", ".safetensors"}


def test_what_is_opened_by_its_alias_is_what_was_trained(world: World) -> None:
    assert torch.equal(features("models:/droppos@candidate"), features(world.saved.uri))
    assert torch.equal(features("models:/droppos/1"), features(world.saved.uri))
    opened = open_backbone("models:/droppos@candidate")
    assert opened.droppos is not None and opened.uri == "models:/droppos@candidate"


def test_a_run_may_start_from_a_registered_model(world: World, here: Path) -> None:
    uri = "models:/droppos@candidate"
    recipe = located(replace(world.recipe, run=replace(world.recipe.run, init_from=uri)))
    assert recipe.run.init_from == uri  # no folder of this machine
    start = read_start(recipe)
    assert start is not None and start.said.startswith(f"starting from {uri}")


def test_a_registered_model_is_exported_again(world: World, here: Path) -> None:
    export_checkpoint("models:/droppos@candidate", str(here / "out"))
    assert torch.equal(features(str(here / "out")), features(world.saved.uri))


ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"droppos", "pipelines"}:
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Refuse())
import mlflow.pyfunc
import numpy as np

pictures = np.load("pictures.npy")
model = mlflow.pyfunc.load_model("models:/droppos@candidate")
np.save("features.npy", model.predict(pictures))
np.save("many.npy", model.predict(np.concatenate([pictures] * 30)))
backbone = model.unwrap_python_model().timm_model()
assert type(backbone).__module__.startswith("timm."), type(backbone)
assert backbone.num_features == 32
"""


@pytest.mark.shares
def test_without_droppos_mlflow_loads_the_same(world: World, here: Path) -> None:
    np.save(here / "pictures.npy", PICTURES)
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        capture_output=True,
        text=True,
        env={**os.environ, "MLFLOW_TRACKING_URI": world.uri, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = np.load(here / "features.npy")
    assert found.dtype == np.float32
    expected = features(world.saved.uri).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(np.load(here / "many.npy"), np.tile(expected, (30, 1)), atol=1e-6)


def test_an_alias_moves_and_says_where_it_was(world: World) -> None:
    again = world.register(world.save(4).uri, "moving", "champion")
    assert (again.version, again.before) == ("1", None)
    newer = world.register(world.saved.uri, "moving")
    assert (newer.version, newer.uri) == ("2", "models:/moving/2")
    moved = world.register("models:/moving/2", "moving", "champion")
    assert (moved.version, moved.before, moved.uri) == ("2", "1", "models:/moving@champion")
    assert moved.checkpoint == world.saved.uri
    promoted = world.register("models:/moving@champion", "moving", "stable")
    assert (promoted.version, promoted.before) == ("2", None)
    assert world.client.get_registered_model("moving").aliases.keys() == {"champion", "stable"}


def test_an_export_names_its_checkpoint_only_if_it_was_made_of_it(world: World, here: Path) -> None:
    export_checkpoint(world.saved.uri, str(here / "backbone"))
    alone = world.register(str(here / "backbone"), "exports")
    assert alone.checkpoint is None and alone.run_id != world.run_id
    assert world.client.get_run(alone.run_id).info.status == "FINISHED"
    of_run = world.register(str(here / "backbone"), "exports", checkpoint=world.saved.uri)
    assert (of_run.version, of_run.checkpoint) == ("2", world.saved.uri)
    assert of_run.run_id == world.run_id
    with pytest.raises(DataError, match=r"was not exported from .*step-00000006: "):
        world.register(str(here / "backbone"), "exports", checkpoint=world.save(6).uri)
    with pytest.raises(ConfigError, match="--checkpoint is for an export"):
        world.register(world.saved.uri, "exports", checkpoint=world.saved.uri)


def test_what_computes_something_else_is_not_registered(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(register, "TOLERANCE", -1.0)
    with pytest.raises(TrainingError, match="nothing was registered"):
        world.register(world.saved.uri, "other")
    assert "other" not in {model.name for model in world.client.search_registered_models()}


@pytest.mark.parametrize(
    ("uri", "error", "words"),
    [
        ("models:/nobody@champion", DataError, r"no registered model 'nobody'; it has: droppos"),
        (
            "models:/droppos@champion",
            DataError,
            r"no alias 'champion'; it has aliases candidate \(version 1\) and versions 1",
        ),
        ("models:/droppos/9", DataError, r"no version 9; it has aliases candidate"),
        ("models:/droppos", ConfigError, "names no registered model; write models:/NAME@ALIAS"),
        ("models:/droppos/Production", ConfigError, "names no registered model"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(
    uri: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        open_backbone(uri)


def test_no_database_is_an_error_and_makes_none(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(DataError, match=r"there are no registered models: .*mlflow.db"):
        open_backbone("models:/droppos@champion")
    assert list(here.iterdir()) == []


def test_a_model_that_somebody_else_registered_has_no_export(world: World, here: Path) -> None:
    (here / "elsewhere").mkdir()
    world.client.create_registered_model("foreign")
    world.client.create_model_version("foreign", source=str(here / "elsewhere"))
    with pytest.raises(DataError, match=rf"\(version 1\) has no {EXPORT} at"):
        fetch("models:/foreign/1", here)


def test_a_promotion_is_of_its_own_model_and_names_an_alias(world: World) -> None:
    with pytest.raises(ConfigError, match=r"is a version of droppos, not of other"):
        world.register("models:/droppos/1", "other", "champion")
    with pytest.raises(ConfigError, match=r"registered already; --alias names"):
        world.register("models:/droppos/1", "droppos")


def test_a_file_may_take_longer_than_other_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    for before, inside in ((None, "600"), ("10", "600"), ("900", "900")):
        monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
        if before is not None:
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", before)
        with for_files():
            assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == inside
        assert os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT") == before


@pytest.mark.parametrize("alias", ["v1", "V12", "latest", "a b", "a/b", ""])
def test_what_cannot_be_an_alias_is_refused(alias: str) -> None:
    with pytest.raises(ConfigError, match="--alias must be letters"):
        check_alias(alias)
    check_alias("champion")


@pytest.mark.parametrize("name", ["a/b", "a@b", "a b", "a:b", "it's", ""])
def test_a_name_that_no_uri_could_spell_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="registered model's name"):
        check_name(name)
    assert parse("models:/a-b_c.d@champion").name == "a-b_c.d"


def test_the_command_registers_and_promotes(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["register", world.saved.uri, "by-command", "--alias", "candidate"])
    assert "droppos evaluate models:/by-command@candidate DATA" in capsys.readouterr().err
    main(["register", "models:/by-command@candidate", "by-command", "--alias", "champion"])
    assert "by-command, version 1" in capsys.readouterr().err
