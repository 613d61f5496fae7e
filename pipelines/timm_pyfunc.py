"""A backbone as MLflow loads it. This file goes with the weights, and needs nothing of droppos.

`mlflow.pyfunc.load_model(URI)` runs it: `predict` gives features, and
`unwrap_python_model().timm_model()` the model itself, to be trained on.

Axes in this file
    N  pictures
    D  channels of a token
"""

from typing import Any

import numpy as np
import timm
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

BATCH = 64
"""Pictures at a time; changes nothing but memory and time."""


class TimmBackbone(PythonModel):
    """A vision transformer of timm's, in eval mode on the CPU."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights that lie beside this file."""
        folder = context.artifacts["export"]
        self._model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def timm_model(self) -> torch.nn.Module:
        """Give the model, as `timm.create_model` made it."""
        return self._model

    @torch.no_grad()
    def predict(  # pyright: ignore[reportIncompatibleMethodOverride] - it says None there
        self, context: PythonModelContext, model_input: np.ndarray, params: Any = None
    ) -> np.ndarray:
        """Summarise pictures: the mean of each one's patch tokens after the last norm.

        Args:
            context: Not used.
            model_input: uint8, N x rows x columns x 3, of the model's size.
            params: Not used.

        Returns:
            float32, N x D.
        """
        pictures = torch.from_numpy(np.ascontiguousarray(model_input))
        return torch.cat([self._features(part) for part in pictures.split(BATCH)]).numpy()

    def _features(self, pictures: torch.Tensor) -> torch.Tensor:
        config = self._model.pretrained_cfg
        mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
        pixels = ((pictures.float() / 255 - mean) / std).permute(0, 3, 1, 2)
        tokens = self._model.forward_features(pixels)
        return tokens[:, self._model.num_prefix_tokens :].mean(dim=1)


set_model(TimmBackbone())
