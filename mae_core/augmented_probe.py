"""The paper's linear probe (Table 10): images augmented anew in every epoch, and a linear head on a frozen encoder's features of them.

Each worker encodes its part of a batch; then all of them take the same step on the features of the whole batch. So the head's batch
statistics are those of the whole batch, for any number of workers and any accumulation. Shapes: N images of a batch, D width.
"""

from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae_core.config import ProbeSpec
from mae_core.data.loader import MicroBatch, TrainLoader
from mae_core.data.remote import Remote
from mae_core.data.skipped import SkippedImages
from mae_core.data.source import LabelledData, check_same_images
from mae_core.data.transforms import normalise
from mae_core.export import write_probe
from mae_core.features import Features, encode_features
from mae_core.head import ProbeHead, head_accuracy
from mae_core.loop import Progress, Training, WantsStop
from mae_core.optim import probe_optimizer
from mae_core.options import ProbeOptim
from mae_core.parallel import grad_norm
from mae_core.rounds import Round, newly_skipped, told_in_rounds
from mae_core.run import TrainedRun, seeded, starting_encoder
from mae_core.vit import pool
from mae_core.world import World, autocast

_MAX_DROPPED_STEPS = 10  # in a row


class ProbeTraining(Training):
    """Training of a head on features that are made anew for each step; `encode` makes a worker's own, (B, D), without gradients."""

    def __init__(
        self,
        *,
        head: ProbeHead,
        encode: Callable[[MicroBatch], Tensor],
        loader: TrainLoader,
        optim: ProbeOptim,
        world: World,
        max_skipped: float,
        save_every: int,
    ) -> None:
        self._encode = encode
        super().__init__(
            module=head,
            optimizer=probe_optimizer(head.parameters(), optim),
            loader=loader,
            optim=optim,
            loss=_loss_of_a_part,
            world=world,
            max_skipped=max_skipped,
            max_dropped=_MAX_DROPPED_STEPS,
            save_every=save_every,
        )

    def _settle_buckets(self) -> None:
        """Nothing to settle: all workers have the same gradients, whose mean has no order. And a pass would enter the batch statistics."""

    def _take_gradients(self, batches: Iterator[MicroBatch]) -> Tensor:
        features_ND, labels_N = self._whole_batch(batches)
        before = [buffer.clone() for buffer in self.module.buffers()]
        loss = F.cross_entropy(self._replica(features_ND), labels_N)
        loss.backward()  # type: ignore[no-untyped-call]
        is_kept = grad_norm(self.module).isfinite()
        for buffer, old in zip(self.module.buffers(), before, strict=True):
            buffer.copy_(torch.where(is_kept, buffer, old))  # a dropped step leaves no trace in the batch statistics
        return loss.detach()

    def _whole_batch(self, batches: Iterator[MicroBatch]) -> tuple[Tensor, Tensor]:
        """Features (N, D) and labels (N,) of all workers and micro-batches, in the order of the data."""
        features, labels = [], []
        for _ in range(self._optim.accumulation):
            micro = self._next(batches)
            features.append(self._of_all_workers(self._encode(micro)))
            labels.append(self._of_all_workers(micro.batch.labels_B.to(self.world.device, non_blocking=True)))
        return torch.cat(features), torch.cat(labels)

    def _of_all_workers(self, rows: Tensor) -> Tensor:
        """Each worker's `rows`, in order of rank, on all of them."""
        by_rank = rows.new_zeros(self.world.size, *rows.shape)
        by_rank[self.world.rank] = rows
        return self.world.sum(by_rank).flatten(0, 1)


def _loss_of_a_part(replica: nn.Module, micro: MicroBatch) -> Tensor:
    raise AssertionError("a probe's loss is that of the whole batch")


class AugmentedProbeRun(TrainedRun):
    """A linear probe whose images are augmented: `spec.data.transform` is given. Its result is the head and its accuracy."""

    def __init__(self, spec: ProbeSpec, *, world: World, encoder_folder: Path | None, remote: Remote | None = None) -> None:
        assert spec.data.transform is not None
        self._spec = spec
        self._world = world
        self.metrics = {}
        encoder, normalize = starting_encoder(spec, encoder_folder, spec.seed)
        self._encoder = encoder.to(world.device).eval().requires_grad_(False)
        self.model = encoder.model
        self._data = LabelledData(spec.data, in_chans=self.model.in_chans, remote=remote)
        check_same_images(self._data.sources, world)
        self.normalize = normalize
        self._head = ProbeHead(self.model.width, len(self._data.classes), seeded(spec.seed)).to(world.device)
        self.training: ProbeTraining = ProbeTraining(
            head=self._head,
            encode=self._encode,
            loader=TrainLoader(
                source=self._data.train_source,
                members=self._data.train,
                model=self.model,
                transform=spec.data.transform,
                seed=spec.seed,
                batch_size=spec.optim.batch_size,
                accumulation=spec.optim.accumulation,
                world=world,
                num_threads=spec.resources.cpus_per_worker,
                skipped=SkippedImages(),
            ),
            optim=spec.optim,
            world=world,
            max_skipped=spec.data.max_corrupt_fraction,
            save_every=spec.checkpoint.every_steps,
        )
        self._evaluate_every = self.training.num_steps

    def _encode(self, micro: MicroBatch) -> Tensor:
        images_BCHW = normalise(micro.batch.pixels_BHWC.to(self._world.device, non_blocking=True), self.normalize)
        with torch.no_grad(), autocast(self._world.device):
            return pool(self._encoder(images_BCHW), self._spec.pooling).float()

    def _evaluate(self, wants_stop: WantsStop) -> Generator[Progress, None, bool]:
        """Measures the head on the validation images, centre-cropped."""
        training, skipped = self.training, SkippedImages()
        held_back = yield from told_in_rounds(self._encode_held_back(skipped), training, wants_stop)
        if held_back is None:
            return True
        measured = head_accuracy(self._head, held_back)
        self.metrics |= {"val_accuracy": measured, "val_accuracy_seeds": [measured]}
        epochs, new = float(self._spec.optim.epochs), newly_skipped(skipped, self._world)
        yield Progress(training.step, training.num_steps, epochs, skipped=new, evaluated={"val_accuracy": measured})
        return False

    def _encode_held_back(self, skipped: SkippedImages) -> Generator[Round, None, Features]:
        return encode_features(
            self._encoder,
            self._data.validation_source,
            self._data.validation,
            pooling=self._spec.pooling,
            normalize=self.normalize,
            world=self._world,
            num_threads=self._spec.resources.cpus_per_worker,
            skipped=skipped,
            max_corrupt_fraction=self._spec.data.max_corrupt_fraction,
        )

    def write_result(self, folder: Path) -> None:
        write_probe([self._head], folder)
