"""The masked autoencoder: what the encoder sees, what is predicted, where the loss is taken."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mae_core.mae import MaeOutput, MaskedAutoencoder
from mae_core.masking import draw_masking
from mae_core.options import DecoderConfig, MaskingConfig, ModelConfig, TargetConfig
from mae_core.patches import patchify, unpatchify
from mae_core.vit import Block, Encoder, initialise, take_tokens

MODEL = ModelConfig(arch="vit_tiny_patch4", image_size=(12, 16))


def autoencoder(
    *, masking: dict[str, Any] | None = None, decoder: dict[str, Any] | None = None, target: dict[str, Any] | None = None
) -> MaskedAutoencoder:
    mae = MaskedAutoencoder(
        Encoder(MODEL),
        masking=MaskingConfig(**masking or {}),
        decoder=DecoderConfig(**{"depth": 1, "width": 64} | (decoder or {})),
        target=TargetConfig(**{"norm_pix": False} | (target or {})),
    )
    initialise(mae, torch.Generator().manual_seed(0))
    return mae.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def noise() -> Tensor:
    return torch.rand(2, MODEL.num_patches, generator=torch.Generator().manual_seed(2))


def numbers_for(mae: MaskedAutoencoder) -> Tensor:
    return torch.rand(2, mae.num_numbers, generator=torch.Generator().manual_seed(3))


def with_other_patches(images: Tensor, chosen_BL: Tensor) -> Tensor:
    patches = patchify(images, 4)
    return unpatchify(torch.where(chosen_BL.bool()[..., None], 9 - patches, patches), patch_size=4, grid=MODEL.grid)


def loss_of(mae: MaskedAutoencoder, output: MaeOutput, images: Tensor) -> Tensor:
    """Mean squared error of what was predicted, for `images` as the truth."""
    return (output.prediction_VQP - take_tokens(mae.target(patchify(images, 4)), output.predicted_VQ)).square().mean()


@torch.no_grad()
def test_the_encoder_sees_only_visible_patches(images: Tensor, noise: Tensor) -> None:
    mae = autoencoder()
    seen: list[Tensor] = []
    mae.encoder.register_forward_hook(lambda *_: pytest.fail("the encoder was given whole images"))
    mae.encoder.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    mae.encoder.norm.register_forward_hook(lambda _, __, tokens: seen.append(tokens))
    before = mae(images, noise)
    changed = with_other_patches(images, before.mask_VL)
    after = mae(changed, noise)

    assert seen[0].shape == (2, 1 + 3, 192)
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert torch.equal(before.prediction_VQP, after.prediction_VQP)
    assert before.loss != after.loss
    torch.testing.assert_close(after.loss, loss_of(mae, before, changed))


@torch.no_grad()
def test_changing_a_visible_patch_changes_the_prediction_alone(images: Tensor, noise: Tensor) -> None:
    mae = autoencoder()
    before = mae(images, noise)
    after = mae(with_other_patches(images, 1 - before.mask_VL), noise)
    assert not torch.equal(before.prediction_VQP, after.prediction_VQP)
    torch.testing.assert_close(after.loss, loss_of(mae, after, images))


def test_masked_patches_are_decoded_at_their_own_places(noise: Tensor) -> None:
    """With a decoder whose one block hands its input on, visible tokens and mask tokens stand where the mask says."""
    mae = autoencoder()
    mae.decoder_embed, mae.decoder_norm, mae.decoder_pred = nn.Identity(), nn.Identity(), nn.Identity()  # type: ignore[assignment]
    mae.decoder_blocks = nn.ModuleList([Block(64, 2)])
    for branch in (mae.decoder_blocks[0].attn.proj, mae.decoder_blocks[0].mlp.fc2):  # type: ignore[union-attr]
        nn.init.zeros_(branch.weight)  # type: ignore[arg-type,union-attr]
        nn.init.zeros_(branch.bias)  # type: ignore[arg-type,union-attr]
    masking = draw_masking(noise, strategy="random", grid=MODEL.grid, num_keep=mae.num_keep)
    numbered = torch.cat([torch.zeros(2, 1), masking.keep_BK + 1.0], dim=1)[..., None].expand(-1, -1, 64)
    mae.mask_token = nn.Parameter(torch.full((1, 1, 64), -1.0))
    decoded = mae._decode(numbered, masking, torch.arange(12).expand(2, -1)) - mae.decoder_pos_embed[:, 1:]
    expected = torch.where(masking.mask_BL.bool(), -1.0, torch.arange(1.0, 13.0))[..., None].expand(-1, -1, 64)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5)


def test_only_masked_patches_are_predicted(images: Tensor, noise: Tensor) -> None:
    output = autoencoder()(images, noise)
    assert output.prediction_VQP.shape == (2, 9, 48)
    assert torch.equal(output.predicted_VQ.sort(dim=1).values, output.mask_VL.nonzero()[:, 1].reshape(2, 9))


@torch.no_grad()
def test_predicting_all_changes_neither_the_loss_nor_the_masked_predictions(images: Tensor, noise: Tensor) -> None:
    mae = autoencoder(target={"norm_pix": True})
    some, everything = mae(images, noise), mae(images, noise, predict_all=True)
    assert everything.prediction_VQP.shape == (2, 12, 48)
    torch.testing.assert_close(everything.loss, some.loss)
    torch.testing.assert_close(take_tokens(everything.prediction_VQP, some.predicted_VQ), some.prediction_VQP)


@torch.no_grad()
def test_a_loss_on_all_counts_visible_patches_too(images: Tensor, noise: Tensor) -> None:
    on_masked, on_all = autoencoder(), autoencoder(target={"loss_on": "all"})
    output = on_all(images, noise)
    everything = on_masked(images, noise, predict_all=True)
    assert torch.equal(output.prediction_VQP, everything.prediction_VQP)
    torch.testing.assert_close(output.loss, (everything.prediction_VQP - patchify(images, 4)).square().mean())
    assert output.loss != everything.loss


@torch.no_grad()
def test_mask_tokens_in_the_encoder_hide_the_pixels_but_not_the_place(images: Tensor, noise: Tensor) -> None:
    mae = autoencoder(masking={"encoder_mask_tokens": True})
    assert not hasattr(mae, "mask_token")
    seen: list[Tensor] = []
    mae.encoder.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    output = mae(images, noise)
    mae(with_other_patches(images, output.mask_VL), noise)
    assert seen[0].shape == (2, 1 + 12, 192)
    assert torch.equal(seen[0], seen[1])
    hidden = seen[0][:, 1:][output.mask_VL.bool()]
    positions = mae.encoder.pos_embed[:, 1:].expand(2, -1, -1)[output.mask_VL.bool()]
    torch.testing.assert_close(hidden, mae.encoder_mask_token[0] + positions)


def cross(**decoder: Any) -> MaskedAutoencoder:
    return autoencoder(decoder={"attention": "cross", "depth": 2} | decoder)


@torch.no_grad()
def test_a_cross_decoder_predicts_each_patch_by_itself(images: Tensor) -> None:
    """What is predicted of a patch does not depend on which others are predicted: that is what lets it predict a fraction."""
    whole, half = cross(), cross(predict_fraction=0.5)
    numbers = numbers_for(half)
    output = half(images, numbers)
    everything = half(images, numbers, predict_all=True)
    assert output.prediction_VQP.shape == (2, 5, 48)  # 4.5 of 9 masked ones, rounded up
    torch.testing.assert_close(take_tokens(everything.prediction_VQP, output.predicted_VQ), output.prediction_VQP)
    torch.testing.assert_close(everything.prediction_VQP, whole(images, numbers[:, :12], predict_all=True).prediction_VQP)
    assert (output.mask_VL.gather(1, output.predicted_VQ) == 1).all()
    assert all(len(row.unique()) == 5 for row in output.predicted_VQ)


@torch.no_grad()
def test_the_fraction_is_drawn_anew_from_its_own_numbers(images: Tensor) -> None:
    mae = cross(predict_fraction=0.5)
    numbers = numbers_for(mae)
    other = torch.cat([numbers[:, :12], numbers[:, 12:].flip(1)], dim=1)
    first, second = mae(images, numbers), mae(images, other)
    assert torch.equal(first.mask_VL, second.mask_VL)
    assert not torch.equal(first.predicted_VQ, second.predicted_VQ)


@torch.no_grad()
def test_a_cross_decoder_sees_every_visible_patch(images: Tensor, noise: Tensor) -> None:
    mae = cross()
    before = mae(images, noise)
    assert torch.equal(before.prediction_VQP, mae(with_other_patches(images, before.mask_VL), noise).prediction_VQP)
    for place in before.mask_VL[0].logical_not().nonzero()[:, 0].tolist():
        chosen = torch.zeros(2, 12)
        chosen[0, place] = 1
        after = mae(with_other_patches(images, chosen), noise)
        assert (after.prediction_VQP[0] != before.prediction_VQP[0]).any(dim=1).all()
        assert torch.equal(after.prediction_VQP[1], before.prediction_VQP[1])


@torch.no_grad()
def test_several_masks_of_an_image_are_as_many_images(images: Tensor) -> None:
    once, thrice = autoencoder(), autoencoder(masking={"num_masks": 3})
    numbers = numbers_for(thrice)
    output = thrice(images, numbers)
    repeated = once(images.repeat_interleave(3, dim=0), numbers.reshape(6, 12))
    assert output.mask_VL.shape == (6, 12)
    assert torch.equal(output.mask_VL, repeated.mask_VL)
    assert torch.equal(output.prediction_VQP, repeated.prediction_VQP)
    assert torch.equal(output.loss, repeated.loss)
    assert len(output.mask_VL[:3].unique(dim=0)) > 1


@pytest.mark.parametrize("strategy", ["block", "grid"])
def test_another_strategy_feeds_as_many_patches(images: Tensor, strategy: str) -> None:
    mae = autoencoder(masking={"strategy": strategy, "ratio": 0.5})
    output = mae(images, numbers_for(mae))
    assert torch.equal(output.mask_VL.sum(dim=1), torch.full((2,), 6.0))
    assert output.prediction_VQP.shape == (2, 6, 48)


@pytest.mark.parametrize("case", [{}, {"attention": "cross", "predict_fraction": 0.5}])
def test_activation_checkpointing_changes_no_gradient(images: Tensor, case: dict[str, Any]) -> None:
    gradients = []
    for activation_checkpointing in (False, True):
        mae = autoencoder(decoder={"depth": 2} | case)
        mae.encoder.activation_checkpointing = activation_checkpointing
        mae(images, numbers_for(mae)).loss.backward()
        gradients.append([parameter.grad for parameter in mae.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == sum(parameter.requires_grad for parameter in mae.parameters())
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
