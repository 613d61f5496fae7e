"""Export to ONNX: one graph from normalised pictures to features, for any number of pictures.

    OUT/model.onnx   input   pictures      (batch, 3, height, width) float32: RGB from 0 to 1, less
                                           ImageNet's mean, divided by its deviation
                     outputs class_token   (batch, channels)
                             patch_tokens  (batch, patches, channels), row by row
                             patch_mean    (batch, channels)

All three are after the last norm. Models near 2 GB, the most that one ONNX file may hold, have
their weights in ``model.onnx.data`` beside it.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
    name, arguments = timm_arguments(trained.model)
    with torch.random.fork_rng(devices=[]):
        # timm's own blocks: ours can be asked for some tokens, which a graph need not carry.
        encoder = timm.create_model(name, num_classes=0, **arguments)
    assert isinstance(encoder, VisionTransformer)
    encoder.load_state_dict(plain(trained.encoder.state_dict()))
    write_graph(_Outputs(encoder), folder, trained.model, OUTPUTS)


def write_graph(
    module: nn.Module,
    folder: Path,
    model: Model,
    outputs: Sequence[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Trace a module that takes normalised pictures, and write its graph.

    Args:
        module: In float32 on the CPU.
        folder: Where the graph goes.
        model: Tells the size of the pictures.
        outputs: Names of what the module gives, in its order.
        metadata: Texts that go with the graph.

    Raises:
        ConfigError: If a package is missing.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch's exporter looks for it late, and says less
    except ImportError as error:
        raise _missing(error) from error
    program = torch.onnx.export(
        module.eval(),
        # Two pictures: a first dimension of 1 would be taken for a constant.
        (torch.zeros(2, 3, *model.image_size),),
        dynamo=True,
        input_names=[INPUT],
        output_names=list(outputs),
        # By place, since each module has its own name for what it takes.
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(metadata or {})
    size = sum(value.numel() * value.element_size() for value in module.state_dict().values())
    program.save(folder / GRAPH, external_data=size > ONE_FILE)
    onnx.checker.check_model(folder / GRAPH, full_check=True)


def session_of(folder: Path, outputs: Sequence[str]) -> Any:
    """Load a graph as its users do.

    Raises:
        ConfigError: If onnxruntime is not installed.
        TrainingError: If it has other outputs.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise _missing(error) from error
    session = onnxruntime.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])
    if (found := [output.name for output in session.get_outputs()]) != list(outputs):
        raise TrainingError(f"{GRAPH} has the outputs {found}, expected {list(outputs)}")
    return session


def _read(folder: Path, _model: Model) -> Iterator[Features]:
    session = session_of(folder, OUTPUTS)

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


def code_for(folder: str, outputs: Sequence[str]) -> str:
    """Write what a user of a graph types."""
    return (
        f'onnxruntime.InferenceSession("{folder}/{GRAPH}").run(None, {{"{INPUT}": pictures}})'
        "  # normalised float32; gives " + ", ".join(outputs)
    )


def _code(folder: str, _model: Model) -> str:
    return code_for(folder, OUTPUTS)


ONNX = Format(
    name="onnx",
    write=_write,
    read=_read,
    code=_code,
    expected=_expected,
    verified="all three outputs by onnxruntime with 2 and with 3 pictures, after onnx.checker",
)
