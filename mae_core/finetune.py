"""The fine-tuning run."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from mae_core.classifier import Classifier
from mae_core.config import FinetuneSpec
from mae_core.data.loader import MicroBatch, SkippedImages
from mae_core.data.source import LabelledData
from mae_core.data.transforms import normalise
from mae_core.evaluate import accuracy
from mae_core.export import write_classifier
from mae_core.loop import Progress, Training, WantsStop, check_skipped
from mae_core.optim import finetune_optimizer
from mae_core.run import TrainedRun, seeded, starting_encoder, training_loader
from mae_core.world import World


class FinetuneRun(TrainedRun):
    """Fine-tuning with a new head. Its result is the classifier."""

    def __init__(self, spec: FinetuneSpec, *, world: World, encoder_folder: Path | None) -> None:
        self._spec: FinetuneSpec = spec
        self._world = world
        self.metrics = {}
        encoder, self.normalize = starting_encoder(spec, encoder_folder, spec.seed)
        self.model = encoder.model
        self._data = LabelledData(spec.data, in_chans=self.model.in_chans)
        self._unreadable, self._num_unreadable = SkippedImages(), 0  # of the validation images
        self._classifier = Classifier(encoder, num_classes=len(self._data.classes), pooling=spec.pooling, generator=seeded(spec.seed)).to(
            world.device
        )
        self.training = Training(
            module=self._classifier,
            optimizer=finetune_optimizer(self._classifier, spec.optim),
            loader=training_loader(spec, self._data.train_source, self._data.train, self.model, world),
            optim=spec.optim,
            loss=self._loss,
            world=world,
            max_skipped=spec.data.max_corrupt_fraction,
            save_every=spec.checkpoint.every_steps,
        )

    def _loss(self, replica: nn.Module, micro: MicroBatch) -> Tensor:
        device = self._world.device
        images = normalise(micro.batch.pixels_BHWC.to(device, non_blocking=True), self.normalize)
        labels = micro.batch.labels_B.to(device, non_blocking=True)
        return F.cross_entropy(replica(images), labels, label_smoothing=self._spec.optim.label_smoothing)

    def progress(self, wants_stop: WantsStop) -> Iterator[Progress]:
        every = (self._spec.evaluate_every_epochs or self._spec.optim.epochs) * self.training.loader.steps_per_epoch
        for progress in self.training.steps(wants_stop):
            self._keep_last(progress)
            yield progress
            if progress.stop_agreed:
                return
            if progress.step % every == 0 or progress.step == progress.num_steps:
                yield self._evaluate(progress.epoch)
                self._classifier.train()
        if "val_accuracy" not in self.metrics:  # resumed from the state saved at the very last step
            yield self._evaluate(float(self._spec.optim.epochs))

    def _evaluate(self, epoch: float) -> Progress:
        """Raises DataError when too many validation images are unreadable, on all workers."""
        self._classifier.eval()
        evaluated = accuracy(
            self._classifier,
            self._data,
            normalize=self.normalize,
            world=self._world,
            num_threads=self._spec.resources.cpus_per_worker,
            skipped=self._unreadable,
        )
        new = {key: why for worker in self._world.gather(self._unreadable.take_new()) for key, why in worker.items()}
        self._num_unreadable += len(new)
        check_skipped(
            self._num_unreadable,
            of=len(self._data.validation),
            max_fraction=self._spec.data.max_corrupt_fraction,
            example=next(iter(new.values()), ""),
        )
        self.metrics |= evaluated
        return Progress(self.training.step, self.training.num_steps, epoch, skipped=new, evaluated=evaluated)

    def write_result(self, folder: Path) -> None:
        write_classifier(self._classifier, folder, classes=list(self._data.classes), normalize=self.normalize)
