"""The optimisers of the paper's tables 8, 9 and 10, and their learning-rate schedule."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from mae_core.classifier import Classifier
from mae_core.options import FinetuneOptim, PretrainOptim

_NO_DECAY_WHEN_FINETUNING = ("encoder.pos_embed", "encoder.cls_token")


def cosine_lr(step: int, *, num_steps: int, warmup_steps: float, lr: float, min_lr: float) -> float:
    """Learning rate of optimiser step `step`, counted from 0: linear warm-up from 0, then half a cosine down to `min_lr` (Table 8)."""
    if step < warmup_steps:
        return lr * step / warmup_steps
    done = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def pretrain_optimizer(module: nn.Module, optim: PretrainOptim) -> torch.optim.AdamW:
    """AdamW with weight decay on all but vectors: the class and mask tokens do decay, as in the authors' code."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": optim.weight_decay, "lr_scale": 1.0},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)


def finetune_optimizer(classifier: Classifier, optim: FinetuneOptim) -> torch.optim.AdamW:
    """AdamW with layer-wise learning rates: full for the head, `layer_decay` of it a layer further down, and so on (Table 9)."""
    depth = classifier.encoder.model.depth
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in classifier.named_parameters():
        decays = parameter.dim() > 1 and name not in _NO_DECAY_WHEN_FINETUNING
        groups.setdefault((_layer(name, depth), decays), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": optim.weight_decay if decays else 0.0,
                "lr_scale": optim.layer_decay ** (depth + 1 - layer),
            }
            for (layer, decays), parameters in groups.items()
        ],
        lr=optim.lr,
        betas=optim.betas,
        fused=True,
    )


def _layer(name: str, depth: int) -> int:
    """0 for the embeddings, i + 1 for block i, depth + 1 for all behind them."""
    if name.startswith("encoder.blocks."):
        return int(name.split(".")[2]) + 1
    return 0 if name.startswith(("encoder.cls_token", "encoder.pos_embed", "encoder.patch_embed")) else depth + 1


def set_lr(groups: Iterable[dict[str, object]], lr: float) -> None:
    """Gives each group `lr` times its own scale."""
    for group in groups:
        scale = group.get("lr_scale", 1.0)
        assert isinstance(scale, float)
        group["lr"] = lr * scale
