"""Names of Hugging Face, against the real library: what it loads and what it saves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mae_core.classifier import Classifier
from mae_core.hf_names import Architecture, from_hf, to_hf
from mae_core.mae import MaskedAutoencoder
from mae_core.options import DecoderConfig, MaskingConfig, TargetConfig
from mae_core.vit import Encoder
from tests.torchvision_ops import import_torchvision
from tests.unit.core_fixtures import TINY

import_torchvision()
import transformers  # noqa: E402  (needs the line above)

DECODER = DecoderConfig(depth=2, width=64)
CONFIG = {
    "architectures": [],
    "hidden_size": TINY.width,
    "num_hidden_layers": TINY.depth,
    "num_attention_heads": TINY.num_heads,
    "intermediate_size": 4 * TINY.width,
    "image_size": 8,
    "patch_size": 4,
}
ARCHITECTURES: tuple[Architecture, ...] = ("ViTModel", "ViTForImageClassification", "ViTMAEForPreTraining")


def ours(architecture: Architecture) -> dict[str, Tensor]:
    """Random numbers under all names of ours that the architecture has."""
    encoder = Encoder(TINY)
    state = encoder.state_dict()
    if architecture == "ViTForImageClassification":
        classifier = Classifier(encoder, num_classes=5, pooling="cls", generator=torch.Generator())
        state = {name.removeprefix("encoder."): tensor for name, tensor in classifier.state_dict().items()}
    if architecture == "ViTMAEForPreTraining":
        mae = MaskedAutoencoder(encoder, masking=MaskingConfig(), decoder=DECODER, target=TargetConfig())
        state = {name.removeprefix("encoder."): tensor for name, tensor in mae.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


def theirs(architecture: Architecture, **changes: Any) -> Any:
    """A model of the real library, with random weights."""
    if architecture == "ViTMAEForPreTraining":
        decoder = {"decoder_hidden_size": 64, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2}
        config = transformers.ViTMAEConfig(**CONFIG, **decoder, decoder_intermediate_size=256)
    else:
        config = transformers.ViTConfig(**CONFIG, num_labels=5)
    return getattr(transformers, architecture)(config, **changes)


def without_pooler(architecture: Architecture) -> dict[str, bool]:
    return {"add_pooling_layer": False} if architecture == "ViTModel" else {}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_library_loads_every_tensor_from_a_file_under_these_names(architecture: Architecture, tmp_path: Path) -> None:
    mine = ours(architecture)
    theirs(architecture, **without_pooler(architecture)).config.save_pretrained(tmp_path)
    save_file({name: tensor.contiguous() for name, tensor in to_hf(mine, architecture).items()}, tmp_path / "model.safetensors")
    model, report = getattr(transformers, architecture).from_pretrained(tmp_path, output_loading_info=True, **without_pooler(architecture))
    assert {name: found for name, found in report.items() if found} == {}
    assert_same(from_hf(model.state_dict()), mine)  # the names that transformers 5 has in memory


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_the_library_saves_is_read(architecture: Architecture, tmp_path: Path) -> None:
    model = theirs(architecture, **without_pooler(architecture))
    model.save_pretrained(tmp_path)
    assert_same(from_hf(load_file(tmp_path / "model.safetensors")), from_hf(model.state_dict()))
    assert from_hf(model.state_dict()).keys() == ours(architecture).keys()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_there_and_back(architecture: Architecture) -> None:
    mine = ours(architecture)
    assert_same(from_hf(to_hf(mine, architecture)), mine)


def test_names_are_those_of_files_on_the_hub() -> None:
    names = to_hf(ours("ViTMAEForPreTraining"), "ViTMAEForPreTraining").keys()
    assert "vit.encoder.layer.11.attention.attention.query.weight" in names
    assert "vit.encoder.layer.0.attention.output.dense.bias" in names
    assert "decoder.decoder_layers.1.intermediate.dense.weight" in names
    assert "embeddings.patch_embeddings.projection.weight" in to_hf(ours("ViTModel"), "ViTModel")


def test_queries_keys_and_values_are_thirds_in_this_order() -> None:
    fused = torch.arange(6.0).reshape(6, 1)
    found = to_hf({"blocks.0.attn.qkv.weight": fused}, "ViTModel")
    assert {name.split(".")[-2]: part.flatten().tolist() for name, part in found.items()} == {
        "query": [0, 1],
        "key": [2, 3],
        "value": [4, 5],
    }


def test_what_has_no_name_here_keeps_its_own() -> None:
    assert from_hf({"vit.pooler.dense.weight": torch.zeros(1)}).keys() == {"vit.pooler.dense.weight"}
    with pytest.raises(KeyError, match="fc_norm"):
        to_hf({"fc_norm.weight": torch.zeros(1)}, "ViTForImageClassification")


@pytest.mark.parametrize("fault", ["missing", "misshapen", "no-shape", "another-type"])
def test_thirds_that_do_not_fit_together_stay_apart(fault: str) -> None:
    prefix = "encoder.layer.3.attention.attention"
    state = {f"{prefix}.{third}.weight": torch.zeros(4, 4) for third in ("query", "key", "value")}
    if fault == "missing":
        del state[f"{prefix}.key.weight"]
    else:
        wrong = {"misshapen": torch.zeros(4, 5), "no-shape": torch.zeros(()), "another-type": torch.zeros(4, 4).half()}
        state[f"{prefix}.key.weight"] = wrong[fault]
    assert from_hf(state).keys() == state.keys()
