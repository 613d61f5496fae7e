"""Export to ONNX: one graph from normalised pictures to features, for any number of pictures.

    OUT/model.onnx   input   pictures      (batch, 3, height, width) float32: RGB from 0 to 1, less
                                           ImageNet's mean, divided by its deviation
                     outputs class_token   (batch, channels)
                             patch_tokens  (batch, patches, channels), row by row
                             patch_mean    (batch, channels)

All three are after the last norm. Models near 2 GB, the most that one ONNX file may hold, have
their weights in ``model.onnx.data`` beside it.
"""

from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from droppos.config import Model
from droppos.encoder import timm_arguments
from droppos.errors import ConfigError, TrainingError
from droppos.export.flow import Features, Format, all_tokens
from droppos.export.folder import plain
from droppos.trained import Trained

GRAPH = "model.onnx"
INPUT, OUTPUTS = "pictures", ("class_token", "patch_tokens", "patch_mean")
ONE_FILE = 1_900_000_000
"""Most bytes of weights inside the graph's file, which may have 2 GiB."""


class _Outputs(nn.Module):
    """What the graph gives."""

    def __init__(self, encoder: VisionTransformer) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self.encoder.forward_features(pictures)
        return tokens[:, 0], tokens[:, 1:], tokens[:, 1:].mean(dim=1)


def _write(trained: Trained, folder: Path) -> None:
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch's exporter looks for it late, and says less
    except ImportError as error:
        raise _missing(error) from error
    name, arguments = timm_arguments(trained.model)
    with torch.random.fork_rng(devices=[]):
        # timm's own blocks: ours can be asked for some tokens, which a graph need not carry.
        encoder = timm.create_model(name, num_classes=0, **arguments)
    assert isinstance(encoder, VisionTransformer)
    weights = plain(trained.encoder.state_dict())
    encoder.load_state_dict(weights)
    program = torch.onnx.export(
        _Outputs(encoder).eval(),
        # Two pictures: a first dimension of 1 would be taken for a constant.
        (torch.zeros(2, 3, *trained.model.image_size),),
        dynamo=True,
        input_names=[INPUT],
        output_names=list(OUTPUTS),
        dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    assert program is not None
    size = sum(value.numel() * value.element_size() for value in weights.values())
    program.save(folder / GRAPH, external_data=size > ONE_FILE)
    onnx.checker.check_model(folder / GRAPH, full_check=True)


def _read(folder: Path, _model: Model) -> Iterator[Features]:
    try:
        import onnxruntime
    except ImportError as error:
        raise _missing(error) from error
    session = onnxruntime.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])
    if (found := [output.name for output in session.get_outputs()]) != list(OUTPUTS):
        raise TrainingError(f"{GRAPH} has the outputs {found}, expected {list(OUTPUTS)}")

    def tokens(pictures: Tensor) -> Tensor:
        outputs = session.run(OUTPUTS, {INPUT: pictures.numpy()})
        first, patches, mean = (torch.tensor(output) for output in outputs)
        return torch.cat([first[:, None], patches, mean[:, None]], dim=1)

    yield tokens


def _expected(encoder: VisionTransformer, pictures: Tensor) -> Tensor:
    tokens = all_tokens(encoder, pictures)
    return torch.cat([tokens, tokens[:, 1:].mean(dim=1, keepdim=True)], dim=1)


def _missing(error: ImportError) -> ConfigError:
    return ConfigError(
        f"an export to ONNX needs {error.name}, which is not installed: "
        "pip install 'droppos[export]'"
    )


def _code(folder: str, _model: Model) -> str:
    return (
        f'onnxruntime.InferenceSession("{folder}/{GRAPH}").run(None, {{"{INPUT}": pictures}})'
        "  # normalised float32; gives " + ", ".join(OUTPUTS)
    )


ONNX = Format(
    name="onnx",
    write=_write,
    read=_read,
    code=_code,
    expected=_expected,
    verified="all three outputs by onnxruntime with 2 and with 3 pictures, after onnx.checker",
)
