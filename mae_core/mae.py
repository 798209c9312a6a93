"""The masked autoencoder (paper, section 3): an encoder on the visible patches, a light decoder on all of them.

Shapes: B images, C channels, H and W pixels, L patches, K visible patches, D encoder width, E decoder width, P numbers in a patch.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from mae_core.masking import Masking, random_masking
from mae_core.options import DecoderConfig, MaskingConfig, TargetConfig
from mae_core.patches import patch_statistics, patchify, sincos_positions
from mae_core.vit import LAYER_NORM_EPS, Block, Encoder, take_tokens


class MaeOutput(NamedTuple):
    """loss: scalar, the mean over masked patches. prediction_BLP: of every patch, in the target's units. mask_BL: 1 where masked."""

    loss: Tensor
    prediction_BLP: Tensor
    mask_BL: Tensor


class MaskedAutoencoder(nn.Module):
    """The encoder is passed in and stays whole: after training it is used as it is, and the rest is dropped."""

    def __init__(self, encoder: Encoder, *, masking: MaskingConfig, decoder: DecoderConfig, target: TargetConfig) -> None:
        super().__init__()
        model = encoder.model
        self.encoder = encoder
        self.num_keep = masking.num_keep(model.num_patches)
        self.norm_pix = target.norm_pix
        self.decoder_embed = nn.Linear(model.width, decoder.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.width))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(decoder.width, model.grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder.width, decoder.num_heads) for _ in range(decoder.depth))
        self.decoder_norm = nn.LayerNorm(decoder.width, eps=LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(decoder.width, model.patch_dim)

    def forward(self, images_BCHW: Tensor, noise_BL: Tensor) -> MaeOutput:
        """One image, one mask: `noise_BL` in [0, 1) decides which patches are masked."""
        patches_BLP = patchify(images_BCHW, self.encoder.model.patch_size)
        masking = random_masking(noise_BL, self.num_keep)
        tokens_BND = self.encoder.encode(patches_BLP, masking.keep_BK)
        prediction_BLP = self.decode(tokens_BND, masking)
        return MaeOutput(masked_loss(prediction_BLP, self.target(patches_BLP), masking.mask_BL), prediction_BLP, masking.mask_BL)

    def decode(self, tokens_BND: Tensor, masking: Masking) -> Tensor:
        """Predictions (B, L, P) of all patches, from the class token and the visible tokens."""
        x_BNE = self.decoder_embed(tokens_BND)
        num_masked = masking.restore_BL.shape[1] - self.num_keep
        mask_tokens = self.mask_token.to(x_BNE.dtype).expand(x_BNE.shape[0], num_masked, -1)
        patches_BLE = take_tokens(torch.cat([x_BNE[:, 1:], mask_tokens], dim=1), masking.restore_BL)
        x_BNE = torch.cat([x_BNE[:, :1], patches_BLE], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x_BNE = block(x_BNE)
        return cast(Tensor, self.decoder_pred(self.decoder_norm(x_BNE[:, 1:])))

    def target(self, patches_BLP: Tensor) -> Tensor:
        """What is to be predicted: the pixels, or the pixels of each patch with mean 0 and deviation 1."""
        if not self.norm_pix:
            return patches_BLP
        mean, std = patch_statistics(patches_BLP)
        return (patches_BLP - mean) / std


def masked_loss(prediction_BLP: Tensor, target_BLP: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean squared error over the masked patches alone (paper, section 3, "Reconstruction target"). Scalar."""
    error_BL = (prediction_BLP - target_BLP).square().mean(dim=-1)
    return (error_BL * mask_BL).sum() / mask_BL.sum()
