"""Names of tensors: ours, which are those of timm and of the authors' code, to and from those of Hugging Face transformers.

Files on the hub have the names of transformers 4 (`encoder.layer.0.attention.attention.query.weight`). transformers 5 names its modules
otherwise (`layers.0.attention.q_proj.weight`), but still reads these names, and writes them again; 5.23 writes a decoder's blocks as
`decoder.decoder_encoder.layer.0`. Written here are the names of version 4, which all versions read; read are all of them.

Shapes: D width. Ours has queries, keys and values in one matrix (3D, D), theirs in three (D, D).
"""

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Architecture = Literal["ViTModel", "ViTForImageClassification", "ViTMAEForPreTraining"]

_BLOCK_OF_OURS = re.compile(r"(decoder_)?blocks\.(\d+)\.(.+)\.(weight|bias)")
_BLOCK_OF_THEIRS = re.compile(r"(decoder\.decoder_layers|encoder\.layer)\.(\d+)\.(.+)\.(weight|bias)")
_IN_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_THIRDS = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
_OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
    "head.weight": "classifier.weight",
    "head.bias": "classifier.bias",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    **{f"decoder_{part}.{kind}": f"decoder.decoder_{part}.{kind}" for part in ("embed", "norm", "pred") for kind in ("weight", "bias")},
}
_TO_VERSION_4 = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
        (r"^layers\.", "encoder.layer."),
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    )
]


def to_hf(state: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """`state` under the names that `architecture` has in a file. Thirds of a fused matrix are views of it.

    Raises KeyError for a name that is not one of a masked autoencoder's or a classifier's with the class token.
    """
    theirs: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = _BLOCK_OF_OURS.fullmatch(name)
        if block is None:
            theirs[_OUTSIDE[name]] = tensor
            continue
        stack = "decoder.decoder_layers" if block[1] else "encoder.layer"
        if block[3] == "attn.qkv":
            thirds = zip(_THIRDS, tensor.chunk(3), strict=True)
            theirs |= {f"{stack}.{block[2]}.{third}.{block[4]}": part for third, part in thirds}
        else:
            theirs[f"{stack}.{block[2]}.{_IN_BLOCK[block[3]]}.{block[4]}"] = tensor
    if architecture == "ViTModel":
        return theirs
    return {name if name.startswith(("classifier.", "decoder.")) else f"vit.{name}": tensor for name, tensor in theirs.items()}


def from_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` under our names, queries, keys and values fused; of any of these architectures, written by any version.

    What has no name here keeps its own (a pooler), as do thirds that do not fit together: a check of the result lists them.
    """
    theirs = {_version_4(name): tensor for name, tensor in state.items()}
    given = {_version_4(name): name for name in state}
    to_ours = {name: ours for ours, name in _OUTSIDE.items()}
    in_block = {name: ours for ours, name in _IN_BLOCK.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        block = _BLOCK_OF_THEIRS.fullmatch(name)
        stack = f"{'decoder_' if block[1].startswith('decoder') else ''}blocks.{block[2]}" if block else ""
        if name in to_ours:
            found[to_ours[name]] = tensor
        elif block is not None and block[3] in in_block:
            found[f"{stack}.{in_block[block[3]]}.{block[4]}"] = tensor
        elif block is not None and block[3] in _THIRDS and (fused := _fused(theirs, block)) is not None:
            found[f"{stack}.attn.qkv.{block[4]}"] = fused
        else:
            found[given[name]] = tensor
    return found


def _version_4(name: str) -> str:
    name = name.removeprefix("vit.")
    for pattern, replacement in _TO_VERSION_4:
        name = pattern.sub(replacement, name)
    return name


def _fused(theirs: Mapping[str, Tensor], block: re.Match[str]) -> Tensor | None:
    """Queries, keys and values of a block in one matrix; None where one is missing or of another shape."""
    thirds = [theirs.get(f"{block[1]}.{block[2]}.{third}.{block[4]}") for third in _THIRDS]
    parts = [part for part in thirds if part is not None and part.dim() > 0]
    if len(parts) < 3 or len({(part.shape, part.dtype) for part in parts}) > 1:
        return None
    return torch.cat(parts)
