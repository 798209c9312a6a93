"""The linear head of a probe, and its training on features that are all in memory.

A head is so small that sharing its batches between workers would cost more than repeating the work: each worker trains the same one, and
so its batch statistics are those of the whole batch. Shapes: N images, D width.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae_core.errors import DivergedError, SpecError
from mae_core.features import Features
from mae_core.optim import cosine_lr, probe_optimizer, set_lr
from mae_core.options import ProbeOptim
from mae_core.randomness import Stream, permutation


class ProbeHead(nn.Sequential):
    """BatchNorm without affine parameters, then a linear layer (weights normal with deviation 0.01)."""

    def __init__(self, width: int, num_classes: int, generator: torch.Generator) -> None:
        linear: nn.Linear = nn.utils.skip_init(nn.Linear, width, num_classes)  # type: ignore[no-untyped-call]  # its own start would draw from the global generator
        nn.init.normal_(linear.weight, std=0.01, generator=generator)
        nn.init.zeros_(linear.bias)
        super().__init__(nn.BatchNorm1d(width, affine=False, eps=1e-6), linear)


class HeadEpoch(NamedTuple):
    """The last step of an epoch: its number, its loss and learning rate."""

    step: int
    loss: float
    lr: float


def steps_per_epoch(optim: ProbeOptim, num_train: int) -> int:
    """The last, incomplete batch of an epoch is dropped. Raises SpecError where not even one is full."""
    if optim.batch_size > num_train:
        raise SpecError(f"optim.batch_size {optim.batch_size} is larger than the data ({num_train} training images); lower it")
    return num_train // optim.batch_size


def train_head(head: ProbeHead, train: Features, *, optim: ProbeOptim, seed: int) -> Iterator[HeadEpoch]:
    """Trains `head` on the features, yielding after each epoch. The order of the images depends on `seed` and epoch alone.

    Raises DivergedError where the loss is not finite, SpecError where a batch is larger than the data.
    """
    epoch_steps = steps_per_epoch(optim, len(train.labels_N))
    num_steps, warmup_steps = optim.epochs * epoch_steps, optim.warmup_epochs * epoch_steps
    optimizer = probe_optimizer(head.parameters(), optim)
    head.train()
    for epoch in range(optim.epochs):
        order = permutation(len(train.labels_N), seed=seed, epoch=epoch, stream=Stream.HEAD_ORDER).to(train.labels_N.device)
        for place, chosen in enumerate(torch.split(order, optim.batch_size)[:epoch_steps]):
            step = epoch * epoch_steps + place
            lr = cosine_lr(step, num_steps=num_steps, warmup_steps=warmup_steps, lr=optim.lr, min_lr=optim.min_lr)
            set_lr(optimizer.param_groups, lr)
            loss = F.cross_entropy(head(train.features_ND[chosen]), train.labels_N[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if not math.isfinite(loss.item()):
            raise DivergedError(f"the loss of step {step + 1} is {loss.item()}; lower optim.base_lr or lengthen optim.warmup_epochs")
        yield HeadEpoch(step + 1, loss.item(), lr)


@torch.no_grad()
def head_accuracy(head: ProbeHead, held_back: Features) -> float:
    """Share in [0, 1] of the held-back images that the head recognises."""
    head.eval()
    hits_N: Tensor = head(held_back.features_ND).argmax(dim=1) == held_back.labels_N
    return hits_N.double().mean().item()
