"""The formats that a trained model is written in, and which of them can be faithful to it. Pydantic only: the service loads no torch."""

from typing import Literal

from pydantic import Field

from mae_core.exports.names import FOLDERS as FOLDERS
from mae_core.exports.names import ExportFormat as ExportFormat
from mae_core.options import DecoderConfig, MaskingConfig, ModelConfig, Strict


class ExportConfig(Strict):
    """What else than timm's layout, which is always written, a trained model is written as.

    formats null: all that are faithful to it. One that is asked for and cannot be faithful is an error.
    """

    formats: list[ExportFormat] | None = Field(default=None, max_length=16, description="null: all that are faithful to the model")
    license: str | None = Field(default=None, min_length=1, max_length=100, examples=["apache-2.0"], description="shown in the model cards")

    def asks_for(self, name: ExportFormat) -> bool:
        return self.formats is None or name in self.formats


class ExportOutcome(Strict):
    """What became of a format: the largest difference between its outputs and the trained model's on real images, or why there is none."""

    difference: float | None = None
    left_out: str | None = None


Outcomes = dict[ExportFormat, ExportOutcome]
Refusals = dict[ExportFormat, str]


def pretraining_refusals(model: ModelConfig, masking: MaskingConfig, decoder: DecoderConfig) -> Refusals:
    """Formats that cannot hold such a pretrained model, each with the reason and what to use instead."""
    instead = "use hf for the encoder alone"
    if decoder.attention == "cross":
        why = f"ViTMAEForPreTraining decodes by self-attention over all patches, this decoder by cross attention; {instead}"
    elif masking.encoder_mask_tokens:
        why = f"ViTMAEForPreTraining gives its encoder no mask tokens, this run does; {instead}, or masking.encoder_mask_tokens: false"
    elif model.image_size[0] != model.image_size[1]:
        height, width = model.image_size
        why = f"ViTMAEForPreTraining takes square images alone, not {height} x {width}; {instead}, or give a square model.image_size"
    else:
        return {}
    return {"hf-mae": why}


def finetuning_refusals(pooling: Literal["mean", "cls"]) -> Refusals:
    """Formats that cannot hold such a fine-tuned model, each with the reason and what to use instead."""
    no_decoder = "a fine-tuned model has no decoder"
    if pooling == "cls":
        return {"hf-mae": f"{no_decoder}; use hf"}
    return {
        "hf": "ViTForImageClassification classifies the class token behind the final norm, this model the mean of the patch tokens behind "
        "a norm of its own; use timm, onnx or torch-export, or fine-tune with pooling: cls",
        "hf-mae": f"{no_decoder}; use timm, onnx or torch-export",
    }


def check_formats(config: ExportConfig, refusals: Refusals) -> None:
    """Raises ValueError where a format is asked for by name that cannot be faithful."""
    for name in config.formats or []:
        if name in refusals:
            raise ValueError(f"export.formats: {name} cannot be faithful to this model: {refusals[name]}")
