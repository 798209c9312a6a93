import json
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mae_core.classifier import Classifier
from mae_core.encoders import has_head, load_classifier, load_encoder
from mae_core.errors import EncoderError
from mae_core.export import write_classifier, write_encoder, write_probe
from mae_core.head import ProbeHead
from mae_core.options import ModelConfig, NormalizeConfig
from mae_core.patches import resize_positions
from mae_core.saved_config import WEIGHTS
from mae_core.vit import Encoder, initialise
from tests.torchvision_ops import import_torchvision
from tests.unit.core_fixtures import TINY

import_torchvision()
import timm  # noqa: E402  (needs the line above)

CLASSES = ["ant", "bee", "cat", "dog"]
MODELS = [
    pytest.param(ModelConfig(arch="vit_tiny_patch4", image_size=16), id="square"),
    pytest.param(ModelConfig(arch="vit_tiny_patch8", image_size=(32, 48)), id="non-square"),
    pytest.param(ModelConfig(arch="vit_tiny_patch4", image_size=(16, 8), in_chans=1), id="1-channel"),
    pytest.param(ModelConfig(arch="vit_tiny_patch4", image_size=16, in_chans=4), id="4-channels"),
    pytest.param(ModelConfig(arch="vit_tiny_patch5", image_size=(15, 25)), id="odd-patch"),
]


def stirred(module: nn.Module) -> nn.Module:
    """Moves every parameter off its initial value, so that an exchange of two would show."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return module


def encoder_of(model: ModelConfig) -> Encoder:
    encoder = Encoder(model)
    initialise(encoder, torch.Generator().manual_seed(0))
    stirred(encoder)
    return encoder.eval()


def normalize_of(model: ModelConfig) -> NormalizeConfig:
    return NormalizeConfig(mean=tuple(0.1 * place for place in range(model.in_chans)), std=(0.25,) * model.in_chans)


def in_timm(folder: Path) -> nn.Module:
    """The exported model in timm, after a check that its file has each tensor of timm's model and no other."""
    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    saved = load_file(folder / WEIGHTS)
    loaded = model.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    return model.eval()


def images_for(model: ModelConfig) -> Tensor:
    return torch.randn(2, model.in_chans, *model.image_size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_timm_loads_the_encoder_whole_with_equal_features(model: ModelConfig, tmp_path: Path) -> None:
    ours = encoder_of(model)
    write_encoder(ours, tmp_path, normalize=normalize_of(model))
    theirs = in_timm(tmp_path)
    images = images_for(model)
    features = ours(images)
    assert features.std() > 0.1
    torch.testing.assert_close(theirs.forward_features(images), features, rtol=0, atol=1e-5)  # type: ignore[operator]
    torch.testing.assert_close(theirs(images), features[:, 0], rtol=0, atol=1e-5)
    config = theirs.pretrained_cfg
    assert config["input_size"] == (model.in_chans, *model.image_size)  # type: ignore[index]
    assert tuple(config["mean"]) == normalize_of(model).mean  # type: ignore[index, arg-type]
    assert tuple(config["std"]) == normalize_of(model).std  # type: ignore[index, arg-type]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("model", [MODELS[1], MODELS[2]])
@torch.no_grad()
def test_timm_loads_the_classifier_with_equal_logits(model: ModelConfig, pooling: Literal["mean", "cls"], tmp_path: Path) -> None:
    ours = classifier_of(model, pooling)
    write_classifier(ours, tmp_path, classes=CLASSES, normalize=normalize_of(model))
    names = load_file(tmp_path / WEIGHTS).keys()
    assert ("fc_norm.weight" in names, "norm.weight" in names) == (pooling == "mean", pooling == "cls")
    logits = ours(images_for(model))
    assert logits.std() > 0.01
    theirs = in_timm(tmp_path)
    torch.testing.assert_close(theirs(images_for(model)), logits, rtol=0, atol=1e-5)
    assert theirs.pretrained_cfg["label_names"] == CLASSES  # type: ignore[index]


def test_what_was_written_is_loaded(tmp_path: Path) -> None:
    encoder = encoder_of(TINY)
    write_encoder(encoder, tmp_path, normalize=normalize_of(TINY))
    for wanted in (None, TINY):
        loaded, normalize, _ = load_encoder(tmp_path, wanted=wanted)
        assert loaded.model == TINY
        assert normalize == normalize_of(TINY)
        state = loaded.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())
        trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
        assert trained == set(state) - {"pos_embed"}


def test_writing_leaves_no_trace_in_the_encoder(tmp_path: Path) -> None:
    encoder = encoder_of(TINY)
    write_encoder(encoder, tmp_path, normalize=normalize_of(TINY))
    loaded = load_encoder(tmp_path, wanted=None).encoder
    torch.nn.init.zeros_(encoder.cls_token)
    assert loaded.cls_token.any()


def classifier_of(model: ModelConfig, pooling: Literal["mean", "cls"]) -> Classifier:
    classifier = Classifier(encoder_of(model), num_classes=len(CLASSES), pooling=pooling, generator=torch.Generator().manual_seed(1))
    stirred(classifier)
    return classifier.eval()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@torch.no_grad()
def test_a_classifier_that_was_written_is_loaded(tmp_path: Path, pooling: Literal["mean", "cls"]) -> None:
    classifier = classifier_of(TINY, pooling)
    write_classifier(classifier, tmp_path, classes=CLASSES, normalize=normalize_of(TINY))
    assert has_head(tmp_path)
    loaded = load_classifier(tmp_path, wanted=TINY)
    assert (loaded.classes, loaded.normalize, loaded.classifier.encoder.model) == (CLASSES, normalize_of(TINY), TINY)
    assert torch.equal(loaded.classifier.eval()(images_for(TINY)), classifier(images_for(TINY)))


