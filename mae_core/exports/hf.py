"""Folders that Hugging Face transformers loads: config, image processor and weights, written without that library."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from mae_core.hf_names import Architecture, from_hf, to_hf
from mae_core.options import DecoderConfig, MaskingConfig, ModelConfig, NormalizeConfig, TargetConfig
from mae_core.saved_config import CONFIG, IMAGE_PROCESSOR, WEIGHTS
from mae_core.vit import LAYER_NORM_EPS

_BICUBIC = 3  # Pillow's number


def write_hf(state: Mapping[str, Tensor], folder: Path, *, architecture: Architecture, config: dict[str, Any]) -> None:
    """Weights under the library's names, and `config`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in to_hf(state, architecture).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps({"architectures": [architecture], **config}, indent=2) + "\n")


def read_hf(folder: Path) -> dict[str, Tensor]:
    """The weights back, under our names."""
    return from_hf(load_file(folder / WEIGHTS))


def vit_config(model: ModelConfig, *, classes: list[str]) -> dict[str, Any]:
    """Of ViTModel, or with `classes` of ViTForImageClassification."""
    height, width = model.image_size
    config = {
        "model_type": "vit",
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "intermediate_size": 4 * model.width,
        "image_size": height if height == width else [height, width],
        "patch_size": model.patch_size,
        "num_channels": model.in_chans,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": LAYER_NORM_EPS,  # theirs would be 1e-12
        "qkv_bias": True,
        "torch_dtype": "float32",
    }
    if classes:
        config["id2label"] = {str(place): name for place, name in enumerate(classes)}
        config["label2id"] = {name: place for place, name in enumerate(classes)}
    return config


def vit_mae_config(model: ModelConfig, *, decoder: DecoderConfig, masking: MaskingConfig, target: TargetConfig) -> dict[str, Any]:
    return vit_config(model, classes=[]) | {
        "model_type": "vit_mae",
        "decoder_hidden_size": decoder.width,
        "decoder_num_hidden_layers": decoder.depth,
        "decoder_num_attention_heads": decoder.num_heads,
        "decoder_intermediate_size": 4 * decoder.width,
        "mask_ratio": _mask_ratio(masking, model.num_patches),
        "norm_pix_loss": target.norm_pix,
    }


def _mask_ratio(masking: MaskingConfig, num_patches: int) -> float:
    """A ratio with which the library, which computes in floats, keeps as many patches as we do."""
    num_keep = masking.num_keep(num_patches)
    if int(num_patches * (1 - masking.ratio)) == num_keep:
        return masking.ratio
    return 1 - (num_keep + 0.5) / num_patches


def write_image_processor(folder: Path, model: ModelConfig, normalize: NormalizeConfig, *, crops: bool) -> None:
    """From 8-bit images to what the model takes.

    crops: images are resized to cover 8/7 of the model's size and cut to their middle, as we measure; else resized to the model's size,
    which leaves images that have it as they are, as we do.
    """
    height, width = model.image_size
    if crops and height == width:
        resize = {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": round(height * 8 / 7) if height <= 224 else height},
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
        }
    else:
        resize = {"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}}
    config = {
        **resize,
        "do_resize": True,
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(normalize.mean),
        "image_std": list(normalize.std),
        "do_convert_rgb": model.in_chans == 3,
    }
    (folder / IMAGE_PROCESSOR).write_text(json.dumps(config, indent=2) + "\n")
