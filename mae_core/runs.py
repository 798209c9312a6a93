"""One run of any kind, from a spec: what `mae_core.train` and the workers drive.

A run yields `Progress`, can hand out and take up its training state, and at its end writes its result into a folder.
"""

import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from mae_core.classifier import Classifier
from mae_core.config import FinetuneSpec, ModelConfig, NormalizeConfig, PretrainSpec, ProbeSpec
from mae_core.data.loader import MicroBatch, SkippedImages, TrainLoader
from mae_core.data.source import ImageSource, LabelledData, open_source, split
from mae_core.data.transforms import normalise
from mae_core.errors import DataError, SpecError
from mae_core.evaluate import accuracy
from mae_core.export import load_encoder, write_classifier, write_encoder, write_probe
from mae_core.loop import Progress, Training, WantsStop, check_skipped, load_training_state, training_state
from mae_core.mae import MaskedAutoencoder
from mae_core.optim import finetune_optimizer, pretrain_optimizer
from mae_core.probe import Probe
from mae_core.randomness import Stream, uniform
from mae_core.reconstruct import reconstruction_grid
from mae_core.vit import Encoder, initialise
from mae_core.world import World

_NUM_SHOWN = 8  # images in a picture of reconstructions
Metrics = dict[str, float | list[float]]


