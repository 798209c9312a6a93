"""The training loop: optimiser steps as a generator that yields after each one.

Who consumes it may save, report or stop between two steps. Nothing in a step waits for the device: losses stay there and are fetched
together every few steps, in one exchange that also carries each worker's wish to stop and its unreadable images. So all workers
agree on them, at the same step, at no further cost.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mae_core.data.loader import MicroBatch, TrainLoader
from mae_core.errors import DataError, DivergedError
from mae_core.export import check_tensors
from mae_core.optim import cosine_lr, set_lr
from mae_core.options import OptimConfig
from mae_core.world import World

WantsStop = Callable[[], bool]
_STEPS_PER_EXCHANGE = {"cpu": 1, "cuda": 16}


@dataclass(frozen=True)
class Progress:
    """The state of a run after `step` of `num_steps` optimiser steps.

    points: (step, {series: value}) of the steps since the last exchange. skipped: newly found unreadable images and why.
    evaluated: metrics of an evaluation that has just been made. stop_agreed: all workers stop here.
    """

    step: int
    num_steps: int
    epoch: float
    points: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    evaluated: dict[str, float] = field(default_factory=dict)
    stop_agreed: bool = False


class Training:
    """A module, its optimiser and its data, and the steps taken so far."""

    def __init__(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: TrainLoader,
        optim: OptimConfig,
        loss: Callable[[nn.Module, MicroBatch], Tensor],
        world: World,
        max_skipped: float,
        save_every: int,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.loader = loader
        self.world = world
        self.step = 0
        self.num_steps = optim.epochs * loader.steps_per_epoch
        self._optim = optim
        self._loss = loss
        self._max_skipped = max_skipped
        self._save_every = save_every
        self._skipped: set[str] = set()
        self._pending: list[tuple[Tensor, float]] = []  # the loss on the device, the learning rate
        self._wait_seconds = 0.0
        self._exchanged_at = 0.0

    def steps(self, wants_stop: WantsStop) -> Iterator[Progress]:
        """Takes the remaining steps, yielding after each.

        Raises DivergedError where the loss is not finite and DataError where too many images are unreadable: on all workers at once.
        """
        # Built here, after any training state was loaded: DDP broadcasts rank 0's weights when it is made.
        replica = DistributedDataParallel(self.module) if self.world.size > 1 else self.module
        self.module.train()
        self._exchanged_at = time.monotonic()
        batches = self.loader.from_step(self.step, self.num_steps)
        try:
            while self.step < self.num_steps:
                self._take_step(replica, batches)
                yield (progress := self._progress(wants_stop))
                if progress.stop_agreed:
                    return
        finally:
            batches.close()  # type: ignore[attr-defined]  # a generator: ends its threads

    def _take_step(self, replica: nn.Module, batches: Iterator[MicroBatch]) -> None:
        lr = cosine_lr(
            self.step,
            num_steps=self.num_steps,
            warmup_steps=self._optim.warmup_epochs * self.loader.steps_per_epoch,
            lr=self._optim.lr,
            min_lr=self._optim.min_lr,
        )
        set_lr(self.optimizer.param_groups, lr)
        total = torch.zeros((), device=self.world.device)
        for _ in range(self._optim.accumulation):
            started = time.monotonic()
            micro = next(batches)
            self._wait_seconds += time.monotonic() - started
            alone = isinstance(replica, DistributedDataParallel) and not micro.is_last
            with cast(DistributedDataParallel, replica).no_sync() if alone else nullcontext(), autocast(self.world.device):
                loss = self._loss(replica, micro) / self._optim.accumulation
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._pending.append((total, lr))

    def _progress(self, wants_stop: WantsStop) -> Progress:
        epoch = self.step / self.loader.steps_per_epoch
        full = len(self._pending) >= _STEPS_PER_EXCHANGE[self.world.device.type]
        due = full or self.step in (1, self.num_steps) or self.step % self._save_every == 0  # nothing waits behind a saved state
        if not due:
            return Progress(self.step, self.num_steps, epoch)
        points, stop_agreed, skipped = self._exchange(wants_stop())
        return Progress(self.step, self.num_steps, epoch, points, skipped, stop_agreed=stop_agreed)

    def _exchange(self, wants_stop: bool) -> tuple[list[tuple[int, dict[str, float]]], bool, dict[str, str]]:
        """One sum over all workers: the pending losses, who wants to stop, who met unreadable images, who waited for data."""
        losses = torch.stack([loss for loss, _ in self._pending])
        told = torch.tensor([float(wants_stop), float(self.loader.skipped.num_new), self._wait_seconds], device=losses.device)
        *means, stops, num_skipped, waited = self.world.sum(torch.cat([losses, told])).tolist()
        now = time.monotonic()
        seconds = max(now - self._exchanged_at, 1e-9)
        images_per_second = len(means) * self.loader.batch_size / seconds
        first = self.step - len(means)
        points = [
            (
                first + place + 1,
                {
                    "loss": total / self.world.size,
                    "lr": lr,
                    "images_per_second": images_per_second,
                    "data_wait": waited / self.world.size / seconds,
                },
            )
            for place, (total, (_, lr)) in enumerate(zip(means, self._pending, strict=True))
        ]
        self._pending, self._wait_seconds, self._exchanged_at = [], 0.0, now
        self._check_finite(points)
        return points, stops > 0, self._share_skipped() if num_skipped else {}

    def _check_finite(self, points: list[tuple[int, dict[str, float]]]) -> None:
        for step, values in points:
            if not math.isfinite(values["loss"]):
                raise DivergedError(f"the loss of step {step} is {values['loss']}; lower optim.base_lr or lengthen optim.warmup_epochs")

    def _share_skipped(self) -> dict[str, str]:
        """Unreadable images that any worker met and none had told of. Raises DataError when they are too many, on all workers."""
        told = {key: why for worker in self.world.gather(self.loader.skipped.take_new()) for key, why in worker.items()}
        new = {key: why for key, why in sorted(told.items()) if key not in self._skipped}
        self._skipped |= new.keys()
        check_skipped(len(self._skipped), of=len(self.loader.members), max_fraction=self._max_skipped, example=next(iter(new.values()), ""))
        return new


def check_skipped(num_skipped: int, *, of: int, max_fraction: float, example: str) -> None:
    """Raises DataError when more than `max_fraction` of the images are unreadable."""
    if num_skipped > max_fraction * of:
        raise DataError(
            f"data: {num_skipped} of {of} images cannot be read, more than data.max_corrupt_fraction {max_fraction:g} allows; "
            f"remove or mend them, or raise the limit. Such as: {example}"
        )


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the device has it, else float32. Never float16: its range makes ViT-H's attention overflow."""
    enabled = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def training_state(training: Training) -> dict[str, Tensor]:
    """Everything that resuming needs, as named tensors on the CPU, independent of the training that goes on.

    Random numbers have no state (`mae_core.randomness`), so weights, the optimiser's moments and the step are all of it.
    """
    state = {f"module.{name}": tensor for name, tensor in training.module.state_dict().items()}
    names = {parameter: name for name, parameter in training.module.named_parameters()}
    for parameter, name in names.items():
        state |= {f"optimizer.{name}.{kind}": tensor for kind, tensor in training.optimizer.state.get(parameter, {}).items()}
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    return copies | {"step": torch.tensor(training.step)}


def load_training_state(training: Training, state: dict[str, Tensor]) -> None:
    """Takes up `state`, made by `training_state` of a training of the same spec. Raises EncoderError where it does not fit."""
    module_state = {name.removeprefix("module."): tensor for name, tensor in state.items() if name.startswith("module.")}
    check_tensors(module_state, training.module.state_dict(), where="the training state")
    training.module.load_state_dict(module_state)
    training.step = int(state["step"])
    moments: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith("optimizer."):
            parameter, _, kind = name.removeprefix("optimizer.").rpartition(".")
            moments.setdefault(parameter, {})[kind] = tensor
    names = {parameter: name for name, parameter in training.module.named_parameters()}
    trained = [parameter for group in training.optimizer.param_groups for parameter in group["params"]]
    known = training.optimizer.state_dict()
    known["state"] = {place: moments[names[parameter]] for place, parameter in enumerate(trained) if names[parameter] in moments}
    training.optimizer.load_state_dict(known)
