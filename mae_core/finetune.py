"""The fine-tuning run."""

from collections.abc import Generator
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from mae_core.classifier import Classifier
from mae_core.config import FinetuneSpec
from mae_core.data.loader import MicroBatch
from mae_core.data.remote import Remote
from mae_core.data.skipped import SkippedImages
from mae_core.data.source import LabelledData, check_same_images, check_units
from mae_core.data.transforms import normalise
from mae_core.evaluate import accuracy
from mae_core.export import write_classifier
from mae_core.exports.formats import Outcomes
from mae_core.exports.trained import Trained, sample_of
from mae_core.exports.write import write_exports
from mae_core.loop import Progress, Training, WantsStop, check_skipped
from mae_core.mixing import erase, mix_batch, mix_plan
from mae_core.optim import finetune_optimizer
from mae_core.parallel import load_whole, shard
from mae_core.provenance import Provenance
from mae_core.randomness import Stream, uniform
from mae_core.rounds import newly_skipped, told_in_rounds
from mae_core.run import TrainedRun, seeded, starting_encoder, training_loader
from mae_core.vit import Encoder, drop_path_scale
from mae_core.world import World


class FinetuneRun(TrainedRun):
    """Fine-tuning with a new head. Its result is the classifier."""

    def __init__(self, spec: FinetuneSpec, *, world: World, encoder_folder: Path | None, remote: Remote | None = None) -> None:
        self._spec: FinetuneSpec = spec
        self._world = world
        self.metrics = {}
        encoder, normalize = starting_encoder(spec, encoder_folder, spec.seed)
        encoder.activation_checkpointing = spec.parallel.activation_checkpointing
        self.model = encoder.model
        self._data = LabelledData(spec.data, in_chans=self.model.in_chans, remote=remote)
        check_same_images(self._data.sources, world)
        if encoder_folder is None:
            check_units(self._data.train_source, spec.data)
        self.normalize, self._is_measured = normalize, spec.data.normalize != "auto"
        self._unreadable, self._num_unreadable = SkippedImages(), 0  # of the validation images
        self._whole = self._classifier = self._new_classifier(encoder).to(world.device)
        if spec.trainable_blocks is not None:
            self._classifier.train_last(spec.trainable_blocks)
        if spec.parallel.strategy == "fsdp":
            shard(self._classifier, world)
        self.training = Training(
            module=self._classifier,
            optimizer=finetune_optimizer(self._classifier, spec.optim),
            loader=training_loader(spec, self._data.train_source, self._data.train, self.model, world),
            optim=spec.optim,
            loss=self._loss,
            world=world,
            max_skipped=spec.data.max_corrupt_fraction,
            max_dropped=spec.optim.max_dropped_steps,
            save_every=spec.checkpoint.every_steps,
        )
        self._evaluate_every = (spec.evaluate_every_epochs or spec.optim.epochs) * self.training.loader.steps_per_epoch

    def _new_classifier(self, encoder: Encoder) -> Classifier:
        num_classes = len(self._data.classes)
        return Classifier(encoder, num_classes=num_classes, pooling=self._spec.pooling, generator=seeded(self._spec.seed))

    def _loss(self, replica: nn.Module, micro: MicroBatch) -> Tensor:
        """Cross-entropy of images that are erased and mixed, under stochastic depth (paper, Table 9)."""
        device, spec, drawn = self._world.device, self._spec, {"seed": self._spec.seed, "epoch": micro.epoch}
        images = normalise(micro.batch.pixels_BHWC.to(device, non_blocking=True), self.normalize)
        images = erase(images, micro.batch.samples_B, **drawn, probability=spec.data.transform.erase_probability)
        labels = micro.batch.labels_B.to(device, non_blocking=True)
        smoothing = spec.optim.label_smoothing
        scale = None
        if spec.optim.drop_path:
            samples = micro.batch.samples_B.to(device, non_blocking=True)
            numbers = uniform(**drawn, stream=Stream.DROP_PATH, samples=samples, count=2 * self.model.depth)
            scale = drop_path_scale(numbers, spec.optim.drop_path)
        if not spec.mix.is_on:
            return F.cross_entropy(replica(images, scale), labels, label_smoothing=smoothing)
        plan = mix_plan(micro.batch.samples_B, **drawn, mix=spec.mix, size=self.model.image_size)
        images, targets = mix_batch(images, labels, plan, num_classes=len(self._data.classes), smoothing=smoothing)
        return F.cross_entropy(replica(images, scale), targets)

    def _evaluate(self, wants_stop: WantsStop) -> Generator[Progress, None, bool]:
        """Raises DataError when too many validation images are unreadable, on all workers."""
        training = self.training
        measuring = accuracy(
            self._classifier,
            self._data,
            normalize=self.normalize,
            world=self._world,
            num_threads=self._spec.resources.cpus_per_worker,
            skipped=self._unreadable,
        )
        evaluated = yield from told_in_rounds(measuring, training, wants_stop)
        if evaluated is None:
            return True
        self._classifier.train()
        new = newly_skipped(self._unreadable, self._world)
        self._num_unreadable += len(new)
        check_skipped(
            self._num_unreadable,
            of=len(self._data.validation),
            max_fraction=self._spec.data.max_corrupt_fraction,
            example=next(iter(new.values()), ""),
        )
        self.metrics |= evaluated
        epoch = training.step / training.loader.steps_per_epoch
        yield Progress(training.step, training.num_steps, epoch, skipped=new, evaluated=evaluated)
        return False

    def _finish(self) -> None:
        if self._spec.parallel.strategy == "fsdp":
            self._whole = self._new_classifier(Encoder(self.model))
            load_whole(self._whole, self._classifier)

    def write_result(self, folder: Path) -> None:
        write_classifier(self._whole, folder, classes=list(self._data.classes), normalize=self.normalize)

    def write_exports(self, folder: Path, made_by: Provenance) -> Outcomes:
        data = self._data
        trained = Trained(
            spec=self._spec,
            module=self._whole,
            mae=None,
            classes=list(data.classes),
            normalize=self.normalize,
            sample=sample_of(data.validation_source, data.validation, model=self.model, normalize=self.normalize),
            num_images=len(data.train),
            metrics=self.metrics,
        )
        return write_exports(trained, folder, made_by=made_by)
