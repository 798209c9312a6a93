"""The encoder and the masked autoencoder around it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mae_core.mae import MaskedAutoencoder, masked_loss
from mae_core.masking import random_masking
from mae_core.options import ARCH_SIZES, DecoderConfig, MaskingConfig, ModelConfig, TargetConfig
from mae_core.patches import patchify, sincos_positions, unpatchify
from mae_core.vit import Encoder, initialise, pool
from tests.torchvision_ops import import_torchvision

import_torchvision()
import timm  # noqa: E402  (needs the line above)

from mae_core.export import _TIMM_ARCHITECTURES  # noqa: E402

MODEL = ModelConfig(arch="vit_tiny_patch4", image_size=(12, 16))
FROZEN_KEYS = Path(__file__).parent / "encoder_state_dict.txt"


def autoencoder(*, norm_pix: bool = False, ratio: float = 0.75, seed: int = 0) -> MaskedAutoencoder:
    mae = MaskedAutoencoder(
        Encoder(MODEL), masking=MaskingConfig(ratio=ratio), decoder=DecoderConfig(depth=1, width=64), target=TargetConfig(norm_pix=norm_pix)
    )
    initialise(mae, torch.Generator().manual_seed(seed))
    return mae.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def noise() -> Tensor:
    return torch.rand(2, MODEL.num_patches, generator=torch.Generator().manual_seed(2))


def with_other_patches(images: Tensor, chosen_BL: Tensor) -> Tensor:
    patches = patchify(images, 4)
    return unpatchify(torch.where(chosen_BL.bool()[..., None], 9 - patches, patches), patch_size=4, grid=MODEL.grid)


@torch.no_grad()
def test_keeping_all_patches_in_order_is_the_whole_image(images: Tensor) -> None:
    encoder = autoencoder().encoder
    everything = torch.arange(MODEL.num_patches).expand(2, -1)
    assert torch.equal(encoder.encode(patchify(images, 4), everything), encoder(images))


@torch.no_grad()
def test_patches_keep_their_positions_when_shuffled(images: Tensor) -> None:
    encoder = autoencoder().encoder
    shuffled = torch.randperm(MODEL.num_patches, generator=torch.Generator().manual_seed(3))
    tokens = encoder.encode(patchify(images, 4), shuffled.expand(2, -1))
    torch.testing.assert_close(tokens[:, 1:], encoder(images)[:, 1:][:, shuffled], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_encoder_sees_only_visible_patches(images: Tensor, noise: Tensor) -> None:
    mae = autoencoder()
    seen: list[Tensor] = []
    mae.encoder.register_forward_hook(lambda *_: pytest.fail("the encoder was given whole images"))
    mae.encoder.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    mae.encoder.norm.register_forward_hook(lambda _, __, tokens: seen.append(tokens))
    before = mae(images, noise)
    changed = with_other_patches(images, before.mask_BL)
    after = mae(changed, noise)

    assert seen[0].shape == (2, 1 + 3, 192)
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert torch.equal(before.prediction_BLP, after.prediction_BLP)
    assert before.loss != after.loss
    assert torch.equal(after.loss, masked_loss(before.prediction_BLP, patchify(changed, 4), before.mask_BL))


@torch.no_grad()
def test_changing_a_visible_patch_changes_the_prediction_alone(images: Tensor, noise: Tensor) -> None:
    mae = autoencoder()
    before = mae(images, noise)
    after = mae(with_other_patches(images, 1 - before.mask_BL), noise)
    assert not torch.equal(before.prediction_BLP, after.prediction_BLP)
    assert torch.equal(after.loss, masked_loss(after.prediction_BLP, patchify(images, 4), before.mask_BL))


def test_the_loss_counts_masked_patches_only() -> None:
    prediction, target = torch.zeros(1, 4, 2), torch.tensor([[[1.0, 1.0], [2.0, 2.0], [3.0, 1.0], [9.0, 9.0]]])
    assert masked_loss(prediction, target, torch.tensor([[1.0, 0.0, 1.0, 0.0]])) == (1 + (9 + 1) / 2) / 2
    prediction.requires_grad_(True)
    masked_loss(prediction, target, torch.tensor([[1.0, 0.0, 1.0, 0.0]])).backward()
    assert prediction.grad is not None
    assert not prediction.grad[0, [1, 3]].any()
    assert prediction.grad[0, [0, 2]].all()


def test_a_normalised_target_has_mean_0_and_deviation_1(images: Tensor) -> None:
    target = autoencoder(norm_pix=True).target(patchify(5 + 3 * images, 4))
    torch.testing.assert_close(target.mean(dim=-1), torch.zeros(2, 12), rtol=0, atol=1e-5)
    torch.testing.assert_close(target.std(dim=-1), torch.ones(2, 12), rtol=1e-5, atol=0)


def test_masked_patches_are_decoded_at_their_own_places(noise: Tensor) -> None:
    """With a decoder that hands its input on, visible tokens and mask tokens stand where the mask says."""
    mae = autoencoder()
    mae.decoder_embed, mae.decoder_norm, mae.decoder_pred = nn.Identity(), nn.Identity(), nn.Identity()  # type: ignore[assignment]
    mae.decoder_blocks = nn.ModuleList()
    masking = random_masking(noise, mae.num_keep)
    numbered = torch.cat([torch.zeros(2, 1), masking.keep_BK + 1.0], dim=1)[..., None].expand(-1, -1, 64)
    mae.mask_token = nn.Parameter(torch.full((1, 1, 64), -1.0))
    decoded = mae.decode(numbered, masking) - mae.decoder_pos_embed[:, 1:]
    expected = torch.where(masking.mask_BL.bool(), -1.0, torch.arange(1.0, 13.0))[..., None].expand(-1, -1, 64)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5)


def test_pooling() -> None:
    tokens = torch.tensor([[[7.0], [1.0], [2.0], [6.0]]])
    assert pool(tokens, "cls").tolist() == [[7.0]]
    assert pool(tokens, "mean").tolist() == [[3.0]]


def test_initial_linear_weights_are_xavier_and_biases_zero() -> None:
    mae = autoencoder()
    linear = {name: module for name, module in mae.named_modules() if isinstance(module, nn.Linear)}
    assert linear["encoder.blocks.3.attn.qkv"].weight.shape == (576, 192)
    for name, module in linear.items():
        fan_out, fan_in = module.weight.shape
        bound = (6 / (fan_in + fan_out)) ** 0.5
        assert 0.95 * bound < module.weight.abs().max() <= bound, name
        assert not module.bias.any(), name


def test_the_patch_projection_is_initialised_as_a_matrix() -> None:
    proj = autoencoder().encoder.patch_embed.proj
    bound = (6 / (48 + 192)) ** 0.5
    assert 0.95 * bound < proj.weight.abs().max() <= bound
    assert proj.bias is not None
    assert 0.9 * 48**-0.5 < proj.bias.abs().max() <= 48**-0.5


def test_initial_norms_tokens_and_positions() -> None:
    mae = autoencoder()
    for module in mae.modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6
            assert (module.weight == 1).all()
            assert not module.bias.any()
    for token in (mae.encoder.cls_token, mae.mask_token):
        assert 0.01 < token.std() < 0.03
    assert torch.equal(mae.encoder.pos_embed, sincos_positions(192, MODEL.grid))
    assert torch.equal(mae.decoder_pos_embed, sincos_positions(64, MODEL.grid))
    assert not mae.encoder.pos_embed.requires_grad
    assert not mae.decoder_pos_embed.requires_grad


def test_the_seed_alone_decides_the_initial_weights() -> None:
    first, torch_state = autoencoder(seed=4).state_dict(), torch.get_rng_state()
    torch.manual_seed(99)
    again, other = autoencoder(seed=4).state_dict(), autoencoder(seed=5).state_dict()
    torch.set_rng_state(torch_state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoder.cls_token"], other["encoder.cls_token"])


def test_names_and_shapes_of_the_state_are_frozen() -> None:
    """Encoders in users' hands have these names. The list is of vit_tiny_patch16 at 224; a change of it must be meant."""
    with torch.device("meta"):
        state = Encoder(ModelConfig(arch="vit_tiny_patch16", image_size=224)).state_dict()
    assert [f"{name} {'x'.join(map(str, tensor.shape))}" for name, tensor in state.items()] == FROZEN_KEYS.read_text().splitlines()


@pytest.mark.parametrize("size", ARCH_SIZES)
def test_every_size_is_timms(size: str) -> None:
    patch = 14 if size == "huge" else 16
    with torch.device("meta"):
        ours = Encoder(ModelConfig(arch=f"vit_{size}_patch{patch}", image_size=224))
        theirs = timm.create_model(_TIMM_ARCHITECTURES[size], num_classes=0)
    assert sum(parameter.numel() for parameter in ours.parameters()) == sum(parameter.numel() for parameter in theirs.parameters())
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == shapes
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads  # type: ignore[union-attr]
