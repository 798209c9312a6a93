"""Encoders that other libraries wrote, by the real libraries: loaded whole, with equal features."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mae_core.encoders import has_head, load_classifier, load_encoder, read_model
from mae_core.errors import EncoderError, SpecError
from mae_core.mae import MaskedAutoencoder
from mae_core.options import IMAGENET_MEAN, DecoderConfig, MaskingConfig, ModelConfig, NormalizeConfig, TargetConfig
from mae_core.vit import Encoder
from tests.torchvision_ops import import_torchvision
from tests.unit.core_fixtures import TINY, finetune_spec, image_folder, opened, pretrain_spec, probe_spec
from tests.unit.test_export import encoder_of, stirred

import_torchvision()
import timm  # noqa: E402  (needs the line above)
import transformers  # noqa: E402

NAMES = ["ant", "bee", "cat"]
SIZES: dict[str, Any] = {"img_size": 8, "patch_size": 4}
HF: dict[str, Any] = {
    "hidden_size": TINY.width,
    "num_hidden_layers": TINY.depth,
    "num_attention_heads": TINY.num_heads,
    "intermediate_size": 4 * TINY.width,
    "image_size": 8,
    "patch_size": 4,
    "layer_norm_eps": 1e-6,
}
HF_DECODER = {
    "decoder_hidden_size": 64,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 256,
}
DECODER = DecoderConfig(depth=2, width=64)
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def timm_model(**changes: Any) -> Any:
    return stirred(timm.create_model("vit_tiny_patch16_224", **SIZES | {"num_classes": 0} | changes)).eval()


def hf_mae() -> Any:
    return stirred(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**HF, **HF_DECODER))).eval()


def our_mae() -> MaskedAutoencoder:
    mae = MaskedAutoencoder(Encoder(TINY), masking=MaskingConfig(), decoder=DECODER, target=TargetConfig())
    stirred(mae)
    return mae.eval()


def authors_file(folder: Path, mae: MaskedAutoencoder, name: str = "checkpoint-799.pth") -> Path:
    """As the authors' code saves while it trains: the model with its decoder, the optimiser and the arguments of the command."""
    model = {name.removeprefix("encoder."): tensor for name, tensor in mae.state_dict().items()}
    arguments = argparse.Namespace(model="mae_vit_tiny_patch4", lr=None, blr=1.5e-4, norm_pix_loss=True, output_dir="./out")
    torch.save({"model": model, "optimizer": {"state": {0: {"step": 1}}}, "epoch": 799, "scaler": {}, "args": arguments}, folder / name)
    return folder / name


def from_authors(folder: Path) -> tuple[Path, Tensor]:
    mae = our_mae()
    return authors_file(folder, mae), mae.encoder(IMAGES)


def from_authors_encoder(folder: Path) -> tuple[Path, Tensor]:
    encoder = encoder_of(TINY)
    torch.save({"model": encoder.state_dict()}, folder / "mae_pretrain_vit_tiny.pth")
    return folder / "mae_pretrain_vit_tiny.pth", encoder(IMAGES)


def from_an_old_file(folder: Path) -> tuple[Path, Tensor]:
    encoder = encoder_of(TINY)
    torch.save(encoder.state_dict(), folder / "old.pt", _use_new_zipfile_serialization=False)
    return folder / "old.pt", encoder(IMAGES)


def from_timm(folder: Path) -> tuple[Path, Tensor]:
    model = timm_model()
    timm.models.save_for_hf(model, folder, model_args=SIZES)
    return folder, model.forward_features(IMAGES)


def from_timm_file(folder: Path) -> tuple[Path, Tensor]:
    model = timm_model()
    save_file(model.state_dict(), folder / "timm.safetensors")
    return folder / "timm.safetensors", model.forward_features(IMAGES)


def from_hf_vit(folder: Path) -> tuple[Path, Tensor]:
    """With its pooler, which nobody trained."""
    model = stirred(transformers.ViTModel(transformers.ViTConfig(**HF))).eval()
    model.save_pretrained(folder)
    return folder, model(IMAGES).last_hidden_state


def from_hf_mae(folder: Path) -> tuple[Path, Tensor]:
    model = hf_mae()
    model.save_pretrained(folder)
    return folder, hf_features(model, folder)


