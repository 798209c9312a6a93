"""Our masked autoencoder against Hugging Face's: same weights, same noise → the same loss, prediction and gradients."""

import pytest
import torch
from torch import Tensor

from mae_core.mae import MaskedAutoencoder
from mae_core.options import DecoderConfig, MaskingConfig, ModelConfig, TargetConfig
from mae_core.patches import sincos_positions
from mae_core.vit import Encoder, initialise
from tests.torchvision_ops import import_torchvision

import_torchvision()
from transformers import ViTMAEConfig, ViTMAEForPreTraining  # noqa: E402  (needs the line above)
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding  # noqa: E402

TOLERANCE = 1e-5
_OUTSIDE_BLOCKS = {
    "vit.embeddings.cls_token": "encoder.cls_token",
    "vit.embeddings.position_embeddings": "encoder.pos_embed",
    "vit.embeddings.patch_embeddings.projection.": "encoder.patch_embed.proj.",
    "vit.layernorm.": "encoder.norm.",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    "decoder.decoder_embed.": "decoder_embed.",
    "decoder.decoder_norm.": "decoder_norm.",
    "decoder.decoder_pred.": "decoder_pred.",
}
_IN_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def theirs_from_ours(ours: dict[str, Tensor], their_names: list[str]) -> dict[str, Tensor]:
    """Our tensors (weights or gradients) under Hugging Face's names; q, k and v are thirds of our fused matrix."""

    def find(name: str) -> Tensor:
        for theirs, mine in _OUTSIDE_BLOCKS.items():
            if name.startswith(theirs):
                return ours[mine + name.removeprefix(theirs)]
        stack, _, rest = name.partition("layers.")
        index, _, rest = rest.partition(".")
        block = f"encoder.blocks.{index}." if stack == "vit." else f"decoder_blocks.{index}."
        inner, _, kind = rest.rpartition(".")
        if inner in _IN_BLOCK:
            return ours[f"{block}{_IN_BLOCK[inner]}.{kind}"]
        third = ("attention.q_proj", "attention.k_proj", "attention.v_proj").index(inner)
        return ours[f"{block}attn.qkv.{kind}"].chunk(3)[third]

    return {name: find(name) for name in their_names}


def pair(
    model: ModelConfig, decoder: DecoderConfig, *, norm_pix: bool, dtype: torch.dtype
) -> tuple[MaskedAutoencoder, ViTMAEForPreTraining]:
    generator = torch.Generator().manual_seed(1)
    ours = MaskedAutoencoder(Encoder(model), masking=MaskingConfig(ratio=0.75), decoder=decoder, target=TargetConfig(norm_pix=norm_pix))
    initialise(ours, generator)
    with torch.no_grad():  # zero biases and unit norms would hide an exchange of two of them
        for parameter in ours.parameters():
            if parameter.requires_grad and parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=model.width,
            num_hidden_layers=model.depth,
            num_attention_heads=model.num_heads,
            intermediate_size=4 * model.width,
            image_size=model.image_size[0],
            patch_size=model.patch_size,
            num_channels=model.in_chans,
            decoder_hidden_size=decoder.width,
            decoder_num_hidden_layers=decoder.depth,
            decoder_num_attention_heads=decoder.num_heads,
            decoder_intermediate_size=4 * decoder.width,
            layer_norm_eps=1e-6,
            norm_pix_loss=norm_pix,
            mask_ratio=0.75,
        )
    )
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    theirs.load_state_dict(theirs_from_ours(ours.state_dict(), list(theirs.state_dict())))
    return ours, theirs


SMALL_DECODER = DecoderConfig(depth=2, width=64)
CASES = [
    pytest.param(ModelConfig(arch="vit_base_patch16", image_size=224), DecoderConfig(), True, torch.float32, id="base-norm_pix"),
    pytest.param(ModelConfig(arch="vit_base_patch16", image_size=224), DecoderConfig(), False, torch.float64, id="base-pixels-float64"),
    pytest.param(
        ModelConfig(arch="vit_tiny_patch5", image_size=35, in_chans=2), SMALL_DECODER, True, torch.float64, id="odd-norm_pix-float64"
    ),
    pytest.param(ModelConfig(arch="vit_tiny_patch7", image_size=49, in_chans=1), SMALL_DECODER, False, torch.float32, id="odd-pixels"),
    pytest.param(ModelConfig(arch="vit_small_patch3", image_size=15, in_chans=5), SMALL_DECODER, True, torch.float32, id="odd-channels"),
]


@pytest.mark.parametrize(("model", "decoder", "norm_pix", "dtype"), CASES)
def test_loss_prediction_and_gradients_equal(model: ModelConfig, decoder: DecoderConfig, norm_pix: bool, dtype: torch.dtype) -> None:
    ours, theirs = pair(model, decoder, norm_pix=norm_pix, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(2, model.in_chans, *model.image_size, generator=generator, dtype=dtype)
    noise = torch.rand(2, model.num_patches, generator=generator)

    mine, other = ours(images, noise, predict_all=True), theirs(images, noise=noise)
    mine.loss.backward()
    other.loss.backward()

    torch.testing.assert_close(mine.loss, other.loss, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(mine.prediction_VQP, other.logits, rtol=0, atol=TOLERANCE)
    assert torch.equal(mine.mask_VL.to(dtype), other.mask.to(dtype))
    my_gradients = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None}
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    assert len(their_gradients) > 20
    for name, gradient in theirs_from_ours(my_gradients, list(their_gradients)).items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=0, atol=TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def test_sincos_positions_equal() -> None:
    theirs = build_2d_sinusoidal_position_embedding(height=3, width=5, embed_dim=24, cls_token=True)
    down_first, across_last = theirs.chunk(2, dim=-1)  # they rotate the halves to the authors' layout, as here, when they load weights
    torch.testing.assert_close(sincos_positions(24, (3, 5))[0], torch.cat([across_last, down_first], dim=-1), rtol=0, atol=1e-6)
