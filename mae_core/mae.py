"""The masked autoencoder (paper, section 3): an encoder on the visible patches, a light decoder that predicts the masked ones.

Shapes: B images, V = B * masks views, C channels, H and W pixels, L patches, K visible, M masked and Q predicted patches of a view,
D encoder width, E decoder width, P numbers in a patch, X uniform numbers of an image.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae_core.masking import Masking, draw_masking, num_numbers
from mae_core.options import DecoderConfig, MaskingConfig, TargetConfig
from mae_core.patches import patch_statistics, patchify, sincos_positions
from mae_core.vit import LAYER_NORM_EPS, Block, Encoder, Mlp, run_block, take_tokens


class MaeOutput(NamedTuple):
    """loss: scalar. prediction_VQP: of the patches at predicted_VQ, in the target's units. mask_VL: 1 where masked."""

    loss: Tensor
    prediction_VQP: Tensor
    predicted_VQ: Tensor
    mask_VL: Tensor


class CrossAttention(nn.Module):
    """Multi-head attention of some tokens to others, which may have another width."""

    def __init__(self, width: int, num_heads: int, context_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(context_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BQE: Tensor, context_BND: Tensor) -> Tensor:
        B, Q, E = x_BQE.shape
        q = self.q(x_BQE).reshape(B, Q, self.num_heads, -1).transpose(1, 2)
        k, v = self.kv(context_BND).reshape(B, context_BND.shape[1], 2, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v)
        return cast(Tensor, self.proj(attended.transpose(1, 2).reshape(B, Q, E)))


class CrossBlock(nn.Module):
    """A decoder block of cross attention alone: predicted patches see the visible ones, but not each other (CrossMAE, Fu et al. 2024)."""

    def __init__(self, width: int, num_heads: int, context_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = CrossAttention(width, num_heads, context_width)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width)

    def forward(self, x_BQE: Tensor, context_BND: Tensor) -> Tensor:
        x_BQE = x_BQE + self.attn(self.norm1(x_BQE), context_BND)
        return x_BQE + cast(Tensor, self.mlp(self.norm2(x_BQE)))


class MaskedAutoencoder(nn.Module):
    """The encoder is passed in and stays whole: after training it is used as it is, and the rest is dropped."""

    def __init__(self, encoder: Encoder, *, masking: MaskingConfig, decoder: DecoderConfig, target: TargetConfig) -> None:
        super().__init__()
        model = encoder.model
        self.encoder = encoder
        self.masking = masking
        self.num_keep = masking.num_keep(model.num_patches)
        self.num_predicted = decoder.num_predicted(model.num_patches - self.num_keep)
        self.norm_pix = target.norm_pix
        self.loss_on_all = target.loss_on == "all"
        self.is_cross = decoder.attention == "cross"
        if masking.encoder_mask_tokens:
            self.encoder_mask_token = nn.Parameter(torch.zeros(1, 1, model.width))
        if self.is_cross:
            blocks: list[nn.Module] = [CrossBlock(decoder.width, decoder.num_heads, model.width) for _ in range(decoder.depth)]
        else:
            blocks = [Block(decoder.width, decoder.num_heads) for _ in range(decoder.depth)]
            self.decoder_embed = nn.Linear(model.width, decoder.width)
        if not masking.encoder_mask_tokens:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.width))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(decoder.width, model.grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = nn.LayerNorm(decoder.width, eps=LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(decoder.width, model.patch_dim)

    @property
    def num_numbers(self) -> int:
        """Uniform numbers that one image needs, for all its masks."""
        return self.masking.num_masks * (num_numbers(self.masking.strategy, self.encoder.model.num_patches) + self._num_choice_numbers)

    @property
    def _num_choice_numbers(self) -> int:
        """Numbers that choose which of the masked patches are predicted; none where all are."""
        num_masked = self.encoder.model.num_patches - self.num_keep
        return num_masked if self.num_predicted < num_masked else 0

    def forward(self, images_BCHW: Tensor, numbers_BX: Tensor, *, predict_all: bool = False) -> MaeOutput:
        """One view for each mask of an image; `numbers_BX` in [0, 1) decide what is masked and predicted.

        predict_all: predicts every patch, as pictures need it; the loss is then of those that it is always of.
        """
        model, num_masks = self.encoder.model, self.masking.num_masks
        patches_VLP = patchify(images_BCHW, model.patch_size).repeat_interleave(num_masks, dim=0)
        numbers_VX = numbers_BX.reshape(len(patches_VLP), -1)
        choice = numbers_VX.shape[1] - self._num_choice_numbers
        masking = draw_masking(numbers_VX[:, :choice], strategy=self.masking.strategy, grid=model.grid, num_keep=self.num_keep)
        tokens_VND = self._encode(patches_VLP, masking)
        if predict_all or self.loss_on_all:
            predicted_VQ = torch.arange(model.num_patches, device=patches_VLP.device).expand(len(patches_VLP), -1)
        elif self._num_choice_numbers:
            chosen_VQ = torch.argsort(numbers_VX[:, choice:], dim=1, stable=True)[:, : self.num_predicted]
            predicted_VQ = masking.masked_BM.gather(1, chosen_VQ)
        else:
            predicted_VQ = masking.masked_BM
        prediction_VQP = self._decode(tokens_VND, masking, predicted_VQ)
        error_VQ = (prediction_VQP - self.target(take_tokens(patches_VLP, predicted_VQ))).square().mean(dim=-1)
        if predict_all and not self.loss_on_all:
            loss = (error_VQ * masking.mask_BL).sum() / masking.mask_BL.sum()
        else:
            loss = error_VQ.mean()  # as many in every view, so it is the mean over the masked patches (section 3, "Reconstruction target")
        return MaeOutput(loss, prediction_VQP.detach(), predicted_VQ, masking.mask_BL)

    def _encode(self, patches_VLP: Tensor, masking: Masking) -> Tensor:
        if self.masking.encoder_mask_tokens:
            return self.encoder.encode(patches_VLP, hidden_as=(self.encoder_mask_token, masking.mask_BL))
        return self.encoder.encode(patches_VLP, masking.keep_BK)

    def _decode(self, tokens_VND: Tensor, masking: Masking, predicted_VQ: Tensor) -> Tensor:
        """Predictions (V, Q, P) of the patches at `predicted_VQ`, from the class token and the encoder's other tokens."""
        if self.is_cross:
            x_VQE = self.mask_token + take_tokens(self.decoder_pos_embed[:, 1:].expand(len(tokens_VND), -1, -1), predicted_VQ)
            for block in self.decoder_blocks:
                x_VQE = run_block(block, x_VQE, tokens_VND, checkpointed=self.encoder.activation_checkpointing)
        else:
            x_VNE = self._all_tokens(self.decoder_embed(tokens_VND), masking) + self.decoder_pos_embed
            *blocks, last = self.decoder_blocks
            for block in blocks:
                x_VNE = run_block(block, x_VNE, checkpointed=self.encoder.activation_checkpointing)
            # Nobody reads the other tokens of the last block; the first token is the class token.
            x_VQE = run_block(last, x_VNE, None, predicted_VQ + 1, checkpointed=self.encoder.activation_checkpointing)
        return cast(Tensor, self.decoder_pred(self.decoder_norm(x_VQE)))

    def _all_tokens(self, x_VNE: Tensor, masking: Masking) -> Tensor:
        """The tokens of all patches in their own order, behind the class token: mask tokens where the encoder saw nothing."""
        if self.masking.encoder_mask_tokens:
            return x_VNE
        mask_tokens = self.mask_token.to(x_VNE.dtype).expand(len(x_VNE), masking.masked_BM.shape[1], -1)
        patches_VLE = take_tokens(torch.cat([x_VNE[:, 1:], mask_tokens], dim=1), masking.restore_BL)
        return torch.cat([x_VNE[:, :1], patches_VLE], dim=1)

    def target(self, patches_BLP: Tensor) -> Tensor:
        """What is to be predicted: the pixels, or the pixels of each patch with mean 0 and deviation 1."""
        if not self.norm_pix:
            return patches_BLP
        mean, std = patch_statistics(patches_BLP)
        return (patches_BLP - mean) / std
