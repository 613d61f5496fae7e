import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from droppos.config import Method, Model
from droppos.errors import ConfigError, DataError, TrainingError
from droppos.export.flow import ExportReport
from droppos.export.flow import export as export_as
from droppos.export.folder import OWN_CONFIG, unfinished
from droppos.export.timm_vit import TIMM, load_export
from droppos.measure.position import protocol_draw
from droppos.model import DropPos
from droppos.trained import Trained

SMALL = Model(
    size="tiny",
    image_size=(32, 48),
    patch_size=8,
    width=24,
    depth=2,
    heads=3,
    decoder_width=16,
    decoder_depth=1,
    decoder_heads=2,
)


def pretrained(model: Model = SMALL, method: Method | None = None) -> DropPos:
    """Make a model whose every weight is unlike its first value, as after training."""
    droppos = DropPos(model, method or Method())
    with torch.no_grad():
        for weight in droppos.parameters():
            weight += 0.02 * torch.randn_like(weight)
    return droppos


def export(droppos: DropPos, model: Model, out: Path) -> ExportReport:
    return export_as(Trained(droppos.encoder, model, droppos), out, TIMM)


def test_timm_computes_what_was_trained_both_ways(tmp_path: Path) -> None:
    droppos = pretrained().train()
    report = export(droppos, SMALL, tmp_path / "out")
    assert report.largest_difference <= 1e-6
    assert droppos.encoder.training

    pictures = torch.randn(2, 3, 32, 48)
    hub = timm.create_model(f"local-dir:{report.path}", pretrained=True).eval()
    plain = timm.create_model(
        report.architecture,
        checkpoint_path=report.path / "model.safetensors",
        **report.arguments,
    ).eval()
    with torch.no_grad():
        trained = droppos.eval().encoder(pictures)
        for loaded in (hub, plain):
            torch.testing.assert_close(loaded(pictures), trained, atol=1e-6, rtol=0)
    assert hub.pretrained_cfg["input_size"] == (3, 32, 48)
    assert hub.pretrained_cfg["mean"] == [0.485, 0.456, 0.406]


@pytest.mark.parametrize(
    "model",
    [
        Model(size="tiny"),
        Model(size="huge", image_size=(28, 42), width=32, depth=1, heads=2),
        Model(size="small", image_size=(96, 32), depth=1),
    ],
    ids=["as published", "patch 14", "tall"],
)
def test_any_shape_is_exported(tmp_path: Path, model: Model) -> None:
    assert export(pretrained(model), model, tmp_path / "out").largest_difference <= 1e-5


def test_loading_needs_no_droppos(tmp_path: Path) -> None:
    droppos = pretrained().eval()
    export(droppos, SMALL, tmp_path / "out")
    pictures = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        expected = {"x": pictures, "y": droppos.encoder(pictures).contiguous()}
    save_file(expected, tmp_path / "expected")
    script = """if True:
        import sys, timm, torch
        from safetensors.torch import load_file
        expected = load_file(sys.argv[2])
        backbone = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
        with torch.no_grad():
            difference = (backbone(expected["x"]) - expected["y"]).abs().max().item()
        assert difference < 1e-5, difference
        assert not [name for name in sys.modules if name.startswith("droppos")]
    """
    command = [sys.executable, "-c", script, str(tmp_path / "out"), str(tmp_path / "expected")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_a_classifier_can_be_put_on(tmp_path: Path) -> None:
    droppos = pretrained()
    export(droppos, SMALL, tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=7)
    assert model(torch.randn(1, 3, 32, 48)).shape == (1, 7)
    torch.testing.assert_close(model.pos_embed, droppos.encoder.pos_embed)


@pytest.mark.parametrize("objective", ["position", "position_pixels"])
def test_positions_can_be_asked_of_an_export(tmp_path: Path, objective: str) -> None:
    method = Method(objective=objective, sigma=0.5)
    droppos = pretrained(method=method).eval()
    export(droppos, SMALL, tmp_path / "out")
    loaded = load_export(tmp_path / "out")
    assert (loaded.model, loaded.method) == (SMALL, method)
    assert loaded.droppos is not None
    draw = protocol_draw(method.counts(SMALL.grid), range(2), seed=0)
    pictures = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        ours, theirs = (model(pictures, draw).logits for model in (droppos, loaded.droppos))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_a_backbone_without_position_head_is_loaded_as_such(tmp_path: Path) -> None:
    export(pretrained(method=Method(objective="pixels")), SMALL, tmp_path / "out")
    loaded = load_export(tmp_path / "out")
    assert loaded.droppos is None
    assert loaded.encoder(torch.randn(1, 3, 32, 48)).shape == (1, 24)


def test_exporting_draws_no_random_number_of_the_run(tmp_path: Path) -> None:
    droppos = pretrained()
    before = torch.get_rng_state()
    export(droppos, SMALL, tmp_path / "out")
    load_export(tmp_path / "out")
    assert torch.equal(before, torch.get_rng_state())


def test_a_previous_export_is_replaced_and_nothing_left_beside(tmp_path: Path) -> None:
    export(pretrained(), SMALL, tmp_path / "out")
    second = pretrained()
    export(second, SMALL, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(written["cls_token"], second.encoder.cls_token.detach())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_things_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(ConfigError, match=r"not a previous export.*thesis\.tex"):
        export(pretrained(), SMALL, tmp_path)
    export(pretrained(), SMALL, tmp_path / "out")
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"notes\.md"):
        export(pretrained(), SMALL, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        export(pretrained(), SMALL, tmp_path / "thesis.tex")


def test_what_does_not_compute_the_same_is_not_written(tmp_path: Path) -> None:
    droppos = pretrained()
    with torch.no_grad():
        droppos.encoder.norm.weight[0] = float("nan")
    with pytest.raises(TrainingError, match="nothing was written"):
        export(droppos, SMALL, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_broken_export_says_what_is_broken(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"droppos\.json cannot be read"):
        load_export(out)
    export(pretrained(), SMALL, out)
    own = json.loads((out / "droppos.json").read_text())

    (out / "droppos.json").write_text(json.dumps({"hello": 1}))
    with pytest.raises(DataError, match="says format None"):
        load_export(out)
    (out / "droppos.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        load_export(out)
    (out / "droppos.json").write_text(json.dumps(own | {"method": {"sigmma": 1}}))
    with pytest.raises(DataError, match="sigmma"):
        load_export(out)
    own["model"]["decoder_width"] = 32
    (out / "droppos.json").write_text(json.dumps(own))
    with pytest.raises(DataError, match="not those of the model"):
        load_export(out)
    (out / "position_head.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match="position_head"):
        load_export(out)
    (out / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"model\.safetensors"):
        load_export(out)


def test_an_upload_that_was_cut_short_is_not_loaded_but_may_be_replaced(tmp_path: Path) -> None:
    droppos, out = pretrained(), tmp_path / "out"
    export(droppos, SMALL, out)
    names = [file.name for file in out.iterdir()]
    (out / OWN_CONFIG).write_bytes(unfinished([*names, "half.bin"]))
    (out / "half.bin").write_bytes(b"ha")
    with pytest.raises(DataError, match="cut short; export again"):
        load_export(out)
    export(droppos, SMALL, out)
    assert load_export(out).whole is not None
    assert not (out / "half.bin").exists()
