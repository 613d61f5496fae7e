"""One flow for every format: write a draft, load it as its users do, compare, put it in place.

Axes in this file
    B  pictures
    T  tokens that are compared
    D  channels of a token
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from droppos.config import Model
from droppos.encoder import timm_arguments
from droppos.errors import TrainingError
from droppos.export.folder import draft_of, write_own
from droppos.trained import Trained

Features = Callable[[Tensor], Tensor]
"""From normalised pictures (B 3 rows columns) to what is compared: tokens (B T D), or logits."""

BATCHES = (2, 3)
"""Pictures at once, one size after the other: a format may have the first one built in."""


@torch.no_grad()
def all_tokens(
    encoder: VisionTransformer, pictures: Float[Tensor, "B 3 rows columns"]
) -> Float[Tensor, "B T D"]:
    """Give class token and patches after the last norm."""
    return encoder.forward_features(pictures)


def any_shape(_model: Model) -> None:
    """Refuse no model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A way out, as data."""

    name: str
    write: Callable[[Trained, Path], None]
    """Put the files that this format's users expect into a folder."""
    read: Callable[[Path, Model], Iterable[Features]]
    """Load them again, in each of the ways users do."""
    code: Callable[[str, Model], str]
    """What a user of the folder types to load it."""
    verified: str
    """How `read` loads it, for the report."""
    check: Callable[[Model], None] = any_shape
    """Refuse a model that this format has no words for, with a ConfigError."""
    expected: Callable[[VisionTransformer, Tensor], Tensor] = all_tokens
    """What the trained encoder must give for `read`'s features to count as the same."""
    tolerance: float = 1e-4
    """Largest difference of a feature. Float32 that is summed in another order differs by about
    1e-5 where features are about 1; a wrong name, norm or position by about 1."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written, and how near it is to what was trained."""

    path: Path
    format: str
    architecture: str
    """timm's name."""
    arguments: dict[str, Any]
    """What ``timm.create_model`` must be told besides, when it is not given a timm folder."""
    image_size: tuple[int, int]
    """Height and width of the pictures it takes, in pixels."""
    parameters: int
    """Of the encoder, fixed positions included."""
    classes: int
    """That its head tells apart; 0 without a head."""
    size: int
    """Bytes of the whole folder."""
    largest_difference: float
    """Largest absolute difference of any feature from the trained encoder's on random
    pictures, over all ways of loading."""
    verified: str
    """What was compared with the trained encoder."""
    command: str
    """Python that loads the export."""


def export(trained: Trained, out: Path, form: Format, shown: str | None = None) -> ExportReport:
    """Write the encoder in a format, load it back, and compare.

    The folder appears at once and complete, or not at all; a previous export there is
    replaced, of whatever format.

    Args:
        trained: With all of its weights in this process.
        out: Folder to write.
        form: One of droppos.export.formats.
        shown: How the code that loads it should name the folder, if not as ``out``.

    Raises:
        ConfigError: If ``out`` holds anything but a previous export, if the format cannot express
            the model, or if it needs a package that is not installed.
        TrainingError: If what was written does not compute what was trained.
    """
    form.check(trained.model)
    code = form.code(shown or str(out), trained.model)
    with draft_of(out) as draft:
        form.write(trained, draft)
        about = {"for": form.name, "load": code, "model": asdict(trained.model)}
        method = None if trained.method is None else asdict(trained.method)
        classes = {"classes": list(trained.classes)} if trained.classes else {}
        write_own(draft, {**about, "method": method, **classes})
        difference = _largest_difference(trained, draft, form)
        if not difference <= form.tolerance:  # NaN is a failure, too
            raise TrainingError(
                f"what was exported computes otherwise than what was trained: it differs by "
                f"{difference:g}, expected at most {form.tolerance:g}; nothing was written to "
                f"{out}. Are the weights finite, and is this the configuration the model was made "
                "from?"
            )
    architecture, arguments = timm_arguments(trained.model)
    return ExportReport(
        path=out,
        format=form.name,
        architecture=architecture,
        arguments={**arguments, "num_classes": len(trained.classes)},
        image_size=trained.model.image_size,
        classes=len(trained.classes),
        parameters=sum(weight.numel() for weight in trained.encoder.state_dict().values()),
        size=sum(file.stat().st_size for file in out.iterdir()),
        largest_difference=difference,
        verified=form.verified,
        command=code,
    )


def _largest_difference(trained: Trained, folder: Path, form: Format) -> float:
    # A copy: the caller's may be training, or on a GPU whose float32 is not quite that.
    encoder = deepcopy(trained.encoder).cpu().float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):  # first values are drawn that the weights replace
        loaded = list(form.read(folder, trained.model))
    difference = torch.zeros(())
    for count in BATCHES:
        pictures = torch.randn(count, 3, *trained.model.image_size, generator=generator)
        expected = form.expected(encoder, pictures)
        for features in loaded:
            apart = (features(pictures) - expected).abs().max()
            difference = torch.maximum(difference, apart)  # keeps a NaN, where max() may not
    return difference.item()
