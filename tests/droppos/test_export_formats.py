"""Every format: what its own project computes with the export is what was trained."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from droppos.config import Method, Model
from droppos.encoder import positions, resample_positions
from droppos.errors import ConfigError, DataError, TrainingError
from droppos.export import FormatName
from droppos.export.flow import Format, export
from droppos.export.formats import FORMATS
from droppos.export.sizes import at_size
from droppos.export.timm_vit import TIMM, load_export
from droppos.model import DropPos
from droppos.trained import Trained

SQUARE = Model(
    size="tiny",
    image_size=(32, 32),
    patch_size=8,
    width=24,
    depth=2,
    heads=3,
    decoder_width=16,
    decoder_depth=1,
    decoder_heads=2,
)
WIDE = replace(SQUARE, image_size=(16, 40))
BASE = Model(size="base", image_size=(32, 32), width=24, heads=2)
"""A ViT-B by the names of its weights; thin, to be quick."""
SQUARE_ONLY: set[FormatName] = {"torchvision", "detectron2"}
QUICK: set[FormatName] = set(FORMATS) - {"onnx"}
"""ONNX has seconds to trace, and its tests do two things at once."""


def trained(model: Model = SQUARE) -> Trained:
    """Make a model whose every weight is unlike its first value and its neighbours."""
    torch.manual_seed(1)
    droppos = DropPos(model, Method()).eval()
    with torch.no_grad():
        for weight in droppos.parameters():
            weight += 0.2 * torch.randn_like(weight)
    return Trained(droppos.encoder, model, droppos)


def pictures(model: Model = SQUARE, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *model.image_size, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def tokens(model: Trained, count: int = 2) -> torch.Tensor:
    return model.encoder.forward_features(pictures(model.model, count))


def run(code: str, **names: Any) -> dict[str, Any]:
    """Run what the report says to type."""
    exec(code, names)
    return names


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_every_format_computes_what_was_trained(tmp_path: Path, form: Format) -> None:
    report = export(trained(), tmp_path / "out", form)
    assert report.largest_difference <= 1e-5
    assert report.format == form.name and str(tmp_path / "out") in report.command
    own = json.loads((tmp_path / "out" / "droppos.json").read_text())
    assert own["load"] == report.command
    assert own["files"] == sorted(file.name for file in report.path.iterdir())


@pytest.mark.parametrize("name", sorted(QUICK - SQUARE_ONLY))
def test_a_picture_need_not_be_square_where_the_format_allows(
    tmp_path: Path, name: FormatName
) -> None:
    assert export(trained(WIDE), tmp_path / "out", FORMATS[name]).largest_difference <= 1e-5


@pytest.mark.parametrize("name", sorted(SQUARE_ONLY))
def test_a_picture_must_be_square_where_the_format_says_so(
    tmp_path: Path, name: FormatName
) -> None:
    with pytest.raises(ConfigError, match=r"square.*\(16, 40\); add --image-size 40 40"):
        export(trained(WIDE), tmp_path / "out", FORMATS[name])
    square = at_size(trained(WIDE), (40, 40))
    assert export(square, tmp_path / "out", FORMATS[name]).largest_difference <= 1e-5


@pytest.mark.parametrize("name", sorted(QUICK))
def test_no_format_passes_weights_that_differ(tmp_path: Path, name: FormatName) -> None:
    model, form = trained(), FORMATS[name]

    def write_another(source: Trained, folder: Path) -> None:
        other = trained()
        with torch.no_grad():
            other.encoder.blocks[1].attn.qkv.bias[-1] += 0.01
        form.write(other, folder)

    with pytest.raises(TrainingError, match="nothing was written"):
        export(model, tmp_path / "out", replace(form, write=write_another))
    assert not list(tmp_path.iterdir())


def test_transformers_takes_pictures_by_its_processor(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, ViTModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = trained(WIDE)
    export(model, tmp_path / "out", FORMATS["transformers"])
    grey = np.full((16, 40, 3), 128, np.uint8)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    values = processor(grey, return_tensors="pt")["pixel_values"]
    assert values.shape == (1, 3, 16, 40)
    expected = (128 / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(values[0, :, 0, 0].numpy(), expected, rtol=1e-5)
    loaded = ViTModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
    with torch.no_grad():
        found = loaded(pictures(WIDE)).last_hidden_state
    torch.testing.assert_close(found, tokens(model), atol=1e-5, rtol=0)


def test_torchvision_loads_by_the_code_that_is_told(tmp_path: Path) -> None:
    import torchvision

    model = trained()
    report = export(model, tmp_path / "out", FORMATS["torchvision"])
    loaded: nn.Module = run(report.command, torchvision=torchvision, torch=torch)["model"]
    with torch.no_grad():
        found = loaded.eval()(pictures())
    torch.testing.assert_close(found, tokens(model)[:, 0], atol=1e-5, rtol=0)


def test_onnx_takes_any_number_of_pictures_that_need_not_be_square(tmp_path: Path) -> None:
    model = trained(WIDE)
    report = export(model, tmp_path / "out", FORMATS["onnx"])
    for count in (1, 5):
        names = {"onnxruntime": onnxruntime, "pictures": pictures(WIDE, count).numpy()}
        first, patches, mean = run(f"outputs = {report.command}", **names)["outputs"]
        expected = tokens(model, count).numpy()
        np.testing.assert_allclose(first, expected[:, 0], atol=1e-5)
        np.testing.assert_allclose(patches, expected[:, 1:], atol=1e-5)
        np.testing.assert_allclose(mean, expected[:, 1:].mean(1), atol=1e-5)


BLOCK = {
    "detectron2": ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"),
    "mmseg": ("ln1", "attn.attn.out_proj", "ln2", "ffn.layers.0.0", "ffn.layers.1"),
}


def both(*modules: str) -> set[str]:
    return {f"{module}.{tail}" for module in modules for tail in ("weight", "bias")}


def test_detectron2_has_the_keys_of_vitdet_for_a_vit_b(tmp_path: Path) -> None:
    FORMATS["detectron2"].write(trained(BASE), tmp_path)
    written = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    documented = {"pos_embed"} | both("patch_embed.proj")
    for block in range(12):
        documented |= both(*(f"blocks.{block}.{name}" for name in BLOCK["detectron2"]))
    assert written.keys() == {f"backbone.net.{name}" for name in documented}
    assert len(written) == 147
    assert written["backbone.net.pos_embed"].shape == (1, 1 + 4, 24)
    assert written["backbone.net.blocks.11.attn.qkv.weight"].shape == (72, 24)


def test_mmseg_has_the_keys_of_its_vision_transformer_for_a_vit_b(tmp_path: Path) -> None:
    FORMATS["mmseg"].write(trained(BASE), tmp_path)
    written = torch.load(tmp_path / "model.pth", weights_only=True)["state_dict"]
    documented = {"cls_token", "pos_embed"} | both("patch_embed.projection", "ln1")
    for block in range(12):
        documented |= both(*(f"layers.{block}.{name}" for name in BLOCK["mmseg"]))
        documented |= {f"layers.{block}.attn.attn.in_proj_{tail}" for tail in ("weight", "bias")}
    assert written.keys() == documented
    assert written["layers.11.attn.attn.in_proj_weight"].shape == (72, 24)


def test_one_format_takes_the_place_of_another(tmp_path: Path) -> None:
    export(trained(), tmp_path / "out", FORMATS["timm"])
    export(trained(), tmp_path / "out", FORMATS["mmseg"])
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"droppos.json", "model.pth"}
    with pytest.raises(DataError, match=r"export for mmseg.*--format timm"):
        load_export(tmp_path / "out")


def test_another_size_has_the_positions_that_timm_would_give_it(tmp_path: Path) -> None:
    model = trained()
    export(model, tmp_path / "own", TIMM)
    resized = at_size(model, (48, 64))
    ours = export(resized, tmp_path / "resized", TIMM)
    assert ours.largest_difference <= 1e-6 and ours.image_size == (48, 64)

    theirs = timm.create_model(
        f"local-dir:{tmp_path / 'own'}", pretrained=True, img_size=(48, 64)
    ).eval()
    assert theirs.pos_embed.shape == (1, 1 + 6 * 8, 24)
    torch.testing.assert_close(positions(resized.encoder), theirs.pos_embed, atol=0, rtol=0)
    with torch.no_grad():
        found = theirs.forward_features(pictures(resized.model))
    torch.testing.assert_close(found, tokens(resized), atol=1e-6, rtol=0)


def test_the_same_size_changes_nothing() -> None:
    model = trained()
    assert at_size(model, (32, 32)) is model
    table = torch.randn(1, 1 + 16, 24)
    assert torch.equal(resample_positions(table, SQUARE.grid, SQUARE.grid), table)


def test_another_size_has_no_position_head(tmp_path: Path) -> None:
    export(trained(), tmp_path / "own", TIMM)
    export(at_size(trained(), (48, 64)), tmp_path / "own", TIMM)
    loaded = load_export(tmp_path / "own")
    assert loaded.droppos is None and loaded.method is None
    assert loaded.model.image_size == (48, 64)
    assert not (tmp_path / "own" / "position_head.safetensors").exists()
    with pytest.raises(DataError, match="no decoder"):
        _ = loaded.whole


def test_a_size_that_patches_do_not_fill_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"height.*multiple of the patch size 8.*50"):
        at_size(trained(), (50, 64))


def test_what_transformers_would_fill_in_by_itself_is_refused(tmp_path: Path) -> None:
    form = FORMATS["transformers"]

    def write_less(source: Trained, folder: Path) -> None:
        form.write(source, folder)
        weights = load_file(folder / "model.safetensors")
        del weights["layernorm.bias"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(TrainingError, match=r"missing_keys.*layernorm\.bias"):
        export(trained(), tmp_path / "out", replace(form, write=write_less))
