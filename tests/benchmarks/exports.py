"""Largest difference of each export of a ViT-B/16 at 224 from the model it was written from.

    python -m tests.benchmarks.exports

Weights are random, none at its first value, so that every bias, norm and position counts.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from droppos.config import Method, Model
from droppos.export.flow import export
from droppos.export.formats import FORMATS
from droppos.model import DropPos
from droppos.trained import Trained


def main() -> None:
    """Print a line for each format."""
    torch.manual_seed(0)
    model = Model()
    droppos = DropPos(model, Method()).eval()
    with torch.no_grad():
        for weight in droppos.parameters():
            if weight.requires_grad:
                weight += torch.nn.init.trunc_normal_(torch.empty_like(weight), std=0.02)
    with TemporaryDirectory() as folder:
        for name, form in FORMATS.items():
            report = export(Trained(droppos.encoder, model, droppos), Path(folder) / name, form)
            print(f"{name:13} {report.largest_difference:.1e}  {report.size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
