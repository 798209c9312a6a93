"""The optimisers of the paper's tables 8, 9 and 10, and their learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mae_core.classifier import Classifier
from mae_core.options import FinetuneOptim, PretrainOptim, ProbeOptim

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
    """AdamW with layer-wise learning rates: full for the head, `layer_decay` of it a layer further down, and so on (Table 9).

    Frozen parameters are left out.
    """
    depth = classifier.encoder.model.depth
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in classifier.named_parameters():
        if not parameter.requires_grad:
            continue
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


class Lars(torch.optim.Optimizer):
    """LARS (You et al. 2017), as MoCo v3 and the authors of MAE have it.

    The step of each weight is scaled by trust_coefficient * |weight| / |gradient with decay| before it enters the momentum; the learning
    rate is multiplied behind it. Vectors neither decay nor are scaled. As torch's fused optimisers, it changes nothing in a step where
    the attribute `found_inf` is a tensor of 1.0, and never waits for the device.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        update = gradient
        if parameter.dim() > 1:
            update = update + group["weight_decay"] * parameter
            norm, update_norm = parameter.norm(), update.norm()
            ratio = group["trust_coefficient"] * norm / update_norm
            update = update * torch.where((norm > 0) & (update_norm > 0), ratio, 1.0)
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = group["momentum"] * state["momentum_buffer"] + update
        changed = parameter - group["lr"] * buffer
        if self.found_inf is not None:
            is_dropped = self.found_inf > 0
            buffer = torch.where(is_dropped, state["momentum_buffer"], buffer)
            changed = torch.where(is_dropped, parameter, changed)
        state["momentum_buffer"].copy_(buffer)
        parameter.copy_(changed)


def probe_optimizer(parameters: Iterable[nn.Parameter], optim: ProbeOptim) -> torch.optim.Optimizer:
    """LARS or SGD with momentum, for a linear probe (Table 10)."""
    if optim.optimizer == "lars":
        return Lars(parameters, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay)
    sgd = torch.optim.SGD(parameters, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay, fused=True)
    if optim.momentum:
        for group in sgd.param_groups:
            for parameter in group["params"]:  # torch makes them in the first step, of whatever memory holds where that is dropped
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


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
