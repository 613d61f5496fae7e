"""Exports of a fine-tuned classifier: the same folders, which give classes in place of features.

Only formats that have words for it: it averages its patches, where the classifiers of transformers
and torchvision read the class token.

timm's folder names the classes as ``label_names`` in config.json; ONNX's graph has one output,
``logits`` (batch, classes), and the names as JSON in its metadata under ``classes``. Either way
``droppos.json`` has them, too.
"""

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from droppos.config import Model
from droppos.encoder import timm_arguments, timm_classifier
from droppos.export import FormatName
from droppos.export.flow import Features, Format
from droppos.export.folder import plain, write_json, write_weights
from droppos.export.onnx_graph import INPUT, code_for, session_of, write_graph
from droppos.export.timm_vit import TIMM_CONFIG, WEIGHTS, timm_config
from droppos.trained import Trained

LOGITS = "logits"
CLASSES = "classes"


def assemble_classifier(
    weights: dict[str, Tensor], model: Model, classes: Sequence[str]
) -> Trained:
    """Build a classifier from its weights, under timm's names.

    Raises:
        RuntimeError: If they are not the weights of that model; it names each.
    """
    with torch.random.fork_rng(devices=[]):  # first values are overwritten: draw none of the run's
        classifier = timm_classifier(model, len(classes))
    classifier.load_state_dict(weights)
    return Trained(classifier.eval(), model, classes=tuple(classes))


@torch.no_grad()
def logits(classifier: VisionTransformer, pictures: Tensor) -> Tensor:
    """Give a logit for each class (pictures, classes)."""
    return classifier(pictures)


def _write_timm(trained: Trained, folder: Path) -> None:
    write_weights(folder / WEIGHTS, plain(trained.encoder.state_dict()))
    said = timm_config(trained.model, len(trained.classes))
    about = {"global_pool": "avg", "label_names": list(trained.classes)}
    arguments = {**said["model_args"], "global_pool": "avg"}  # the one that timm reads
    write_json(folder / TIMM_CONFIG, {**said, **about, "model_args": arguments})


def _read_timm(folder: Path, model: Model) -> Iterator[Features]:
    architecture, arguments = timm_arguments(model)
    loaded: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    by_path: Any = timm.create_model(
        architecture,
        num_classes=loaded.num_classes,
        global_pool="avg",
        checkpoint_path=folder / WEIGHTS,
        **arguments,
    )
    for each in (loaded.eval(), by_path.eval()):
        yield partial(logits, each)


def _timm_code(folder: str, _model: Model) -> str:
    return "\n".join(
        [
            f'model = timm.create_model("local-dir:{folder}", pretrained=True).eval()',
            "transform = timm.data.create_transform("
            "**timm.data.resolve_model_data_config(model), is_training=False)",
            'names = model.pretrained_cfg["label_names"]',
        ]
    )


def _write_onnx(trained: Trained, folder: Path) -> None:
    names = {CLASSES: json.dumps(list(trained.classes), ensure_ascii=False)}
    write_graph(
        deepcopy(trained.encoder).cpu().float(), folder, trained.model, [LOGITS], metadata=names
    )


def _read_onnx(folder: Path, _model: Model) -> Iterator[Features]:
    session = session_of(folder, [LOGITS])
    yield lambda pictures: torch.tensor(session.run([LOGITS], {INPUT: pictures.numpy()})[0])


def _onnx_code(folder: str, _model: Model) -> str:
    return code_for(folder, [LOGITS])


CLASSIFIERS: dict[FormatName, Format] = {
    "timm": Format(
        name="timm",
        write=_write_timm,
        read=_read_timm,
        code=_timm_code,
        expected=logits,
        verified="all logits, loaded by timm from the folder and by checkpoint_path",
    ),
    "onnx": Format(
        name="onnx",
        write=_write_onnx,
        read=_read_onnx,
        code=_onnx_code,
        expected=logits,
        verified="all logits by onnxruntime with 2 and with 3 pictures, after onnx.checker",
    ),
}
"""The formats that take one."""
