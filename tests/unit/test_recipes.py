"""Freeze test of the recipes: the numbers of tables 8, 9 and 10 of He et al. 2021 and of the authors' code, resolved through the specs."""

from typing import Any

import pytest

from mae_core.config import RUN_SPEC, FinetuneSpec, ProbeSpec, Spec
from mae_core.options import ModelConfig
from mae_core.recipes import merged, recipe_for

ARCHS = {"base": "vit_base_patch16", "large": "vit_large_patch16", "huge": "vit_huge_patch14"}
CROP = {"crop": "resized", "flip": True}

PRETRAIN: dict[str, Any] = {
    "recipe": "paper",
    "masking": {"strategy": "random", "ratio": 0.75, "num_masks": 1, "encoder_mask_tokens": False},
    "decoder": {"depth": 8, "width": 512, "attention": "self", "predict_fraction": 1.0},
    "target": {"norm_pix": True, "loss_on": "masked"},
    "transform": CROP | {"crop_scale": (0.2, 1.0)},
    "optim": {
        "epochs": 800,
        "batch_size": 4096,
        "batch_size_per_device": 64,
        "accumulation": 1,
        "base_lr": 1.5e-4,
        "lr": 2.4e-3,
        "warmup_epochs": 40,
        "min_lr": 0.0,
        "weight_decay": 0.05,
        "betas": (0.9, 0.95),
        "max_dropped_steps": 10,
    },
}
FINETUNE: dict[str, Any] = {
    "recipe": "paper",
    "pooling": "mean",
    "transform": CROP
    | {
        "crop_scale": (0.08, 1.0),
        "rand_augment": {"num_ops": 2, "magnitude": 9.0, "magnitude_std": 0.5},
        "erase_probability": 0.25,
    },
    "mix": {"mixup": 0.8, "cutmix": 1.0},
    "trainable_blocks": None,
    "optim": {
        "epochs": 100,
        "batch_size": 1024,
        "batch_size_per_device": 16,
        "accumulation": 1,
        "base_lr": 5e-4,
        "lr": 2e-3,
        "warmup_epochs": 5,
        "min_lr": 1e-6,
        "weight_decay": 0.05,
        "betas": (0.9, 0.999),
        "layer_decay": 0.65,
        "drop_path": 0.1,
        "label_smoothing": 0.1,
        "max_dropped_steps": 10,
    },
}
LARGE_OPTIM = FINETUNE["optim"] | {"epochs": 50, "base_lr": 1e-3, "lr": 4e-3, "layer_decay": 0.75, "drop_path": 0.2}
PROBE: dict[str, Any] = {
    "recipe": "paper",
    "pooling": "cls",
    "transform": {"crop_scale": (0.08, 1.0), "crop": "clamped", "flip": True},
    "num_seeds": 1,
    "optim": {
        "optimizer": "lars",
        "epochs": 90,
        "batch_size": 16384,
        "batch_size_per_device": 256,
        "accumulation": 1,
        "base_lr": 0.1,
        "lr": 6.4,
        "warmup_epochs": 10,
        "min_lr": 0.0,
        "weight_decay": 0.0,
        "momentum": 0.9,
    },
}
PAPER: dict[tuple[str, str], dict[str, Any]] = {
    ("pretrain", "base"): PRETRAIN,
    ("pretrain", "large"): PRETRAIN,
    ("pretrain", "huge"): PRETRAIN,
    ("finetune", "base"): FINETUNE,
    ("finetune", "large"): FINETUNE | {"optim": LARGE_OPTIM},
    ("finetune", "huge"): FINETUNE | {"optim": LARGE_OPTIM | {"drop_path": 0.3}},
    ("probe", "base"): PROBE,
    ("probe", "large"): PROBE,
    ("probe", "huge"): PROBE,
}


def given(kind: str, arch: str | None, **changes: Any) -> dict[str, Any]:
    """The least that a user says, on 64 workers as the authors had."""
    spec: dict[str, Any] = {"kind": kind, "name": "test", "data": {"source": "/data"}, "resources": {"num_workers": 64}}
    if arch is not None:
        spec["model"] = {"arch": arch, "image_size": 224}
    if kind != "pretrain":
        spec["encoder"] = {"job": "abc"}
        spec["data"]["validation"] = "/validation"
    return merged(changes, spec)


def resolved(kind: str, arch: str | None, **changes: Any) -> Spec:
    return RUN_SPEC.validate_python(given(kind, arch, **changes))


def small(kind: str, **changes: Any) -> Spec:
    return resolved(kind, "vit_tiny_patch16", **({"resources": {"num_workers": 1}} | changes))


def settings(spec: Spec) -> dict[str, Any]:
    dump = spec.model_dump()
    names = ("recipe", "masking", "decoder", "target", "pooling", "mix", "trainable_blocks", "num_seeds", "optim")
    return {name: dump[name] for name in names if name in dump} | {"transform": dump["data"].get("transform")}


