"""A fine-tuned classifier as timm and onnxruntime load it: its logits, and its classes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch

from droppos.encoder import build_encoder
from droppos.errors import DataError, TrainingError
from droppos.export.classifiers import CLASSIFIERS, assemble_classifier
from droppos.export.flow import export
from droppos.export.sizes import at_size
from droppos.export.timm_vit import load_export
from droppos.measure.finetune import build_classifier
from droppos.measure.finetune_recipe import Finetune
from droppos.trained import Trained
from tests.droppos.tiny import TINY

CLASSES = ("cat", "dog", "Käse, alt")


def classifier() -> Trained:
    """Make one whose every weight is unlike its first value and its neighbours."""
    torch.manual_seed(1)
    made = build_classifier(build_encoder(TINY).state_dict(), TINY, len(CLASSES), Finetune())
    with torch.no_grad():
        for weight in made.parameters():
            weight += 0.2 * torch.randn_like(weight)
    return Trained(made.eval(), TINY, classes=CLASSES)


def pictures(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, *TINY.image_size, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def expected(trained: Trained, count: int = 4) -> torch.Tensor:
    return trained.encoder(pictures(count))


def test_timm_gives_its_logits_and_its_classes(tmp_path: Path) -> None:
    trained = classifier()
    report = export(trained, tmp_path / "out", CLASSIFIERS["timm"])
    assert report.largest_difference <= 1e-5 and report.classes == 3
    names: dict[str, Any] = {"timm": timm}
    exec(report.command, names)
    with torch.no_grad():
        torch.testing.assert_close(names["model"](pictures()), expected(trained))
    assert names["names"] == list(CLASSES)
    # The norm is one of averages: taken for one of tokens, logits would be others.
    assert isinstance(names["model"].norm, torch.nn.Identity)
    own = json.loads((tmp_path / "out/droppos.json").read_text())
    assert own["classes"] == list(CLASSES) and own["for"] == "timm"


def test_the_way_of_a_picture_into_timm_is_told(tmp_path: Path) -> None:
    from PIL import Image

    report = export(classifier(), tmp_path / "out", CLASSIFIERS["timm"])
    names: dict[str, Any] = {"timm": timm}
    exec(report.command, names)
    rows, columns = TINY.image_size
    pixels = np.full((rows, columns, 3), 255, np.uint8)
    given = names["transform"](Image.fromarray(pixels))
    assert given.shape == (3, rows, columns)
    assert given[:, 0, 0].tolist() == pytest.approx([2.2489, 2.4286, 2.64], abs=1e-3)


@pytest.mark.shares
def test_onnx_gives_its_logits_and_its_classes(tmp_path: Path) -> None:
    trained = classifier()
    report = export(trained, tmp_path / "out", CLASSIFIERS["onnx"])
    assert report.largest_difference <= 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(CLASSES)
    names: dict[str, Any] = {"onnxruntime": onnxruntime, "pictures": pictures(5).numpy()}
    (found,) = eval(report.command.split("  #")[0], names)
    np.testing.assert_allclose(found, expected(trained, 5).numpy(), atol=1e-4)


def test_another_size_keeps_its_weights_and_stretches_its_positions(tmp_path: Path) -> None:
    trained = classifier()
    rows, columns = TINY.image_size
    larger = at_size(trained, (2 * rows, 2 * columns))
    assert larger.classes == CLASSES
    export(larger, tmp_path / "out", CLASSIFIERS["timm"])
    loaded = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True)
    before = trained.encoder.state_dict()
    for name, weight in loaded.state_dict().items():
        assert name == "pos_embed" or torch.equal(weight, before[name])
    assert trained.model.image_size == (rows, columns)
    with torch.no_grad():
        assert loaded(torch.zeros(1, 3, 2 * rows, 2 * columns)).shape == (1, 3)


def test_weights_of_another_model_or_other_classes_are_refused() -> None:
    weights = classifier().encoder.state_dict()
    assert assemble_classifier(weights, TINY, CLASSES).classes == CLASSES
    with pytest.raises(RuntimeError, match="size mismatch for head"):
        assemble_classifier(weights, TINY, ["cat", "dog"])
    with pytest.raises(RuntimeError, match="blocks"):
        assemble_classifier(weights, replace(TINY, depth=TINY.shape.depth + 1), CLASSES)


def test_one_that_diverged_is_not_written(tmp_path: Path) -> None:
    trained = classifier()
    with torch.no_grad():
        trained.encoder.get_classifier().bias[0] = float("nan")
    with pytest.raises(TrainingError, match="computes otherwise"):
        export(trained, tmp_path / "out", CLASSIFIERS["timm"])
    assert not (tmp_path / "out").exists()


def test_its_export_is_no_backbone(tmp_path: Path) -> None:
    export(classifier(), tmp_path / "out", CLASSIFIERS["timm"])
    with pytest.raises(DataError, match="a fine-tuned classifier, which is no backbone"):
        load_export(tmp_path / "out")
