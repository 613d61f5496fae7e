"""A run that starts from trained weights: found anywhere, held against the recipe, and named."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from droppos.config import Compute, Heads, Method, Model, Optim
from droppos.encoder import sincos_positions
from droppos.errors import ConfigError, DataError, TrainingError
from droppos.export.flow import export
from droppos.export.timm_vit import TIMM
from droppos.model import DropPos
from droppos.parallel import unwrap
from droppos.trained import Trained
from pipelines import checkpoints, stored_state
from pipelines.backbone import Backbone, from_checkpoint, open_backbone
from pipelines.evaluate import evaluate
from pipelines.export import export_checkpoint
from pipelines.facts import facts
from pipelines.groundwork import located
from pipelines.local_s3 import S3Server
from pipelines.prepare import prepare
from pipelines.pretrain import pretrain
from pipelines.recipe import Data, MeasureProtocol, Recipe, Run, Tracking
from pipelines.start import RECORD, WEIGHTS, clear, load_start, read_start, started_from
from pipelines.storage import Place, open_place
from pipelines.worker import create_state
from tests.droppos.test_foreign import official, saved
from tests.droppos.test_parity import MODEL as REFERENCE
from tests.droppos.tiny import TINY
from tests.pipelines.test_facts import DATA

METHOD = Method(mask_ratio=0.25)


def recipe_of(start: str | None, **changes: Any) -> Recipe:
    return Recipe(model=TINY, method=METHOD, run=Run(init_from=start, **changes))


def trained(model: Model = TINY) -> Trained:
    droppos = DropPos(model, METHOD).eval()
    with torch.no_grad():
        for weight in filter(lambda weight: weight.requires_grad, droppos.parameters()):
            weight += 0.1 * torch.randn_like(weight)
    return Trained(droppos.encoder, model, droppos)


def exported(folder: Path) -> tuple[str, Trained]:
    source = trained()
    return str(export(source, folder / "backbone", TIMM).path), source


def timm_backbone() -> Any:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=48, depth=2, num_heads=4
    )


def same_encoder(backbone: Trained, source: Trained) -> bool:
    ours, theirs = backbone.encoder.state_dict(), source.encoder.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def keep_start(recipe: Recipe, home: Place) -> str | None:
    """Do as a driver does that has taken the run over."""
    start = read_start(recipe)
    clear(home)
    if start is None:
        return None
    start.keep(home)
    return start.said


@pytest.fixture
def home(tmp_path: Path) -> Place:
    return open_place(str(tmp_path / "home"))


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_every_strategy_starts_with_the_very_weights(
    tmp_path: Path, home: Place, one_rank: None, strategy: Any
) -> None:
    uri, source = exported(tmp_path)
    recipe = replace(recipe_of(uri), compute=Compute(strategy=strategy, device="cpu"))
    notice = keep_start(recipe, home)
    assert notice == f"starting from {uri}: the encoder is taken whole"
    state = create_state(recipe, steps_per_epoch=1)
    load_start(state, home)
    found = unwrap(state.model).state_dict()
    for name, value in source.whole.state_dict().items():
        whole = found[name].full_tensor() if hasattr(found[name], "full_tensor") else found[name]
        assert torch.equal(whole, value), name


def test_what_is_new_is_as_it_would_be_without(tmp_path: Path, home: Place) -> None:
    file = tmp_path / "vit.pth"
    file.write_bytes(saved(timm_backbone().state_dict()))
    recipe = replace(recipe_of(str(file)), compute=Compute(strategy="single", device="cpu"))
    keep_start(recipe, home)
    new = create_state(recipe, steps_per_epoch=1)
    state = create_state(recipe, steps_per_epoch=1)
    load_start(state, home)
    ours, theirs = state.model.state_dict(), new.model.state_dict()
    assert all(
        torch.equal(value, theirs[name]) == (not name.startswith("encoder."))
        for name, value in ours.items()
        if name.endswith(("embed.weight", "qkv.weight", "token", "pos_embed"))
    )


def test_the_run_remembers_by_hash_what_it_started_from(tmp_path: Path, home: Place) -> None:
    uri, _ = exported(tmp_path)
    keep_start(recipe_of(uri), home)
    digest = hashlib.sha256((Path(uri) / "model.safetensors").read_bytes()).hexdigest()
    told = started_from(None, home, uri)
    assert told == {"uri": uri, "sha256": digest}
    kept = stored_state.save(
        home, 3, {"w": torch.ones(1)}, facts(recipe_of(uri), DATA, told), checkpoints.Retention(1)
    )
    (home / RECORD).delete()  # a run that goes on needs neither it nor the original
    assert started_from(kept, home, uri) == told
    assert kept.record["recipe"]["run"]["init_from"] == uri


def test_a_run_without_starts_new_whatever_an_earlier_try_left(tmp_path: Path, home: Place) -> None:
    uri, _ = exported(tmp_path)
    keep_start(recipe_of(uri), home)
    assert keep_start(recipe_of(None), home) is None
    assert home.children() == []
    assert started_from(None, home, None) is None


def test_a_run_whose_start_is_gone_does_not_start_new(tmp_path: Path, home: Place) -> None:
    uri, _ = exported(tmp_path)
    keep_start(recipe_of(uri), home)
    clear(home)
    with pytest.raises(TrainingError, match=r"start\.json is gone"):
        started_from(None, home, uri)


def test_kept_weights_that_were_changed_are_refused(tmp_path: Path, home: Place) -> None:
    uri, _ = exported(tmp_path)
    recipe = replace(recipe_of(uri), compute=Compute(strategy="single", device="cpu"))
    keep_start(recipe, home)
    data = bytearray((home / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (home / WEIGHTS).write_bytes(bytes(data))
    with pytest.raises(TrainingError, match="is damaged: expected sha256"):
        load_start(create_state(recipe, steps_per_epoch=1), home)


def test_a_reference_checkpoint_brings_its_position_head(tmp_path: Path, home: Place) -> None:
    file = tmp_path / "droppos.pth"
    file.write_bytes(saved(official()))
    recipe = Recipe(model=REFERENCE, run=Run(init_from=str(file)))
    notice = keep_start(recipe, home)
    assert notice is not None and "not used: pixel_decoder" in notice and "new" not in notice


@pytest.mark.parametrize("change", [{"width": 24}, {"depth": 1}, {"patch_size": 16, "heads": 2}])
def test_what_does_not_fit_stops_the_run_before_the_cluster(
    tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, int]
) -> None:
    uri, _ = exported(tmp_path)
    prepare(str(photographs), str(tmp_path / "data"))
    monkeypatch.setattr("pipelines.pretrain.connect", lambda _: pytest.fail("a cluster started"))
    recipe = recipe_of(uri, storage=str(tmp_path / "runs"))
    recipe = replace(
        recipe,
        model=replace(TINY, **change),
        optim=Optim(epochs=1, warmup_epochs=0, global_batch=12),
        data=Data(path=str(tmp_path / "data")),
    )
    with pytest.raises(ConfigError, match=f"another encoder: .*{next(iter(change))}"):
        pretrain(recipe)
    with pytest.raises(DataError, match="no checkpoint"):
        pretrain(replace(recipe, run=replace(recipe.run, init_from=str(tmp_path / "nothing"))))
    assert not (tmp_path / "runs" / "droppos" / "recipe.yaml").exists()


def test_the_place_is_spelt_out_for_workers_but_not_a_name(tmp_path: Path) -> None:
    assert located(recipe_of("vit.pth")).run.init_from == str(Path("vit.pth").absolute())
    named = located(recipe_of("timm:vit_base_patch16_224.mae"))
    assert named.run.init_from == "timm:vit_base_patch16_224.mae"


def test_timm_downloads_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = timm_backbone()
    backbone.reset_classifier(0)
    asked: dict[str, Any] = {}
    create_here = timm.create_model

    def create(name: str, **arguments: Any) -> Any:
        if not arguments.get("pretrained"):
            return create_here(name, **arguments)
        asked.update(arguments, name=name)
        return backbone

    monkeypatch.setattr("pipelines.backbone.timm.create_model", create)
    found = open_backbone("timm:vit_tiny")
    assert asked == {"name": "vit_tiny", "pretrained": True, "num_classes": 0}
    assert found.model.shape.heads == 4 and found.uri == "timm:vit_tiny"
    with pytest.raises(DataError, match="gives no pretrained 'vit_no_such'"):
        monkeypatch.undo()
        open_backbone("timm:vit_no_such")


def test_a_timm_folder_is_opened_by_its_config(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(saved(timm_backbone().state_dict()))
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    found = open_backbone(str(folder))
    assert (found.model.shape.heads, found.model.image_size) == (4, (48, 48))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(DataError, match=r"without weights: found config\.json"):
        open_backbone(str(folder))
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(DataError, match="names no timm architecture"):
        open_backbone(str(folder))


def test_a_reference_checkpoint_is_evaluated_and_exported(
    tmp_path: Path, photographs: Path
) -> None:
    file = tmp_path / "droppos.pth"
    file.write_bytes(saved(official()))
    heads = Heads(encoder=4, decoder=4)
    data = str(tmp_path / "data")
    prepare(str(photographs), data)
    measured = evaluate(
        str(file), data, measure=MeasureProtocol(pictures=12), heads=heads, limit=40
    )
    assert measured.position is not None and measured.knn is not None
    report = export_checkpoint(str(file), str(tmp_path / "out"), heads=heads)
    again = evaluate(str(report.path), data, measure=MeasureProtocol(pictures=12), limit=40)
    assert again.position is not None
    assert again.position.accuracy == measured.position.accuracy
    assert (again.knn, again.effective_rank) == (measured.knn, measured.effective_rank)


@pytest.mark.slow
def test_exports_on_s3_are_replaced_loaded_and_started_from(
    s3: S3Server, s3_env: S3Server, tmp_path: Path, home: Place
) -> None:
    bucket = s3.bucket("ways-out")
    local, source = exported(tmp_path)
    export_checkpoint(local, f"{bucket}/backbone", "mmseg")
    report = export_checkpoint(local, f"{bucket}/backbone")
    assert "local-dir:backbone" in report.command
    assert "model.pth" not in open_place(f"{bucket}/backbone").children()
    assert same_encoder(open_backbone(f"{bucket}/backbone"), source)
    assert keep_start(recipe_of(f"{bucket}/backbone"), home) is not None
    open_place(f"{bucket}/mine/thesis.tex").write_bytes(b"years")
    with pytest.raises(ConfigError, match=r"not a previous export.*thesis\.tex"):
        export_checkpoint(local, f"{bucket}/mine")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_run_starts_from_a_backbone_and_its_checkpoint_names_it(
    tmp_path: Path, photographs: Path, ray_cluster: None
) -> None:
    file = tmp_path / "vit.pth"
    backbone = timm_backbone()
    file.write_bytes(saved({"model": backbone.state_dict()}))
    prepare(str(photographs), str(tmp_path / "data"))
    recipe = Recipe(
        model=replace(TINY, image_size=(48, 48)),
        method=METHOD,
        # A rate at which nothing moves: what comes out is what went in.
        optim=Optim(epochs=1, global_batch=12, warmup_epochs=0, lr_per_256=1e-12),
        compute=Compute(strategy="fsdp2", precision="float32", device="cpu"),
        data=Data(path=str(tmp_path / "data"), decode_cpus=2),
        run=Run(name="on", storage=str(tmp_path / "runs"), workers=2, init_from=str(file)),
        tracking=Tracking(uri=f"sqlite:///{tmp_path}/mlflow.db"),
    )
    said: list[str] = []
    outcome = pretrain(recipe, on_event=lambda e: said.extend([e["said"]] if "said" in e else []))
    assert outcome.finished and outcome.checkpoint is not None
    assert said == [
        f"starting from {file}: the encoder is taken whole; new: dropped_token, "
        "position_decoder; its positions are not computed ones; they stay fixed"
    ]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert outcome.checkpoint.record["init_from"] == {"uri": str(file), "sha256": digest}
    trained: Backbone = from_checkpoint(outcome.checkpoint)
    expected = backbone.state_dict()
    for name, value in trained.encoder.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)
    assert not torch.equal(
        trained.encoder.pos_embed.detach(), sincos_positions(trained.model.grid, 48)
    )
    file.unlink()  # a run that is there needs it no more
    assert pretrain(recipe, resume=True).finished
    with pytest.raises(ConfigError, match=r"run\.init_from: .* in the checkpoint, None now"):
        pretrain(replace(recipe, run=replace(recipe.run, init_from=None)), resume=True)
