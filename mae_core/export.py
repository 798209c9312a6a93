"""The trained encoder on disk: safetensors and a config that timm, and this project, load.

    timm.create_model("local-dir:FOLDER", pretrained=True)

`config.json` is timm's; its key `maestro` says our own model, so that reading back needs no guess. Weights have timm's names, which
are ours and those of the authors.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mae_core.classifier import Classifier
from mae_core.errors import EncoderError
from mae_core.options import ModelConfig, NormalizeConfig
from mae_core.patches import resize_positions
from mae_core.vit import Encoder

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_HEAD = ("head.", "fc_norm.")  # a classifier's own tensors, beside its encoder's
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
    _write(_exported_state(classifier), folder, config)


def _exported_state(classifier: Classifier) -> dict[str, Tensor]:
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


class LoadedClassifier(NamedTuple):
    """A fine-tuned model, the names of its classes in the order of its outputs, and the normalisation of its images."""

    classifier: Classifier
    classes: list[str]
    normalize: NormalizeConfig


def has_head(folder: Path) -> bool:
    """Whether `folder` holds a fine-tuned model, not an encoder alone. Raises EncoderError where it cannot be read."""
    return bool(_read_config(folder).classes)


def read_model(folder: Path) -> ModelConfig:
    """The model of an encoder or a classifier in `folder`. Raises EncoderError."""
    return _read_config(folder).model


def load_encoder(folder: Path, *, wanted: ModelConfig | None) -> tuple[Encoder, NormalizeConfig]:
    """An encoder written by `write_encoder`, and its normalisation.

    Where the `wanted` model has another image size, positions are interpolated. Raises EncoderError where anything else differs.
    """
    config = _read_config(folder)
    if config.classes:
        raise EncoderError(f"encoder {folder} is a fine-tuned model with a head; name the encoder that it started from")
    model = _model_to_build(config.model, wanted, folder=folder)
    with torch.device("meta"):
        saved, encoder = Encoder(config.model), Encoder(model)
    state = _read_weights(folder, expected=saved.state_dict())
    encoder.load_state_dict(_resized(state, config.model, model), assign=True)
    encoder.pos_embed.requires_grad_(False)
    return encoder, config.normalize


def load_classifier(folder: Path, *, wanted: ModelConfig | None) -> LoadedClassifier:
    """A fine-tuned model written by `write_classifier`. `wanted` and errors are those of `load_encoder`."""
    config = _read_config(folder)
    if not config.classes:
        raise EncoderError(f"encoder {folder} has no head; name a folder that a fine-tuning wrote")
    model = _model_to_build(config.model, wanted, folder=folder)
    with torch.device("meta"):
        saved, classifier = (
            Classifier(Encoder(each), num_classes=len(config.classes), pooling=config.pooling, generator=torch.Generator())
            for each in (config.model, model)
        )
    state = _resized(_read_weights(folder, expected=_exported_state(saved)), config.model, model)
    own = {name if name.startswith(_HEAD) else f"encoder.{name}": tensor for name, tensor in state.items()}
    classifier.load_state_dict(own, assign=True)
    return LoadedClassifier(classifier, config.classes, config.normalize)


class _Config(NamedTuple):
    """What `config.json` says. No classes: an encoder without a head."""

    model: ModelConfig
    normalize: NormalizeConfig
    classes: list[str]
    pooling: Literal["mean", "cls"]


def _read_config(folder: Path) -> _Config:
    try:
        said = json.loads((folder / CONFIG).read_text())
        model = ModelConfig.model_validate(said["maestro"]["model"])
        normalize = NormalizeConfig.model_validate(said["maestro"]["normalize"])
        classes = [str(name) for name in said.get("label_names", [])]
        return _Config(model, normalize, classes, "mean" if said.get("global_pool") == "avg" else "cls")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EncoderError(f"encoder {folder}: {CONFIG} cannot be read ({error}); name a folder that a pretraining wrote") from error


def _model_to_build(saved: ModelConfig, wanted: ModelConfig | None, *, folder: Path) -> ModelConfig:
    if wanted is None:
        return saved
    differ = [
        f"{name} is {getattr(saved, name)!r}, but the spec's model has {getattr(wanted, name)!r}"
        for name in ("arch", "in_chans")
        if getattr(saved, name) != getattr(wanted, name)
    ]
    if differ:
        raise EncoderError(f"encoder {folder}: {'; '.join(differ)}; leave model out to take the encoder's")
    return wanted


def _read_weights(folder: Path, *, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise EncoderError(f"encoder {folder}: {WEIGHTS} cannot be read ({error})") from error
    check_tensors(state, expected, where=f"encoder {folder / WEIGHTS}")
    return state


def _resized(state: dict[str, Tensor], saved: ModelConfig, model: ModelConfig) -> dict[str, Tensor]:
    return state | {"pos_embed": resize_positions(state["pos_embed"], saved.grid, model.grid)}


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