def from_hf_mae_of_torch(folder: Path) -> tuple[Path, Tensor]:
    """As files on the hub were for years: pickled, float16, with the library's own epsilon."""
    model = hf_mae()
    model.save_pretrained(folder)
    torch.save({name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-12}))
    return folder, hf_features(model.half().float(), folder)


def hf_features(model: Any, folder: Path) -> Tensor:
    """All patches' tokens of ViTMAEForPreTraining's encoder, computed by the library's ViTModel."""
    plain = transformers.ViTModel(transformers.ViTConfig(**HF), add_pooling_layer=False).eval()
    plain.load_state_dict({name.removeprefix("vit."): tensor for name, tensor in model.state_dict().items() if name.startswith("vit.")})
    features: Tensor = plain(IMAGES).last_hidden_state
    return features


WRITERS = [
    from_authors,
    from_authors_encoder,
    from_an_old_file,
    from_timm,
    from_timm_file,
    from_hf_vit,
    from_hf_mae,
    from_hf_mae_of_torch,
]


@pytest.mark.parametrize("write", WRITERS)
@torch.no_grad()
def test_an_encoder_of_another_library_has_its_features(write: Callable[[Path], tuple[Path, Tensor]], tmp_path: Path) -> None:
    place, features = write(tmp_path)
    assert features.std() > 0.1
    assert (has_head(place), read_model(place)) == (False, TINY)
    loaded = load_encoder(place, wanted=None)
    torch.testing.assert_close(loaded.encoder.eval()(IMAGES), features, rtol=0, atol=1e-5)
    assert {name for name, parameter in loaded.encoder.named_parameters() if not parameter.requires_grad} == {"pos_embed"}
    assert bool(loaded.decoder) == (write in (from_authors, from_hf_mae, from_hf_mae_of_torch))


def test_the_statistics_of_the_images(tmp_path: Path) -> None:
    """timm's configuration says them, and Hugging Face's image processor; those of a file alone are ImageNet's for three channels."""
    for name in ("timm", "hf", "authors", "grey"):
        (tmp_path / name).mkdir()
    timm.models.save_for_hf(timm_model(pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}), tmp_path / "timm")
    place, _ = from_hf_mae(tmp_path / "hf")
    assert load_encoder(place, wanted=None).normalize is None
    transformers.ViTImageProcessorPil(image_mean=[0.4, 0.5, 0.6], image_std=[0.1, 0.2, 0.3]).save_pretrained(place)
    assert load_encoder(place, wanted=None).normalize == NormalizeConfig(mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))
    assert load_encoder(from_authors(tmp_path / "authors")[0], wanted=None).normalize.mean == IMAGENET_MEAN  # type: ignore[union-attr]
    grey = ModelConfig(arch="vit_tiny_patch4", image_size=8, in_chans=1)
    save_file(encoder_of(grey).state_dict(), tmp_path / "grey" / "grey.safetensors")
    assert load_encoder(tmp_path / "grey" / "grey.safetensors", wanted=None).normalize is None
    images = image_folder(tmp_path / "images", mode="L")
    spec = probe_spec(images, model=None, encoder={"file": str(tmp_path / "grey" / "grey.safetensors")})
    with pytest.raises(SpecError, match=r"data\.normalize: the encoder's files say no mean"):
        opened(spec, encoder_folder=tmp_path / "grey" / "grey.safetensors")


@torch.no_grad()
def test_a_fine_tuned_model_of_timm(tmp_path: Path) -> None:
    model = timm_model(num_classes=3, global_pool="avg")
    timm.models.save_for_hf(model, tmp_path, model_config={"label_names": NAMES}, model_args=SIZES)
    loaded = load_classifier(tmp_path, wanted=None)
    assert (loaded.classes, loaded.classifier.pooling) == (NAMES, "mean")
    torch.testing.assert_close(loaded.classifier.eval()(IMAGES), model(IMAGES), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_fine_tuned_model_of_hugging_face(tmp_path: Path) -> None:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**HF, id2label=dict(enumerate(NAMES)))).eval()
    stirred(model)
    model.save_pretrained(tmp_path)
    loaded = load_classifier(tmp_path, wanted=None)
    assert (loaded.classes, loaded.classifier.pooling) == (NAMES, "cls")
    torch.testing.assert_close(loaded.classifier.eval()(IMAGES), model(IMAGES).logits, rtol=0, atol=1e-5)


