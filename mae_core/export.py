"""Writes the trained encoder: safetensors and a config that timm, and this project (`mae_core.encoders`), load.

    timm.create_model("local-dir:FOLDER", pretrained=True)

`config.json` is timm's; its key `maestro` says our own model, so that reading back needs no guess. Weights have timm's names, which
are ours and those of the authors.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from mae_core.classifier import Classifier
from mae_core.errors import EncoderError
from mae_core.options import ModelConfig, NormalizeConfig
from mae_core.saved_config import CONFIG, WEIGHTS
from mae_core.vit import Encoder

_TIMM_ARCHITECTURES = {
    "tiny": "vit_tiny_patch16_224",
    "small": "vit_small_patch16_224",
    "base": "vit_base_patch16_224",
    "large": "vit_large_patch16_224",
    "huge": "vit_huge_patch14_224",
}


def write_encoder(encoder: Encoder, folder: Path, *, normalize: NormalizeConfig) -> None:
    """The encoder alone: features are the tokens behind its final norm."""
    _write(encoder.state_dict(), folder, _config(encoder.model, normalize, num_classes=0, global_pool="token"))


def write_classifier(classifier: Classifier, folder: Path, *, classes: list[str], normalize: NormalizeConfig) -> None:
    """A fine-tuned model with its head, as timm's classifier of the same pooling."""
    pool = "avg" if classifier.pooling == "mean" else "token"
    config = _config(classifier.encoder.model, normalize, num_classes=len(classes), global_pool=pool)
    config["label_names"] = config["pretrained_cfg"]["label_names"] = classes
    _write(exported_state(classifier), folder, config)


def exported_state(classifier: Classifier) -> dict[str, Tensor]:
    """Its tensors by timm's names: those of the encoder without a prefix."""
    return {name.removeprefix("encoder."): tensor for name, tensor in classifier.state_dict().items()}


def write_probe(heads: Sequence[nn.Module], folder: Path) -> None:
    """The heads of a probe, one for each seed, in order."""
    tensors = {f"heads.{place}.{name}": tensor for place, head in enumerate(heads) for name, tensor in head.state_dict().items()}
    _write(tensors, folder, {"num_heads": len(heads)})


def _write(tensors: dict[str, Tensor], folder: Path, config: dict[str, Any]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _config(model: ModelConfig, normalize: NormalizeConfig, *, num_classes: int, global_pool: str) -> dict[str, Any]:
    return {
        "architecture": _TIMM_ARCHITECTURES[model.size_name],
        "num_classes": num_classes,
        "num_features": model.width,
        "global_pool": global_pool,
        "model_args": {  # what timm builds the model with; the pooling above is for people
            "img_size": list(model.image_size),
            "patch_size": model.patch_size,
            "in_chans": model.in_chans,
            "embed_dim": model.width,
            "depth": model.depth,
            "num_heads": model.num_heads,
            "global_pool": global_pool,
        },
        "pretrained_cfg": {
            "tag": "maestro",
            "num_classes": num_classes,
            "input_size": [model.in_chans, *model.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.875 if max(model.image_size) <= 224 else 1.0,
            "crop_mode": "center",
            "mean": list(normalize.mean),
            "std": list(normalize.std),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "maestro": {"model": model.model_dump(mode="json"), "normalize": normalize.model_dump(mode="json")},
    }


def check_tensors(given: dict[str, Tensor], expected: dict[str, Tensor], *, where: str) -> None:
    """Raises EncoderError that lists each tensor that is missing, unexpected, or of another shape or type."""
    faults = [f"{name} is missing" for name in expected if name not in given]
    faults += [f"{name} is not part of this model" for name in given if name not in expected]
    both = [(name, given[name], tensor) for name, tensor in expected.items() if name in given]
    faults += [f"{name} has shape {tuple(own.shape)}, not {tuple(other.shape)}" for name, own, other in both if own.shape != other.shape]
    faults += [f"{name} is {_dtype(own)}, not {_dtype(other)}" for name, own, other in both if own.dtype != other.dtype]
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise EncoderError(f"{where} does not fit: {'; '.join(faults[:8])}{more}")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
