"""The training loop: optimiser steps as a generator that yields after each one.

Who consumes it may save, report or stop between two steps. Nothing in a step waits for the device: losses stay there and are fetched
together every few steps, in one exchange that also carries each worker's wish to stop, whether it can save, and its unreadable images.
So all workers agree on them, at the same step, at no further cost.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mae_core.data.loader import MicroBatch, TrainLoader
from mae_core.data.names import printable
from mae_core.errors import DataError, DivergedError
from mae_core.export import check_tensors
from mae_core.optim import cosine_lr, set_lr
from mae_core.options import OptimConfig
from mae_core.parallel import grad_norm, replicate, synchronised
from mae_core.reconstruct import Reconstructions
from mae_core.world import World, autocast

WantsStop = Callable[[], bool]
CanSave = Callable[[], bool]
_STEPS_PER_EXCHANGE = {"cpu": 1, "cuda": 16}
_NAMED_IMAGES = 8  # of a dropped batch


def always() -> bool:
    return True


@dataclass(frozen=True)
class DroppedStep:
    """A step whose loss or gradient was not finite: it changed nothing. rank: the worker whose loss it was, None where only the gradient
    overflowed. images: the first of its batch."""

    step: int
    rank: int | None
    images: list[str]
    loss: float
    grad_norm: float

    def __str__(self) -> str:
        who = "whose losses are finite on every rank" if self.rank is None else f"of rank {self.rank}"
        return f"step {self.step} (loss {self.loss:g}, gradient norm {self.grad_norm:g}), {who}, images {', '.join(self.images)}"


@dataclass(frozen=True)
class Progress:
    """The state of a run after `step` of `num_steps` optimiser steps.

    points: (step, {series: value}) of the steps since the last exchange. skipped: newly found unreadable images and why.
    dropped: steps among them that were dropped. evaluated, reconstructions: of an evaluation that has just been made.
    save_agreed: the training state is to be saved now, by all workers. stop_agreed: all workers stop here.
    """

    step: int
    num_steps: int
    epoch: float
    points: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    dropped: list[DroppedStep] = field(default_factory=list)
    evaluated: dict[str, float] = field(default_factory=dict)
    reconstructions: Reconstructions | None = None
    save_agreed: bool = False
    stop_agreed: bool = False


class _Pending(NamedTuple):
    """A step that was not told of yet; loss and gradient norm are on the device."""

    loss: Tensor
    grad_norm: Tensor
    lr: float
    samples: list[Tensor]


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
        max_dropped: int,
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
        self._max_dropped = max_dropped
        self._save_every = save_every
        self._saved_at = 0
        self._skipped: set[str] = set()
        self._pending: list[_Pending] = []
        self._samples: list[Tensor] = []  # of the step that is being taken
        self._dropped: list[DroppedStep] = []  # in a row, up to the newest step
        self._wait_seconds = self._step_seconds = 0.0
        _make_optimizer_state(module, optimizer)

    def steps(self, wants_stop: WantsStop, can_save: CanSave = always) -> Iterator[Progress]:
        """Takes the remaining steps, yielding after each.

        Raises DivergedError where too many steps in a row are not finite and DataError where too many images are unreadable: on all
        workers at once.
        """
        # Built here, after any training state was loaded: DDP broadcasts rank 0's weights when it is made.
        self._replica = replicate(self.module, self.world)
        self.module.train()
        self._settle_buckets()
        self._saved_at = self.step
        batches = self.loader.from_step(self.step, self.num_steps)
        try:
            while self.step < self.num_steps:
                started = time.monotonic()
                self._take_step(batches)
                self._step_seconds += time.monotonic() - started
                yield (progress := self._progress(wants_stop, can_save))
                if progress.stop_agreed:
                    return
                self._check_dropped()
        finally:
            batches.close()  # type: ignore[attr-defined]  # a generator: ends its threads

    def _settle_buckets(self) -> None:
        """One backward pass whose result is thrown away: after its first one DDP groups the gradients anew, and with three workers or more
        the order of their sum, and so its rounding, depends on the groups. A resumed run must have the same ones from its first step."""
        if self.world.size > 2 and self._replica is not self.module:
            batches = self.loader.from_step(self.step, self.step + 1)
            with autocast(self.world.device):
                loss = self._loss(self._replica, next(batches))
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.zero_grad(set_to_none=True)
            batches.close()  # type: ignore[attr-defined]

    def _take_step(self, batches: Iterator[MicroBatch]) -> None:
        lr = cosine_lr(
            self.step,
            num_steps=self.num_steps,
            warmup_steps=self._optim.warmup_epochs * self.loader.steps_per_epoch,
            lr=self._optim.lr,
            min_lr=self._optim.min_lr,
        )
        set_lr(self.optimizer.param_groups, lr)
        self._samples = []
        loss = self._take_gradients(batches)
        norm = grad_norm(self.module)
        _step_if_finite(self.optimizer, norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._pending.append(_Pending(loss, norm, lr, self._samples))

    def _take_gradients(self, batches: Iterator[MicroBatch]) -> Tensor:
        """Leaves a step's gradients in `.grad`, the mean over all workers; this worker's mean loss, a scalar on the device."""
        total = torch.zeros((), device=self.world.device)
        for _ in range(self._optim.accumulation):
            micro = self._next(batches)
            with synchronised(self._replica, micro.is_last):
                with autocast(self.world.device):
                    loss = self._loss(self._replica, micro) / self._optim.accumulation
                # A loss that is not finite makes all gradients NaN and so, by their mean, those of every worker: all drop the step.
                (loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _next(self, batches: Iterator[MicroBatch]) -> MicroBatch:
        started = time.monotonic()
        micro = next(batches)
        self._wait_seconds += time.monotonic() - started
        self._samples.append(micro.batch.samples_B)
        return micro

    def _progress(self, wants_stop: WantsStop, can_save: CanSave) -> Progress:
        epoch = self.step / self.loader.steps_per_epoch
        full = len(self._pending) >= _STEPS_PER_EXCHANGE[self.world.device.type]
        save_due = self.step // self._save_every > self._saved_at // self._save_every and self.step < self.num_steps
        if not (full or self.step in (1, self.num_steps) or (save_due and self.step % self._save_every == 0)):
            return Progress(self.step, self.num_steps, epoch)
        started = time.monotonic()
        losses = torch.stack([pending.loss for pending in self._pending])
        norms = torch.stack([pending.grad_norm for pending in self._pending])
        num_new = float(self.loader.skipped.num_new) + float(self.loader.skipped.fatal is not None)
        told = torch.tensor([float(wants_stop()), float(not can_save()), num_new, self._wait_seconds], device=losses.device)
        answers = self.world.sum(torch.cat([losses, (~norms.isfinite()).to(losses.dtype), told])).tolist()
        stops, busy, num_skipped, waited = answers[-4:]
        num_steps = len(self._pending)
        seconds = max(self._step_seconds + time.monotonic() - started, 1e-9)
        means = [total / self.world.size for total in answers[:num_steps]]
        points = self._points(means, norms.tolist(), seconds=seconds, waited=waited / self.world.size)
        dropped = self._name_dropped(points, [count > 0 for count in answers[num_steps : 2 * num_steps]], losses)
        self._pending, self._wait_seconds, self._step_seconds = [], 0.0, 0.0
        save_agreed = save_due and busy == 0 and not self._dropped
        self._saved_at = self.step if save_agreed else self._saved_at
        skipped = self._share_skipped() if num_skipped else {}
        return Progress(
            *(self.step, self.num_steps, epoch, points, skipped, dropped), save_agreed=save_agreed and not stops, stop_agreed=stops > 0
        )

    def _points(self, losses: list[float], norms: list[float], *, seconds: float, waited: float) -> list[tuple[int, dict[str, float]]]:
        first = self.step - len(losses)
        speed = {"images_per_second": len(losses) * self._optim.batch_size / seconds, "data_wait": waited / seconds}
        return [
            (first + place + 1, {"loss": loss, "lr": pending.lr, "grad_norm": norm} | speed)
            for place, (loss, norm, pending) in enumerate(zip(losses, norms, self._pending, strict=True))
        ]

    def _name_dropped(self, points: list[tuple[int, dict[str, float]]], is_dropped: list[bool], losses: Tensor) -> list[DroppedStep]:
        """The dropped ones of the pending steps; `_dropped` are then those in a row up to the newest."""
        if not any(is_dropped):
            self._dropped = []
            return []
        keys = self.loader.source.keys
        seen = [
            (math.isfinite(loss), [printable(keys[sample]) for sample in torch.cat(pending.samples)[:_NAMED_IMAGES].tolist()])
            for loss, pending in zip(losses.tolist(), self._pending, strict=True)
        ]
        by_rank = self.world.gather(seen)
        all_dropped: list[DroppedStep] = []
        for place, (step, values) in enumerate(points):
            if not is_dropped[place]:
                self._dropped = []
                continue
            rank = next((rank for rank, told in enumerate(by_rank) if not told[place][0]), None)
            images = by_rank[rank or 0][place][1]
            step_dropped = DroppedStep(step, rank, images, values["loss"], values["grad_norm"])
            self._dropped.append(step_dropped)
            all_dropped.append(step_dropped)
        return all_dropped

    def _check_dropped(self) -> None:
        if len(self._dropped) > self._max_dropped:
            raise DivergedError(
                f"{len(self._dropped)} step(s) in a row had no finite loss or gradient, more than the {self._max_dropped} allowed; "
                f"the first: {self._dropped[0]}. Lower optim.base_lr or lengthen optim.warmup_epochs"
            )

    def _share_skipped(self) -> dict[str, str]:
        """Unreadable images that any worker met and none had told of. Raises DataError when they are too many, on all workers."""
        told = self.world.gather((self.loader.skipped.take_new(), self.loader.skipped.fatal))
        fatal = next((fatal for _, fatal in told if fatal is not None), None)
        if fatal is not None:
            raise DataError(fatal)
        known = {key: why for new, _ in told for key, why in new.items()}
        new = {key: why for key, why in sorted(known.items()) if key not in self._skipped}
        self._skipped |= new.keys()
        check_skipped(len(self._skipped), of=len(self.loader.members), max_fraction=self._max_skipped, example=next(iter(new.values()), ""))
        return new


def check_skipped(num_skipped: int, *, of: int, max_fraction: float, example: str, section: str = "data") -> None:
    """Raises DataError when more than `max_fraction` of the images are unreadable."""
    if num_skipped > max_fraction * of:
        raise DataError(
            f"{section}: {num_skipped} of {of} images cannot be read, more than {section}.max_corrupt_fraction {max_fraction:g} allows; "
            f"remove or mend them, or raise the limit. Such as: {example}"
        )


def _step_if_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """A step that changes nothing, counters included, where `norm` is not finite; decided on the device, as GradScaler does."""
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    optimizer.step()


def _make_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Makes what the optimiser would make in its first step, so that a training state has the same tensors at any time."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    _step_if_finite(optimizer, torch.full((), math.nan, device=trained[0].device))
    optimizer.zero_grad(set_to_none=True)


def training_state(training: Training) -> dict[str, Tensor]:
    """Everything that resuming needs, as named tensors: the training's own, not copies; DTensors where it is sharded.

    Random numbers have no state (`mae_core.randomness`), so weights, the optimiser's moments and the step are all of it.
    """
    state = {f"module.{name}": tensor for name, tensor in training.module.state_dict().items()}
    for name, parameter in training.module.named_parameters():
        state |= {f"optimizer.{name}.{kind}": tensor for kind, tensor in training.optimizer.state.get(parameter, {}).items()}
    return state | {"step": torch.tensor(training.step)}


@torch.no_grad()
def load_training_state(training: Training, state: dict[str, Tensor]) -> None:
    """Takes up `state`, made by `training_state` of a training of the same spec. Raises EncoderError where it does not fit."""
    own = training_state(training)
    check_tensors(state, own, where="the training state")
    for name, tensor in own.items():
        if tensor is not state[name]:
            tensor.copy_(state[name])
    training.step = int(state["step"])
