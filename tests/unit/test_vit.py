"""The encoder and the masked autoencoder around it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mae_core.mae import MaskedAutoencoder
from mae_core.options import ARCH_SIZES, DecoderConfig, MaskingConfig, ModelConfig, TargetConfig
from mae_core.patches import patchify, resize_positions, sincos_positions
from mae_core.vit import Block, Encoder, drop_path_scale, initialise, pool
from tests.torchvision_ops import import_torchvision

import_torchvision()
import timm  # noqa: E402  (needs the line above)
from timm.layers import resample_abs_pos_embed  # noqa: E402

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


def test_a_normalised_target_has_mean_0_and_deviation_1(images: Tensor) -> None:
    target = autoencoder(norm_pix=True).target(patchify(5 + 3 * images, 4))
    torch.testing.assert_close(target.mean(dim=-1), torch.zeros(2, 12), rtol=0, atol=1e-5)
    torch.testing.assert_close(target.std(dim=-1), torch.ones(2, 12), rtol=1e-5, atol=0)


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


@pytest.mark.parametrize(("old", "new"), [((14, 14), (28, 28)), ((14, 14), (7, 10)), ((3, 5), (5, 3)), ((2, 2), (1, 9))])
def test_positions_of_another_grid_are_timms(old: tuple[int, int], new: tuple[int, int]) -> None:
    positions = torch.randn(1, 1 + old[0] * old[1], 24, generator=torch.Generator().manual_seed(0))
    theirs = resample_abs_pos_embed(positions, new_size=list(new), old_size=list(old), num_prefix_tokens=1)
    torch.testing.assert_close(resize_positions(positions, old, new), theirs, rtol=0, atol=1e-6)


def test_positions_of_the_same_grid_stay_as_they_are() -> None:
    positions = sincos_positions(24, (3, 5))
    assert resize_positions(positions, (3, 5), (3, 5)) is positions


def test_drop_path_rises_with_depth_and_keeps_the_mean() -> None:
    numbers = torch.rand(20_000, 8, generator=torch.Generator().manual_seed(0))
    scale = drop_path_scale(numbers, 0.3)
    dropped = (scale == 0).float().mean(dim=0)
    torch.testing.assert_close(dropped, torch.tensor([0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3]), rtol=0, atol=0.015)
    torch.testing.assert_close(scale.mean(dim=0), torch.ones(8), rtol=0, atol=0.03)
    assert scale[:, -1].unique().tolist() == pytest.approx([0.0, 1 / 0.7])


@torch.no_grad()
def test_a_dropped_branch_adds_nothing_and_others_are_scaled() -> None:
    block = Block(8, 2)
    initialise(block, torch.Generator().manual_seed(0))
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    attended = x + block.attn(block.norm1(x))
    assert torch.equal(block(x, torch.tensor([[0.0, 0.0]] * 3)), x)
    assert torch.equal(block(x, torch.tensor([[1.0, 0.0]] * 3)), attended)
    mixed = block(x, torch.tensor([[0.0, 2.0], [0.0, 0.0], [1.0, 1.0]]))
    torch.testing.assert_close(mixed[0], (x + 2 * block.mlp(block.norm2(x)))[0])
    assert torch.equal(mixed[1], x[1])
    torch.testing.assert_close(mixed[2], block(x)[2])


@torch.no_grad()
def test_each_block_takes_its_own_two_scales(images: Tensor) -> None:
    encoder = autoencoder().encoder
    scale = torch.ones(2, 24)
    assert torch.equal(encoder(images, scale), encoder(images))
    scale[:, 2:] = 0
    first = encoder.blocks[0](encoder_input(encoder, images))
    torch.testing.assert_close(encoder(images, scale), encoder.norm(first))


def encoder_input(encoder: Encoder, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = encoder.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    encoder(images)
    hook.remove()
    return seen[0]


def test_activation_checkpointing_changes_no_gradient(images: Tensor) -> None:
    gradients = []
    for activation_checkpointing in (False, True):
        encoder = autoencoder().encoder
        encoder.activation_checkpointing = activation_checkpointing
        encoder(images, drop_path_scale(torch.rand(2, 24, generator=torch.Generator().manual_seed(5)), 0.5)).square().sum().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters() if parameter.grad is not None])
    assert len(gradients[0]) > 100
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
