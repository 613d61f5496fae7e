"""The formats there are."""

from droppos.export import FormatName
from droppos.export.detectron2_vitdet import DETECTRON2
from droppos.export.flow import Format
from droppos.export.mmseg_vit import MMSEG
from droppos.export.onnx_graph import ONNX
from droppos.export.timm_vit import TIMM
from droppos.export.torchvision_vit import TORCHVISION
from droppos.export.transformers_vit import TRANSFORMERS

FORMATS: dict[FormatName, Format] = {
    "timm": TIMM,
    "transformers": TRANSFORMERS,
    "torchvision": TORCHVISION,
    "onnx": ONNX,
    "detectron2": DETECTRON2,
    "mmseg": MMSEG,
}
