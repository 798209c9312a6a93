"""A trained model in every format that is faithful to it, each tested on real images against the model as it was trained.

Shapes: B images, C channels, H and W pixels, X uniform numbers of an image.
"""

import logging
import shutil
from functools import cached_property
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.func import functional_call

from mae_core.classifier import Classifier
from mae_core.encoders import load_classifier, load_encoder
from mae_core.errors import EncoderError
from mae_core.export import exported_state
from mae_core.exports.card import write_cards
from mae_core.exports.formats import FOLDERS, ExportFormat, ExportOutcome, Outcomes
from mae_core.exports.hf import read_hf, vit_config, vit_mae_config, write_hf, write_image_processor
from mae_core.exports.programs import Outputs, run_onnx, run_torch_export, trace, write_onnx, write_torch_export
from mae_core.exports.trained import Trained
from mae_core.provenance import Provenance
from mae_core.vit import Encoder

logger = logging.getLogger(__name__)

TORCH_FILE = "model.pth"

_TOLERANCE = 1e-4  # of the largest output, or of 1
_HEAD = ("head.", "fc_norm.")


def write_exports(trained: Trained, folder: Path, *, made_by: Provenance) -> Outcomes:
    """Writes the formats that the spec asks for into folders below `folder`, which holds timm's layout, and a model card into each.

    What cannot be faithful or fails its test is left out, and why is in its outcome and in the card. Raises EncoderError where timm's
    layout fails.
    """
    exporter = _Exporter(trained, folder)
    difference, allowed = exporter.compare_native()
    if not difference <= allowed:
        raise EncoderError(f"the features of the model written to {folder} differ by {difference:g} from those of the trained model")
    outcomes: Outcomes = {"timm": ExportOutcome(difference=difference)}
    refusals = trained.spec.export_refusals()
    for name in get_args(ExportFormat)[1:]:
        place = folder / FOLDERS[name]
        shutil.rmtree(place, ignore_errors=True)
        if name in refusals:
            outcomes[name] = ExportOutcome(left_out=refusals[name])
        elif not trained.spec.export.asks_for(name):
            outcomes[name] = ExportOutcome(left_out="it is not among export.formats of the spec")
        else:
            outcomes[name] = _attempt(exporter, name, place)
    write_cards(trained, folder, outcomes, made_by)
    return outcomes


def _attempt(exporter: "_Exporter", name: ExportFormat, place: Path) -> ExportOutcome:
    place.mkdir()
    try:
        difference, allowed = exporter.write(name, place)
        fault = None if difference <= allowed else f"its outputs differ by {difference:g} from the trained model's"
    except Exception as error:  # a library that fails must not cost a trained model
        logger.warning("export %s failed", name, exc_info=error)
        difference, fault = 0.0, f"writing it failed: {type(error).__name__}: {error}"[:500]
    if fault is None:
        return ExportOutcome(difference=difference)
    shutil.rmtree(place)
    return ExportOutcome(left_out=fault)