def test_an_image_that_is_not_square(tmp_path: Path) -> None:
    """A folder's configuration says its size; a file of 2 x 4 patches could be of 4 x 2."""
    wanted = ModelConfig(arch="vit_tiny_patch4", image_size=(8, 16))
    model = timm_model(img_size=(8, 16))
    timm.models.save_for_hf(model, tmp_path, model_args=SIZES | {"img_size": [8, 16]})
    assert read_model(tmp_path) == wanted
    torch.save(model.state_dict(), tmp_path / "model.pth")
    with pytest.raises(EncoderError, match=r"images that are not square \(8 patches\); name a folder whose config\.json"):
        read_model(tmp_path / "model.pth")


def test_every_tensor_that_is_missing_extra_or_misshapen_is_listed(tmp_path: Path) -> None:
    state = encoder_of(TINY).state_dict()
    del state["blocks.3.mlp.fc1.bias"]
    state |= {"blocks.0.ls1.gamma": torch.zeros(192), "norm.weight": torch.zeros(7)}
    torch.save(state, tmp_path / "broken.pth")
    with pytest.raises(EncoderError) as caught:
        load_encoder(tmp_path / "broken.pth", wanted=None)
    message = str(caught.value)
    assert str(tmp_path / "broken.pth") in message
    assert (
        "blocks.3.mlp.fc1.bias is missing; blocks.0.ls1.gamma is not part of this model; norm.weight has shape (7,), not (192,)" in message
    )


