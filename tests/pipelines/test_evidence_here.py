"""Training in one process takes the very steps that the jobs take on Ray."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from droppos.config import Compute, Method, Model, Optim
from droppos.encoder import build_encoder
from droppos.errors import ConfigError, TrainingError
from droppos.measure.finetune_recipe import Finetune
from pipelines import checkpoints
from pipelines.backbone import from_checkpoint
from pipelines.evidence.here import finetune_here, pretrain_here
from pipelines.holdout import load_pictures
from pipelines.prepare import prepare
from pipelines.pretrain import pretrain
from pipelines.recipe import Data, Recipe, Run, Tracking

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

MODEL = Model(
    size="tiny",
    image_size=(32, 32),
    patch_size=8,
    width=32,
    depth=2,
    heads=4,
    decoder_width=32,
    decoder_depth=1,
    decoder_heads=4,
)


@pytest.fixture(scope="module")
def data(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("here") / "data")
    prepare(str(photographs), folder, group_rows=10)
    return folder


@pytest.fixture
def recipe(data: str, tmp_path: Path) -> Recipe:
    """Of 18 steps; a window holds whole batches, and the last one of an epoch is short."""
    return Recipe(
        model=MODEL,
        method=Method(mask_ratio=0.25),
        optim=Optim(epochs=3, global_batch=12, lr_per_256=1e-2, warmup_epochs=1),
        compute=Compute(strategy="ddp", precision="float32", device="cpu"),
        data=Data(path=data, window=48, decode_cpus=1),
        run=Run(name="run", storage=str(tmp_path), log_every=1, checkpoint_every=4),
        tracking=Tracking(uri=f"sqlite:///{tmp_path}/mlflow.db"),
    )


def weights(saved: checkpoints.Saved) -> Mapping[str, torch.Tensor]:
    return from_checkpoint(saved).whole.state_dict()


@pytest.mark.slow
def test_it_is_the_run_that_ray_would_have_trained(recipe: Recipe, ray_cluster: None) -> None:
    told: dict[int, float] = {}
    here = pretrain_here(recipe, told.__setitem__)
    heard: dict[int, float] = {}

    def on_event(event: Mapping[str, Any]) -> None:
        if event["kind"] == "metrics" and "train/loss" in event["values"]:
            heard[event["step"]] = event["values"]["train/loss"]

    job = pretrain(replace(recipe, run=replace(recipe.run, name="job")), on_event=on_event)
    assert job.checkpoint is not None
    assert here.step == job.checkpoint.step == 18
    assert list(told) == list(heard) == list(range(1, 19))
    # Threads may sum in another order, which grows from step to step.
    assert [told[step] for step in (1, 2)] == pytest.approx([heard[1], heard[2]], abs=1e-6)
    assert list(told.values()) == pytest.approx(list(heard.values()), abs=2e-3)


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(recipe: Recipe) -> None:
    whole = weights(pretrain_here(replace(recipe, run=replace(recipe.run, name="whole"))))
    seen: list[int] = []

    def die(step: int, loss: float) -> None:
        seen.append(step)
        if step == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain_here(recipe, die)
    again: list[int] = []
    resumed = weights(pretrain_here(recipe, lambda step, loss: again.append(step)))
    assert (seen[-1], again[0], again[-1]) == (10, 9, 18)  # the newest checkpoint was of step 8
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_a_run_that_has_ended_takes_no_step(recipe: Recipe) -> None:
    first = pretrain_here(recipe)
    again: list[int] = []
    assert pretrain_here(recipe, lambda step, loss: again.append(step)) == first
    assert again == []


def test_a_checkpoint_of_another_recipe_is_no_start(recipe: Recipe) -> None:
    pretrain_here(recipe)
    with pytest.raises(ConfigError, match=r"made with other settings.*method\.sigma: 1\.0 in the"):
        pretrain_here(replace(recipe, method=replace(recipe.method, sigma=0.5)))


def test_what_diverges_ends(recipe: Recipe) -> None:
    wild = replace(recipe.optim, lr_per_256=1e30, clip_norm=None, warmup_epochs=0)
    with pytest.raises(TrainingError, match=r"at or before step \d+; lower optim\.lr_per_256"):
        pretrain_here(replace(recipe, optim=wild))


def tune(data: str, seed: int = 0, epochs: int = 8) -> float:
    torch.manual_seed(0)
    encoder = build_encoder(MODEL).eval()
    optim = Optim(epochs=epochs, global_batch=12, lr_per_256=6e-2, warmup_epochs=1, clip_norm=1.0)
    mild = Finetune(
        optim=optim,
        layer_decay=1.0,
        drop_path=0.0,
        mixup=0.0,
        cutmix=0.0,
        random_erasing=0.0,
        augment="",
        crop_scale=(0.5, 1.0),
    )
    found = load_pictures(data, (32, 32), ratio=1)
    assert found.labels is not None
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    done = finetune_here(
        encoder,
        MODEL,
        data,
        (found.pixels, torch.tensor(found.labels)),
        mild,
        seed=seed,
        device=torch.device("cpu"),
    )
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    return done.accuracy.value


def test_fine_tuning_learns_its_own_pictures(data: str) -> None:
    assert tune(data) > 0.6  # of six classes
    assert tune(data, epochs=1) < 0.6


def test_fine_tuning_again_gives_the_same(data: str) -> None:
    assert tune(data, epochs=2) == tune(data, epochs=2)