@pytest.mark.parametrize(("kind", "size"), list(PAPER))
def test_the_papers_recipes(kind: str, size: str) -> None:
    assert settings(resolved(kind, ARCHS[size])) == PAPER[kind, size]


@pytest.mark.parametrize("kind", ["pretrain", "finetune", "probe"])
def test_a_smaller_model_gets_the_papers_values_of_base(kind: str) -> None:
    assert settings(resolved(kind, "vit_small_patch16", recipe="paper")) == PAPER[kind, "base"]


@pytest.mark.parametrize(
    ("size", "recipe"), [("tiny", "small"), ("small", "small"), ("base", "paper"), ("large", "paper"), ("huge", "paper"), (None, "small")]
)
def test_the_size_chooses_the_recipe(size: str | None, recipe: str) -> None:
    assert recipe_for(size) == recipe
    arch = None if size is None else f"vit_{size}_patch16"
    assert resolved("probe" if size is None else "pretrain", arch, resources={"num_workers": 1}).recipe == recipe


def test_the_small_recipe_augments_little_and_mixes_nothing() -> None:
    finetune, probe, pretrain = (small(kind) for kind in ("finetune", "probe", "pretrain"))
    assert isinstance(finetune, FinetuneSpec)
    assert isinstance(probe, ProbeSpec)
    assert not finetune.mix.is_on
    assert (finetune.data.transform.rand_augment, finetune.data.transform.erase_probability, finetune.optim.drop_path) == (None, 0.0, 0.0)
    assert (probe.data.transform, probe.optim.optimizer, probe.pooling) == (None, "sgd", "mean")
    assert {spec.optim.batch_size for spec in (finetune, probe)} | {pretrain.optim.batch_size} == {128, 256}  # type: ignore[union-attr]


def test_what_a_user_says_wins_field_by_field() -> None:
    spec = resolved(
        "finetune",
        ARCHS["large"],
        optim={"layer_decay": 0.9},
        mix={"cutmix": 0.0},
        data={"transform": {"rand_augment": {"magnitude": 5.0}, "flip": False}},
    )
    expected = merged(
        {
            "optim": {"layer_decay": 0.9},
            "mix": {"cutmix": 0.0},
            "transform": {"rand_augment": {"magnitude": 5.0}, "flip": False},
        },
        PAPER["finetune", "large"],
    )
    assert settings(spec) == expected


def test_a_section_can_be_switched_off() -> None:
    spec = resolved("finetune", ARCHS["base"], data={"transform": {"rand_augment": None}})
    assert settings(spec)["transform"] == FINETUNE["transform"] | {"rand_augment": None}
    probe = resolved("probe", ARCHS["base"], data={"transform": None})
    assert settings(probe)["transform"] is None


@pytest.mark.parametrize("size", list(ARCHS))
def test_an_encoders_size_brings_its_recipe(size: str) -> None:
    """The user named no model, so that the recipe follows the encoder; what they said stays."""
    spec = resolved("finetune", None, optim={"epochs": 7, "batch_size": 1024}, resources={"num_workers": 64}, mix={"mixup": 0.5})
    assert isinstance(spec, FinetuneSpec)
    assert spec.recipe == "small"
    found = settings(spec.with_model(ModelConfig(arch=ARCHS[size], image_size=224), where="the encoder"))
    said = {"optim": {"epochs": 7}, "mix": {"mixup": 0.5}}
    assert found == merged(said, PAPER["finetune", size])


def test_a_recipe_that_was_named_stays_with_the_encoders_size() -> None:
    spec = resolved("probe", None, recipe="small", resources={"num_workers": 1})
    assert isinstance(spec, ProbeSpec)
    found = spec.with_model(ModelConfig(arch=ARCHS["huge"], image_size=224), where="the encoder")
    assert (found.recipe, found.optim.optimizer, found.optim.batch_size) == ("small", "sgd", 256)


@pytest.mark.parametrize("kind", ["pretrain", "finetune", "probe", "evaluate"])
def test_a_resolved_spec_survives_json(kind: str) -> None:
    for spec in (small(kind), resolved(kind, ARCHS["large"])):
        assert RUN_SPEC.validate_json(spec.model_dump_json()) == spec


def test_merging_changes_neither_side() -> None:
    said, defaults = {"a": {"b": 1}, "c": None}, {"a": {"b": 2, "d": [3]}, "c": {"e": 4}, "f": 5}
    assert merged(said, defaults) == {"a": {"b": 1, "d": [3]}, "c": None, "f": 5}
    assert (said, defaults) == ({"a": {"b": 1}, "c": None}, {"a": {"b": 2, "d": [3]}, "c": {"e": 4}, "f": 5})
