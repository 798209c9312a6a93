"""The trained model as a graph that needs none of this code: ONNX, and torch's own `torch.export`. Any number of images goes in.

In: `images`, float32 (B, C, H, W), normalised. Out: `features` (B, 1 + L, D), the encoder's tokens, and of a fine-tuned model `logits`
(B, classes).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mae_core.classifier import Classifier
from mae_core.vit import Encoder

ONNX_FILE, TORCH_EXPORT_FILE = "model.onnx", "model.pt2"

_TRACED_IMAGES = 2  # one would make a graph for one


class Outputs(nn.Module):
    """What an export is compared by, by name."""

    def __init__(self, module: Encoder | Classifier) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if isinstance(self.module, Encoder):
            return {"features": self.module(images)}
        tokens_BND = self.module.encoder(images)
        return {"features": tokens_BND, "logits": self.module.classify(tokens_BND)}


def trace(module: Encoder | Classifier) -> ExportedProgram:
    """The graph of a module in eval mode on the CPU, for any number of images."""
    model = module.model if isinstance(module, Encoder) else module.encoder.model
    images = torch.zeros(_TRACED_IMAGES, model.in_chans, *model.image_size)  # not the user's: they would be stored in the file
    with torch.no_grad():
        program = torch.export.export(Outputs(module).eval(), (images,), dynamic_shapes={"images": {0: Dim("batch")}})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def write_torch_export(program: ExportedProgram, folder: Path) -> None:
    torch.export.save(program, folder / TORCH_EXPORT_FILE)


def run_torch_export(folder: Path, images_BCHW: Tensor) -> dict[str, Tensor]:
    """Outputs of the file in `folder`."""
    with torch.no_grad():
        outputs: dict[str, Tensor] = torch.export.load(folder / TORCH_EXPORT_FILE).module()(images_BCHW)
    return outputs


def write_onnx(program: ExportedProgram, folder: Path, *, names: list[str]) -> None:
    """One file; above what one can hold (2 GB), the weights lie beside it."""
    with _quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["images"],
            output_names=names,
            dynamic_shapes={"images": {0: Dim("batch")}},
            verbose=False,
        )
    assert exported is not None
    exported.save(folder / ONNX_FILE)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # torch copies its own LeafSpec, whose making it has deprecated; nothing here calls it.
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning)
        yield


def run_onnx(folder: Path, images_BCHW: Tensor) -> dict[str, Tensor]:
    """Outputs of the file in `folder`, computed by ONNX Runtime."""
    import onnxruntime  # here, as only a run that exports needs it

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / ONNX_FILE, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {"images": images_BCHW.numpy()})
    return {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}
