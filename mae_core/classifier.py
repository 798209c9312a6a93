"""A classifier on top of the encoder, for fine-tuning, in timm's layout: pooling, `fc_norm`, `head`.

Shapes: B images, C channels, H and W pixels, D width, S = 2 * depth branches.
"""

from typing import Literal, cast

import torch
from torch import Tensor, nn

from mae_core.vit import LAYER_NORM_EPS, Block, Encoder, pool


class Classifier(nn.Module):
    """`mean` pooling averages the patch tokens before a norm of its own; `cls` takes the class token behind the encoder's norm."""

    def __init__(self, encoder: Encoder, *, num_classes: int, pooling: Literal["mean", "cls"], generator: torch.Generator) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        encoder.pos_embed.requires_grad_(True)
        if pooling == "mean":  # as in timm: the norm moves behind the pooling
            self.fc_norm = nn.LayerNorm(encoder.model.width, eps=LAYER_NORM_EPS)
            encoder.norm = nn.Identity()  # type: ignore[assignment]
        self.head = nn.Linear(encoder.model.width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5, generator=generator)
        nn.init.zeros_(self.head.bias)

    def train_last(self, num_blocks: float) -> None:
        """Freezes all but the last blocks, the norm behind them and the head; half a block is its MLP (paper, section 4.3)."""
        for name, parameter in self.encoder.named_parameters():
            parameter.requires_grad_(name.startswith("norm."))
        blocks = cast(list[Block], list(self.encoder.blocks))
        whole = int(num_blocks)
        for block in blocks[len(blocks) - whole :]:
            block.requires_grad_(True)
        if num_blocks > whole:
            half = blocks[len(blocks) - whole - 1]
            half.norm2.requires_grad_(True)
            half.mlp.requires_grad_(True)

    def forward(self, images_BCHW: Tensor, scale_BS: Tensor | None = None) -> Tensor:
        """Logits (B, classes). `scale_BS`: of `drop_path_scale`, while training."""
        return self.classify(self.encoder(images_BCHW, scale_BS))

    def classify(self, tokens_BND: Tensor) -> Tensor:
        """Logits (B, classes) of the encoder's tokens."""
        features_BD = pool(tokens_BND, self.pooling)
        if self.pooling == "mean":
            features_BD = self.fc_norm(features_BD)
        return cast(Tensor, self.head(features_BD))