@pytest.mark.parametrize("kind", ["encoder", "classifier"])
@torch.no_grad()
def test_positions_are_interpolated_for_another_image_size(tmp_path: Path, kind: str) -> None:
    wanted = ModelConfig(arch="vit_tiny_patch4", image_size=(8, 16))
    if kind == "encoder":
        saved = encoder_of(TINY)
        write_encoder(saved, tmp_path, normalize=normalize_of(TINY))
        loaded = load_encoder(tmp_path, wanted=wanted).encoder
    else:
        classifier = classifier_of(TINY, "mean")
        saved = classifier.encoder
        write_classifier(classifier, tmp_path, classes=CLASSES, normalize=normalize_of(TINY))
        found = load_classifier(tmp_path, wanted=wanted).classifier
        assert found(images_for(wanted)).shape == (2, len(CLASSES))
        loaded = found.encoder
    assert loaded.model == wanted
    assert torch.equal(loaded.pos_embed, resize_positions(saved.pos_embed, (2, 2), (2, 4)))
    assert loaded(images_for(wanted)).shape == (2, 9, 192)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            ModelConfig(arch="vit_tiny_patch8", image_size=8),
            r"fit the spec's model: arch 'vit_tiny_patch8' \(encoder: 'vit_tiny_patch4'\); give",
        ),
        (ModelConfig(arch="vit_tiny_patch4", image_size=12, in_chans=1), r"model: in_chans 1 \(encoder: 3\); give the encoder"),
    ],
)
def test_another_model_than_the_wanted_one(tmp_path: Path, wanted: ModelConfig, message: str) -> None:
    write_encoder(encoder_of(TINY), tmp_path, normalize=normalize_of(TINY))
    with pytest.raises(EncoderError, match=message):
        load_encoder(tmp_path, wanted=wanted)


def test_a_classifier_is_no_encoder_and_an_encoder_no_classifier(tmp_path: Path) -> None:
    for name in ("encoder", "classifier"):
        (tmp_path / name).mkdir()
    write_encoder(encoder_of(TINY), tmp_path / "encoder", normalize=normalize_of(TINY))
    write_classifier(classifier_of(TINY, "cls"), tmp_path / "classifier", classes=CLASSES, normalize=normalize_of(TINY))
    assert not has_head(tmp_path / "encoder")
    with pytest.raises(EncoderError, match="is a fine-tuned model with a head; name the encoder that it started from"):
        load_encoder(tmp_path / "classifier", wanted=None)
    with pytest.raises(EncoderError, match="has no head; name a folder that a fine-tuning wrote"):
        load_classifier(tmp_path / "encoder", wanted=None)


def test_a_classifier_whose_tensors_do_not_fit(tmp_path: Path) -> None:
    write_classifier(classifier_of(TINY, "mean"), tmp_path, classes=CLASSES, normalize=normalize_of(TINY))
    state = load_file(tmp_path / WEIGHTS)
    save_file(state | {"head.bias": torch.zeros(3), "fc_norm.bias": state["fc_norm.bias"].half()}, tmp_path / WEIGHTS)
    with pytest.raises(EncoderError, match=r"head\.bias has shape \(3,\), not \(4,\); fc_norm\.bias is float16, not float32$"):
        load_classifier(tmp_path, wanted=None)


def test_every_tensor_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    write_encoder(encoder_of(TINY), tmp_path, normalize=normalize_of(TINY))
    state = load_file(tmp_path / WEIGHTS)
    del state["norm.weight"]
    state |= {"head.weight": torch.zeros(2, 192), "cls_token": torch.zeros(1, 1, 5), "norm.bias": state["norm.bias"].double()}
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(EncoderError) as caught:
        load_encoder(tmp_path, wanted=None)
    message = str(caught.value)
    assert str(tmp_path / WEIGHTS) in message
    assert "norm.weight is missing; head.weight is not part of this model; " in message
    assert "cls_token has shape (1, 1, 5), not (1, 1, 192); norm.bias is float64, not float32" in message


def test_a_long_list_of_misfits_is_shortened(tmp_path: Path) -> None:
    write_encoder(encoder_of(TINY), tmp_path, normalize=normalize_of(TINY))
    save_file({"nothing": torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(EncoderError, match=r"cls_token is missing; .* and 143 more$"):
        load_encoder(tmp_path, wanted=None)


@pytest.mark.parametrize("broken", ["no-folder", "no-json", "another-json", "no-model", "no-weights", "half-the-weights"])
def test_a_folder_that_cannot_be_read(tmp_path: Path, broken: str) -> None:
    folder = tmp_path / "encoder"
    folder.mkdir()
    write_encoder(encoder_of(TINY), folder, normalize=normalize_of(TINY))
    config, weights = folder / "config.json", folder / WEIGHTS
    if broken == "no-folder":
        folder = tmp_path / "elsewhere"
    elif broken == "no-json":
        config.write_text("{")
    elif broken == "another-json":
        config.write_text("[]")
    elif broken == "no-model":
        config.write_text(json.dumps({"name": "vit_tiny_patch16_224"}))
    elif broken == "no-weights":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:1000])
    file = WEIGHTS if "weights" in broken else r"config\.json"
    with pytest.raises(EncoderError, match=rf"encoder {folder}: {file} cannot be read"):
        load_encoder(folder, wanted=None)


def test_the_heads_of_a_probe(tmp_path: Path) -> None:
    heads = [ProbeHead(6, 3, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    write_probe(heads, tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    for place, head in enumerate(heads):
        for name, tensor in head.state_dict().items():
            assert torch.equal(state[f"heads.{place}.{name}"], tensor)
    assert len(state) == 2 * len(heads[0].state_dict())
