"""The Vision Transformer encoder (Dosovitskiy et al. 2021), with the parameter names of timm and of the authors' code.

Shapes: B images, L patches, K patches given to the encoder, N = 1 + K tokens, D width, P numbers in a patch, S = 2 * depth branches.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mae_core.options import ModelConfig
from mae_core.patches import patchify, sincos_positions

LAYER_NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention with a fused projection of queries, keys and values."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, index_BQ: Tensor | None = None) -> Tensor:
        """Every token attends to all; with `index_BQ` those alone are computed (B, Q, D)."""
        B, N, D = x_BND.shape
        if index_BQ is None:
            q, k, v = self.qkv(x_BND).reshape(B, N, 3, self.num_heads, -1).unbind(2)
        else:
            (weight_q, weight_kv), (bias_q, bias_kv) = (torch.split(each, [D, 2 * D]) for each in (self.qkv.weight, self.qkv.bias))
            q = F.linear(take_tokens(x_BND, index_BQ), weight_q, bias_q).reshape(B, -1, self.num_heads, D // self.num_heads)
            k, v = F.linear(x_BND, weight_kv, bias_kv).reshape(B, N, 2, self.num_heads, -1).unbind(2)
        # Unbound before they are transposed, so that on the way back their gradients are stacked in one copy instead of two.
        attended = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return cast(Tensor, self.proj(attended.transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    """Two linear layers with GELU, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x_BND))))


class Block(nn.Module):
    """A pre-norm transformer block. `scale_B2` multiplies what its two branches add (stochastic depth); None: as they are.
    `index_BQ`: the tokens to compute, all where it is None."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width)

    def forward(self, x_BND: Tensor, scale_B2: Tensor | None = None, index_BQ: Tensor | None = None) -> Tensor:
        attended = self.attn(self.norm1(x_BND), index_BQ)
        x_BND = x_BND if index_BQ is None else take_tokens(x_BND, index_BQ)
        x_BND = x_BND + (attended if scale_B2 is None else attended * scale_B2[:, 0, None, None])
        mixed: Tensor = self.mlp(self.norm2(x_BND))
        return x_BND + (mixed if scale_B2 is None else mixed * scale_B2[:, 1, None, None])


class PatchEmbed(nn.Module):
    """The patch projection. A convolution holds the weights, as everywhere else; patches go through it as one linear map,
    so that only the patches that are kept need embedding."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(model.in_chans, model.width, kernel_size=model.patch_size, stride=model.patch_size)

    def forward(self, patches_BKP: Tensor) -> Tensor:
        # Pixels to the weight's order (channel, row, column): turning the weight instead would give its gradient strides of its own.
        pixels_BKP = patches_BKP.reshape(*patches_BKP.shape[:2], -1, self.proj.in_channels).transpose(2, 3).flatten(2)
        return F.linear(pixels_BKP, self.proj.weight.flatten(1), self.proj.bias)


