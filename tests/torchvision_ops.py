"""Makes `import torchvision` work beside a CPU-only torch.

PyPI's torchvision wheel is built for CUDA; beside the CPU wheel of torch its compiled operators do not load, and registering their
fakes then fails. Declaring the two operators that it registers fakes for is enough for timm and transformers, which use neither.
Where the real operators load, this does nothing.
"""

import importlib
import sys

import torch

_kept_alive: list[torch.library.Library] = []


def import_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for op in ("nms", "qnms"):
        library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept_alive.append(library)
    importlib.import_module("torchvision")
