"""Tensors of a saved encoder under our names, whoever wrote them: this project, the MAE authors' code, timm or Hugging Face.

From a folder with a `config.json` (`mae_core.saved_config`), or from a file of weights alone, whose tensors say the model. Only tensors
and plain containers are unpickled (`weights_only=True`).
"""

import argparse
import json
import math
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mae_core.errors import EncoderError
from mae_core.hf_names import from_hf
from mae_core.options import IMAGENET_MEAN, IMAGENET_STD, ModelConfig, NormalizeConfig
from mae_core.saved_config import (
    CONFIG,
    IMAGE_PROCESSOR,
    WEIGHT_SUFFIXES,
    WEIGHTS,
    WEIGHTS_OF_TORCH,
    SavedConfig,
    arch_name,
    saved_config,
)

_UNREADABLE = (
    *(OSError, EOFError, SafetensorError, pickle.UnpicklingError, struct.error),
    *(RuntimeError, ValueError, LookupError, TypeError, AttributeError),
)
_WRAPPERS = ("model", "state_dict")  # under which a checkpoint of training has the model
_OF_HF = re.compile(r"(vit\.)?embeddings\.")
_DECODER = ("mask_token", "decoder_")
_UNUSED = ("pooler.", "vit.pooler.")  # Hugging Face's layer behind the features, random behind a masked autoencoder


class SavedWeights(NamedTuple):
    """state: the encoder's, and a classifier's head. decoder: of a masked autoencoder that was saved whole."""

    file: Path
    state: dict[str, Tensor]
    decoder: dict[str, Tensor]


def read_config(place: Path) -> SavedConfig:
    """What a folder or a file of weights holds. Raises EncoderError where it cannot be read, or is another network."""
    if place.is_file():
        return _config_of(read_weights(place).state, place)
    try:
        said = json.loads((place / CONFIG).read_text())
        processor = place / IMAGE_PROCESSOR
        return saved_config(said, json.loads(processor.read_text()) if processor.is_file() else None)
    except (OSError, ValueError) as error:
        what = f"{CONFIG} cannot be read ({error})"
        raise EncoderError(f"encoder {place}: {what}; name a folder that a pretraining, timm or Hugging Face wrote, or a file") from error


def read_weights(place: Path) -> SavedWeights:
    """The tensors of a folder or a file; those of other libraries as float32. Raises EncoderError."""
    file = place if place.is_file() else _weights_file(place)
    try:
        tensors = load_file(file) if file.suffix == ".safetensors" else _unpickled(file)
    except _UNREADABLE as error:
        why = _why(error)
        name = "the file" if file == place else file.name
        raise EncoderError(f"encoder {place}: {name} cannot be read ({why})") from error
    if any(_OF_HF.match(name) for name in tensors):
        tensors = from_hf({name: tensor for name, tensor in tensors.items() if not name.startswith(_UNUSED)})
    decoder = {name: tensor for name, tensor in tensors.items() if name.startswith(_DECODER)}
    return SavedWeights(file, {name: tensor for name, tensor in tensors.items() if name not in decoder}, decoder)


def _why(error: Exception) -> str:
    """In our words where the library's would advise to unpickle whatever is there."""
    if isinstance(error, pickle.UnpicklingError):
        refused = re.search(r"(?:Unsupported global: GLOBAL|Trying to load unsupported GLOBAL) (\S+)", str(error))
        what = f"it holds a {refused[1]}" if refused else "it is damaged, or holds more"
        return f"{what}, where only tensors and plain containers are taken; save the model's state_dict alone"
    return str(error).partition("\n")[0][:300] or type(error).__name__


def in_float32(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that were saved with half the precision, or with double, as we compute with them."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _weights_file(folder: Path) -> Path:
    for name in (WEIGHTS, WEIGHTS_OF_TORCH):
        if (folder / name).is_file():
            return folder / name
    raise EncoderError(f"encoder {folder}: {WEIGHTS} cannot be read (there is none, and no {WEIGHTS_OF_TORCH} in one piece)")


def _unpickled(file: Path) -> dict[str, Tensor]:
    """The model of a checkpoint. Raises pickle.UnpicklingError for whatever is no tensor, and ValueError where there is no model."""
    if file.suffix not in WEIGHT_SUFFIXES:
        raise ValueError(f"its name ends in none of {', '.join(WEIGHT_SUFFIXES)}")
    with torch.serialization.safe_globals([argparse.Namespace]):  # the authors keep their arguments in it
        saved: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    if not isinstance(saved, dict):
        raise ValueError(f"it holds a {type(saved).__name__}, not tensors by name")
    saved = next((saved[name] for name in _WRAPPERS if isinstance(saved.get(name), dict)), saved)
    if others := [str(name) for name, value in saved.items() if not isinstance(name, str) or not isinstance(value, Tensor)]:
        raise ValueError(f"it holds more than tensors by name, such as {', '.join(others[:5])}; save the model's state_dict alone")
    return dict(saved)


def _config_of(state: dict[str, Tensor], file: Path) -> SavedConfig:
    """The model that tensors of these shapes belong to: images are square, the statistics of three channels ImageNet's."""
    needed = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4}
    if faults := [name for name, dims in needed.items() if name not in state or state[name].dim() != dims]:
        there = ", ".join(list(state)[:5]) or "no tensor"
        raise EncoderError(
            f"encoder {file} is no ViT by the names of the MAE authors, timm or Hugging Face: no {', '.join(faults)}, but {there}"
        )
    if heads := [name for name in state if name.startswith(("head.", "fc_norm."))]:
        raise EncoderError(
            f"encoder {file} is a fine-tuned model ({', '.join(heads)}), and a file says no names of classes; name the encoder that it "
            "started from, or to evaluate it a folder of timm (label_names) or Hugging Face (id2label)"
        )
    _, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    num_patches = state["pos_embed"].shape[1] - 1
    rows = math.isqrt(max(num_patches, 0))
    if not rows or rows**2 != num_patches:
        raise EncoderError(
            f"encoder {file} is for images that are not square ({num_patches} patches); name a folder whose {CONFIG} says their size"
        )
    depth = 1 + max((int(name.split(".")[1]) for name in state if re.match(r"blocks\.\d+\.", name)), default=-1)
    try:
        arch = arch_name(width=state["cls_token"].shape[2], depth=depth, patch_size=patch_size)
        model = ModelConfig(arch=arch, image_size=(rows * patch_size, rows * patch_size), in_chans=in_chans)
    except ValueError as error:
        raise EncoderError(f"encoder {file}: {error}") from error
    return SavedConfig(model, NormalizeConfig(mean=IMAGENET_MEAN, std=IMAGENET_STD) if in_chans == 3 else None, [], "cls")
