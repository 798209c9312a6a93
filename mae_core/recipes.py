"""Recipes: what a spec has where its user says nothing. Plain data; the resolved spec shows every value.

paper: tables 8, 9 and 10 of He et al. 2021 with the values of the authors' released code, for ViT-B, L and H (smaller models get B's).
At 448 pixels ViT-H gets the values of 224. small: ViT-Tiny and Small on small data and few devices, as measured on CIFAR-10
(`benchmarks/README.md`); what was not varied there is DeiT's or the paper's.
"""

from typing import Any, Literal

RecipeName = Literal["paper", "small"]
Fields = dict[str, Any]

_CROP = {"crop_scale": [0.2, 1.0], "crop": "resized", "flip": True}

_PAPER: dict[str, Fields] = {
    "pretrain": {  # Table 8
        "masking": {"strategy": "random", "ratio": 0.75},
        "decoder": {"depth": 8, "width": 512, "attention": "self"},
        "target": {"norm_pix": True, "loss_on": "masked"},
        "data": {"transform": _CROP},
        "optim": {
            "epochs": 800,
            "batch_size": 4096,
            "base_lr": 1.5e-4,
            "warmup_epochs": 40,
            "min_lr": 0.0,
            "weight_decay": 0.05,
            "betas": [0.9, 0.95],
        },
    },
    "finetune": {  # Table 9, for targets of normalised pixels
        "pooling": "mean",
        "data": {
            "transform": {
                "crop_scale": [0.08, 1.0],
                "crop": "resized",
                "flip": True,
                "erase_probability": 0.25,
                "rand_augment": {"num_ops": 2, "magnitude": 9.0, "magnitude_std": 0.5},
            }
        },
        "mix": {"mixup": 0.8, "cutmix": 1.0},
        "optim": {
            "epochs": 100,
            "batch_size": 1024,
            "base_lr": 5e-4,
            "warmup_epochs": 5,
            "min_lr": 1e-6,
            "weight_decay": 0.05,
            "betas": [0.9, 0.999],
            "layer_decay": 0.65,
            "drop_path": 0.1,
            "label_smoothing": 0.1,
        },
    },
    "probe": {  # Table 10
        "pooling": "cls",
        "data": {"transform": {"crop_scale": [0.08, 1.0], "crop": "clamped", "flip": True}},
        "optim": {
            "optimizer": "lars",
            "epochs": 90,
            "batch_size": 16384,
            "base_lr": 0.1,
            "warmup_epochs": 10,
            "min_lr": 0.0,
            "weight_decay": 0.0,
            "momentum": 0.9,
        },
    },
    "evaluate": {"pooling": "cls"},
    "embed": {"pooling": "cls"},
}
# Where a size differs from ViT-B.
_PAPER_BY_SIZE: dict[str, dict[str, Fields]] = {
    "large": {"finetune": {"optim": {"epochs": 50, "base_lr": 1e-3, "layer_decay": 0.75, "drop_path": 0.2}}},
    "huge": {"finetune": {"optim": {"epochs": 50, "base_lr": 1e-3, "layer_decay": 0.75, "drop_path": 0.3}}},
}

_SMALL: dict[str, Fields] = {
    "pretrain": {
        "masking": {"strategy": "random", "ratio": 0.6},
        "decoder": {"depth": 2, "width": 192, "attention": "self"},
        "target": {"norm_pix": True, "loss_on": "masked"},
        "data": {"transform": {**_CROP, "crop_scale": [0.4, 1.0]}},
        "optim": {
            "epochs": 400,
            "batch_size": 256,
            "base_lr": 1e-3,
            "warmup_epochs": 20,
            "min_lr": 0.0,
            "weight_decay": 0.05,
            "betas": [0.9, 0.95],
        },
    },
    "finetune": {
        "pooling": "mean",
        "data": {"transform": {"crop_scale": [0.4, 1.0], "crop": "resized", "flip": True, "rand_augment": None, "erase_probability": 0.0}},
        "mix": {"mixup": 0.0, "cutmix": 0.0},
        "optim": {
            "epochs": 100,
            "batch_size": 128,
            "base_lr": 2e-3,
            "warmup_epochs": 5,
            "min_lr": 1e-6,
            "weight_decay": 0.05,
            "betas": [0.9, 0.999],
            "layer_decay": 0.85,
            "drop_path": 0.0,
            "label_smoothing": 0.1,
        },
    },
    "probe": {
        "pooling": "mean",
        "data": {"transform": None},
        "optim": {
            "optimizer": "sgd",
            "epochs": 90,
            "batch_size": 256,
            "base_lr": 0.1,
            "warmup_epochs": 10,
            "min_lr": 0.0,
            "weight_decay": 0.0,
            "momentum": 0.9,
        },
    },
    "evaluate": {"pooling": "mean"},
    "embed": {"pooling": "mean"},
}


def recipe_for(size: str | None) -> RecipeName:
    """The recipe of a spec that names none: `small` for tiny and small models and where the size is not known yet."""
    return "paper" if size in ("base", "large", "huge") else "small"


def recipe_fields(recipe: str, *, kind: str, size: str | None) -> Fields:
    """All that `recipe` says of a run of `kind` with a model of `size`, as nested sections."""
    if recipe == "small":
        return _SMALL.get(kind, {})
    return merged(_PAPER_BY_SIZE.get(size or "", {}).get(kind, {}), _PAPER.get(kind, {}))


def merged(given: Fields, defaults: Fields) -> Fields:
    """`given`, with the fields of `defaults` that it lacks; sections are merged field by field."""
    result = dict(given)
    for name, default in defaults.items():
        if name not in given:
            result[name] = default
        elif isinstance(given[name], dict) and isinstance(default, dict):
            result[name] = merged(given[name], default)
    return result
