"""What lies beside an encoder's weights: the `config.json` of this project, of timm or of Hugging Face transformers.

Pydantic only: the service reads it as well, so that an encoder that does not do is refused at submission.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from mae_core.options import ARCH_SIZES, ModelConfig, NormalizeConfig

CONFIG, IMAGE_PROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS, WEIGHTS_OF_TORCH = "model.safetensors", "pytorch_model.bin"
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")  # of a file that holds nothing but tensors, or a checkpoint of training

_MAX_LAYER_NORM_EPS = 1e-6  # ours; with less (1e-12, Hugging Face's) the numbers are the same
_TIMM_ARGUMENTS = {
    *("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "num_classes", "global_pool"),
    *("weight_init", "dynamic_img_size", "strict_img_size"),  # these change no number
}
_TIMM_ARCHITECTURE = re.compile(r"vit_([a-z]+)_patch(\d+)(?:_(\d+))?")


class SavedConfig(NamedTuple):
    """A saved encoder, or with `classes` a fine-tuned model. normalize None: not said.

    decoder: whether a decoder beside it has heads as ours has.
    """

    model: ModelConfig
    normalize: NormalizeConfig | None
    classes: list[str]
    pooling: Literal["mean", "cls"]
    is_ours: bool = False
    decoder: bool = True


def saved_config(said: Any, processor: Any = None) -> SavedConfig:
    """What `config.json` says, and `preprocessor_config.json` where there is one, both as JSON was read.

    Raises ValueError where it is none of the three, lacks something, or describes another network than ours.
    """
    if not isinstance(said, Mapping):
        raise ValueError("it is no mapping")
    try:
        if "maestro" in said:
            return _ours(said)
        if "model_type" in said:
            return _of_hf(said, processor if isinstance(processor, Mapping) else {})
        if "architecture" in said:
            return _of_timm(said)
    except KeyError as error:
        raise ValueError(f"it has no {error.args[0]}") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"it is not as its library writes it ({error})") from None
    raise ValueError("it has neither maestro nor model_type (Hugging Face) nor architecture (timm)")


def arch_name(*, width: int, depth: int, patch_size: int, num_heads: int | None = None) -> str:
    """Our name of a ViT of these sizes; the heads are not said by tensors. Raises ValueError where we have none."""
    for name, (own_width, own_depth, own_heads) in ARCH_SIZES.items():
        if (own_width, own_depth) == (width, depth) and num_heads in (None, own_heads):
            return f"vit_{name}_patch{patch_size}"
    known = ", ".join(f"{name} {'/'.join(map(str, sizes))}" for name, sizes in ARCH_SIZES.items())
    raise ValueError(f"its width/depth/heads {width}/{depth}/{num_heads or '?'} are none of ours: {known}")


def statistics(mean: Any, std: Any, *, in_chans: int) -> NormalizeConfig | None:
    """None where they are not of so many channels."""
    if not isinstance(mean, list | tuple) or not isinstance(std, list | tuple) or not len(mean) == len(std) == in_chans:
        return None
    return NormalizeConfig(mean=tuple(mean), std=tuple(std))


def _ours(said: Mapping[str, Any]) -> SavedConfig:
    model, normalize = (said["maestro"][name] for name in ("model", "normalize"))
    return SavedConfig(
        ModelConfig.model_validate(model),
        NormalizeConfig.model_validate(normalize),
        [str(name) for name in said.get("label_names", [])],
        "mean" if said.get("global_pool") == "avg" else "cls",
        is_ours=True,
    )


def _of_timm(said: Mapping[str, Any]) -> SavedConfig:
    named = _TIMM_ARCHITECTURE.fullmatch(said["architecture"])
    if named is None or named[1] not in ARCH_SIZES:
        raise ValueError(f"timm's {said['architecture']} is another network; vit_<size>_patch<n> with a size of {', '.join(ARCH_SIZES)} do")
    given, pretrained = said.get("model_args") or {}, said.get("pretrained_cfg") or {}
    if other := [name for name in given if name not in _TIMM_ARGUMENTS and not name.endswith("_rate")]:
        raise ValueError(f"it is another network than ours, or may be: it was made with {', '.join(other)}")
    width, depth, num_heads = ARCH_SIZES[named[1]]
    in_chans, *input_size = pretrained.get("input_size") or (3, int(named[3] or 224), int(named[3] or 224))
    in_chans = given.get("in_chans", in_chans)
    model = ModelConfig(
        arch=arch_name(
            width=given.get("embed_dim", width),
            depth=given.get("depth", depth),
            num_heads=given.get("num_heads", num_heads),
            patch_size=given.get("patch_size", int(named[2])),
        ),
        image_size=given.get("img_size", input_size),
        in_chans=in_chans,
    )
    classes = _class_names(said.get("label_names") or pretrained.get("label_names"), num_classes=said.get("num_classes", 0))
    pooling = given.get("global_pool", said.get("global_pool", "token"))
    if classes and pooling not in ("avg", "token"):
        raise ValueError(f"its global_pool is {pooling!r}; avg and token do")
    normalize = statistics(pretrained.get("mean"), pretrained.get("std"), in_chans=in_chans)
    return SavedConfig(model, normalize, classes, "mean" if pooling == "avg" else "cls")


def _class_names(names: Any, *, num_classes: int) -> list[str]:
    if not num_classes:
        return []
    if isinstance(names, Mapping):
        names = list(names.values())
    if not isinstance(names, list) or len(names) != num_classes:
        raise ValueError(
            f"it has a head for {num_classes} classes, but not their names (label_names); add them, or save it with num_classes=0"
        )
    return _distinct([str(name) for name in names])


def _distinct(names: list[str]) -> list[str]:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"its classes {', '.join(twice[:5])} have the same name twice, and images are told apart by it; rename them")
    return names


def _of_hf(said: Mapping[str, Any], processor: Mapping[str, Any]) -> SavedConfig:
    if said["model_type"] not in ("vit", "vit_mae"):
        raise ValueError(f"its model_type {said['model_type']!r} is another network; vit and vit_mae do")
    wanted = {"hidden_act": "gelu", "qkv_bias": True, "intermediate_size": 4 * said["hidden_size"]}
    if other := [f"{name} {said[name]!r}, not {value!r}" for name, value in wanted.items() if said.get(name, value) != value]:
        raise ValueError(f"it is another network than ours: it has {'; '.join(other)}")
    if (eps := said.get("layer_norm_eps", 0)) > _MAX_LAYER_NORM_EPS:
        raise ValueError(f"it is another network than ours: its layer_norm_eps is {eps:g}, more than {_MAX_LAYER_NORM_EPS:g}")
    in_chans = said.get("num_channels", 3)
    arch = arch_name(
        width=said["hidden_size"],
        depth=said["num_hidden_layers"],
        num_heads=said["num_attention_heads"],
        patch_size=said["patch_size"],
    )
    classes: list[str] = []
    if "ViTForImageClassification" in (said.get("architectures") or []):
        named = {int(number): str(name) for number, name in (said.get("id2label") or {}).items()}
        classes = _distinct([named[number] for number in sorted(named)])
    return SavedConfig(
        ModelConfig(arch=arch, image_size=said["image_size"], in_chans=in_chans),
        statistics(processor.get("image_mean"), processor.get("image_std"), in_chans=in_chans),
        classes,
        "cls",
        decoder=said.get("decoder_hidden_size", 512) == 32 * said.get("decoder_num_attention_heads", 16),
    )
