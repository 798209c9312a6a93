"""Linear probe: what a linear classifier reads from frozen features (paper, appendix A.1).

Every image is encoded once, centre-cropped, by the workers together; then each trains the same head on all the features. A head is so
small that sharing its batches would cost more than repeating the work, and so its batch statistics are those of the whole batch.

Shapes: N images, B a batch, D width.
"""

import math
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae_core.config import ProbeSpec
from mae_core.data.loader import SkippedImages, measured_batches
from mae_core.data.source import ImageSource, LabelledData
from mae_core.data.transforms import normalise
from mae_core.errors import DivergedError, SpecError
from mae_core.export import write_probe
from mae_core.loop import Progress, WantsStop, autocast, check_skipped
from mae_core.optim import cosine_lr, set_lr
from mae_core.options import NormalizeConfig
from mae_core.randomness import Stream, permutation
from mae_core.run import Run, starting_encoder
from mae_core.vit import Encoder, pool
from mae_core.world import World

_ENCODE_BATCH = 256  # images that a worker encodes at once


class ProbeHead(nn.Sequential):
    """BatchNorm without affine parameters, then a linear layer (weights normal with deviation 0.01)."""

    def __init__(self, width: int, num_classes: int, generator: torch.Generator) -> None:
        linear = nn.Linear(width, num_classes)
        nn.init.normal_(linear.weight, std=0.01, generator=generator)
        nn.init.zeros_(linear.bias)
        super().__init__(nn.BatchNorm1d(width, affine=False, eps=1e-6), linear)


