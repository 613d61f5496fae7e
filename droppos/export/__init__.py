"""The way out: trained weights in the formats that people load."""

from typing import Literal

FormatName = Literal["timm", "transformers", "torchvision", "onnx", "detectron2", "mmseg"]
