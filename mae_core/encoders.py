"""Reads what an `encoder:` names.

Where the wanted model has another image size, positions are interpolated; nothing else is changed.
"""

import json
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mae_core.classifier import Classifier
from mae_core.errors import EncoderError
from mae_core.export import CONFIG, WEIGHTS, check_tensors, exported_state
from mae_core.options import ModelConfig, NormalizeConfig
from mae_core.patches import resize_positions
from mae_core.vit import Encoder

_HEAD = ("head.", "fc_norm.")  # a classifier's own tensors, beside its encoder's


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
    state = _resized(_read_weights(folder, expected=exported_state(saved)), config.model, model)
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