class Encoder(nn.Module):
    """ViT encoder without a head. `forward` sees whole images, `encode` any subset of their patches.

    Positions are fixed; a fine-tune may free them by `requires_grad_`.
    """

    def __init__(self, model: ModelConfig, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.model = model
        self.activation_checkpointing = activation_checkpointing
        self.cls_token = nn.Parameter(torch.zeros(1, 1, model.width))
        self.pos_embed = nn.Parameter(sincos_positions(model.width, model.grid), requires_grad=False)
        self.patch_embed = PatchEmbed(model)
        self.blocks = nn.ModuleList(Block(model.width, model.num_heads) for _ in range(model.depth))
        self.norm = nn.LayerNorm(model.width, eps=LAYER_NORM_EPS)

    def encode(
        self,
        patches_BLP: Tensor,
        keep_BK: Tensor | None = None,
        *,
        hidden_as: tuple[Tensor, Tensor] | None = None,
        scale_BS: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, 1 + K, D), the class token first, of the patches at `keep_BK` (all where it is None).

        `hidden_as` = (mask token (1, 1, D), mask_BL) replaces the embeddings of masked patches by the token. `scale_BS` is what
        `drop_path_scale` gives.
        """
        positions_BLD = self.pos_embed[:, 1:].expand(patches_BLP.shape[0], -1, -1)
        if keep_BK is not None:
            patches_BLP = take_tokens(patches_BLP, keep_BK)
            positions_BLD = take_tokens(positions_BLD, keep_BK)
        x_BND = self.patch_embed(patches_BLP)
        if hidden_as is not None:
            x_BND = torch.where(hidden_as[1][..., None] > 0, hidden_as[0].to(x_BND.dtype), x_BND)
        x_BND = x_BND + positions_BLD
        cls_B1D = (self.cls_token + self.pos_embed[:, :1]).expand(x_BND.shape[0], -1, -1)
        x_BND = torch.cat([cls_B1D, x_BND], dim=1)
        for place, block in enumerate(self.blocks):
            scale_B2 = None if scale_BS is None else scale_BS[:, 2 * place : 2 * place + 2]
            x_BND = run_block(block, x_BND, scale_B2, checkpointed=self.activation_checkpointing)
        return cast(Tensor, self.norm(x_BND))

    def forward(self, images_BCHW: Tensor, scale_BS: Tensor | None = None) -> Tensor:
        """Tokens (B, 1 + L, D) of whole images, normalised by the final LayerNorm."""
        return self.encode(patchify(images_BCHW, self.model.patch_size), scale_BS=scale_BS)


def run_block(block: nn.Module, x_BND: Tensor, *others: Tensor | None, checkpointed: bool) -> Tensor:
    """One block; `checkpointed`: keeping its input alone and computing it once more on the way back (Chen et al. 2016)."""
    if checkpointed and torch.is_grad_enabled():  # nothing in a block is random, so there is no random state to keep
        return cast(Tensor, checkpoint(block, x_BND, *others, use_reentrant=False, preserve_rng_state=False))
    return cast(Tensor, block(x_BND, *others))


def drop_path_scale(numbers_BS: Tensor, rate: float) -> Tensor:
    """What stochastic depth multiplies each branch by (Huang et al. 2016): 0 with a probability that rises evenly from 0 in the first block
    to `rate` in the last, else the inverse of what is left. `numbers_BS`: uniform in [0, 1), two for each block."""
    rates_S = torch.linspace(0, rate, numbers_BS.shape[1] // 2, device=numbers_BS.device).repeat_interleave(2)
    return (numbers_BS >= rates_S) / (1 - rates_S)


def take_tokens(x_BLD: Tensor, index_BK: Tensor) -> Tensor:
    """The tokens at `index_BK`: (B, K, D)."""
    return x_BLD.gather(1, index_BK[..., None].expand(-1, -1, x_BLD.shape[2]))


def pool(tokens_BND: Tensor, pooling: str) -> Tensor:
    """Features (B, D): the class token (`cls`) or the mean of the patch tokens; or these themselves (`tokens`), (B, L, D)."""
    if pooling == "tokens":
        return tokens_BND[:, 1:]
    return tokens_BND[:, 0] if pooling == "cls" else tokens_BND[:, 1:].mean(dim=1)


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """The authors' initialisation: Xavier-uniform for every linear layer (the fused qkv as one matrix) and for the patch projection
    seen as a matrix, zero biases, LayerNorm 1 and 0, class and mask tokens normal with deviation 0.02. Positions stay as they are.

    The bias of the patch projection is uniform in ±1/sqrt(P), the default of a convolution, as the authors left it.
    """
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight, generator=generator)
            nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Conv2d):
            nn.init.xavier_uniform_(child.weight.view(child.weight.shape[0], -1), generator=generator)
            assert child.bias is not None
            bound = child.weight[0].numel() ** -0.5
            nn.init.uniform_(child.bias, -bound, bound, generator=generator)
        elif isinstance(child, nn.LayerNorm):
            nn.init.ones_(child.weight)
            nn.init.zeros_(child.bias)
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2] in ("cls_token", "mask_token", "encoder_mask_token"):
            nn.init.normal_(parameter, std=0.02, generator=generator)
