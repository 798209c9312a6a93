"""The formats that a trained model is written in, and the folder of each. The standard library only: the command line starts with them."""

from typing import Literal

ExportFormat = Literal["timm", "hf", "hf-mae", "torch", "onnx", "torch-export"]

FOLDERS: dict[ExportFormat, str] = {
    "timm": "",  # the result's own folder, from which this project loads it, too
    "hf": "hf/",
    "hf-mae": "hf-mae/",
    "torch": "torch/",
    "onnx": "onnx/",
    "torch-export": "torch_export/",
}