class Run(ABC):
    """A run of one kind. `metrics` are final once `progress` is exhausted."""

    model: ModelConfig
    normalize: NormalizeConfig
    metrics: Metrics

    resumes = False  # whether the kind has a training state; a probe is short enough to start over

    def is_save_due(self, progress: Progress) -> bool:
        """Whether the training state should be saved after this step."""
        return False

    @abstractmethod
    def progress(self, wants_stop: WantsStop) -> Iterator[Progress]:
        """Does the work, yielding as it goes; the same on all workers."""

    def training_state(self) -> dict[str, Tensor]:
        """What resuming needs."""
        raise NotImplementedError

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Goes on from `state`."""
        raise NotImplementedError

    @abstractmethod
    def write_result(self, folder: Path) -> None:
        """Writes what the run is for into an empty folder."""

    def write_reconstructions(self, path: Path) -> bool:
        """Writes a picture of reconstructions as PNG; False where there is none to make."""
        return False


def open_run(spec: PretrainSpec | ProbeSpec | FinetuneSpec, *, world: World, encoder_folder: Path | None) -> Run:
    """The run that `spec` describes. `encoder_folder` holds the encoder that it names, None for random weights.

    Raises DataError, EncoderError or SpecError.
    """
    torch.set_num_threads(spec.resources.cpus_per_worker)
    if isinstance(spec, PretrainSpec):
        return PretrainRun(spec, world=world)
    if isinstance(spec, ProbeSpec):
        return ProbeRun(spec, world=world, encoder_folder=encoder_folder)
    return FinetuneRun(spec, world=world, encoder_folder=encoder_folder)


def _loader(spec: PretrainSpec | FinetuneSpec, source: ImageSource, members: list[int], model: ModelConfig, world: World) -> TrainLoader:
    return TrainLoader(
        source=source,
        members=members,
        model=model,
        transform=spec.data.transform,
        seed=spec.seed,
        batch_size=spec.optim.batch_size,
        accumulation=spec.optim.accumulation,
        world=world,
        num_threads=spec.resources.cpus_per_worker,
        skipped=SkippedImages(),
    )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class _TrainedRun(Run):
    """What pretraining and fine-tuning share: a training with a state."""

    training: Training
    _spec: PretrainSpec | FinetuneSpec

    resumes = True

    def is_save_due(self, progress: Progress) -> bool:
        return progress.step % self._spec.checkpoint.every_steps == 0 and progress.step < progress.num_steps and not progress.evaluated

    def training_state(self) -> dict[str, Tensor]:
        return training_state(self.training)

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        load_training_state(self.training, state)

    def _keep_last(self, progress: Progress) -> None:
        if progress.points:
            self.metrics |= {"loss": progress.points[-1][1]["loss"]}


class PretrainRun(_TrainedRun):
    """Masked-autoencoder pretraining. Its result is the encoder alone."""

    def __init__(self, spec: PretrainSpec, *, world: World) -> None:
        self._spec: PretrainSpec = spec
        self._world = world
        self.model, self.metrics = spec.model, {}
        self.normalize = spec.data.normalize_for(spec.model.in_chans)
        self._source = open_source(spec.data.source, in_chans=spec.model.in_chans)
        members, held_back = split(self._source, spec.data.validation_fraction)
        if not members:
            raise DataError(f"data.validation_fraction {spec.data.validation_fraction:g} leaves no image to train on; lower it")
        choice = held_back or members
        self._shown = choice[:: max(len(choice) // _NUM_SHOWN, 1)][:_NUM_SHOWN]  # spread over the classes
        self._mae = MaskedAutoencoder(Encoder(spec.model), masking=spec.masking, decoder=spec.decoder, target=spec.target)
        initialise(self._mae, _generator(spec.seed))
        self._mae.to(world.device)
        self.training = Training(
            module=self._mae,
            optimizer=pretrain_optimizer(self._mae, spec.optim),
            loader=_loader(spec, self._source, members, spec.model, world),
            optim=spec.optim,
            loss=self._loss,
            world=world,
            max_skipped=spec.data.max_corrupt_fraction,
            save_every=spec.checkpoint.every_steps,
        )

    def _loss(self, replica: nn.Module, micro: MicroBatch) -> Tensor:
        device = self._world.device
        images = normalise(micro.batch.pixels_BHWC.to(device, non_blocking=True), self.normalize)
        samples = micro.batch.samples_B.to(device, non_blocking=True)
        noise = uniform(seed=self._spec.seed, epoch=micro.epoch, stream=Stream.MASK, samples=samples, count=self.model.num_patches)
        loss: Tensor = replica(images, noise).loss
        return loss

    def progress(self, wants_stop: WantsStop) -> Iterator[Progress]:
        for progress in self.training.steps(wants_stop):
            self._keep_last(progress)
            yield progress

    def write_result(self, folder: Path) -> None:
        write_encoder(self._mae.encoder, folder, normalize=self.normalize)

    def write_reconstructions(self, path: Path) -> bool:
        picture = reconstruction_grid(self._mae, self._source, self._shown, normalize=self.normalize, seed=self._spec.seed)
        if picture is not None:
            picture.save(path)
        return picture is not None


class FinetuneRun(_TrainedRun):
    """Fine-tuning with a new head. Its result is the classifier."""

    def __init__(self, spec: FinetuneSpec, *, world: World, encoder_folder: Path | None) -> None:
        self._spec: FinetuneSpec = spec
        self._world = world
        self.metrics = {}
        encoder, self.normalize = starting_encoder(spec, encoder_folder, spec.seed)
        self.model = encoder.model
        self._data = LabelledData(spec.data, in_chans=self.model.in_chans)
        self._unreadable, self._num_unreadable = SkippedImages(), 0  # of the validation images
        self._classifier = Classifier(
            encoder, num_classes=len(self._data.classes), pooling=spec.pooling, generator=_generator(spec.seed)
        ).to(world.device)
        self.training = Training(
            module=self._classifier,
            optimizer=finetune_optimizer(self._classifier, spec.optim),
            loader=_loader(spec, self._data.train_source, self._data.train, self.model, world),
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


def starting_encoder(spec: ProbeSpec | FinetuneSpec, folder: Path | None, seed: int) -> tuple[Encoder, NormalizeConfig]:
    """The encoder a probe or fine-tune starts from, and the normalisation of its images (the encoder's, unless the spec gives one)."""
    if folder is not None:
        encoder, normalize = load_encoder(folder, wanted=spec.model)
        try:
            spec.with_model(encoder.model, where=str(folder))
        except ValidationError as error:
            raise SpecError("; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())) from error
        return encoder, spec.data.normalize or normalize
    assert spec.model is not None, "the spec's own check"
    encoder = Encoder(spec.model)
    initialise(encoder, _generator(seed))
    return encoder, spec.data.normalize_for(spec.model.in_chans)