def edited(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "swin"}, "its model_type 'swin' is another network; vit and vit_mae do"),
        ({"hidden_act": "relu"}, "it has hidden_act 'relu', not 'gelu'"),
        ({"layer_norm_eps": 1e-3}, "its layer_norm_eps is 0.001"),
        ({"num_attention_heads": 4}, "width/depth/heads 192/12/4 are none of ours: tiny 192/12/3"),
        ({"hidden_size": None}, "is not as its library writes it"),
    ],
)
def test_another_network_of_hugging_face(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    place, _ = from_hf_vit(tmp_path)
    with pytest.raises(EncoderError) as caught:
        load_encoder(edited(place, **changes), wanted=None)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "resnet50"}, "timm's resnet50 is another network"),
        ({"model_args": SIZES | {"depth": 7}}, "width/depth/heads 192/7/3 are none of ours"),
        ({"model_args": SIZES | {"act_layer": "quick_gelu"}}, "it was made with act_layer"),
        ({"num_classes": 3, "label_names": ["crane", "ant", "crane"]}, "its classes crane have the same name twice"),
        ({"num_classes": 3}, "a head for 3 classes, but not their names (label_names)"),
        (
            {"num_classes": 3, "label_names": NAMES, "model_args": SIZES | {"global_pool": "map"}},
            "its global_pool is 'map'; avg and token do",
        ),
    ],
)
def test_another_network_of_timm(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    place, _ = from_timm(tmp_path)
    with pytest.raises(EncoderError) as caught:
        load_encoder(edited(place, **changes), wanted=None)
    assert message in str(caught.value)


class Danger:
    """What a pickle could run when it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("touched"),))


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"model": encoder_of(TINY)}, "cannot be read"),
        ({"danger": Danger()}, r"cannot be read \(it holds a \S+, where only tensors and plain containers are taken; save the model's"),
        ([torch.zeros(1)], "it holds a list, not tensors by name"),
        ({"weights": torch.zeros(1), "epoch": 3}, "holds more than tensors by name, such as epoch"),
        ({"fc.weight": torch.zeros(2, 2)}, "is no ViT by the names of the MAE authors, timm or Hugging Face: no cls_token"),
        ({**encoder_of(TINY).state_dict(), "head.weight": torch.zeros(3, 192)}, r"is a fine-tuned model \(head.weight\)"),
        ({**encoder_of(TINY).state_dict(), "cls_token": torch.zeros(1, 1, 100)}, "100/12/. are none of ours"),
    ],
)
def test_a_file_that_is_no_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Any, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(saved, tmp_path / "file.pth")
    with pytest.raises(EncoderError, match=message):
        load_encoder(tmp_path / "file.pth", wanted=None)
    assert not Path("touched").exists()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    whole, _ = from_authors(tmp_path)
    for name, content in (("half.pth", whole.read_bytes()[:5000]), ("empty.pth", b""), ("half.safetensors", b"12"), ("odd.txt", b"text")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EncoderError, match=rf"encoder {tmp_path / name}: the file cannot be read \(.+\)"):
            load_encoder(tmp_path / name, wanted=None)
    with pytest.raises(EncoderError, match=r"config\.json cannot be read"):
        load_encoder(tmp_path / "nowhere.pth", wanted=None)
    place, _ = from_hf_mae(tmp_path)
    (place / "model.safetensors").unlink()
    with pytest.raises(EncoderError, match=r"there is none, and no pytorch_model\.bin in one piece"):
        load_encoder(place, wanted=None)


def first_loss(run: Any) -> float:
    [[(_, values)]] = [progress.points for progress, _ in zip(run.progress(lambda: False), range(1), strict=False)]
    loss: float = values["loss"]
    return loss


@pytest.mark.parametrize("library", ["authors", "hf"])
def test_a_pretraining_goes_on_with_encoder_and_decoder(tmp_path: Path, library: str) -> None:
    images = image_folder(tmp_path / "images")
    if library == "authors":
        mae = our_mae()
        place, decoder = authors_file(tmp_path, mae), mae.decoder_blocks[1].mlp.fc1.weight  # type: ignore[union-attr, index]
        encoder = mae.encoder.blocks[5].attn.qkv.weight  # type: ignore[union-attr]
    else:
        model = hf_mae()
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        place = tmp_path
        [decoder] = [tensor for name, tensor in saved.items() if name.startswith("decoder") and ".1.intermediate.dense.weight" in name]
        thirds = [f"vit.encoder.layer.5.attention.attention.{third}.weight" for third in ("query", "key", "value")]
        encoder = torch.cat([saved[name] for name in thirds])
    normalize = {"normalize": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    given: dict[str, Any] = {"encoder": {"file": str(place)}, "decoder": {"depth": 2, "width": 64}, "data": normalize}
    run: Any = opened(pretrain_spec(images, **given), encoder_folder=place)
    state = run.training_state()
    assert torch.equal(state["module.encoder.blocks.5.attn.qkv.weight"], encoder)
    assert torch.equal(state["module.decoder_blocks.1.mlp.fc1.weight"], decoder)
    new: Any = opened(pretrain_spec(images, **given | {"encoder": None}))
    assert first_loss(run) != first_loss(new)


def test_a_pretraining_goes_on_with_a_new_decoder_where_the_old_one_does_not_fit(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images")
    mae = our_mae()
    place = authors_file(tmp_path, mae)
    for decoder in ({"depth": 1, "width": 64}, {"depth": 2, "width": 64, "attention": "cross"}):
        spec = pretrain_spec(images, encoder={"file": str(place)}, decoder=decoder)
        run: Any = opened(spec, encoder_folder=place)
        state = run.training_state()
        assert torch.equal(state["module.encoder.norm.weight"], mae.encoder.norm.weight)
        assert torch.equal(state["module.decoder_norm.weight"], torch.ones(64))
        assert run.normalize.mean == IMAGENET_MEAN


def test_a_pretraining_goes_on_at_another_image_size_with_its_own_statistics(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images")
    place = authors_file(tmp_path, our_mae())
    model = {"arch": "vit_tiny_patch4", "image_size": 16}
    decoder = {"depth": 2, "width": 64}
    spec = pretrain_spec(images, encoder={"file": str(place)}, model=model, decoder=decoder, data={"normalize": "auto"})
    run: Any = opened(spec, encoder_folder=place)
    state = run.training_state()
    assert state["module.encoder.pos_embed"].shape == (1, 17, 192)
    assert state["module.decoder_pos_embed"].shape == (1, 17, 64)
    assert not torch.equal(state["module.decoder_norm.weight"], torch.ones(64))
    first_loss(run)
    assert run.normalize.mean != IMAGENET_MEAN


def test_a_fine_tune_starts_from_an_authors_checkpoint(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images")
    mae = our_mae()
    place = authors_file(tmp_path, mae)
    run: Any = opened(finetune_spec(images, model=None, encoder={"file": str(place)}), encoder_folder=place)
    assert run.model == TINY
    assert torch.equal(run.training_state()["module.encoder.blocks.2.mlp.fc2.weight"], mae.encoder.blocks[2].mlp.fc2.weight)  # type: ignore[union-attr]
    first_loss(run)
