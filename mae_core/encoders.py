"""Opens what an `encoder:` names: what this project wrote, or timm, Hugging Face or the MAE authors' code (`mae_core.saved_weights`).

Where the wanted model has another image size, positions are interpolated; nothing else is changed.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mae_core.classifier import Classifier
from mae_core.errors import EncoderError
from mae_core.export import check_tensors, exported_state
from mae_core.options import ModelConfig, NormalizeConfig
from mae_core.patches import resize_positions
from mae_core.saved_config import SavedConfig
from mae_core.saved_weights import in_float32, read_config, read_weights
from mae_core.vit import Encoder

_HEAD = ("head.", "fc_norm.")  # a classifier's own tensors, beside its encoder's


class LoadedEncoder(NamedTuple):
    """An encoder and the normalisation of its images, None where its files do not say it. decoder: what it was pretrained with, if it is
    there, by the authors' names."""

    encoder: Encoder
    normalize: NormalizeConfig | None
    decoder: dict[str, Tensor]


class LoadedClassifier(NamedTuple):
    """A fine-tuned model, the names of its classes in the order of its outputs, and the normalisation of its images as above."""

    classifier: Classifier
    classes: list[str]
    normalize: NormalizeConfig | None


def has_head(place: Path) -> bool:
    """Whether the folder or file holds a fine-tuned model, not an encoder alone. Raises EncoderError where it cannot be read."""
    return bool(read_config(place).classes)


def read_model(place: Path) -> ModelConfig:
    """The model of an encoder or a classifier. Raises EncoderError."""
    return read_config(place).model


def load_encoder(place: Path, *, wanted: ModelConfig | None) -> LoadedEncoder:
    """An encoder without a head, from a folder or a file of weights.

    Where the `wanted` model has another image size, positions are interpolated. Raises EncoderError where anything else differs.
    """
    config = read_config(place)
    if config.classes:
        raise EncoderError(f"encoder {place} is a fine-tuned model with a head; name the encoder that it started from")
    model = _model_to_build(config.model, wanted, place=place)
    with torch.device("meta"):
        saved, encoder = Encoder(config.model), Encoder(model)
    state, decoder = _read_tensors(place, config, expected=saved.state_dict())
    encoder.load_state_dict(_resized(state, config.model, model), assign=True)
    encoder.pos_embed.requires_grad_(False)
    return LoadedEncoder(encoder, config.normalize, decoder)


def load_classifier(place: Path, *, wanted: ModelConfig | None) -> LoadedClassifier:
    """A fine-tuned model. `wanted` and errors are those of `load_encoder`."""
    config = read_config(place)
    if not config.classes:
        raise EncoderError(f"encoder {place} has no head; name a folder that a fine-tuning wrote")
    model = _model_to_build(config.model, wanted, place=place)
    with torch.device("meta"):
        saved, classifier = (
            Classifier(Encoder(each), num_classes=len(config.classes), pooling=config.pooling, generator=torch.Generator())
            for each in (config.model, model)
        )
    state, _ = _read_tensors(place, config, expected=exported_state(saved))
    resized = _resized(state, config.model, model)
    own = {name if name.startswith(_HEAD) else f"encoder.{name}": tensor for name, tensor in resized.items()}
    classifier.load_state_dict(own, assign=True)
    return LoadedClassifier(classifier, config.classes, config.normalize)


def _model_to_build(saved: ModelConfig, wanted: ModelConfig | None, *, place: Path) -> ModelConfig:
    if wanted is None:
        return saved
    if differ := wanted.differences(saved):
        raise EncoderError(f"encoder {place} does not fit the spec's model: {', '.join(differ)}; give the encoder's own")
    return wanted


def _read_tensors(place: Path, config: SavedConfig, *, expected: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's tensors and the decoder's. Raises EncoderError that lists what is missing, not the model's, or of another shape."""
    saved = read_weights(place)
    state = saved.state if config.is_ours else in_float32(saved.state)
    check_tensors(state, expected, where=f"encoder {saved.file}")
    return state, in_float32(saved.decoder) if config.decoder else {}


def _resized(state: dict[str, Tensor], saved: ModelConfig, model: ModelConfig) -> dict[str, Tensor]:
    return state | {"pos_embed": resize_positions(state["pos_embed"], saved.grid, model.grid)}