class Probe:
    """Features of all images under one encoder, and the heads trained on them. `accuracy` is that of the newest head."""

    def __init__(self, spec: ProbeSpec, encoder: Encoder, data: LabelledData, *, normalize: NormalizeConfig, world: World) -> None:
        self.heads: list[ProbeHead] = []
        self.accuracy = 0.0
        self._spec = spec
        self._data = data
        self._normalize = normalize
        self._world = world
        self._skipped = SkippedImages()
        self.use_encoder(encoder)

    def use_encoder(self, encoder: Encoder) -> None:
        """Probes another encoder from here on."""
        self._encoder = encoder.to(self._world.device).eval()
        self._features: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def train_head(self, seed: int, place: int, wants_stop: WantsStop) -> Iterator[Progress]:
        """Trains the head number `place` of the run, yielding after each part of the encoding and each epoch."""
        optim = self._spec.optim
        if self._features is None:
            num_steps = optim.epochs * self._epoch_steps(len(self._data.train))
            for stop in self._encode(wants_stop):
                skipped = self._skipped_by_all()
                yield Progress(num_steps * place, num_steps * self._spec.num_seeds, 0.0, skipped=skipped, stop_agreed=stop)
                if stop:
                    return
        assert self._features is not None
        train_ND, train_labels_N, _, _ = self._features
        epoch_steps = self._epoch_steps(len(train_ND))  # fewer images than before, where some cannot be read
        num_steps = optim.epochs * epoch_steps
        all_steps, done = num_steps * self._spec.num_seeds, num_steps * place
        head = ProbeHead(train_ND.shape[1], len(self._data.classes), torch.Generator().manual_seed(seed)).to(self._world.device)
        optimizer = torch.optim.SGD(head.parameters(), lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay)
        warmup_steps = optim.warmup_epochs * epoch_steps
        for epoch in range(optim.epochs):
            order = permutation(len(train_ND), seed=seed, epoch=epoch, stream=Stream.HEAD_ORDER).to(self._world.device)
            for step in range(epoch * epoch_steps, (epoch + 1) * epoch_steps):
                first = (step - epoch * epoch_steps) * optim.batch_size
                chosen = order[first : first + optim.batch_size]
                lr = cosine_lr(step, num_steps=num_steps, warmup_steps=warmup_steps, lr=optim.lr, min_lr=optim.min_lr)
                set_lr(optimizer.param_groups, lr)
                loss = F.cross_entropy(head(train_ND[chosen]), train_labels_N[chosen])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            step = done + (epoch + 1) * epoch_steps
            points = [(step, {"loss": loss.item(), "lr": lr})]
            if not math.isfinite(loss.item()):
                raise DivergedError(f"the loss of step {step} is {loss.item()}; lower optim.base_lr or lengthen optim.warmup_epochs")
            last = epoch + 1 == optim.epochs
            evaluated = {"val_accuracy": self._measure(head)} if last else {}
            yield Progress(step, all_steps, float(epoch + 1), points, evaluated=evaluated, stop_agreed=self._agree(wants_stop))
        self.heads.append(head)

    def _epoch_steps(self, num_train: int) -> int:
        batch_size = self._spec.optim.batch_size
        if batch_size > num_train:
            raise SpecError(f"optim.batch_size {batch_size} is larger than the data ({num_train} training images); lower it")
        return num_train // batch_size

    def _measure(self, head: ProbeHead) -> float:
        assert self._features is not None
        _, _, held_ND, held_labels_N = self._features
        head.eval()
        with torch.inference_mode():
            self.accuracy = (head(held_ND).argmax(dim=1) == held_labels_N).double().mean().item()
        return self.accuracy

    def _agree(self, wants_stop: WantsStop) -> bool:
        return self._world.sum(torch.tensor([float(wants_stop())], device=self._world.device)).item() > 0

    def _skipped_by_all(self) -> dict[str, str]:
        return {key: why for worker in self._world.gather(self._skipped.take_new()) for key, why in worker.items()}

    def _encode(self, wants_stop: WantsStop) -> Iterator[bool]:
        """Fills the features, yielding after each part whether all agree to stop."""
        data = self._data
        parts: list[tuple[Tensor, Tensor]] = []
        for source, members in ((data.train_source, data.train), (data.validation_source, data.validation)):
            features_ND = torch.zeros(len(members), self._encoder.model.width, device=self._world.device)
            readable_N = torch.zeros(len(members), dtype=torch.bool, device=self._world.device)
            round_size = _ENCODE_BATCH * self._world.size
            for first in range(0, len(members), round_size):
                self._encode_round(source, members, range(first, min(first + round_size, len(members))), features_ND, readable_N)
                yield self._agree(wants_stop)
            features_ND, readable_N = self._world.sum(features_ND), self._world.sum(readable_N.int()).bool()
            unread = len(members) - int(readable_N.sum())
            limit = self._spec.data.max_corrupt_fraction
            check_skipped(unread, of=len(members), max_fraction=limit, example="see the images_skipped events")
            labels_N = torch.tensor([source.labels[member] for member in members], device=self._world.device)
            parts.append((features_ND[readable_N], labels_N[readable_N]))
        self._features = (*parts[0], *parts[1])

    @torch.inference_mode()
    def _encode_round(self, source: ImageSource, members: list[int], places: range, features_ND: Tensor, readable_N: Tensor) -> None:
        mine = list(places[self._world.rank :: self._world.size])
        place_of = {members[place]: place for place in mine}
        for batch in measured_batches(
            source,
            [members[place] for place in mine],
            size=self._encoder.model.image_size,
            batch_size=_ENCODE_BATCH,
            num_threads=self._spec.resources.cpus_per_worker,
            skipped=self._skipped,
        ):
            with autocast(self._world.device):
                tokens_BND = self._encoder(normalise(batch.pixels_BHWC.to(self._world.device), self._normalize))
            rows = torch.tensor([place_of[sample] for sample in batch.samples_B.tolist()], device=self._world.device)
            features_ND[rows] = pool(tokens_BND, self._spec.pooling).float()
            readable_N[rows] = True


class ProbeRun(Run):
    """A linear probe, for each of some seeds. Its result is the heads and their accuracy."""

    def __init__(self, spec: ProbeSpec, *, world: World, encoder_folder: Path | None) -> None:
        self._spec = spec
        self._encoder_folder = encoder_folder
        self.metrics = {}
        encoder, self.normalize = starting_encoder(spec, encoder_folder, spec.seed)
        self.model = encoder.model
        data = LabelledData(spec.data, in_chans=self.model.in_chans)
        self._probe = Probe(spec, encoder, data, normalize=self.normalize, world=world)

    def progress(self, wants_stop: WantsStop) -> Iterator[Progress]:
        accuracies: list[float] = []
        for place in range(self._spec.num_seeds):
            seed = self._spec.seed + place
            if place and self._encoder_folder is None:  # each seed measures other random weights
                self._probe.use_encoder(starting_encoder(self._spec, None, seed)[0])
            for progress in self._probe.train_head(seed, place, wants_stop):
                yield progress
                if progress.stop_agreed:
                    return
            accuracies.append(self._probe.accuracy)
        self.metrics = {"val_accuracy": statistics.median(accuracies), "val_accuracy_seeds": accuracies}

    def write_result(self, folder: Path) -> None:
        write_probe(self._probe.heads, folder)