class _Exporter:
    """Writes one format after the other, each into its folder, and says by how much it differs, and by how much it may.

    All is compared on the CPU in float32, wherever the model was trained: devices differ by more than exports may.
    """

    def __init__(self, trained: Trained, folder: Path) -> None:
        self._trained, self._native = trained, folder
        self._images_BCHW = trained.sample.images_BCHW
        module = trained.module
        self._state = _on_cpu(exported_state(module) if isinstance(module, Classifier) else module.state_dict())

    def compare_native(self) -> tuple[float, float]:
        with torch.no_grad():
            found: dict[str, Tensor] = Outputs(self._loaded)(self._images_BCHW)
        return _difference(found, self._reference)

    def write(self, name: ExportFormat, folder: Path) -> tuple[float, float]:
        match name:
            case "hf":
                return self._write_hf(folder)
            case "hf-mae":
                return self._write_hf_mae(folder)
            case "torch":
                return self._write_torch(folder)
            case "torch-export":
                write_torch_export(self._program, folder)
                return _difference(run_torch_export(folder, self._images_BCHW), self._reference)
            case "onnx":
                write_onnx(self._program, folder, names=list(self._reference))
                return _difference(run_onnx(folder, self._images_BCHW), self._reference)
        raise AssertionError(name)

    def _write_hf(self, folder: Path) -> tuple[float, float]:
        trained = self._trained
        config = vit_config(trained.model, classes=trained.classes)
        write_hf(self._state, folder, architecture="ViTForImageClassification" if trained.classes else "ViTModel", config=config)
        write_image_processor(folder, trained.model, trained.normalize, crops=trained.sample.resized)
        return _difference(self._outputs_of(read_hf(folder)), self._reference)

    def _write_hf_mae(self, folder: Path) -> tuple[float, float]:
        trained, spec = self._trained, self._trained.spec
        assert spec.kind == "pretrain", "refused otherwise"
        config = vit_mae_config(trained.model, decoder=spec.decoder, masking=spec.masking, target=spec.target)
        write_hf(self._with_decoder, folder, architecture="ViTMAEForPreTraining", config=config)
        write_image_processor(folder, trained.model, trained.normalize, crops=trained.sample.resized)
        return _difference(self._outputs_of(read_hf(folder)), self._reference | self._prediction)

    def _write_torch(self, folder: Path) -> tuple[float, float]:
        state = self._with_decoder or self._state
        torch.save({"model": state}, folder / TORCH_FILE)
        found = self._outputs_of(torch.load(folder / TORCH_FILE, weights_only=True)["model"])
        return _difference(found, self._reference | self._prediction)

    @cached_property
    def _reference(self) -> dict[str, Tensor]:
        return self._outputs_of(self._state)

    @cached_property
    def _loaded(self) -> Encoder | Classifier:
        """The model back from timm's layout."""
        if self._trained.classes:
            return load_classifier(self._native, wanted=None).classifier.eval()
        return load_encoder(self._native, wanted=None).encoder.eval()

    @cached_property
    def _program(self) -> ExportedProgram:
        return trace(self._loaded)

    @cached_property
    def _with_decoder(self) -> dict[str, Tensor]:
        """The tensors of the whole autoencoder by the authors' names; empty where it is none that they have."""
        mae = self._trained.mae
        if mae is None or mae.is_cross or mae.masking.encoder_mask_tokens:
            return {}
        return _on_cpu({name.removeprefix("encoder."): tensor for name, tensor in mae.state_dict().items()})

    @cached_property
    def _prediction(self) -> dict[str, Tensor]:
        return self._predicted(self._with_decoder) if self._with_decoder else {}

    def _outputs_of(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the trained model's code makes of these tensors, which must be all that it has."""
        own = {name: tensor for name, tensor in state.items() if name in self._state or name not in self._with_decoder}
        inner = "" if isinstance(self._trained.module, Encoder) else "encoder."
        named = {f"module.{name if name.startswith(_HEAD) else inner + name}": tensor for name, tensor in own.items()}
        with torch.no_grad():
            outputs: dict[str, Tensor] = functional_call(Outputs(self._trained.module).eval(), named, (self._images_BCHW,), strict=True)
        return outputs | (self._predicted(state) if len(own) < len(state) else {})

    def _predicted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the decoder predicts for all patches, with the same masks each time."""
        mae = self._trained.mae
        assert mae is not None
        named = {f"encoder.{name}" if name in self._state else name: tensor for name, tensor in state.items()}
        numbers_BX = torch.rand(len(self._images_BCHW), mae.num_numbers, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            predicted = functional_call(mae.eval(), named, (self._images_BCHW, numbers_BX), {"predict_all": True}, strict=True)
        return {"prediction": predicted.prediction_VQP}


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, float]:
    """The largest difference between outputs of the same names, and the largest that passes; NaN where one is not a number."""
    assert found.keys() == expected.keys(), (found.keys(), expected.keys())
    differences = [float((found[name] - tensor).abs().max()) for name, tensor in expected.items()]
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    return float(torch.tensor(differences).max()), _TOLERANCE * max(1.0, largest)
